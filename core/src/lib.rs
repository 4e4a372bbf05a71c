//! The pure heart of Vasto: identities, placement, codecs, the merge rule, topology and plans.
//!
//! **Invariant:** nothing in this crate performs IO, reads a clock or draws a random number; `now`
//! and seeds are arguments. Everything here can be tested in milliseconds, and every format that
//! is persisted or shipped is fixed by golden vectors in `testdata/v1`.

#![warn(missing_docs)]

pub mod address;
pub mod band;
pub mod catalog;
pub mod clock;
pub mod codec;
pub mod entry;
pub mod error;
pub mod hash;
pub mod ids;
pub mod lease;
pub mod limits;
pub mod members;
pub mod merge;
pub mod plan;
pub mod primaries;
pub mod record;
pub mod stored_key;
pub mod topology;

pub use band::Band;
pub use error::{ErrorCode, VastoError};
pub use ids::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, NodeId, Origin, OwnSeq, PlanId, ReplicaId, ShardId,
};
