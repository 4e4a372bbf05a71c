//! A cluster to measure on, with the calls that every part makes.
//!
//! **Invariant:** a change begins only once the one before has left nothing: no plan, no quarantine,
//! no replica that leaves.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use vasto_client::answer::KeyspaceDescription;
use vasto_client::{Ack, Answer, Error, ErrorKind, Keyspace, KeyspaceSpec, Operation, Vasto};
use vasto_core::ids::{KeyspaceId, ReplicaId, ShardId};
use vasto_shipping::{Bucket, BucketOptions, Manifest};
use vasto_testkit::S3Server;

use super::args::Args;
use super::cpu::CpuSample;
use super::follow::{Ended, follow};
use super::table::note;
use crate::cluster::Cluster;
use crate::raw::newest_manifest;

/// How long what has moved is kept, at least: the next change waits for its end.
const QUARANTINE: Duration = Duration::from_millis(200);
/// Interval between two looks at a keyspace.
const LOOK: Duration = Duration::from_millis(100);
/// Time in which a keyspace comes to rest: what has moved is removed, which compacts.
const SETTLES_WITHIN: Duration = Duration::from_secs(3 * 60);
/// Time in which a node is known to be there, or to be away.
const KNOWN_WITHIN: Duration = Duration::from_secs(60);

/// What the collection of garbage does in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Garbage {
    /// It goes at the first collection, whatever its age.
    Goes,
    /// It stays for a day, as by default.
    Stays,
}

/// A running cluster and its clients.
pub(super) struct Stage {
    pub(super) vasto: Vasto,
    pub(super) bucket: Bucket,
    // Last: its processes end after the clients.
    pub(super) cluster: Cluster,
}

impl Stage {
    pub(super) async fn start(
        args: &Args,
        s3: Option<&S3Server>,
        name: &str,
        nodes: usize,
        garbage: Garbage,
    ) -> Result<Self> {
        let mut builder = Cluster::builder().nodes(nodes).allow_warnings().logs_into(&args.logs());
        if garbage == Garbage::Goes {
            builder = builder.keeps_no_garbage();
        }
        if let Some(dir) = &args.dir {
            builder = builder.inside(dir);
        }
        if let Some(s3) = s3 {
            builder = builder.s3(s3, name);
        }
        let cluster = builder.start().await?;
        let vasto = Vasto::connect(&cluster.master()).await?;
        let options = s3.map_or_else(BucketOptions::default, S3Server::options);
        let bucket = Bucket::open(cluster.bucket(), &options)?;
        note(&format!("{name}: a master and {nodes} nodes, bucket {}", cluster.bucket()));
        Ok(Self { vasto, bucket, cluster })
    }

    pub(super) async fn create(
        &self,
        name: &str,
        shards: u32,
        replicas: u32,
        ack: Ack,
    ) -> Result<Keyspace> {
        let spec = KeyspaceSpec::default().shards(shards).replicas(replicas).ack(ack);
        self.vasto.create_keyspace(name, spec.quarantine(QUARANTINE)).await?;
        Ok(self.vasto.keyspace(name).await?)
    }

    /// Resizes a keyspace and waits for the end; the next change may have to wait until it has
    /// [settled](Self::settled).
    pub(super) async fn resize(&self, name: &str, to: u32) -> Result<Ended> {
        let label = format!("{name} to {to} shards");
        let started = self.vasto.start_resize(name, to).await.with_context(|| label.clone())?;
        follow(&self.vasto, started, &label).await?.done()
    }

    /// Rebalances the cluster. What moves is known once all nodes have reported.
    pub(super) async fn rebalance(&self) -> Result<Ended> {
        let started = self.once_reported(async || self.vasto.start_rebalance().await).await?;
        follow(&self.vasto, started, "rebalance").await?.done()
    }

    /// Moves all replicas off a node, which may be lost with `replace`.
    pub(super) async fn empty(&self, node: usize, replace: bool) -> Result<Ended> {
        let id = self.id_of(node)?;
        let started = self
            .once_reported(async || self.vasto.start_emptying_node(&id, None, replace).await)
            .await?;
        let label = if replace { "replacement" } else { "drain" };
        follow(&self.vasto, started, label).await?.done()
    }

    /// Restores a keyspace into a new one, from the bucket alone.
    pub(super) async fn restore(&self, name: &str, into: &str) -> Result<Ended> {
        let started = self.vasto.start_restore_from_bucket(name, into, None).await?;
        follow(&self.vasto, started, &format!("restore into {into}")).await?.done()
    }

    /// Asks again while the master has not heard of all nodes.
    async fn once_reported(
        &self,
        ask: impl AsyncFn() -> Result<Answer<Operation>, Error>,
    ) -> Result<Answer<Operation>> {
        let began = Instant::now();
        loop {
            match ask().await {
                Ok(started) => return Ok(started),
                Err(error)
                    if error.kind() == ErrorKind::Unavailable && began.elapsed() < KNOWN_WITHIN =>
                {
                    tokio::time::sleep(LOOK).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Compacts a keyspace and has the bucket hold all of it.
    pub(super) async fn tidy(&self, name: &str) -> Result<()> {
        note(&format!("{name}: compacting, then a checkpoint"));
        self.vasto.compact_keyspace(name).await?;
        self.vasto.checkpoint_keyspace(name).await?;
        Ok(())
    }

    /// Waits until nothing of earlier changes is left.
    ///
    /// # Errors
    /// When that takes too long.
    pub(super) async fn settled(&self, name: &str) -> Result<()> {
        let began = Instant::now();
        let mut left = String::new();
        while began.elapsed() < SETTLES_WITHIN {
            let described = self.vasto.describe_keyspace(name).await;
            match described.as_ref().map(|described| rest(described)) {
                Ok(None) => return Ok(()),
                Ok(Some(rest)) => left = rest,
                Err(error) => left = error.to_string(),
            }
            tokio::time::sleep(LOOK).await;
        }
        anyhow::bail!("{name} did not come to rest within {SETTLES_WITHIN:?}: {left}")
    }

    /// Returns the id of a node.
    pub(super) fn id_of(&self, node: usize) -> Result<String> {
        self.cluster.node_id(node).with_context(|| format!("node {node} has no id"))
    }

    pub(super) async fn cordon(&self, node: usize, cordoned: bool) -> Result<()> {
        let id = self.id_of(node)?;
        self.vasto.cordon_node(&id, cordoned).await?;
        Ok(())
    }

    /// Kills a node and removes its disk; returns once the master knows.
    pub(super) async fn lose(&mut self, node: usize) -> Result<()> {
        let id = self.id_of(node)?;
        self.cluster.kill9_node(node).await?;
        std::fs::remove_dir_all(self.cluster.node_dir(node))?;
        let began = Instant::now();
        while began.elapsed() < KNOWN_WITHIN {
            let nodes = self.vasto.list_nodes().await?;
            if nodes.iter().any(|one| one.node_id == id && one.state == "away") {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        anyhow::bail!("the master does not know within {KNOWN_WITHIN:?} that {id} is away")
    }

    /// Returns the number of nodes that run.
    pub(super) fn running(&mut self) -> usize {
        (0..self.cluster.nodes()).filter(|node| self.cluster.node_process(*node).is_ok()).count()
    }

    /// Returns the newest manifest of each shard, from the replica that ships.
    pub(super) async fn manifests(&self, name: &str) -> Result<Vec<Manifest>> {
        let described = self.vasto.describe_keyspace(name).await?;
        let keyspace = KeyspaceId(described.keyspace_id);
        let mut manifests = Vec::new();
        for placed in &described.placement {
            let shipper = placed.replicas.first().context("a shard without replicas")?;
            let (shard, replica) = (ShardId(placed.shard), ReplicaId(shipper.replica_id));
            manifests.push(newest_manifest(&self.bucket, keyspace, shard, replica).await?);
        }
        Ok(manifests)
    }

    /// Returns the bytes that the nodes have sent to the bucket, as far as they have reported.
    pub(super) async fn bytes_written(&self) -> Result<u64> {
        let status = self.vasto.cluster_status().await?;
        let status: Value = serde_json::from_str(status.json())?;
        let nodes = status["nodes"].as_array().context("no nodes")?;
        let written = |node: &Value| node["bucket_requests"]["bytes_written"].as_u64();
        Ok(nodes.iter().filter_map(written).sum())
    }

    pub(super) fn cpu(&mut self) -> Result<CpuSample> {
        CpuSample::take(&mut self.cluster)
    }

    /// Deletes a keyspace that was made to measure.
    pub(super) async fn delete(&self, name: &str) -> Result<()> {
        self.vasto.delete_keyspace(name).await?;
        Ok(())
    }

    /// Deletes what nothing in the bucket needs. That this fails is told and changes no figure: the
    /// next collection takes what this one has left.
    pub(super) async fn collect(&self) {
        match self.vasto.collect_garbage(false).await {
            Ok(collected) => {
                if let Some(stopped) = &collected.stopped {
                    note(&format!("the collection of garbage stopped: {stopped}"));
                }
            }
            Err(error) => note(&format!("no garbage was collected: {error}")),
        }
    }

    /// Ends the cluster.
    pub(super) async fn finish(self) -> Result<()> {
        let Self { vasto, cluster, .. } = self;
        vasto.close().await;
        cluster.finish().await
    }
}

/// Returns what is left of earlier changes; `None` when nothing is.
fn rest(described: &KeyspaceDescription) -> Option<String> {
    let leaving = described
        .placement
        .iter()
        .flat_map(|shard| &shard.replicas)
        .filter(|replica| replica.role == "leaving")
        .count();
    let (kept, retired) = (described.quarantines.len(), described.retired.len());
    let operation = described.operation.as_ref().map(|operation| &operation.id);
    let calm = leaving + kept + retired == 0 && operation.is_none();
    (!calm).then(|| {
        format!("{operation:?}, {kept} quarantines, {retired} retired, {leaving} leaving replicas")
    })
}

#[cfg(test)]
mod tests {
    use vasto_client::answer::{Quarantine, ReplicaStatus, RetiredReplica, ShardPlacement};

    use super::*;

    #[test]
    fn a_keyspace_rests_when_nothing_is_kept_and_nobody_leaves() {
        let replica = |role: &str| ReplicaStatus { role: role.to_owned(), ..Default::default() };
        let with = |role: &str| KeyspaceDescription {
            placement: vec![ShardPlacement { shard: 0, replicas: vec![replica(role)] }],
            ..Default::default()
        };
        assert_eq!(rest(&with("primary")), None);
        assert!(rest(&with("leaving")).is_some());
        let kept =
            KeyspaceDescription { quarantines: vec![Quarantine::default()], ..with("primary") };
        let retired =
            KeyspaceDescription { retired: vec![RetiredReplica::default()], ..with("primary") };
        assert!(rest(&kept).is_some() && rest(&retired).is_some());
    }
}
