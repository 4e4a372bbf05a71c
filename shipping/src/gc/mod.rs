//! Garbage collection and the check of the bucket.
//!
//! `survey` reads what is in the bucket, `coverage` finds the archives that no log needs any more,
//! `exports` knows what running plans have exported, `retention` decides which objects are needed, `collect` deletes the others under a `term`, and
//! `fsck` reports objects that are missing, damaged or needed by nothing.

mod clocks;
mod collect;
mod coverage;
mod exports;
mod fsck;
mod retention;
mod survey;
mod term;

pub use collect::{Collected, collect, collect_at};
pub use fsck::{Fsck, Known, KnownReplica, Orphan, check, fsck};
pub use retention::Retention;
pub use term::interrupt;
