//! An address in front of several servers, of which it leads to one at a time.
//!
//! **Invariant:** once it leads to another server, no connection to the one before passes anything
//! any more.

use std::net::SocketAddr;

use anyhow::Result;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// The address.
#[derive(Debug)]
pub struct Front {
    address: SocketAddr,
    port: watch::Sender<Option<u16>>,
    task: JoinHandle<()>,
}

impl Front {
    /// Listens on loopback; connections end at once while it leads nowhere.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (port, leads) = watch::channel(None);
        let task = tokio::spawn(async move {
            // Dropping the set ends the connections.
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                connections.spawn(pass(client, leads.clone()));
            }
        });
        Ok(Self { address, port, task })
    }

    /// Returns the address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leads to this port on loopback from now on, and ends all connections.
    pub fn lead_to(&self, port: u16) {
        self.port.send_replace(Some(port));
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(mut client: TcpStream, mut leads: watch::Receiver<Option<u16>>) {
    let Some(port) = *leads.borrow_and_update() else { return };
    let passing = async {
        let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
        // Each end handles a broken connection.
        let _ = copy_bidirectional(&mut client, &mut server).await;
    };
    tokio::select! {
        () = passing => {}
        _ = leads.changed() => {}
    }
}
