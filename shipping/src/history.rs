//! What the bucket holds of a shard's past: the checkpoints of its replicas, and the log behind each.
//!
//! **Invariant:** everything is found by name and checked when it is read; a chunk is the next one
//! only when it begins exactly behind the last record.
//!
//! Lists, so for bootstrap, restore and fsck only.

use std::collections::BTreeMap;

use vasto_core::{KeyspaceId, Lsn, ReplicaId, ShardId};

use crate::bucket::{Bucket, BucketError};
use crate::chunk::{Chunk, ChunkError};
use crate::envelope::EnvelopeError;
use crate::layout::{self, Owner, Shipped};
use crate::manifest::Manifest;

/// Why the past cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// A manifest cannot be read.
    #[error("{key}: {source}; run `vasto bucket fsck`")]
    Manifest {
        /// The object.
        key: String,
        /// What is wrong with it.
        source: EnvelopeError,
    },
    /// A chunk cannot be read.
    #[error("{key}: {source}; run `vasto bucket fsck`")]
    Chunk {
        /// The object.
        key: String,
        /// What is wrong with it.
        source: ChunkError,
    },
    /// An object that was listed or named is gone.
    #[error("{0} is missing from the bucket; run `vasto bucket fsck`")]
    Missing(String),
    /// An object says that it is another one.
    #[error("{0} holds another object's content: objects were moved by hand; put them back")]
    Misplaced(String),
}

/// The checkpoint to begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Key of its manifest.
    pub key: String,
    /// The manifest.
    pub manifest: Manifest,
}

/// What one replica has shipped, by the names of its objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folder {
    /// LSNs of its checkpoints, rising.
    pub manifests: Vec<Lsn>,
    /// First LSNs of its chunks, rising.
    pub chunks: Vec<Lsn>,
}

/// What each replica of a shard has shipped.
pub async fn folders(
    bucket: &Bucket,
    keyspace: KeyspaceId,
    shard: ShardId,
) -> Result<BTreeMap<ReplicaId, Folder>, HistoryError> {
    let mut folders: BTreeMap<ReplicaId, Folder> = BTreeMap::new();
    for object in bucket.list(&layout::shard_prefix(keyspace, shard)).await? {
        let Some((owner, shipped)) = layout::parse_shipped(&object.key) else { continue };
        let folder = folders.entry(owner.replica).or_default();
        match shipped {
            Shipped::Manifest(lsn) => folder.manifests.push(lsn),
            Shipped::Chunk(lsn) => folder.chunks.push(lsn),
            Shipped::Sst | Shipped::Database => {}
        }
    }
    for folder in folders.values_mut() {
        folder.manifests.sort_unstable();
        folder.chunks.sort_unstable();
    }
    Ok(folders)
}

/// Reads the manifest under a key.
pub async fn manifest_at(bucket: &Bucket, key: &str) -> Result<Base, HistoryError> {
    let bytes = bucket.get(key).await?.ok_or_else(|| HistoryError::Missing(key.to_owned()))?;
    let manifest = Manifest::decode(&bytes).map_err(|source| HistoryError::Manifest { key: key.to_owned(), source })?;
    if layout::manifest(manifest.keyspace, manifest.shard, manifest.replica, manifest.lsn) != key {
        return Err(HistoryError::Misplaced(key.to_owned()));
    }
    Ok(Base { key: key.to_owned(), manifest })
}

/// Where to begin with what a replica has shipped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Newest {
    /// Its last checkpoint that holds nothing newer than the time.
    pub base: Option<Base>,
    /// The greatest commit time in the oldest checkpoint that does, microseconds.
    pub later_us: Option<u64>,
}

/// The last checkpoint of a replica that holds nothing newer than a commit time, microseconds; the
/// last of all without one. One that cannot be read is passed by while there is an older one: the log
/// behind that one leads past it, and whoever reads the log sees when it does not.
///
/// # Errors
/// When none of those that would do can be read.
pub async fn newest_base(
    bucket: &Bucket,
    owner: Owner,
    manifests: &[Lsn],
    until_us: Option<u64>,
) -> Result<Newest, HistoryError> {
    let mut newest = Newest::default();
    let mut unreadable = None;
    for lsn in manifests.iter().rev() {
        let key = layout::manifest(owner.keyspace, owner.shard, owner.replica, *lsn);
        match manifest_at(bucket, &key).await {
            Ok(base) if until_us.is_none_or(|until| base.manifest.commit_time_max <= until) => {
                newest.base = Some(base);
                return Ok(newest);
            }
            Ok(base) => newest.later_us = Some(base.manifest.commit_time_max),
            Err(HistoryError::Bucket(error)) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "a checkpoint cannot be read; the one before it is used");
                unreadable.get_or_insert(error);
            }
        }
    }
    unreadable.map_or(Ok(newest), Err)
}

/// The chunk that holds the record behind one, and the bytes of its object; `None` when there is none.
///
/// Almost always it begins there. Where a crash came between a chunk and the note of it, a checkpoint may
/// end inside of a chunk: then the last of `known` (first LSNs, rising) before it is looked at too.
pub async fn chunk_after(
    bucket: &Bucket,
    owner: Owner,
    known: &[Lsn],
    after: Lsn,
) -> Result<Option<(Chunk, u64)>, HistoryError> {
    if let Some(found) = chunk_at(bucket, owner, after.next()).await? {
        return Ok(Some(found));
    }
    let before = known.partition_point(|first| *first <= after);
    let Some(first) = before.checked_sub(1).and_then(|at| known.get(at)) else { return Ok(None) };
    Ok(chunk_at(bucket, owner, *first).await?.filter(|(chunk, _)| chunk.last_lsn > after))
}

async fn chunk_at(bucket: &Bucket, owner: Owner, first: Lsn) -> Result<Option<(Chunk, u64)>, HistoryError> {
    let key = layout::chunk(owner.keyspace, owner.shard, owner.replica, first);
    let Some(bytes) = bucket.get(&key).await? else { return Ok(None) };
    let chunk = Chunk::decode(&bytes).map_err(|source| HistoryError::Chunk { key: key.clone(), source })?;
    let says = (chunk.keyspace, chunk.shard, chunk.replica, chunk.first_lsn);
    if says != (owner.keyspace, owner.shard, owner.replica, first) {
        return Err(HistoryError::Misplaced(key));
    }
    Ok(Some((chunk, bytes.len() as u64)))
}
