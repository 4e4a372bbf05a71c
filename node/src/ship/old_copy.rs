//! Detects a directory that was put back from an old copy by what the bucket holds of the replica.
//!
//! A replica without peers has no other replica that knows more of it than itself. It ships only
//! synced records, so its archive ends before its log does; when the archive reaches further, the
//! directory is not the one that has shipped it.
//!
//! **Invariant:** a listed object counts only once it was read whole and proves to be this
//! replica's. A bucket that does not answer, or a damaged object, keeps no replica from serving:
//! then the first object that is in the way of shipping reveals the old copy.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vasto_core::ids::Lsn;
use vasto_shipping::RetryBudget;
use vasto_shipping::archive::{self, ArchiveError};
use vasto_shipping::bucket::{Bucket, BucketError};
use vasto_shipping::layout::{self, Owner};

use crate::node_dir::{DirError, read_json, write_json};

/// How long a replica waits for the bucket before it opens without its answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Returns the error of a replica whose archive reaches further than its directory.
pub(crate) fn reason(held: Lsn, end: Lsn) -> String {
    let local_end = match end {
        Lsn(0) => "there is nothing of it here".to_owned(),
        end => format!("its log ends at record {end} here"),
    };
    format!(
        "{OLD_COPY}: the bucket holds this replica up to record {held}, and {local_end}; stop the node and put its \
         newer data directory back, or have another node take over what the bucket holds with `vasto node replace`"
    )
}

/// Prefix of that error.
pub(crate) const OLD_COPY: &str = "the data directory is an old copy";

/// The end of the log when the directory was refused.
#[derive(Serialize, Deserialize)]
struct Refused {
    end: Lsn,
    /// End of the log with the record of that opening: another end means another directory.
    opened: Lsn,
}

fn note_path(dir: &Path) -> PathBuf {
    dir.join("old-copy.json")
}

/// Records where the log of a refused directory ends: each opening adds a record to it, which is
/// now `opened`.
pub(crate) fn note(dir: &Path, end: Lsn, opened: Lsn) -> Result<(), DirError> {
    write_json(&note_path(dir), &Refused { end, opened })
}

/// Returns the end of the log before any refused opening, if it ends here as such an opening has
/// left it.
pub(crate) fn end_of(dir: &Path, end: Lsn) -> Result<Lsn, DirError> {
    let refused = read_json::<Refused>(&note_path(dir))?.filter(|refused| refused.opened == end);
    Ok(refused.map_or(end, |refused| refused.end))
}

/// Returns the end of the replica's archive if it is beyond the end of its log. `shipped` is the
/// replica's own record of what it has shipped. `None` also when the bucket does not answer in
/// time.
pub(crate) async fn held_beyond(
    bucket: &Bucket,
    owner: Owner,
    shipped: Lsn,
    end: Lsn,
) -> Option<Lsn> {
    let bucket = bucket.with_retry(RetryBudget::probe());
    match tokio::time::timeout(PATIENCE, archive_end_beyond(&bucket, owner, shipped, end)).await {
        Ok(Ok(held)) => held,
        Ok(Err(error)) => {
            tracing::info!(%error, keyspace = owner.keyspace.0, shard = owner.shard.0, "the bucket does not say what it holds of a replica; it serves");
            None
        }
        Err(_) => {
            tracing::info!(
                keyspace = owner.keyspace.0,
                shard = owner.shard.0,
                "the bucket is slow to say what it holds of a replica; it serves"
            );
            None
        }
    }
}

async fn archive_end_beyond(
    bucket: &Bucket,
    owner: Owner,
    shipped: Lsn,
    end: Lsn,
) -> Result<Option<Lsn>, BucketError> {
    let Owner { keyspace, shard, replica } = owner;
    let listed = bucket.list(&layout::checkpoint_prefix(keyspace, shard, replica)).await?;
    let newest = listed.iter().filter_map(|object| layout::parse_manifest_lsn(&object.key)).max();
    if let Some(newest) = newest.filter(|newest| *newest > end) {
        match archive::manifest_at(bucket, &layout::manifest(keyspace, shard, replica, newest))
            .await
        {
            Ok(_) => return Ok(Some(newest)),
            Err(ArchiveError::Bucket(error)) => return Err(error),
            Err(_) => {} // no evidence about this replica
        }
    }
    // Chunks are found by name: the next one begins after the last record of this one.
    let mut at = shipped;
    loop {
        match archive::chunk_after(bucket, owner, &[], at).await {
            Ok(Some((chunk, _))) if chunk.last_lsn > end => return Ok(Some(chunk.last_lsn)),
            Ok(Some((chunk, _))) => at = chunk.last_lsn,
            Err(ArchiveError::Bucket(error)) => return Err(error),
            Ok(None) | Err(_) => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_core::ids::{Epoch, Incarnation, KeyspaceId, Origin, OwnSeq, ReplicaId, ShardId};
    use vasto_core::record::{Body, KeyEntry, Record};
    use vasto_shipping::{BucketOptions, Chunk};

    const OWNER: Owner =
        Owner { keyspace: KeyspaceId(1), shard: ShardId(0), replica: ReplicaId(7) };

    fn record(lsn: u64) -> Record {
        Record {
            lsn: Lsn(lsn),
            synced_lsn: Lsn(lsn - 1),
            commit_time: 1_000 + lsn,
            floor: 0,
            epoch: Epoch(1),
            origin: Origin { replica: OWNER.replica, incarnation: Incarnation(1) },
            own_seq: OwnSeq(lsn),
            body: Body::data(vec![KeyEntry { key: b"k".to_vec(), entry: vec![1, 2] }]),
        }
    }

    async fn ship(bucket: &Bucket, first: u64, last: u64) {
        let chunk = Chunk {
            keyspace: OWNER.keyspace,
            shard: OWNER.shard,
            replica: OWNER.replica,
            first_lsn: Lsn(first),
            last_lsn: Lsn(last),
            previous: None,
            records: (first..=last).flat_map(|lsn| record(lsn).encode()).collect(),
        };
        bucket
            .create(
                &layout::chunk(OWNER.keyspace, OWNER.shard, OWNER.replica, Lsn(first)),
                chunk.encode(),
            )
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn an_archive_beyond_the_end_of_the_log_reveals_an_old_copy() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display());
        let bucket = Bucket::open(&url, &BucketOptions::default()).unwrap();
        let beyond = async |shipped, end| held_beyond(&bucket, OWNER, Lsn(shipped), Lsn(end)).await;
        assert_eq!(beyond(0, 0).await, None, "a new replica");
        ship(&bucket, 1, 50).await;
        ship(&bucket, 51, 90).await;
        assert_eq!(beyond(90, 90).await, None);
        assert_eq!(
            beyond(50, 95).await,
            None,
            "a crash came before it was noted that the last chunk is shipped"
        );
        assert_eq!(beyond(50, 60).await, Some(Lsn(90)));
        assert_eq!(beyond(0, 0).await, Some(Lsn(50)), "nothing is left of it here");
        // A foreign object under the name of a manifest is no evidence.
        let key = layout::manifest(OWNER.keyspace, OWNER.shard, OWNER.replica, Lsn(900));
        bucket.create(&key, bytes::Bytes::from_static(b"{}")).await.unwrap();
        assert_eq!(beyond(90, 95).await, None);
        // Nor is a damaged chunk.
        let key = layout::chunk(OWNER.keyspace, OWNER.shard, OWNER.replica, Lsn(91));
        bucket.create(&key, bytes::Bytes::from_static(b"VASTOCHK, but then noise")).await.unwrap();
        assert_eq!(beyond(90, 90).await, None);
    }
}
