//! The archive of a shard in the bucket: the checkpoints of its replicas, and the log after each
//! checkpoint.
//!
//! **Invariant:** every object is found by name and checked when it is read; a chunk is the next
//! chunk only when it begins exactly after the last record.
//!
//! Uses LIST requests, so for bootstrap, restore and fsck only.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt};
use vasto_core::ids::Vector;
use vasto_core::{KeyspaceId, Lsn, PlanId, ReplicaId, ShardId};

use crate::bucket::{Bucket, BucketError, ObjectInfo};
use crate::chunk::{self, Chunk, ChunkError, Says};
use crate::envelope::EnvelopeError;
use crate::layout::{self, Owner, Shipped};
use crate::manifest::Manifest;

/// Reads in flight.
pub(crate) const READS: usize = 8;

/// Why the archive cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// A manifest cannot be read.
    #[error("{key}: {source}; run `vasto bucket fsck`")]
    Manifest {
        /// The object.
        key: String,
        /// The decoding error.
        source: EnvelopeError,
    },
    /// A chunk cannot be read.
    #[error("{key}: {source}; run `vasto bucket fsck`")]
    Chunk {
        /// The object.
        key: String,
        /// The decoding error.
        source: ChunkError,
    },
    /// An object that was listed or named is gone.
    #[error("{0} is missing from the bucket; run `vasto bucket fsck`")]
    Missing(String),
    /// The content of an object names another key.
    #[error("{0} holds another object's content: objects were moved by hand; put them back")]
    Misplaced(String),
}

/// A checkpoint in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedCheckpoint {
    /// Key of its manifest.
    pub key: String,
    /// The manifest.
    pub manifest: Manifest,
}

/// The archive of one replica, by the names of its objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReplicaArchive {
    /// LSNs of its checkpoints, ascending.
    pub manifests: Vec<Lsn>,
    /// First LSNs of its chunks, ascending.
    pub chunks: Vec<Lsn>,
    /// Store times of its objects.
    pub times: Times,
}

/// Times at which the store received the objects of a replica, by the store's own clock,
/// microseconds since 1970.
///
/// A replica ships its log in order, so the time of an object bounds the time of everything before
/// it, whatever the clocks of the nodes that accepted the writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Times {
    /// By the LSN of the checkpoint.
    pub manifests: BTreeMap<Lsn, u64>,
    /// By the first LSN of the chunk.
    pub chunks: BTreeMap<Lsn, u64>,
}

impl Times {
    /// Returns the latest time at which the replica can have received the record with this LSN;
    /// `u64::MAX` when no object bounds it.
    pub fn held_by(&self, lsn: Lsn) -> u64 {
        let chunks = self.chunks.range(lsn.next()..).map(|(_, at)| *at);
        let manifests = self.manifests.range(lsn..).map(|(_, at)| *at);
        chunks.chain(manifests).min().unwrap_or(u64::MAX)
    }

    /// Returns the same bound for every record of a chunk.
    pub fn chunk_held_by(&self, first: Lsn, last: Lsn) -> u64 {
        self.chunks.get(&first).copied().unwrap_or(u64::MAX).min(self.held_by(last))
    }
}

/// Lists the archive of each replica of a shard.
pub async fn archives(
    bucket: &Bucket,
    keyspace: KeyspaceId,
    shard: ShardId,
) -> Result<BTreeMap<ReplicaId, ReplicaArchive>, ArchiveError> {
    Ok(by_replica(&bucket.list(&layout::shard_prefix(keyspace, shard)).await?))
}

/// Divides the objects of a shard among its replicas.
pub(crate) fn by_replica(objects: &[ObjectInfo]) -> BTreeMap<ReplicaId, ReplicaArchive> {
    let mut archives: BTreeMap<ReplicaId, ReplicaArchive> = BTreeMap::new();
    for object in objects {
        let Some((owner, shipped)) = layout::parse_shipped(&object.key) else { continue };
        let archive = archives.entry(owner.replica).or_default();
        match shipped {
            Shipped::Manifest(lsn) => {
                archive.manifests.push(lsn);
                archive.times.manifests.insert(lsn, object.modified_us);
            }
            Shipped::Chunk(lsn) => {
                archive.chunks.push(lsn);
                archive.times.chunks.insert(lsn, object.modified_us);
            }
            Shipped::Sst | Shipped::Database => {}
        }
    }
    for archive in archives.values_mut() {
        archive.manifests.sort_unstable();
        archive.chunks.sort_unstable();
    }
    archives
}

/// Reads the manifest under a key.
pub async fn manifest_at(bucket: &Bucket, key: &str) -> Result<ArchivedCheckpoint, ArchiveError> {
    let bytes = bucket.get(key).await?.ok_or_else(|| ArchiveError::Missing(key.to_owned()))?;
    let manifest = Manifest::decode(&bytes)
        .map_err(|source| ArchiveError::Manifest { key: key.to_owned(), source })?;
    if layout::manifest(manifest.keyspace, manifest.shard, manifest.replica, manifest.lsn) != key {
        return Err(ArchiveError::Misplaced(key.to_owned()));
    }
    Ok(ArchivedCheckpoint { key: key.to_owned(), manifest })
}

/// Checkpoints of a replica, split at a point in time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Newest {
    /// The last checkpoint that holds nothing newer than the time.
    pub base: Option<ArchivedCheckpoint>,
    /// The checkpoints that hold something newer, ascending.
    pub later: Vec<Later>,
}

/// A checkpoint that holds something newer than the wanted time: it shows which records the log up
/// to it contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Later {
    /// LSN up to which the checkpoint covers the log.
    pub lsn: Lsn,
    /// The vector of the checkpoint.
    pub vector: Vector,
    /// The greatest commit time in the checkpoint, microseconds.
    pub commit_time_max: u64,
    /// The plan whose ingest it holds.
    pub ingested: Option<PlanId>,
}

impl Later {
    /// Takes the fields from a manifest.
    pub fn of(manifest: Manifest) -> Self {
        Self {
            lsn: manifest.lsn,
            vector: manifest.vector,
            commit_time_max: manifest.commit_time_max,
            ingested: manifest.ingested,
        }
    }
}

/// Resolution of object times: some stores report whole seconds.
pub const STORE_TIME_GRAIN_US: u64 = 1_000_000;

/// Returns true when an object held at `held_by_us` existed at `until_us` for certain, by the
/// store's clock.
pub fn is_proven(held_by_us: u64, until_us: u64) -> bool {
    held_by_us.saturating_add(STORE_TIME_GRAIN_US) <= until_us
}

/// Returns the last checkpoint of a replica that holds nothing newer than a time, microseconds;
/// without a time the last of all. "Nothing newer" is decided by the commit times, or by the store
/// having received the checkpoint by then, which also holds when the clock that assigned the commit
/// times was ahead. An unreadable checkpoint is skipped while there is an older one: the log after
/// the older one covers it, and the reader of the log detects when it does not.
///
/// # Errors
/// When none of the checkpoints that qualify can be read.
pub async fn newest_checkpoint(
    bucket: &Bucket,
    owner: Owner,
    archive: &ReplicaArchive,
    until_us: Option<u64>,
) -> Result<Newest, ArchiveError> {
    let mut newest = Newest::default();
    let mut unreadable = None;
    for lsn in archive.manifests.iter().rev() {
        let key = owner.manifest(*lsn);
        let would_do = |manifest: &Manifest| {
            until_us.is_none_or(|until| {
                manifest.commit_time_max <= until || is_proven(archive.times.held_by(*lsn), until)
            })
        };
        match manifest_at(bucket, &key).await {
            Ok(base) if would_do(&base.manifest) => {
                newest.base = Some(base);
                newest.later.reverse();
                return Ok(newest);
            }
            Ok(ArchivedCheckpoint { manifest, .. }) => newest.later.push(Later::of(manifest)),
            Err(ArchiveError::Bucket(error)) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "a checkpoint cannot be read; the one before it is used");
                unreadable.get_or_insert(error);
            }
        }
    }
    newest.later.reverse();
    unreadable.map_or(Ok(newest), Err)
}

/// Returns true when the chunk continues the archive of another replica of the shard: the log
/// before it need not be in the same archive.
pub fn goes_on_behind_another(chunk: &Chunk) -> bool {
    chunk.says().behind.is_some()
}

/// Returns [`goes_on_behind_another`] of the first chunk in an archive.
///
/// # Errors
/// When the chunk cannot be read.
pub async fn begins_behind_another(
    bucket: &Bucket,
    owner: Owner,
    archive: &ReplicaArchive,
) -> Result<bool, ArchiveError> {
    let Some(first) = archive.chunks.first() else { return Ok(false) };
    Ok(chunk_at(bucket, owner, *first)
        .await?
        .is_some_and(|(chunk, _)| goes_on_behind_another(&chunk)))
}

/// Archives that some chunks continue, by the fields at the beginning of each.
#[derive(Debug, Default)]
pub struct Continued {
    /// The replicas whose archives are continued.
    pub replicas: BTreeSet<ReplicaId>,
    /// Chunks that are gone or whose beginning cannot be read: each may continue any archive.
    pub unreadable: usize,
}

/// Returns what these chunks continue, by the fields at the beginning of each. For a deletion an
/// unreadable chunk is a doubt; a reader of the log passes it over and meets it there.
///
/// # Errors
/// When the bucket does not answer.
pub async fn continued_by(
    bucket: &Bucket,
    owner: Owner,
    firsts: &[Lsn],
) -> Result<Continued, BucketError> {
    let key = |first: &Lsn| owner.chunk(*first);
    let keys: Vec<String> = firsts.iter().map(key).collect();
    let says = futures::stream::iter(keys).map(|key| async move {
        let beginning = bucket.beginning(&key, chunk::BEGINNING_BYTES).await?;
        let says = beginning.and_then(|(bytes, _)| chunk::peek(&bytes).ok());
        Ok::<_, BucketError>(says.filter(|says| !says.unclear))
    });
    let read: Vec<Option<Says>> = says.buffer_unordered(READS).try_collect().await?;
    Ok(Continued {
        replicas: read.iter().flatten().filter_map(|says| says.behind).collect(),
        unreadable: read.iter().filter(|says| says.is_none()).count(),
    })
}

/// Returns the chunk that holds the record after an LSN, and the size of its object; `None` without
/// such a chunk.
///
/// The chunk almost always begins there. After a crash between the upload of a chunk and its note,
/// a checkpoint may end inside a chunk: then the last of `known` (first LSNs, ascending) before it
/// is read too.
pub async fn chunk_after(
    bucket: &Bucket,
    owner: Owner,
    known: &[Lsn],
    after: Lsn,
) -> Result<Option<(Chunk, u64)>, ArchiveError> {
    if let Some(found) = chunk_at(bucket, owner, after.next()).await? {
        return Ok(Some(found));
    }
    let before = known.partition_point(|first| *first <= after);
    let Some(first) = before.checked_sub(1).and_then(|at| known.get(at)) else { return Ok(None) };
    Ok(chunk_at(bucket, owner, *first).await?.filter(|(chunk, _)| chunk.last_lsn > after))
}

async fn chunk_at(
    bucket: &Bucket,
    owner: Owner,
    first: Lsn,
) -> Result<Option<(Chunk, u64)>, ArchiveError> {
    let key = owner.chunk(first);
    let Some(bytes) = bucket.get(&key).await? else { return Ok(None) };
    let chunk =
        Chunk::decode(&bytes).map_err(|source| ArchiveError::Chunk { key: key.clone(), source })?;
    let says = (chunk.keyspace, chunk.shard, chunk.replica, chunk.first_lsn);
    if says != (owner.keyspace, owner.shard, owner.replica, first) {
        return Err(ArchiveError::Misplaced(key));
    }
    Ok(Some((chunk, bytes.len() as u64)))
}
