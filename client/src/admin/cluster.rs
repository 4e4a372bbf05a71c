//! Calls about the cluster, its nodes and its bucket.

use vasto_proto::v1;

use crate::answer::{
    Answer, BucketCheck, BucketRepair, ClusterCheck, ClusterStatus, GarbageCollection, NodeStatus,
};
use crate::client::Vasto;
use crate::error::Error;
use crate::master::Call;

impl Vasto {
    /// Returns the state of the cluster.
    ///
    /// # Errors
    /// `Unavailable` or `DeadlineExceeded` when the master does not answer.
    pub async fn cluster_status(&self) -> Result<Answer<ClusterStatus>, Error> {
        self.master
            .call(Call::Ask, |mut master| async move { master.cluster_status(v1::Empty {}).await })
            .await
    }

    /// Returns the nodes.
    ///
    /// # Errors
    /// As of [`Vasto::cluster_status`].
    pub async fn list_nodes(&self) -> Result<Answer<Vec<NodeStatus>>, Error> {
        self.master
            .call(Call::Ask, |mut master| async move { master.list_nodes(v1::Empty {}).await })
            .await
    }

    /// Cordons a node, so that it gets no new replicas, or uncordons it; its present replicas stay.
    ///
    /// # Errors
    /// `NotFound` when no such node is known.
    pub async fn cordon_node(
        &self,
        node: &str,
        cordoned: bool,
    ) -> Result<Answer<NodeStatus>, Error> {
        let request = v1::CordonNodeRequest { node_id: node.to_owned(), cordoned };
        self.master
            .call(Call::Change, |mut master| async move { master.cordon_node(request).await })
            .await
    }

    /// Checks the cluster: everything that [`Vasto::cluster_status`] warns of, check by check.
    ///
    /// # Errors
    /// When the master does not answer.
    pub async fn check_cluster(&self) -> Result<Answer<ClusterCheck>, Error> {
        self.master
            .call(Call::Ask, |mut master| async move { master.check_cluster(v1::Empty {}).await })
            .await
    }

    /// Checks the bucket for objects that are missing, damaged, or orphaned. With `deep` every byte
    /// in the bucket is read.
    ///
    /// # Errors
    /// When the bucket does not answer.
    pub async fn check_bucket(&self, deep: bool) -> Result<Answer<BucketCheck>, Error> {
        let request = v1::CheckBucketRequest { deep };
        self.master
            .call(Call::AskLong, |mut master| async move { master.check_bucket(request).await })
            .await
    }

    /// Deletes the objects that are not needed any more, or only lists them.
    ///
    /// # Errors
    /// When the bucket does not answer; objects deleted until then were not needed.
    pub async fn collect_garbage(&self, dry_run: bool) -> Result<Answer<GarbageCollection>, Error> {
        let request = v1::CollectGarbageRequest { dry_run };
        self.master
            .call(
                Call::ChangeLong,
                |mut master| async move { master.collect_garbage(request).await },
            )
            .await
    }

    /// Writes objects that the bucket has lost and the nodes still know. With `accept_loss` also
    /// when nodes are away that may know more.
    ///
    /// # Errors
    /// `FailedPrecondition` when nodes are away, or belong to several clusters; when the bucket
    /// does not answer.
    pub async fn repair_bucket(&self, accept_loss: bool) -> Result<Answer<BucketRepair>, Error> {
        let request = v1::RepairBucketRequest { accept_loss };
        self.master
            .call(Call::ChangeLong, |mut master| async move { master.repair_bucket(request).await })
            .await
    }
}
