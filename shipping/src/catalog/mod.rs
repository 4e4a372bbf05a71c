//! The catalog in the bucket: numbered create-only objects, of which the last is in force.
//!
//! **Invariant:** a version, once written, is never changed or removed, and numbers have no gaps (a
//! version is only ever written after the version before it was seen). So "does number n exist?" is
//! monotonic, and the tip is found by galloping upward from any version known to exist.
//!
//! `store` reads and writes versions, on which `cluster` (the claim of the prefix), `names`,
//! `keyspaces` and `settings` are built. `succession` writes a version behind one that a newer program
//! may have written. The master decides what a version contains; the nodes apply it, and undo a seal
//! that no master decides.

mod cluster;
mod error;
mod keyspaces;
mod names;
mod settings;
mod store;
mod succession;

pub use error::CatalogError;
pub use settings::{ClusterSettings, Rebalance};
pub use store::{CatalogStore, CatalogWrite, decode_catalog, encode_catalog};
pub use succession::StoredCatalog;
