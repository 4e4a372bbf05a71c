//! The pure core of Vasto: identities, placement, codecs, the merge rule, topology and plans.
//!
//! **Invariant:** nothing in this crate performs IO, reads a clock or draws a random number; `now`
//! and seeds are arguments. Everything here can be tested in milliseconds, and every format that
//! is persisted or shipped is fixed by golden vectors in `testdata/v1`.

#![warn(missing_docs)]

pub mod address;
pub mod band;
pub mod clock;
pub mod control;
pub mod error;
pub mod format;
pub mod hash;
pub mod ids;
pub mod lease;
pub mod limits;
pub mod topology;

pub use band::Band;
pub use control::{balance, catalog, estimate, operation, plan, reconcile, report, stored};
pub use error::{ErrorCode, VastoError};
pub use format::{codec, entry, merge, record, stored_key};
pub use ids::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, NodeId, Origin, OwnSeq, PlanId, ReplicaId,
    ShardId,
};
