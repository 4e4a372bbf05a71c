//! The archives of a shard that a replica is built from.
//!
//! **Invariant:** the sources are chosen once and the choice is stored on disk, whatever is shipped
//! meanwhile.

mod candidates;
mod stored;

use vasto_core::catalog::{GivenUp, Retirement};
use vasto_core::ids::{Lsn, ReplicaId};
use vasto_shipping::archive::{ArchivedCheckpoint, Later, Times};
use vasto_shipping::layout::Owner;

pub(crate) use candidates::candidates;
pub(crate) use stored::chosen;

use super::chunks::ChunkReader;
use super::error::BuildError;

/// The archive of one replica of a shard.
#[derive(Debug, Clone)]
pub(crate) struct RestoreSource {
    /// The replica that owns the objects.
    pub owner: Owner,
    /// The checkpoint to begin with; `None` begins empty, with the first chunk.
    pub base: Option<ArchivedCheckpoint>,
    /// First LSNs of the listed chunks, ascending.
    pub chunks: Vec<Lsn>,
    /// Lower bound of the end of the shipped log.
    pub end: Lsn,
    /// Times at which the object store received the listed objects.
    pub times: Times,
    /// Checkpoints that hold something newer than the target time, ascending.
    pub later: Vec<Later>,
}

/// All archives from which a shard can be made, the best one first.
#[derive(Debug, Clone, Default)]
pub(crate) struct RestoreSources {
    /// The archives.
    pub all: Vec<RestoreSource>,
    /// The preferred replicas, then the replicas whose archives their logs continue, then those
    /// that these continue, and so on: their archives together hold the complete logs of the
    /// preferred replicas.
    pub chain: Vec<ReplicaId>,
    /// Archives of replicas whose loss was accepted before the checkpoint of the first source was
    /// made: that checkpoint should contain them. Read only when records are missing without them,
    /// because another log continues one of these archives.
    pub set_aside: Vec<RestoreSource>,
    /// The greatest commit time in the oldest checkpoint that is newer than the target time,
    /// microseconds.
    pub later_us: Option<u64>,
}

/// Replicas whose archives are ignored or treated apart.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Without<'a> {
    /// Targets of plans that were undone: their records were never part of the keyspace; the
    /// archives are ignored.
    pub discarded: &'a [ReplicaId],
    /// Replicas whose loss was accepted, each with the catalog version that did so. Shipped records
    /// that no other replica had taken over by then are given up. The archives come later in the
    /// order or are set aside.
    pub given_up: &'a [GivenUp],
    /// Retirements before the target time: the replicas that they concern belonged to an earlier
    /// shard with the same number; the archives are ignored.
    pub retirements: &'a [Retirement],
}

impl RestoreSource {
    /// Creates a source from a checkpoint alone, without a listing.
    pub(crate) fn of_base(owner: Owner, base: ArchivedCheckpoint) -> Self {
        let (chunks, end, times, later) = (Vec::new(), Lsn(0), Times::default(), Vec::new());
        Self { owner, base: Some(base), chunks, end, times, later }
    }

    /// Returns the LSN after which the log is read: that of the base checkpoint, which covers
    /// everything before.
    pub(super) fn start(&self) -> Lsn {
        self.base.as_ref().map_or(Lsn(0), |base| base.manifest.lsn)
    }
}

impl RestoreSources {
    /// Returns the archives that were set aside, because another log continues one of them before
    /// `first`.
    pub(super) fn take_up_set_aside(&self, first: Lsn) -> impl Iterator<Item = &RestoreSource> {
        self.set_aside.iter().inspect(move |source| {
            tracing::info!(
                keyspace = source.owner.keyspace.0,
                shard = source.owner.shard.0,
                replica = source.owner.replica.0,
                before = first.0,
                "what a replica has shipped whose loss was accepted is read: another log continues it"
            );
        })
    }
}

/// The log of a source that is being read.
pub(super) struct Reading<'a> {
    pub source: &'a RestoreSource,
    pub log: ChunkReader,
}

/// Why the reading of a log ended.
pub(super) enum Ended {
    /// The reader reached the end of the log.
    AtEnd,
    /// A record of an origin is missing before the chunk that begins with this LSN; another log may
    /// have it.
    Gap(Lsn),
}

impl<'a> Reading<'a> {
    /// Reads the log of a source after an LSN.
    pub(super) fn after(source: &'a RestoreSource, at: Lsn) -> Self {
        Self { source, log: ChunkReader::after(source.owner, source.chunks.clone(), at) }
    }

    /// Returns an error that names the first missing chunk when objects after the position were
    /// listed.
    pub(super) fn check_end(&self) -> Result<(), BuildError> {
        if self.log.at >= self.source.end {
            return Ok(());
        }
        Err(BuildError::chunk_gone(self.source.owner, self.log.at.next()))
    }
}
