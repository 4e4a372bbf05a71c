//! A target that is lost with all its replicas right behind the commit: what its source had shipped
//! by then, and the target had not, is taken from the archive of the source.

use std::time::Duration;

use tokio::task::block_in_place;
use vasto_core::Band;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, ReplicaId, ShardId};
use vasto_core::record::{FeedProgress, KeyEntry, RangeState};
use vasto_shipping::Bucket;
use vasto_shipping::layout::Owner;

use super::restore::bootstrap_into;
use super::shipping::{Shipping, bucket};
use super::support::*;
use crate::build::sources::{self, Without};
use crate::build::{Adoption, BuildError, Log, Resized};
use crate::replica::{OpenOptions, Replica};

const HOUR: Duration = Duration::from_secs(3_600);
/// Shards after the grow: keys of the only shard move to the new one.
const AFTER: u32 = 2;
const NEW: ShardId = ShardId(1);

/// Returns keys that move.
fn moving(round: &str) -> Vec<String> {
    let moves = |key: &String| jump(partition_hash(key.as_bytes()), AFTER).shard == NEW;
    (0..).map(|i| format!("{round}{i}")).filter(moves).take(20).collect()
}

/// Ships the log of a replica to its end, behind a checkpoint if one is asked for.
async fn ship(rig: &Rig, replica: &Replica, bucket: &Bucket, checkpoint: bool) {
    replica.position().await.unwrap();
    let shipping = Shipping::start(rig, &rig.path, replica, bucket, HOUR);
    if checkpoint {
        shipping.handle.checkpoint(None).await.unwrap();
    }
    shipping.stop().await;
}

struct Grow {
    bucket: Bucket,
    source: (Rig, Replica),
    target: (Rig, Replica),
}

impl Grow {
    fn new() -> Self {
        let opened = |rig: Rig| {
            let replica = block_in_place(|| rig.create());
            (rig, replica)
        };
        Self {
            bucket: bucket(),
            source: opened(Rig::new()),
            target: opened(Rig::of(NEW, ReplicaId(2), AFTER, RangeState::Owned)),
        }
    }

    fn owner(&self) -> Owner {
        let source = &self.source.1;
        Owner { keyspace: KEYSPACE, shard: source.shard, replica: source.id }
    }

    /// Writes moving keys at the source, which ships them; returns them as its log has them, and its
    /// LSN.
    async fn written(&self, round: &str) -> (Vec<KeyEntry>, Lsn) {
        let (rig, source) = &self.source;
        let keys = moving(round);
        block_in_place(|| write(source, keys.iter().map(|key| put(key, round)).collect()));
        ship(rig, source, &self.bucket, false).await;
        let rows = data_rows(source).into_iter();
        let moved =
            rows.filter(|(stored, _)| keys.iter().any(|key| key.as_bytes() == &stored[1..]));
        let entries = moved.map(|(stored, entry)| KeyEntry { key: stored[1..].to_vec(), entry });
        (entries.collect(), source.settled_lsn())
    }

    /// Lets the target follow what is written; returns its LSN.
    async fn followed(&self, round: &str) -> Lsn {
        let (entries, lsn) = self.written(round).await;
        let progress = vec![FeedProgress::Tail(self.source.1.id, lsn)];
        self.target.1.apply(entries, progress).await.unwrap()
    }

    /// Returns the quarantine when the source seals now, in which the target covers everything from
    /// this LSN of its log on.
    fn resized(&self, lsn: Lsn) -> Vec<Resized> {
        let sources = vec![(self.owner(), Some(self.source.1.settled_lsn()))];
        vec![Resized { targets: vec![(self.target.1.id, lsn)], sources }]
    }

    /// Makes a replica of the lost target's shard from the bucket alone, in its place or of a new
    /// keyspace.
    async fn built(&self, log: Log, resized: Vec<Resized>) -> Result<(Rig, Replica), BuildError> {
        let rig = Rig::of(NEW, ReplicaId(20), AFTER, RangeState::Owned);
        let lost = self.target.1.id;
        let none = Without::default();
        let chosen = sources::candidates(&self.bucket, KEYSPACE, NEW, &[lost], none, None).await?;
        let mut bootstrap = bootstrap_into(&rig, &self.bucket, &rig.path);
        bootstrap.resized = resized;
        let keyspace = match log {
            Log::Replicate => KEYSPACE,
            Log::Fork { .. } => KeyspaceId(8),
        };
        let adoption = Adoption {
            keyspace,
            replica: rig.replica,
            owned: Band::owned(AFTER).into(),
            version: CatalogVersion(1),
            epoch: Epoch(1),
        };
        let base = chosen.all[0].base.as_ref().unwrap();
        bootstrap.take(base, adoption, log).await?;
        let opened = block_in_place(|| {
            Replica::open(OpenOptions { keyspace, ..rig.options(&rig.path, true) })
        });
        let replica = opened.unwrap();
        let taken = match log {
            Log::Replicate => bootstrap.join_all(&replica, &chosen, lost, AFTER).await,
            Log::Fork { .. } => bootstrap.merge_all(&replica, &chosen, AFTER, None).await,
        };
        let taken = match taken {
            Ok(()) => bootstrap.take_from_sources(&replica, &chosen, AFTER, log).await,
            Err(error) => Err(error),
        };
        match taken {
            Ok(()) => Ok((rig, replica)),
            Err(error) => {
                replica.stop().await;
                Err(error)
            }
        }
    }
}

/// A checkpoint of the target holds the first round, a chunk of it the second one, and only the
/// source has shipped the third one.
async fn lost_behind_the_commit() -> (Grow, Lsn) {
    let grow = Grow::new();
    grow.followed("base").await;
    let (rig, target) = &grow.target;
    ship(rig, target, &grow.bucket, true).await;
    grow.followed("logged").await;
    ship(rig, target, &grow.bucket, false).await;
    let committed = grow.followed("last").await;
    (grow, committed)
}

fn missing(replica: &Replica, round: &str) -> usize {
    let has = |key: &String| block_in_place(|| get(replica, key)).as_deref() == Some(round);
    moving(round).iter().filter(|key| !has(key)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_source_acknowledged_by_the_bucket_outlives_its_target() {
    let (grow, committed) = lost_behind_the_commit().await;
    let rows = data_rows(&grow.target.1);
    let end = grow.source.1.settled_lsn();
    for log in [Log::Replicate, Log::Fork { shards: AFTER, until_us: None }] {
        // The archive of the target alone, as the bucket has it.
        let (_rig, alone) = grow.built(log, Vec::new()).await.unwrap();
        let lost = ["base", "logged", "last"].map(|round| missing(&alone, round));
        assert_eq!(lost, [0, 0, 20], "{log:?}: what the test is about");
        let (_rig, whole) = grow.built(log, grow.resized(committed)).await.unwrap();
        assert_eq!(data_rows(&whole), rows, "{log:?}");
        let cursors = whole.tail_cursors().unwrap();
        assert!(cursors.iter().any(|(_, lsn)| *lsn == end), "{log:?}: {cursors:?}");
        // A target that has shipped everything up to the seals needs nothing of its sources.
        let (_rig, covered) = grow.built(log, grow.resized(Lsn(1))).await.unwrap();
        assert_eq!(data_rows(&covered), data_rows(&alone), "{log:?}");
        for replica in [alone, whole, covered] {
            replica.stop().await;
        }
    }
}

/// The source's log is read from where the target's archive says: what is before may be deleted
/// since, and its tombstone purged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_target_had_taken_is_not_taken_again() {
    for (first, gone) in [("logged", false), ("last", true)] {
        // The chunk of this round goes: the one behind the cursor is missed, an earlier one is not.
        let grow = Grow::new();
        grow.followed("base").await;
        let (rig, target) = &grow.target;
        ship(rig, target, &grow.bucket, true).await;
        let mut chunks = Vec::new();
        let mut committed = Lsn(0);
        for round in ["logged", "last", "later"] {
            chunks.push((round, grow.owner().chunk(grow.source.1.settled_lsn().next())));
            committed = grow.followed(round).await;
            if round == "logged" {
                ship(rig, target, &grow.bucket, false).await;
            }
        }
        let (_, key) = chunks.iter().find(|(round, _)| *round == first).unwrap();
        assert!(grow.bucket.head(key).await.unwrap().is_some(), "{key}");
        grow.bucket.delete(key).await.unwrap();
        let built = grow.built(Log::Replicate, grow.resized(committed)).await;
        match built {
            Ok((_rig, replica)) => {
                assert!(!gone && data_rows(&replica) == data_rows(target), "{first}");
                replica.stop().await;
            }
            Err(error) => assert!(gone && matches!(error, BuildError::Gap { .. }), "{error}"),
        }
    }
}

/// The source serves on. What it has shipped behind its seal is not taken, nor missed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_of_a_source_is_read_to_its_seal() {
    let (grow, committed) = lost_behind_the_commit().await;
    let rows = data_rows(&grow.target.1);
    let resized = grow.resized(committed);
    let hole = grow.owner().chunk(grow.source.1.settled_lsn().next());
    for round in ["hole", "behind"] {
        grow.written(round).await;
    }
    grow.bucket.delete(&hole).await.unwrap();
    let (_rig, replica) = grow.built(Log::Replicate, resized).await.unwrap();
    assert_eq!(data_rows(&replica), rows);
    replica.stop().await;
    // A resize that an older release has committed: the end is not known, and a hole is an error.
    let mut unknown = grow.resized(committed);
    unknown[0].sources[0].1 = None;
    let Err(error) = grow.built(Log::Replicate, unknown).await else {
        panic!("a hole is passed over")
    };
    assert!(matches!(error, BuildError::Gap { .. }), "{error}");
}
