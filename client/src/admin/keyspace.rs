//! Calls about keyspaces, except for those that start an operation.

use vasto_core::limits::check_keyspace_name;
use vasto_proto::convert::ack_to_wire;
use vasto_proto::v1;

use crate::answer::{
    Answer, CommandedNodes, DeletedKeyspace, EvictedReplica, KeyspaceDescription, KeyspaceSummary,
};
use crate::client::Vasto;
use crate::error::Error;
use crate::master::Call;
use crate::spec::KeyspaceSpec;

impl Vasto {
    /// Creates a keyspace and waits until it serves.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad name or specification, `AlreadyExists`, `FailedPrecondition`
    /// when there are too few nodes, `Unknown` when the master went away.
    pub async fn create_keyspace(
        &self,
        name: &str,
        spec: KeyspaceSpec,
    ) -> Result<Answer<KeyspaceDescription>, Error> {
        check_keyspace_name(name)?;
        spec.check()?;
        let request = v1::CreateKeyspaceRequest {
            name: name.to_owned(),
            shards: spec.shards,
            replicas: spec.replicas,
            ack: ack_to_wire(Some(spec.ack)),
            ttl_ms: spec.ttl_ms,
            quarantine_ms: spec.quarantine_ms,
            tombstone_grace_ms: spec.tombstone_grace_ms,
        };
        self.master
            .call(Call::Change, |mut master| async move { master.create_keyspace(request).await })
            .await
    }

    /// Returns the keyspaces.
    ///
    /// # Errors
    /// `Unavailable` or `DeadlineExceeded` when the master does not answer, as of all calls below.
    pub async fn list_keyspaces(&self) -> Result<Answer<Vec<KeyspaceSummary>>, Error> {
        self.master
            .call(Call::Ask, |mut master| async move { master.list_keyspaces(v1::Empty {}).await })
            .await
    }

    /// Returns a keyspace with its placement.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn describe_keyspace(
        &self,
        name: &str,
    ) -> Result<Answer<KeyspaceDescription>, Error> {
        let request = request(name)?;
        self.master
            .call(Call::Ask, |mut master| async move { master.describe_keyspace(request).await })
            .await
    }

    /// Evicts a replica from its placement. The replica is drained when its node is there, and a
    /// new replica is made on a node without one; with `accept_loss` the data that only it holds is
    /// given up.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for the last replica of a shard, or while the keyspace
    /// changes.
    pub async fn evict_replica(
        &self,
        name: &str,
        replica: u64,
        accept_loss: bool,
    ) -> Result<Answer<EvictedReplica>, Error> {
        let request = v1::EvictRequest { name: name.to_owned(), replica_id: replica, accept_loss };
        self.master
            .call(Call::Change, |mut master| async move { master.evict_replica(request).await })
            .await
    }

    /// Deletes a keyspace and its data on the nodes.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while the keyspace changes its shards.
    pub async fn delete_keyspace(&self, name: &str) -> Result<Answer<DeletedKeyspace>, Error> {
        let request = request(name)?;
        self.master
            .call(Call::Change, |mut master| async move { master.delete_keyspace(request).await })
            .await
    }

    /// Has every shard ship a checkpoint to the bucket now and waits for it (an hour at most).
    ///
    /// # Errors
    /// `NotFound`; `Unavailable` when a node is away.
    pub async fn checkpoint_keyspace(&self, name: &str) -> Result<Answer<CommandedNodes>, Error> {
        let request = request(name)?;
        self.master
            .call(Call::ChangeLong, |mut master| async move {
                master.checkpoint_keyspace(request).await
            })
            .await
    }

    /// Compacts every shard on its nodes now and waits for it (an hour at most).
    ///
    /// # Errors
    /// `NotFound`; `Unavailable` when a node is away.
    pub async fn compact_keyspace(&self, name: &str) -> Result<Answer<CommandedNodes>, Error> {
        let request = request(name)?;
        self.master
            .call(
                Call::ChangeLong,
                |mut master| async move { master.compact_keyspace(request).await },
            )
            .await
    }
}

fn request(name: &str) -> Result<v1::KeyspaceRequest, Error> {
    check_keyspace_name(name)?;
    Ok(v1::KeyspaceRequest { name: name.to_owned() })
}
