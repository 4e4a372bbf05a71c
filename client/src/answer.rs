//! Answers of the master to administrative calls: documents with the fields that
//! `vasto --output json` prints.
//!
//! **Invariant:** a document of another version of the master can be read as long as the types of
//! its fields are the same: unknown fields are passed over, missing ones get the default of their
//! type (only the id and the state of an operation must be there), and a name that only another
//! version has, of a state for instance, is kept as text. A figure that no node has reported is
//! `None`.

mod bucket;
mod cluster;
mod keyspace;
mod operation;

use std::ops::Deref;

use serde::de::DeserializeOwned;

pub use bucket::{BucketCheck, BucketRepair, GarbageCollection, Orphan};
pub use cluster::{
    Bill, BillPerMonth, ClusterCheck, ClusterStatus, Finding, MasterStatus, NodeStatus,
};
pub use keyspace::{
    CommandedNodes, DeletedKeyspace, EvictedReplica, KeyspaceDescription, KeyspaceSummary,
    Quarantine, QuarantinesLeft, ReplicaStatus, RetiredReplica, ShardPlacement,
};
pub use operation::{
    AbsentNode, ChangeCost, ChangePlan, ChangeRequests, ChangeSource, NodeDisk, Operation,
    OperationEstimate, OperationSource, OperationState, OperationTarget, OperationTrouble,
    PlannedMove, ReachedLog, RebalancePlan, RebalanceSource, ShardsOrNode, WritePauseMs,
};

use crate::error::{Error, ErrorKind};

/// An answer of the master: a document, which it dereferences to, and the JSON text that the master
/// sent.
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
    /// Reads the answer to a call. A call that `changes` something was carried out, so that an
    /// answer to it that cannot be read is [`ErrorKind::Unknown`].
    pub(crate) fn read(json: String, changes: bool) -> Result<Self, Error> {
        match serde_json::from_str(&json) {
            Ok(document) => Ok(Self { document, json }),
            Err(error) => {
                let kind = if changes { ErrorKind::Unknown } else { ErrorKind::Internal };
                let message = format!(
                    "the master's answer cannot be read ({error}); is it of the same version as this program?"
                );
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

    /// Every document of the master, as its own tests pin them.
    const PINNED: &str = include_str!("../../master/testdata/v1/documents.txt");

    fn pinned<T: DeserializeOwned>(name: &str) -> T {
        let mut lines = PINNED.lines();
        assert!(lines.any(|line| line.strip_prefix("# ") == Some(name)), "no document of {name}");
        // `N` stands for a number that depends on the clock.
        let document = lines.next().unwrap().replace(":N,", ":0,").replace(":N}", ":0}");
        Answer::<T>::read(document, false).unwrap().into_document()
    }

    #[test]
    fn every_document_of_the_master_is_read() {
        let orders: KeyspaceDescription = pinned("keyspace describe");
        let failed = &orders.placement[0].replicas[1];
        assert_eq!(
            (orders.ack.as_str(), failed.state.as_str(), failed.lsn),
            ("replica", "failed", Some(100))
        );
        assert_eq!(orders.placement[0].replicas[2].keys_estimate, None);
        assert_eq!(
            (&orders.quarantines[0].replicas, orders.quarantines[0].until_us),
            (&vec![1], Some(9_000_000))
        );
        assert_eq!(orders.operation.unwrap().bytes_total, Some(1_000));
        assert_eq!(pinned::<KeyspaceDescription>("keyspace describe, idle").operation, None);
        assert_eq!(pinned::<Vec<KeyspaceSummary>>("keyspace list").len(), 4);
        let plan = pinned::<ChangePlan>("keyspace resize --plan");
        assert_eq!(
            (plan.kind.as_str(), plan.sources[1].bytes_to_read, plan.requests.get),
            ("grow", 349_525, 4)
        );
        assert_eq!((plan.disk_needed[0].free, plan.refused), (None, None));
        assert_eq!(plan.from, Some(ShardsOrNode::Shards(2)));
        assert_eq!(pinned::<CommandedNodes>("keyspace compact").nodes.len(), 2);
        assert_eq!(pinned::<CommandedNodes>("keyspace checkpoint").keyspace, "one");
        assert_eq!(pinned::<EvictedReplica>("keyspace evict").state, "draining");
        assert!(pinned::<DeletedKeyspace>("keyspace delete").shipped);
        let restore = pinned::<Operation>("keyspace restore");
        assert_eq!(restore.without[0].shards, [0]);
        assert_eq!(restore.estimate.map(|estimate| estimate.objects_read), Some(2));

        let nodes: Vec<NodeStatus> = pinned("node list");
        assert_eq!((nodes.len(), nodes[0].disk_free, &nodes[3].address), (5, Some(1 << 20), &None));
        assert!(pinned::<NodeStatus>("node cordon").cordoned);
        let status: ClusterStatus = pinned("cluster status");
        assert_eq!((status.nodes.len(), status.keyspaces.len(), status.warnings.len()), (5, 4, 11));
        assert_eq!(status.bill.unwrap().per_month.total, Some(7.4402));

        assert_eq!(pinned::<Vec<Operation>>("operation list").len(), 7);
        let states = [
            ("operation show, running", OperationState::Running),
            ("operation show, done", OperationState::Done),
            ("operation show, aborted", OperationState::Aborted),
            ("operation show, a drain that runs", OperationState::Running),
            ("operation show, a drain that is done", OperationState::Done),
            ("operation show, a drain that was aborted", OperationState::Aborted),
        ];
        for (name, state) in states {
            assert_eq!(pinned::<Operation>(name).state, state, "{name}");
        }
        assert_eq!(pinned::<BucketRepair>("bucket repair").unknown_keyspaces, [7]);
    }

    #[test]
    fn a_change_with_an_answer_that_cannot_be_read_may_have_been_made() {
        for (changes, kind) in [(true, ErrorKind::Unknown), (false, ErrorKind::Internal)] {
            for json in ["", "[", r#"{"objects": "many"}"#] {
                assert_eq!(
                    Answer::<BucketCheck>::read(json.to_owned(), changes).unwrap_err().kind(),
                    kind
                );
            }
        }
    }
}
