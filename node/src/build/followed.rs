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

use vasto_core::ids::{Lsn, ReplicaId};
use vasto_core::record::{Body, FeedProgress};
use vasto_shipping::archive;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::layout::Owner;

use super::bootstrap::{Bootstrap, Log, tail_cursor};
use super::chunks::ChunkReader;
use super::error::BuildError;
use super::filter::ShardFilter;
use super::groups::apply_in_groups;
use crate::replica::Replica;

impl Bootstrap {
    /// Returns the replicas whose logs the shard has followed.
    pub(super) fn followed(&self) -> Vec<ReplicaId> {
        let sources = self.resized.iter().flat_map(|resized| &resized.sources);
        sources.map(|source| source.replica).collect()
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

    /// Takes what the sources of resizes have shipped and the archives of the shard, which have been
    /// read to their ends, do not hold.
    ///
    /// # Errors
    /// `Gap` when a part of a source's log is missing.
    pub(crate) async fn take_from_sources(
        &self,
        replica: &Replica,
        shards: u32,
        log: Log,
    ) -> Result<(), BuildError> {
        let reached = self.progress.lock().reached.clone();
        for resized in &self.resized {
            let is_covered = |(target, lsn): &(ReplicaId, Lsn)| {
                reached.iter().any(|(read, at)| read == target && at >= lsn)
            };
            if resized.targets.iter().any(is_covered) {
                continue;
            }
            for source in &resized.sources {
                self.take_rest(replica, *source, shards, log).await?;
            }
        }
        Ok(())
    }

    /// Takes the log of a source behind the position up to which the shard has followed it.
    async fn take_rest(
        &self,
        replica: &Replica,
        source: Owner,
        shards: u32,
        log: Log,
    ) -> Result<(), BuildError> {
        let key = log.cursor_of(source.replica);
        // Only one replica of each shard that gave rows was followed.
        let Some(cursor) = tail_cursor(replica, key)? else { return Ok(()) };
        let mut archives = archive::archives(&self.bucket, source.keyspace, source.shard).await?;
        let archived = archives.remove(&source.replica).unwrap_or_default();
        let filter = ShardFilter { shard: replica.shard, shards };
        let mut rest = ChunkReader::after(source, archived.chunks, cursor);
        let mut taken = 0;
        while let Some(chunk) = self.next_listed(&mut rest).await? {
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
