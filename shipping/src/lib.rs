//! Object storage: the bucket, the formats of its objects, and the catalog's create-only register.
//!
//! **Invariant:** an object is written once and its name never reused; a writer that finds a name
//! taken reads back and compares instead of assuming. Every decision in the bucket is made by
//! create-if-absent on a numbered name.
//!
//! This crate knows neither RocksDB nor gRPC: other crates decide which files a checkpoint holds
//! and how a node applies a catalog version.

#![warn(missing_docs)]

pub mod archive;
pub mod bucket;
pub mod catalog;
pub mod chunk;
mod clock;
pub mod cost;
pub mod due;
pub mod envelope;
pub mod export;
pub mod gc;
pub mod layout;
pub mod manifest;
pub mod metrics;
pub mod weight;

pub use bucket::download::{self, DownloadError, DownloadProgress, Wanted, download};
pub use bucket::{
    Bucket, BucketError, BucketOptions, Create, Listing, ObjectInfo, Pacer, RequestCounts,
    RetryBudget, Uploaded, Usage,
};
pub use catalog::{
    CatalogError, CatalogStore, CatalogWrite, ClusterSettings, Rebalance, StoredCatalog,
};
pub use chunk::{Chunk, ChunkError};
pub use cost::Prices;
pub use envelope::EnvelopeError;
pub use export::{ExportManifest, ExportedTable};
pub use manifest::{DatabaseFile, Manifest, ManifestFile};
pub use weight::Weight;
