//! What the master answers to administrative calls: documents with the fields that `vasto --output json` prints.
//!
//! **Invariant:** a document of another version of the master can be read as long as the types of its fields are the
//! same: unknown fields are passed over, missing ones get the default of their type. A figure that no node has
//! reported is `None`.

mod bucket;
mod cluster;
mod keyspace;
mod operation;

use std::ops::Deref;

use serde::de::DeserializeOwned;

pub use bucket::{BucketCheck, BucketRepair, GarbageCollection, Orphan};
pub use cluster::{Bill, BillPerMonth, ClusterStatus, MasterStatus, NodeStatus};
pub use keyspace::{
    CommandedNodes, DeletedKeyspace, EvictedReplica, KeyspaceDescription, KeyspaceSummary, Quarantine, ReplicaStatus,
    ShardPlacement,
};
pub use operation::{
    AbsentNode, Operation, OperationState, ReachedLog, ResizePlan, ResizeSource, ShardsOrNode, WritePauseMs,
};

use crate::error::{Error, ErrorKind};

/// An answer of the master: a document, which it dereferences to, and the JSON text that the master sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer<T> {
    document: T,
    json: String,
}

impl<T> Answer<T> {
    /// Returns the document as the master sent it, with the fields that this version does not know.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Returns the document alone.
    pub fn into_document(self) -> T {
        self.document
    }
}

impl<T> Deref for Answer<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.document
    }
}

impl<T: DeserializeOwned> Answer<T> {
    /// Reads the answer to a call. A call that `changes` something was carried out, so that an answer to it that
    /// cannot be read is [`ErrorKind::Unknown`].
    pub(crate) fn read(json: String, changes: bool) -> Result<Self, Error> {
        match serde_json::from_str(&json) {
            Ok(document) => Ok(Self { document, json }),
            Err(error) => {
                let kind = if changes { ErrorKind::Unknown } else { ErrorKind::Internal };
                let message =
                    format!("the master's answer cannot be read ({error}); is it of the same version as this program?");
                Err(Error::new(kind, message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_answer_keeps_its_text_and_passes_over_what_is_new() {
        let json = r#"{"objects": 3, "orphans": [{"key": "a", "colour": "red"}], "later": {}}"#;
        let answer = Answer::<BucketCheck>::read(json.to_owned(), false).unwrap();
        assert_eq!((answer.objects, answer.bytes, answer.orphans[0].key.as_str()), (3, 0, "a"));
        assert_eq!(answer.json(), json);
    }

    #[test]
    fn a_change_with_an_answer_that_cannot_be_read_may_have_been_made() {
        for (changes, kind) in [(true, ErrorKind::Unknown), (false, ErrorKind::Internal)] {
            for json in ["", "[", r#"{"objects": "many"}"#] {
                assert_eq!(Answer::<BucketCheck>::read(json.to_owned(), changes).unwrap_err().kind(), kind);
            }
        }
    }
}
