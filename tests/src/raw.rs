//! What a bucket holds of a replica, and the yardstick for everything that reads it: the same
//! objects to files with object_store alone.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use vasto_core::ids::{KeyspaceId, ReplicaId, ShardId};
use vasto_shipping::{Bucket, Manifest, layout};
use vasto_testkit::cpu_seconds;

/// Requests that are under way at a time, as many as a node has.
const PARALLEL: usize = 8;

/// A download that is done.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawDownload {
    /// Bytes of all objects.
    pub bytes: u64,
    /// Time until the last file was synced, seconds.
    pub seconds: f64,
    /// CPU that this process used meanwhile, seconds.
    pub cpu_seconds: f64,
}

/// Reads the newest manifest of a replica.
///
/// # Errors
/// When there is none, or it cannot be read.
pub async fn newest_manifest(
    bucket: &Bucket,
    keyspace: KeyspaceId,
    shard: ShardId,
    replica: ReplicaId,
) -> Result<Manifest> {
    let objects = bucket.list(&layout::replica_prefix(keyspace, shard, replica)).await?;
    let newest = objects.iter().max_by_key(|object| layout::parse_manifest_lsn(&object.key));
    let newest = newest.filter(|object| layout::parse_manifest_lsn(&object.key).is_some());
    let key = &newest
        .with_context(|| format!("shard {shard} has no checkpoint of replica {replica}"))?
        .key;
    let bytes = bucket.get(key).await?.with_context(|| format!("{key} is gone"))?;
    Ok(Manifest::decode(&bytes)?)
}

/// Downloads objects to files in a directory and syncs each.
///
/// # Errors
/// When an object cannot be read, or a file not be written.
pub async fn download_raw(bucket: &Bucket, keys: &[String], dir: &Path) -> Result<RawDownload> {
    let root = bucket
        .url()
        .strip_prefix("s3://")
        .and_then(|rest| rest.split_once('/'))
        .map_or("", |(_, root)| root);
    let own = std::process::id();
    let (began, cpu) = (Instant::now(), cpu_seconds(own)?);
    let store = bucket.raw_store();
    let sizes = futures::stream::iter(keys.iter().enumerate())
        .map(|(number, key)| {
            let (store, path) = (store.clone(), dir.join(format!("{number}.object")));
            let key = if root.is_empty() { key.clone() } else { format!("{root}/{key}") };
            async move {
                let body = store.get(&object_store::path::Path::from(key)).await?.bytes().await?;
                let bytes = body.len() as u64;
                let write = move || {
                    let mut file = std::fs::File::create(path)?;
                    std::io::Write::write_all(&mut file, &body)?;
                    file.sync_all()
                };
                tokio::task::spawn_blocking(write).await??;
                anyhow::Ok(bytes)
            }
        })
        .buffer_unordered(PARALLEL)
        .try_collect::<Vec<u64>>()
        .await?;
    Ok(RawDownload {
        bytes: sizes.into_iter().sum(),
        seconds: began.elapsed().as_secs_f64(),
        cpu_seconds: cpu_seconds(own)? - cpu,
    })
}
