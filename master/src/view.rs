//! The JSON documents for scripts, exactly as the interface promises them.
//!
//! **Invariant:** every document is a struct of this module or of a crate below: a pure view of the
//! state, built without a request. Fields are added, never renamed or removed. A figure that no
//! node has reported is `null`, never made up.

pub(crate) mod cost;
pub(crate) mod drain;
pub(crate) mod estimate;
pub(crate) mod keyspace;
pub(crate) mod node;
pub(crate) mod operation;
pub(crate) mod outcome;
pub(crate) mod plan;
pub(crate) mod rebalance;
pub(crate) mod status;
#[cfg(test)]
mod tests;
mod whole;

use serde::{Serialize, Serializer};

/// Serializes a document.
pub(crate) fn json(document: &impl Serialize) -> String {
    serde_json::to_string(document).expect("documents have only string keys")
}

/// A document that shows its keys in alphabetical order.
pub(crate) struct Sorted<T>(pub(crate) T);

impl<T: Serialize> Serialize for Sorted<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::to_value(&self.0).map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}
