//! Writes that take options before they are awaited.
//!
//! **Invariant:** nothing is checked or sent before the `await`; all checks are made before
//! anything is sent.

use std::future::IntoFuture;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use vasto_core::catalog::Ack;

use crate::batch::{Batch, Write};
use crate::error::Error;
use crate::keyspace::Keyspace;
use crate::modify::Condition;
use crate::value::Outcome;

/// A put that is sent when it is awaited; see [`Keyspace::put`].
#[must_use = "a put does nothing until it is awaited"]
pub struct Put<'a> {
    pub(crate) keyspace: &'a Keyspace,
    pub(crate) write: Write,
    pub(crate) ack: Option<Ack>,
    pub(crate) condition: Option<Condition>,
}

impl Put<'_> {
    /// Sets the time to live, at least 1 ms. The keyspace's default if not given.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.write.options = self.write.options.ttl(ttl);
        self
    }

    /// Sets the event time in microseconds since 1970, not 0 and at most a minute ahead of the clock.
    /// The later event time wins; repeating a put with its own event time has no effect.
    pub fn event_time(mut self, micros: u64) -> Self {
        self.write.options = self.write.options.event_time(micros);
        self
    }

    /// Asks for a stronger acknowledgement than the keyspace's.
    pub fn ack(mut self, ack: Ack) -> Self {
        self.ack = Some(ack);
        self
    }
}

impl<'a> IntoFuture for Put<'a> {
    type Output = Result<Outcome, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            match self.condition {
                None => self.keyspace.write_one(self.write, self.ack).await,
                Some(condition) => self.keyspace.write_if(self.write, condition, self.ack).await,
            }
        }
        .boxed()
    }
}

/// A delete that is sent when it is awaited; see [`Keyspace::delete`].
#[must_use = "a delete does nothing until it is awaited"]
pub struct Delete<'a> {
    pub(crate) keyspace: &'a Keyspace,
    pub(crate) write: Write,
    pub(crate) ack: Option<Ack>,
    pub(crate) condition: Option<Condition>,
}

impl Delete<'_> {
    /// Sets the event time; as [`Put::event_time`].
    pub fn event_time(mut self, micros: u64) -> Self {
        self.write.options = self.write.options.event_time(micros);
        self
    }

    /// Asks for a stronger acknowledgement than the keyspace's.
    pub fn ack(mut self, ack: Ack) -> Self {
        self.ack = Some(ack);
        self
    }
}

impl<'a> IntoFuture for Delete<'a> {
    type Output = Result<Outcome, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            match self.condition {
                None => self.keyspace.write_one(self.write, self.ack).await,
                Some(condition) => self.keyspace.write_if(self.write, condition, self.ack).await,
            }
        }
        .boxed()
    }
}

/// A batch that is sent when it is awaited; see [`Keyspace::write`].
#[must_use = "a batch does nothing until it is awaited"]
pub struct WriteBatch<'a> {
    pub(crate) keyspace: &'a Keyspace,
    pub(crate) batch: Batch,
    pub(crate) ack: Option<Ack>,
}

impl WriteBatch<'_> {
    /// Asks for a stronger acknowledgement than the keyspace's.
    pub fn ack(mut self, ack: Ack) -> Self {
        self.ack = Some(ack);
        self
    }
}

impl<'a> IntoFuture for WriteBatch<'a> {
    type Output = Result<Vec<Outcome>, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move { self.keyspace.write_batch(self.batch, self.ack).await }.boxed()
    }
}
