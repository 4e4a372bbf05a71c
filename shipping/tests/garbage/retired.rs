//! What the replicas of a retired shard shipped stays for as long as a point in time before the
//! shrink can be restored, and goes afterwards.

use vasto_core::catalog::{Placed, RetiredReplica, Retirement, ShardPlacement};

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3_600);
const GONE: ShardId = ShardId(1);
/// Left the shard before it retired; no checkpoint of another replica covers what it shipped.
const MOVED: ReplicaId = ReplicaId(2);
/// Was in the shard when it retired.
const LAST: ReplicaId = ReplicaId(3);

/// The archive begins seven days ago.
const WEEK: Retention = Retention {
    keep_checkpoints: 1,
    keep_for: Duration::from_secs(7 * 24 * 3_600),
    min_age: Duration::ZERO,
};

fn days_ago_us(days: u32) -> u64 {
    now_us() - (days * DAY).as_micros() as u64
}

/// A keyspace of two shards, both with archives, that has shrunk to one.
struct Shrunk {
    dated: Dated,
    /// Of the retired shard.
    archives: Vec<String>,
}

impl Shrunk {
    /// `retired_at_us` is the time in the version that retired the shard. Everything in the bucket
    /// is nine days old.
    async fn new(retired_at_us: u64) -> Self {
        let mut dated = Dated::new().await;
        dated.rig.three_checkpoints().await;
        let mut next = dated.rig.catalog.next(days_ago_us(9), 2);
        next.next_replica = ReplicaId(4);
        next.retired.push(RetiredReplica {
            shard: GONE,
            replica: LAST,
            node: NodeId(1),
            plan: PlanId(1),
        });
        next.next_plan = PlanId(2);
        let retirement = Retirement {
            first: GONE,
            below: ReplicaId(4),
            version: next.version,
            at_us: retired_at_us,
        };
        next.retirements.push(retirement);
        dated.rig.write(next).await;
        let mut archives = archive(&dated.rig, MOVED, 1).await;
        archives.extend(archive(&dated.rig, LAST, 1_000).await);
        dated.age(9 * DAY).await;
        Self { dated, archives }
    }

    /// The quarantine has ended: the replica is removed for good.
    async fn remove_the_last_replica(&mut self) {
        let mut next = self.dated.rig.catalog.next(days_ago_us(9), 3);
        next.retired.clear();
        self.dated.rig.write(next).await;
        self.dated.age(9 * DAY).await;
    }

    fn set_age(&self, key: &str, days: u32) {
        self.dated.set(key, Dated::now() - days * DAY);
    }

    fn retirement_key(&self) -> String {
        layout::catalog_version(self.dated.rig.keyspace(), CatalogVersion(2))
    }

    /// Collects nothing; returns how many of the retired shard's objects would go.
    async fn would_go(&self) -> usize {
        let planned = collect(&self.dated.rig.bucket, WEEK, true).await.unwrap();
        self.archives.iter().filter(|key| planned.keys.contains(key)).count()
    }
}

/// Uploads a checkpoint and a chunk of a replica of the retired shard, with records of its own;
/// returns the keys.
async fn archive(rig: &Rig, replica: ReplicaId, own: u64) -> Vec<String> {
    let origin = Origin { replica, incarnation: Incarnation(1) };
    let (keyspace, lsn) = (rig.keyspace(), Lsn(10));
    let body = Bytes::from(format!("the rows of replica {replica}"));
    let sst = layout::sst(keyspace, GONE, replica, 1, "0000");
    let file = ManifestFile {
        key: sst.clone(),
        file_number: 1,
        bytes: body.len() as u64,
        crc32c: crc32c::crc32c(&body),
        level: 1,
        smallest_seqno: 1,
        largest_seqno: 2,
        first_key: vec![1],
        last_key: vec![2],
        entries: 1,
    };
    let manifest = Manifest {
        keyspace,
        shard: GONE,
        replica,
        incarnation: Incarnation(1),
        epoch: Epoch(1),
        version: CatalogVersion(1),
        lsn,
        vector: Vector::from([(origin, OwnSeq(own))]),
        event_time_max: 1,
        commit_time_max: 1,
        floor: 0,
        created_at_us: 1,
        nonce: 1,
        previous: None,
        range_states: Vec::new(),
        files: vec![file],
        ingested: None,
        database: None,
    };
    let record = Record {
        lsn: lsn.next(),
        synced_lsn: lsn,
        origin,
        own_seq: OwnSeq(own + 1),
        commit_time: 2,
        epoch: Epoch(1),
        floor: 0,
        body: Body::Data { entries: Vec::new(), results: Vec::new(), progress: Vec::new() },
    };
    let chunk = Chunk {
        keyspace,
        shard: GONE,
        replica,
        first_lsn: record.lsn,
        last_lsn: record.lsn,
        previous: None,
        records: record.encode(),
    };
    let keys = vec![
        sst,
        layout::manifest(keyspace, GONE, replica, lsn),
        layout::chunk(keyspace, GONE, replica, chunk.first_lsn),
    ];
    rig.put(&keys[0], body).await;
    rig.put(&keys[1], manifest.encode()).await;
    rig.put(&keys[2], chunk.encode()).await;
    keys
}

#[tokio::test]
async fn the_archives_of_a_retired_shard_stay_while_a_time_before_can_be_restored() {
    let mut shrunk = Shrunk::new(days_ago_us(9)).await;
    assert_eq!(shrunk.would_go().await, 0, "its last replica is kept, whatever has passed");
    shrunk.remove_the_last_replica().await;
    let (retirement, rig) = (shrunk.retirement_key(), &shrunk.dated.rig);
    assert_eq!(shrunk.would_go().await, 6, "from here on each condition counts alone");
    // The shard existed six days ago.
    shrunk.set_age(&retirement, 6);
    assert_eq!(shrunk.would_go().await, 0);
    shrunk.set_age(&retirement, 9);
    // The last replica shipped something six days ago.
    shrunk.set_age(&shrunk.archives[5], 6);
    assert_eq!(shrunk.would_go().await, 3, "only what left before");
    shrunk.set_age(&shrunk.archives[5], 9);
    // A survivor's checkpoint cannot be read.
    let manifest = layout::manifest(rig.keyspace(), SHARD, REPLICA, Lsn(30));
    let sound = std::fs::read(shrunk.dated.path(&manifest)).unwrap();
    std::fs::write(shrunk.dated.path(&manifest), "damaged").unwrap();
    assert_eq!(shrunk.would_go().await, 0);
    std::fs::write(shrunk.dated.path(&manifest), sound).unwrap();
    shrunk.set_age(&manifest, 9);
    // Afterwards exactly the retired shard goes.
    let survivor = layout::shard_prefix(rig.keyspace(), SHARD);
    collect(&rig.bucket, WEEK, false).await.unwrap();
    let left = rig.keys().await;
    assert!(left.iter().all(|key| key.starts_with(&survivor)), "{left:?}");
    assert!(left.contains(&rig.sst(4)) && left.contains(&manifest), "{left:?}");
    assert!(fsck(&rig.bucket, true).await.unwrap().is_clean());
}

/// The version that a restore picks is decided by the time in it, which is later here than that at
/// which the store received it.
#[tokio::test]
async fn a_clock_that_was_ahead_at_the_shrink_makes_no_archive_go_earlier() {
    let mut shrunk = Shrunk::new(days_ago_us(6)).await;
    shrunk.remove_the_last_replica().await;
    assert_eq!(shrunk.would_go().await, 0);
}

/// The checkpoints of the later shard say nothing of the records of the earlier one.
#[tokio::test]
async fn what_a_retired_shard_shipped_is_told_from_a_later_shard_with_the_same_number() {
    let mut shrunk = Shrunk::new(days_ago_us(9)).await;
    shrunk.remove_the_last_replica().await;
    let later = ReplicaId(4);
    let rig = &mut shrunk.dated.rig;
    let mut next = rig.catalog.next(days_ago_us(9), 4);
    next.placement
        .push(ShardPlacement::new(GONE, vec![Placed { replica: later, node: NodeId(1) }]));
    next.next_replica = ReplicaId(5);
    rig.write(next).await;
    let of_the_later = archive(rig, later, 1).await;
    shrunk.dated.age(9 * DAY).await;
    shrunk.set_age(&shrunk.retirement_key(), 6);
    assert_eq!(shrunk.would_go().await, 0);
    shrunk.set_age(&shrunk.retirement_key(), 9);
    assert_eq!(shrunk.would_go().await, 6);
    let rig = &shrunk.dated.rig;
    collect(&rig.bucket, WEEK, false).await.unwrap();
    let left = rig.keys().await;
    assert!(of_the_later.iter().all(|key| left.contains(key)), "{left:?}");
    assert!(shrunk.archives.iter().all(|key| !left.contains(key)), "{left:?}");
}

/// The log of a replica that has left its shard may lack its beginning, since gc removes it.
#[tokio::test]
async fn a_hole_at_the_beginning_of_a_retired_log_is_found_while_its_replica_is_kept() {
    let mut shrunk = Shrunk::new(days_ago_us(9)).await;
    let rig = &shrunk.dated.rig;
    let manifest = layout::manifest(rig.keyspace(), GONE, LAST, Lsn(10));
    rig.bucket.delete(&manifest).await.unwrap();
    let first = layout::chunk(rig.keyspace(), GONE, LAST, Lsn(1));
    assert_eq!(fsck(&rig.bucket, false).await.unwrap().missing, [first]);
    shrunk.remove_the_last_replica().await;
    assert!(fsck(&shrunk.dated.rig.bucket, false).await.unwrap().is_clean());
}
