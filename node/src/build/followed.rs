//! A shard that received rows in a resize is built from the archives of its sources too, where its
//! own do not reach the seals.
//!
//! A target follows the logs of its sources until the commit, and ships what it takes from them when
//! its own turn comes. Until then a write that a source has acknowledged because the bucket had it is
//! in the source's archive alone.
//!
//! **Invariants**
//! - A source's log is read from where the shard's own archives say that they have it: an earlier
//!   record may have been deleted since, and its tombstone purged.
//! - A record of it that is missing is an error, never passed over.

use std::collections::BTreeMap;

use vasto_core::catalog::Quarantine;
use vasto_core::ids::{Lsn, ReplicaId, covers};
use vasto_core::record::{Body, FeedProgress};
use vasto_shipping::archive::{self, ArchivedCheckpoint};
use vasto_shipping::chunk::Chunk;
use vasto_shipping::layout::Owner;

use super::bootstrap::{Bootstrap, Log, tail_cursor};
use super::chunks::ChunkReader;
use super::error::BuildError;
use super::filter::ShardFilter;
use super::groups::apply_in_groups;
use super::sources::RestoreSources;
use crate::replica::Replica;
impl Bootstrap {
    /// Returns the replicas whose logs the shard has followed.
    pub(super) fn followed(&self) -> Vec<ReplicaId> {
        let sources = self.resized.iter().flat_map(|resized| &resized.sources);
        sources.map(|(source, _)| source.replica).collect()
    }

    /// Notes how far the records of a chunk, which are all here, had followed the sources. `key`
    /// returns the id that keys the cursor of an archive.
    pub(super) async fn note_followed(
        &self,
        replica: &Replica,
        chunk: &Chunk,
        key: fn(ReplicaId) -> ReplicaId,
    ) -> Result<(), BuildError> {
        let followed = self.followed();
        if followed.is_empty() {
            return Ok(());
        }
        let mut reached: BTreeMap<ReplicaId, Lsn> = BTreeMap::new();
        // A decoded chunk holds whole records only.
        for record in chunk.records().map_while(Result::ok) {
            let Body::Data { progress, .. } = record.body else { continue };
            for cursor in progress {
                if let FeedProgress::Tail(source, lsn) = cursor
                    && followed.contains(&source)
                {
                    let at = reached.entry(source).or_default();
                    *at = lsn.max(*at);
                }
            }
        }
        let mut news = Vec::new();
        for (source, lsn) in reached {
            if tail_cursor(replica, key(source))?.is_none_or(|held| held < lsn) {
                news.push(FeedProgress::Tail(key(source), lsn));
            }
        }
        if !news.is_empty() {
            replica.apply(Vec::new(), news).await?;
        }
        Ok(())
    }

    /// Takes what the sources of resizes have shipped and the archives of the shard, `read` to their
    /// ends, do not hold.
    ///
    /// # Errors
    /// `Gap` when a part of a source's log is missing.
    pub(crate) async fn take_from_sources(
        &self,
        replica: &Replica,
        read: &RestoreSources,
        shards: u32,
        log: Log,
    ) -> Result<(), BuildError> {
        let reached = self.progress.lock().reached.clone();
        let is_held = |base: &ArchivedCheckpoint| match log {
            Log::Replicate => covers(&replica.vector(), &base.manifest.vector),
            // All checkpoints are merged.
            Log::Fork { .. } => true,
        };
        for resized in &self.resized {
            let has_checkpoint = |target: ReplicaId| {
                let of_target = read.all.iter().filter(|source| source.owner.replica == target);
                of_target.filter_map(|source| source.base.as_ref()).any(is_held)
            };
            if resized.targets.iter().any(|target| is_covered(*target, &reached, has_checkpoint)) {
                continue;
            }
            for (source, seal) in &resized.sources {
                let filter = ShardFilter { shard: replica.shard, shards };
                self.take_rest(replica, *source, *seal, filter, log).await?;
            }
        }
        Ok(())
    }

    /// Takes the log of a source behind the position up to which the shard has followed it, up to its
    /// `seal`.
    async fn take_rest(
        &self,
        replica: &Replica,
        source: Owner,
        seal: Option<Lsn>,
        filter: ShardFilter,
        log: Log,
    ) -> Result<(), BuildError> {
        let key = log.cursor_of(source.replica);
        // Only one replica of each shard that gave rows was followed.
        let Some(cursor) = tail_cursor(replica, key)? else { return Ok(()) };
        if seal.is_some_and(|seal| cursor >= seal) {
            return Ok(());
        }
        let mut archives = archive::archives(&self.bucket, source.keyspace, source.shard).await?;
        let archived = archives.remove(&source.replica).unwrap_or_default();
        // What is acknowledged is listed by now; a source that ships on may never be caught up with.
        let listed = archived.chunks.last().copied().unwrap_or_default();
        let mut rest = ChunkReader::after(source, archived.chunks, cursor);
        let mut taken = 0;
        while seal.is_none_or(|seal| rest.at < seal) {
            let Some(chunk) = self.next_listed(&mut rest).await? else { break };
            if seal.is_none() && chunk.first_lsn > listed {
                break;
            }
            if !rest.gapless {
                return Err(BuildError::gap(source, chunk.first_lsn));
            }
            let entries = rest.entries(&chunk, filter);
            taken += entries.len();
            rest.at = chunk.last_lsn;
            let progress = vec![FeedProgress::Tail(key, chunk.last_lsn)];
            apply_in_groups(replica, entries, progress).await?;
            self.registry.report.notify_one();
        }
        tracing::info!(
            keyspace = replica.keyspace.0,
            shard = replica.shard.0,
            from = source.shard.0,
            source = source.replica.0,
            after = cursor.0,
            reached = rest.at.0,
            taken,
            "took what the source of a resize had shipped and this shard had not"
        );
        Ok(())
    }
}

/// Returns true when the archives that were read hold everything up to the seals: the log of a target
/// up to its LSN of then, or a checkpoint of a replica that came in its place. The log of such a one
/// may end before, behind the archive of another.
fn is_covered(
    (target, lsn): (ReplicaId, Lsn),
    reached: &[(ReplicaId, Lsn)],
    has_checkpoint: impl Fn(ReplicaId) -> bool,
) -> bool {
    reached.iter().any(|(read, at)| *read == target && *at >= lsn)
        && (lsn > Quarantine::ANY_MANIFEST || has_checkpoint(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_of_a_target_covers_the_seals_and_that_of_its_successor_does_not() {
        let (target, other) = (ReplicaId(3), ReplicaId(4));
        let reached = [(target, Lsn(40)), (other, Lsn(90))];
        let covered = |replica, lsn, has_checkpoint| {
            is_covered((replica, Lsn(lsn)), &reached, |_| has_checkpoint)
        };
        assert!(covered(target, 40, false));
        assert!(!covered(target, 41, true), "what was read ends before");
        assert!(!covered(other, 1, false), "only chunks of the successor were read");
        assert!(covered(other, 1, true));
        assert!(!covered(ReplicaId(5), 1, true), "nothing of it was read");
    }
}
