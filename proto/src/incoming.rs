//! The connections that a server accepts.
//!
//! **Invariants**
//! - A server has a bounded number of connections, whatever its peers do; one more is closed at
//!   once, and the accept loop never ends because of an error: exhausted descriptors become free
//!   again.
//! - A peer that connects and sends nothing is closed: it is no client.
//!
//! The task that serves a connection can end it through its [`Hangup`], even while the peer reads
//! nothing.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_stream::Stream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;
use vasto_core::limits::{ACCEPT_PAUSE, FIRST_BYTE_TIMEOUT};

/// Accepted connections, for `serve_with_incoming`.
pub struct Incoming {
    listener: TcpListener,
    room: Arc<Semaphore>,
    /// Timeout for the first byte of a peer.
    patience: Duration,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    /// Accepts at most `most` connections of the listener at a time.
    pub fn new(listener: TcpListener, most: usize) -> Self {
        Self {
            listener,
            room: Arc::new(Semaphore::new(most)),
            patience: FIRST_BYTE_TIMEOUT,
            pause: None,
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match ready!(self.listener.poll_accept(cx)) {
                Ok((stream, peer)) => match self.room.clone().try_acquire_owned() {
                    Ok(permit) => {
                        return Poll::Ready(Some(Ok(Connection::new(
                            stream,
                            permit,
                            self.patience,
                        ))));
                    }
                    // Dropping the stream closes it: the client sees that at once and may go
                    // elsewhere.
                    Err(_) => tracing::debug!(%peer, "there is no room for another connection"),
                },
                Err(error) => {
                    tracing::debug!(%error, "a connection could not be accepted");
                    // An exhausted resource is not free again at once; an aborted connection costs
                    // a pause, too.
                    self.pause = Some(Box::pin(tokio::time::sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

/// Handle that ends a connection; a request carries that of its own connection among its
/// extensions.
#[derive(Debug, Clone, Default)]
pub struct Hangup(CancellationToken);

impl Hangup {
    /// Ends the connection, with everything that waits to be sent.
    pub fn hang_up(&self) {
        self.0.cancel();
    }

    /// Returns whether the connection was ended.
    pub fn is_hung_up(&self) -> bool {
        self.0.is_cancelled()
    }
}

/// One accepted connection, which gives its place back when it ends.
pub struct Connection {
    stream: TcpStream,
    /// Timer until the first byte has come.
    silence: Option<Pin<Box<Sleep>>>,
    hangup: Hangup,
    hung_up: Pin<Box<WaitForCancellationFutureOwned>>,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    fn new(stream: TcpStream, permit: OwnedSemaphorePermit, patience: Duration) -> Self {
        // Without TCP_NODELAY small frames wait for each other; a connection that is already gone
        // fails at its first use.
        let _ = stream.set_nodelay(true);
        let hangup = Hangup::default();
        let hung_up = Box::pin(hangup.0.clone().cancelled_owned());
        Self {
            stream,
            silence: Some(Box::pin(tokio::time::sleep(patience))),
            hangup,
            hung_up,
            _permit: permit,
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Hangup;

    fn connect_info(&self) -> Hangup {
        self.hangup.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A server always waits for the next byte, so cancellation wakes it here.
        if self.hung_up.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if read.is_ready() {
            self.silence = None;
        } else if let Some(silence) = &mut self.silence
            && silence.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::SocketAddr;

    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_stream::StreamExt;

    async fn incoming(most: usize) -> (Incoming, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (Incoming::new(listener, most), address)
    }

    #[tokio::test]
    async fn one_connection_too_many_is_closed_and_a_place_comes_back() {
        let (mut incoming, address) = incoming(2).await;
        let _first = TcpStream::connect(address).await.unwrap();
        let _second = TcpStream::connect(address).await.unwrap();
        let taken =
            [incoming.next().await.unwrap().unwrap(), incoming.next().await.unwrap().unwrap()];
        let mut refused = TcpStream::connect(address).await.unwrap();
        let mut byte = [0];
        tokio::select! {
            _ = incoming.next() => panic!("there is no room"),
            read = refused.read(&mut byte) => assert!(matches!(read, Ok(0) | Err(_)), "closed"),
        }
        drop(taken);
        let _third = TcpStream::connect(address).await.unwrap();
        incoming.next().await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_peer_that_says_nothing_is_closed_and_one_that_has_spoken_is_not() {
        let (mut incoming, address) = incoming(2).await;
        incoming.patience = Duration::from_millis(200);
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut connection = incoming.next().await.unwrap().unwrap();
        let mut byte = [0];
        let error = connection.read(&mut byte).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(connection);
        assert!(matches!(silent.read(&mut byte).await, Ok(0) | Err(_)));

        let mut speaking = TcpStream::connect(address).await.unwrap();
        let mut connection = incoming.next().await.unwrap().unwrap();
        speaking.write_all(b"a").await.unwrap();
        assert_eq!(connection.read(&mut byte).await.unwrap(), 1);
        let quiet =
            tokio::time::timeout(Duration::from_millis(500), connection.read(&mut byte)).await;
        assert!(quiet.is_err(), "it may be idle");
        let hangup = connection.connect_info();
        let (read, ()) = tokio::join!(connection.read(&mut byte), async { hangup.hang_up() });
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }
}
