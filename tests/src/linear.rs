//! Histories of single keys, and the check whether some order of their operations explains them:
//! linearizability, checked by `porcupine-rs`, one key at a time.
//!
//! The model:
//! - A key is absent, or holds a value and the event time of the write that put it there. A read
//!   must see the result of the last write before it, event time included; event times grow from
//!   write to write.
//! - An operation of unknown outcome took effect at some point in time after its call, or never.
//! - The client repeats puts and deletes whose reply was lost or late; an operation that took as
//!   long as a repetition takes may have taken effect once more, at any point in time after its
//!   call. An effect that a read saw with another event time than the acknowledged one is such an
//!   effect.
//! - While a node is away a read may see a write that is not acknowledged yet, is lost with the
//!   node and ends as unknown. Such reads are ignored ([`Judge::dirty`]).
//!
//! **Invariant:** a refused operation ("nothing was changed") is not part of a history: if it did
//! take effect, a read sees a value that no operation wrote.

mod entry;
mod judge;
mod model;
mod workload;

pub use judge::{Judge, Judgement};
pub use workload::Workload;
