//! Start of shipping at a replica: after the objects that the others of its shard have shipped.
//!
//! **Invariants**
//! - The log before its next chunk is in the bucket: every record by origin and own sequence in the
//!   archives of others, or in its own. Doubtful records are shipped again; where the log does not
//!   reach back far enough for that, a checkpoint comes first.
//! - The chunk names an object of the other replica as its predecessor, so that records that are
//!   not in this replica's own archive are not mistaken for a gap.

use std::collections::{BTreeMap, BTreeSet};

use vasto_core::ids::{Lsn, Origin, OwnSeq, ReplicaId, Vector, covers, join};
use vasto_core::limits::SHIPPED_READ_BYTES_MAX;
use vasto_core::record::Record;
use vasto_shipping::archive::{self, ArchiveError, Newest, ReplicaArchive};
use vasto_shipping::bucket::Bucket;
use vasto_shipping::layout::{self, Owner};

use super::context::ShipContext;
use super::error::{ShipError, blocking};
use crate::replica::Replica;

/// Bytes of the log per read.
const READ_BYTES: usize = 4 << 20;

/// Numbered records of a part of this replica's log, by origin, with their LSNs.
#[derive(Default)]
struct Logged(BTreeMap<Origin, (OwnSeq, Vec<Lsn>)>);

impl Logged {
    fn add(&mut self, record: &Record) {
        if record.own_seq.0 > 0 {
            let (_, lsns) = self.0.entry(record.origin).or_insert((record.own_seq, Vec::new()));
            lsns.push(record.lsn);
        }
    }

    /// Returns the part of a vector that lies before this part of the log.
    fn before(&self, vector: &Vector) -> Vector {
        let before = |(origin, seq): (&Origin, &OwnSeq)| {
            let seq = self.0.get(origin).map_or(*seq, |(first, _)| OwnSeq(first.0 - 1));
            (*origin, seq)
        };
        vector.iter().map(before).collect()
    }

    /// Returns the first record that a vector does not cover, and its origin.
    fn first_beyond(&self, held: &Vector) -> Option<(Lsn, Origin)> {
        let of = |(origin, (first, lsns)): (&Origin, &(OwnSeq, Vec<Lsn>))| {
            let next = held.get(origin).copied().unwrap_or_default().0 + 1;
            let at = usize::try_from(next.saturating_sub(first.0)).ok()?;
            Some((*lsns.get(at)?, *origin))
        };
        self.0.iter().filter_map(of).min()
    }
}

/// The coverage of other replicas' archives.
#[derive(Default)]
struct Held {
    vector: Vector,
    /// True when any of the archives has a checkpoint.
    has_base: bool,
    /// Upload time and key of the last object of the replica that shipped last.
    last: Option<(u64, String, ReplicaId)>,
    /// Chunks after its checkpoint.
    chunks: u64,
}

/// The log of the replica that begins to ship.
#[derive(Clone, Copy)]
pub(super) enum OwnLog {
    /// Continues this replica's own archive, which covers the log up to this LSN.
    Behind(Lsn),
    /// Does not reach back to the end of this replica's own archive.
    Cut {
        /// The replica began with more than its log holds.
        began_full: bool,
    },
}

/// Where shipping continues.
pub(super) struct Place {
    /// LSN up to which the archives of others cover the log.
    pub(super) covered: Lsn,
    /// Key of the last object of the replica that shipped last.
    pub(super) previous: String,
    /// Chunks after the manifest of that replica.
    pub(super) chunks: u64,
}

/// Reads the archives of the others; returns where to continue after them, `None` when they are no
/// help.
///
/// # Errors
/// [`BinlogError::TooOld`](crate::binlog::BinlogError::TooOld) when the log is cut meanwhile.
pub(super) async fn find(context: &ShipContext, own: OwnLog) -> Result<Option<Place>, ShipError> {
    let replica = &context.replica;
    let mut archives =
        archive::archives(&context.bucket, replica.keyspace, replica.shard).await.map_err(odd)?;
    archives.remove(&replica.id);
    if archives.is_empty() {
        return Ok(None);
    }
    let position = replica.position().await?;
    // A replica whose records are not here, such as a target of a plan that was undone, is no help.
    archives.retain(|id, _| position.vector.keys().any(|origin| origin.replica == *id));
    let after = match own {
        OwnLog::Behind(shipped) => shipped,
        OwnLog::Cut { .. } => Lsn(replica.log().first_lsn().0 - 1),
    };
    let logged = logged(replica, after, position.lsn).await?;
    let before = match own {
        OwnLog::Behind(_) => Vector::new(),
        OwnLog::Cut { .. } => logged.before(&position.vector),
    };
    let held = held_by_others(&context.bucket, replica, archives, &logged, &before).await?;
    let next = logged
        .first_beyond(&held.vector)
        .map_or(position.lsn.next(), |(lsn, _)| lsn)
        .max(after.next());
    let is_help = match own {
        OwnLog::Behind(shipped) => next > shipped.next(),
        // The state that this replica began with is in no record.
        OwnLog::Cut { began_full } => held.has_base || !began_full,
    };
    let Some((_, previous, other)) = held.last.filter(|_| is_help && covers(&held.vector, &before))
    else {
        return Ok(None);
    };
    tracing::info!(
        keyspace = replica.keyspace.0,
        shard = replica.shard.0,
        replica = replica.id.0,
        behind = other.0,
        lsn = next.0,
        "shipping goes on behind what another replica has shipped"
    );
    Ok(Some(Place { covered: Lsn(next.0 - 1), previous, chunks: held.chunks }))
}

/// Returns where the records after `after` are in the log, up to `last`.
async fn logged(replica: &Replica, after: Lsn, last: Lsn) -> Result<Logged, ShipError> {
    let log = replica.log().clone();
    blocking(move || {
        let mut records = Logged::default();
        let mut reader = log.reader(after)?;
        while reader.position() < last {
            let batch = reader.next_batch(READ_BYTES)?;
            if batch.is_empty() {
                break;
            }
            for (lsn, bytes) in &batch {
                let record = Record::decode(bytes)
                    .map_err(|error| ShipError::Checkpoint(error.to_string()))?;
                if *lsn <= last {
                    records.add(&record);
                }
            }
        }
        Ok::<_, ShipError>(records)
    })
    .await
}

/// Returns the coverage of the other archives of the shard, as far as it is needed to find the
/// first record that is missing there. Too little of it costs a repeated upload, or a checkpoint.
async fn held_by_others(
    bucket: &Bucket,
    replica: &Replica,
    archives: BTreeMap<ReplicaId, ReplicaArchive>,
    logged: &Logged,
    before: &Vector,
) -> Result<Held, ShipError> {
    let mut held = Held::default();
    let mut left = SHIPPED_READ_BYTES_MAX;
    for (id, archive) in archives {
        let owner = Owner { keyspace: replica.keyspace, shard: replica.shard, replica: id };
        let from_the_start = archive.chunks.first() == Some(&Lsn(1));
        let newest = match archive::newest_checkpoint(bucket, owner, &archive, None).await {
            Err(ArchiveError::Bucket(error)) => return Err(error.into()),
            Err(_) if from_the_start => Newest::default(),
            Err(_) => continue, // it cannot be read by others either
            Ok(newest) => newest,
        };
        let leads_back = newest.base.is_some()
            || from_the_start
            || archive::begins_behind_another(bucket, owner, &archive).await.map_err(odd)?;
        if !leads_back {
            continue;
        }
        let start = newest.base.as_ref().map_or(Lsn(0), |base| base.manifest.lsn);
        if let Some(base) = &newest.base {
            held.vector = join(&held.vector, &base.manifest.vector);
            held.has_base = true;
        }
        let after_base = archive.chunks.partition_point(|first| *first <= start);
        let mut origins_read = BTreeSet::new();
        for first in archive.chunks[after_base..].iter().rev() {
            let beyond = logged.first_beyond(&held.vector);
            let is_enough = beyond.is_none_or(|(_, origin)| origins_read.contains(&origin))
                && covers(&held.vector, before);
            if is_enough || left == 0 {
                break;
            }
            let read = archive::chunk_after(bucket, owner, &[], Lsn(first.0 - 1)).await;
            let Some((chunk, bytes)) = read.map_err(odd)? else { continue };
            left = left.saturating_sub(bytes);
            let vector = chunk.vector();
            held.vector = join(&held.vector, &vector);
            origins_read.extend(vector.into_keys());
        }
        let last_chunk = archive.chunks.last().filter(|first| **first > start).map(|first| {
            let key = layout::chunk(owner.keyspace, owner.shard, owner.replica, *first);
            (archive.times.chunks.get(first).copied().unwrap_or_default(), key)
        });
        let last = last_chunk.or_else(|| {
            let base = newest.base.as_ref()?;
            Some((
                archive.times.manifests.get(&base.manifest.lsn).copied().unwrap_or_default(),
                base.key.clone(),
            ))
        });
        if let Some((at, key)) = last
            && held.last.as_ref().is_none_or(|(latest, ..)| *latest <= at)
        {
            held.last = Some((at, key, id));
            held.chunks = (archive.chunks.len() - after_base) as u64;
        }
    }
    Ok(held)
}

fn odd(error: ArchiveError) -> ShipError {
    match error {
        ArchiveError::Bucket(error) => error.into(),
        other => ShipError::Checkpoint(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_core::ids::{Epoch, Incarnation};
    use vasto_core::record::Body;

    fn origin(replica: u64) -> Origin {
        Origin { replica: ReplicaId(replica), incarnation: Incarnation(1) }
    }

    fn logged(records: &[(u64, u64, u64)]) -> Logged {
        let mut logged = Logged::default();
        for (lsn, replica, own_seq) in records {
            logged.add(&Record {
                lsn: Lsn(*lsn),
                synced_lsn: Lsn(0),
                commit_time: 1,
                floor: 0,
                epoch: Epoch(1),
                origin: origin(*replica),
                own_seq: OwnSeq(*own_seq),
                body: Body::data(Vec::new()),
            });
        }
        logged
    }

    fn vector(all: &[(u64, u64)]) -> Vector {
        all.iter().map(|(replica, seq)| (origin(*replica), OwnSeq(*seq))).collect()
    }

    #[test]
    fn the_first_record_that_others_lack_is_found_whoever_took_it() {
        let logged =
            logged(&[(10, 1, 4), (11, 2, 7), (12, 1, 5), (13, 1, 6), (14, 2, 8), (15, 2, 0)]);
        let beyond = |held: &[(u64, u64)]| logged.first_beyond(&vector(held)).map(|(lsn, _)| lsn.0);
        assert_eq!(beyond(&[(1, 6), (2, 8)]), None);
        assert_eq!(beyond(&[(1, 5), (2, 8)]), Some(13));
        assert_eq!(beyond(&[(1, 9), (2, 7)]), Some(14));
        assert_eq!(beyond(&[(1, 6)]), Some(11), "an origin that nobody has heard of");
        // Records that the log no longer holds must be in the archives.
        let before = logged.before(&vector(&[(1, 6), (2, 8), (3, 2)]));
        assert_eq!(before, vector(&[(1, 3), (2, 6), (3, 2)]));
    }
}
