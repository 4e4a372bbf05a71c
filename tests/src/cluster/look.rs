//! What a cluster says of a keyspace and of the bucket, and the wait until it has come to rest.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vasto_core::catalog::Catalog;
use vasto_core::ids::ReplicaId;
use vasto_testkit::{DEADLINE, until};

use super::Cluster;
use crate::catalog::CatalogDir;

/// Maximum age of a report.
const REPORT_AGE: Duration = Duration::from_millis(1_200);

impl Cluster {
    /// Returns the catalog of a keyspace in a local bucket, or in a store of the test.
    ///
    /// # Errors
    /// When the keyspace cannot be described.
    pub async fn catalog(&self, name: &str) -> Result<CatalogDir> {
        let described = self.json(&["keyspace", "describe", name]).await?;
        let id = described["keyspace_id"]
            .as_u64()
            .with_context(|| format!("no keyspace_id in {described}"))?;
        Ok(match &self.store {
            Some(store) => CatalogDir::in_store(store, id),
            None => CatalogDir::new(&self.bucket_dir()?, id),
        })
    }

    /// Returns the directory of a local bucket.
    ///
    /// # Errors
    /// When the bucket is not a local directory.
    pub fn bucket_dir(&self) -> Result<PathBuf> {
        let root =
            self.bucket.strip_prefix("file://").context("the bucket is not a local directory")?;
        Ok(Path::new(root).to_owned())
    }

    /// Returns the directory of a replica on a node.
    pub fn replica_dir(&self, node: usize, catalog: &Catalog, replica: ReplicaId) -> PathBuf {
        self.node_dir(node).join("replicas").join(format!("{}-{replica}", catalog.keyspace))
    }

    /// Waits until earlier plans of a keyspace have ended completely: no plan, no quarantined
    /// range, no retired replica.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn settled(&self, name: &str) -> Result<()> {
        let catalog = self.catalog(name).await?;
        until(&format!("plans and quarantines of {name} to end"), DEADLINE, async || {
            let tip = catalog.tip().ok()?;
            (tip.plans().next().is_none() && tip.quarantines.is_empty() && tip.retired.is_empty())
                .then_some(())
        })
        .await
        .with_context(|| format!("the catalog is {:?}", catalog.tip()))
    }

    /// Waits until the keyspace has all its replicas and none is draining; returns the version.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn whole(&self, name: &str) -> Result<Catalog> {
        let catalog = self.catalog(name).await?;
        until(&format!("all replicas of {name} to be there"), DEADLINE, async || {
            let tip = catalog.tip().ok()?;
            let wanted = tip.spec.replicas as usize;
            let whole = tip.placement.iter().all(|shard| shard.replicas.len() == wanted);
            let calm = tip.draining.is_empty() && tip.plans().next().is_none();
            (whole && calm).then_some(tip)
        })
        .await
        .with_context(|| format!("{:?}", catalog.tip()))
    }

    /// Waits until all records of a keyspace are in the bucket: until reports are unchanged for
    /// longer than the age of a report.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn shipped(&self, name: &str) -> Result<()> {
        let mut since: Option<(Vec<Value>, Instant)> = None;
        until(&format!("everything of {name} to be shipped"), DEADLINE, async || {
            let described = self.json(&["keyspace", "describe", name]).await.ok()?;
            let shards = described["placement"].as_array()?.clone();
            let lsns: Vec<Value> =
                shards.iter().map(|shard| shard["replicas"][0]["lsn"].clone()).collect();
            let done =
                |shard: &Value| shard["replicas"][0]["lsn"] == shard["replicas"][0]["shipped_lsn"];
            if !shards.iter().all(done) {
                since = None;
                return None;
            }
            match &since {
                Some((before, at)) if *before == lsns => (at.elapsed() > REPORT_AGE).then_some(()),
                _ => {
                    since = Some((lsns, Instant::now()));
                    None
                }
            }
        })
        .await
    }

    /// Reads every object of the bucket: none is missing or damaged. Returns what was found.
    ///
    /// # Errors
    /// The objects that are missing or damaged.
    pub async fn fsck(&self) -> Result<Value> {
        let found = self.json(&["bucket", "fsck", "--deep"]).await?;
        ensure!(found["missing"] == json!([]) && found["corrupt"] == json!([]), "{found}");
        Ok(found)
    }

    /// Collects garbage in a cluster at rest that keeps nothing for its age: afterwards the bucket
    /// is complete, and something needs every object in it.
    ///
    /// # Errors
    /// The objects that are missing, damaged, or needed by nothing.
    pub async fn collect(&self) -> Result<Value> {
        let collected = self.json(&["bucket", "gc"]).await?;
        ensure!(collected["stopped"].is_null(), "{collected}");
        let found = self.fsck().await?;
        ensure!(found["orphans"] == json!([]), "nothing needs these, and they stay: {found}");
        Ok(collected)
    }

    /// Checks that the exports for these keyspaces are in a local bucket, and are not any more once
    /// nothing needs them.
    ///
    /// # Errors
    /// The exports that are missing, or stay.
    pub async fn exports_go(&self, exports: &[(String, Vec<String>)]) -> Result<()> {
        let bucket = self.bucket_dir()?;
        let keys = || exports.iter().flat_map(|(_, keys)| keys);
        let gone: Vec<&String> = keys().filter(|key| !bucket.join(key).exists()).collect();
        ensure!(gone.is_empty(), "these exports are not in the bucket: {gone:?}");
        for (keyspace, _) in exports {
            self.settled(keyspace).await?;
            // The checkpoint covers what was made from the exports.
            self.json(&["keyspace", "checkpoint", keyspace]).await?;
            self.shipped(keyspace).await?;
        }
        self.collect().await?;
        let left: Vec<&String> = keys().filter(|key| bucket.join(key).exists()).collect();
        ensure!(left.is_empty(), "these exports are still in the bucket: {left:?}");
        Ok(())
    }
}
