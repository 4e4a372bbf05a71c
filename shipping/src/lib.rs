//! Object storage: the bucket, the formats of what lies in it, and the catalog's create-only register.
//!
//! **Invariant:** an object is written once and its name never reused; whoever finds a name taken
//! reads back and compares instead of assuming. Everything that is decided in the bucket is decided
//! by create-if-absent on a numbered name.
//!
//! This crate knows neither RocksDB nor gRPC: which files a checkpoint holds and what a node does
//! with a catalog version is decided elsewhere.

#![warn(missing_docs)]

pub mod bill;
mod breaker;
pub mod bucket;
pub mod catalog_store;
pub mod chunk;
mod cluster_settings;
mod counts;
pub mod download;
pub mod due;
pub mod envelope;
pub mod error;
mod failure;
mod fsck;
pub mod garbage;
pub mod history;
pub mod layout;
mod listing;
pub mod manifest;
pub mod metrics;
mod open;
mod retry;
mod survey;
mod upload;
mod wire;

pub use bill::{Prices, Usage};
pub use bucket::{Bucket, BucketError, BucketOptions, Create, ObjectInfo, RequestCounts, Uploaded};
pub use catalog_store::{CatalogError, CatalogStore, CatalogWrite};
pub use chunk::{Chunk, ChunkError};
pub use cluster_settings::ClusterSettings;
pub use download::{DownloadError, DownloadProgress, Wanted, download};
pub use envelope::EnvelopeError;
pub use listing::Listing;
pub use manifest::{DatabaseFile, Manifest, ManifestFile};
pub use retry::RetryBudget;
