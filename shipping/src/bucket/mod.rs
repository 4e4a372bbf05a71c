//! The bucket: the only access to object storage.
//!
//! **Invariant:** no operation overwrites an object. [`Bucket::create`] returns `Created` only when
//! the bytes under the key are the caller's own, also when the reply to an earlier attempt was
//! lost.
//!
//! From the bottom up: the data (`options`, `object`, `counts`, `error`), what a failure means
//! (`failure`), how often a request is repeated (`retry`) and when none is sent (`breaker`), what
//! holds bulk bytes back (`pacer`), the open bucket and its single attempts (`handle`, `attempt`), the operations (`read`, `create`,
//! `delete`, `listing`, `probe`, `upload`, [`mod@download`]), and `open`, which turns a URL into a
//! bucket.

mod attempt;
mod breaker;
mod copied;
mod counts;
mod create;
mod delete;
mod directory;
mod disk;
pub mod download;
mod error;
mod failure;
mod handle;
mod listing;
mod object;
mod open;
mod options;
mod pacer;
mod page;
mod probe;
mod read;
mod retry;
mod strangers;
mod upload;
mod wire;

pub use counts::{RequestCounts, Usage};
pub use error::BucketError;
pub use handle::Bucket;
pub use object::{Create, GET_BYTES_MAX, Listing, ObjectInfo, Uploaded};
pub use options::BucketOptions;
pub use pacer::Pacer;
pub use retry::RetryBudget;

pub(crate) use directory::staged_for;
