//! Object storage: the bucket, the formats of its objects, and the catalog's create-only register.
//!
//! **Invariant:** an object is written once and its name never reused; a writer that finds a name taken
//! reads back and compares instead of assuming. Every decision in the bucket is made
//! by create-if-absent on a numbered name.
//!
//! This crate knows neither RocksDB nor gRPC: other crates decide which files a checkpoint holds and
//! how a node applies a catalog version.

#![warn(missing_docs)]

pub mod archive;
mod breaker;
pub mod bucket;
pub mod catalog_store;
pub mod chunk;
mod cluster_settings;
pub mod cost;
mod counts;
pub mod download;
pub mod due;
pub mod envelope;
pub mod error;
mod failure;
mod fsck;
pub mod garbage;
pub mod layout;
mod listing;
pub mod manifest;
pub mod metrics;
mod open;
mod retry;
mod survey;
mod upload;
mod wire;

pub use bucket::{Bucket, BucketError, BucketOptions, Create, ObjectInfo, RequestCounts, Uploaded};
pub use catalog_store::{CatalogError, CatalogStore, CatalogWrite};
pub use chunk::{Chunk, ChunkError};
pub use cluster_settings::ClusterSettings;
pub use cost::{Prices, Usage};
pub use download::{DownloadError, DownloadProgress, Wanted, download};
pub use envelope::EnvelopeError;
pub use listing::Listing;
pub use manifest::{DatabaseFile, Manifest, ManifestFile};
pub use retry::RetryBudget;
