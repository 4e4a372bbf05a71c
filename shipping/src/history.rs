//! What the bucket holds of a shard's past: the checkpoints of its replicas, and the log behind each.
//!
//! **Invariant:** everything is found by name and checked when it is read; a chunk is the next one
//! only when it begins exactly behind the last record.
//!
//! Lists, so for bootstrap, restore and fsck only.

use std::collections::BTreeMap;

use vasto_core::ids::Vector;
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
    /// When the store got them, by its own clock.
    pub times: Times,
}

/// When the store got the objects of a replica, by the store's own clock, microseconds since 1970.
///
/// A replica ships its log in order, so an object bounds the time of everything that lies before it: the
/// clocks of those who took the writes have no say in that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Times {
    /// By the LSN of the checkpoint.
    pub manifests: BTreeMap<Lsn, u64>,
    /// By the first LSN of the chunk.
    pub chunks: BTreeMap<Lsn, u64>,
}

impl Times {
    /// The replica held the record with this LSN at that time, at the latest; `u64::MAX` when no object
    /// tells.
    pub fn held_by(&self, lsn: Lsn) -> u64 {
        let chunks = self.chunks.range(lsn.next()..).map(|(_, at)| *at);
        let manifests = self.manifests.range(lsn..).map(|(_, at)| *at);
        chunks.chain(manifests).min().unwrap_or(u64::MAX)
    }

    /// The same for every record of a chunk.
    pub fn chunk_held_by(&self, first: Lsn, last: Lsn) -> u64 {
        self.chunks.get(&first).copied().unwrap_or(u64::MAX).min(self.held_by(last))
    }
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
            Shipped::Manifest(lsn) => {
                folder.manifests.push(lsn);
                folder.times.manifests.insert(lsn, object.modified_us);
            }
            Shipped::Chunk(lsn) => {
                folder.chunks.push(lsn);
                folder.times.chunks.insert(lsn, object.modified_us);
            }
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
    /// Those that do, rising.
    pub later: Vec<Later>,
}

/// A checkpoint that holds something newer than the wanted time: it tells what the log up to it brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Later {
    /// It covers the log up to here.
    pub lsn: Lsn,
    /// Per origin, what it covers.
    pub vector: Vector,
    /// The greatest commit time in it, microseconds.
    pub commit_time_max: u64,
}

impl Later {
    /// What a manifest tells.
    pub fn of(manifest: Manifest) -> Self {
        Self { lsn: manifest.lsn, vector: manifest.vector, commit_time_max: manifest.commit_time_max }
    }
}

/// Objects carry their time in whole seconds in some stores.
pub const STORE_TIME_GRAIN_US: u64 = 1_000_000;

/// True when what the store had at one time was there at another, by the store's clock.
pub fn is_proven(held_by_us: u64, until_us: u64) -> bool {
    held_by_us.saturating_add(STORE_TIME_GRAIN_US) <= until_us
}

/// The last checkpoint of a replica that holds nothing newer than a time, microseconds; the last of all
/// without one. Nothing newer: by the commit times, or because the store had it by then, which tells when
/// the clock that stamped them was ahead. One that cannot be read is passed by while there is an older
/// one: the log behind that one leads past it, and whoever reads the log sees when it does not.
///
/// # Errors
/// When none of those that would do can be read.
pub async fn newest_base(
    bucket: &Bucket,
    owner: Owner,
    folder: &Folder,
    until_us: Option<u64>,
) -> Result<Newest, HistoryError> {
    let mut newest = Newest::default();
    let mut unreadable = None;
    for lsn in folder.manifests.iter().rev() {
        let key = layout::manifest(owner.keyspace, owner.shard, owner.replica, *lsn);
        let would_do = |manifest: &Manifest| {
            until_us
                .is_none_or(|until| manifest.commit_time_max <= until || is_proven(folder.times.held_by(*lsn), until))
        };
        match manifest_at(bucket, &key).await {
            Ok(base) if would_do(&base.manifest) => {
                newest.base = Some(base);
                newest.later.reverse();
                return Ok(newest);
            }
            Ok(Base { manifest, .. }) => newest.later.push(Later::of(manifest)),
            Err(HistoryError::Bucket(error)) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "a checkpoint cannot be read; the one before it is used");
                unreadable.get_or_insert(error);
            }
        }
    }
    newest.later.reverse();
    unreadable.map_or(Ok(newest), Err)
}

/// True when a log goes on at this chunk behind what another replica of the shard has shipped: what lies
/// before it need not be in the same folder.
pub fn goes_on_behind_another(chunk: &Chunk) -> bool {
    chunk.says().behind_another
}

/// [`goes_on_behind_another`] of the first chunk in a folder.
///
/// # Errors
/// When it cannot be read.
pub async fn begins_behind_another(bucket: &Bucket, owner: Owner, folder: &Folder) -> Result<bool, HistoryError> {
    let Some(first) = folder.chunks.first() else { return Ok(false) };
    Ok(chunk_at(bucket, owner, *first).await?.is_some_and(|(chunk, _)| goes_on_behind_another(&chunk)))
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
