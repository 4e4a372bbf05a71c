//! The Rust client of Vasto.
//!
//! ```no_run
//! # async fn example() -> Result<(), vasto_client::Error> {
//! use std::time::Duration;
//! use vasto_client::{Key, KeyspaceSpec, Vasto};
//!
//! let vasto = Vasto::connect("http://127.0.0.1:8278").await?;
//! vasto.create_keyspace("ks1", KeyspaceSpec::default().shards(3)).await?;
//! let ks = vasto.keyspace("ks1").await?;
//! ks.put("k", "v").await?;
//! ks.put(Key::new("user:1:name").partition("user:1"), "Ada").ttl(Duration::from_secs(60)).await?;
//! let value = ks.get("k").await?;
//! # Ok(())
//! # }
//! ```
//!
//! A [`Keyspace`] handle knows which node holds which key and follows every change by itself;
//! concurrent operations to a node share frames on one long-lived stream, so many tasks that each
//! await single puts are as fast as batches. When nodes cannot keep up, callers wait: nothing is
//! buffered without bound.
//!
//! **Invariant:** an operation ends with its result, with an error that promises that nothing was
//! changed, or with [`ErrorKind::Unknown`]; within its deadline.

#![deny(missing_docs)]

mod admin;
pub mod answer;
mod attempt;
mod batch;
mod client;
mod connection;
mod error;
mod execute;
mod key;
mod keyspace;
mod master;
mod node;
mod request;
mod retry;
mod route;
mod spec;
mod transport;
mod tuning;
mod value;
mod watch;

pub use admin::{EmptyOptions, RestoreOptions};
pub use answer::{Answer, Operation, OperationState};
pub use batch::{Batch, WriteOptions};
pub use bytes::Bytes;
pub use client::Vasto;
pub use error::{Error, ErrorKind};
pub use key::{IntoBytes, Key};
pub use keyspace::Keyspace;
pub use request::{Delete, Modify, Put, Rows, Scan, WriteBatch};
pub use route::{ReadFrom, WriteTo};
pub use spec::KeyspaceSpec;
pub use value::{Outcome, Payload, Row, Value};
pub use vasto_core::catalog::Ack;
