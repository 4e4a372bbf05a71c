//! A shard runs through random histories and is restored at random points in time: the result
//! equals that of a model, or the restore is refused; no write is lost silently.
//!
//! Clocks run ahead, behind, and are corrected; nodes leave and return, restart, or are given up;
//! the shipping replica changes; tombstones are forgotten; the shard gives keys away. The store has
//! a clock of its own. `VASTO_MOMENTS` sets the number of histories, `VASTO_MOMENTS_SEED` the seed
//! of the first.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::block_in_place;
use vasto_core::Band;
use vasto_core::catalog::GivenUp;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::{CatalogVersion, Epoch, Lsn, ReplicaId, ShardId};
use vasto_core::record::{BandRange, RangeState, Record};
use vasto_shipping::Bucket;
use vasto_shipping::archive::manifest_at;
use vasto_testkit::{Numbers, setting};

use super::dated::Dated;
use super::replication::{member, pull};
use super::restore::{bootstrap_into, restore_from};
use super::shipping::Shipping;
use super::support::*;
use crate::build::sources::Without;
use crate::build::{Adoption, Log};
use crate::replica::Replica;
use crate::replica::command::Control;
use crate::ship::Assignment;

const SECOND: u64 = 1_000_000;
const HOUR: Duration = Duration::from_secs(3_600);
/// Largest difference between good clocks, with a margin.
const SLACK: u64 = 10 * SECOND;

/// One acknowledged write.
#[derive(Debug, Clone)]
struct Write {
    key: String,
    /// The value; `None` deletes.
    value: Option<String>,
    event_time: u64,
    /// The replica that accepted the write, the time of that, and the commit time.
    by: ReplicaId,
    at: u64,
    commit_time: u64,
}

struct Node {
    rig: Rig,
    /// Open replica; `None` only during a restart.
    open: Option<Replica>,
    present: bool,
    offset: i64,
    /// Writes that the replica holds.
    holds: BTreeSet<usize>,
    /// Writes whose records are in the replica's log as they were written.
    whole: BTreeSet<usize>,
}

impl Node {
    fn replica(&self) -> &Replica {
        self.open.as_ref().unwrap()
    }

    fn close(&mut self) {
        let replica = self.open.take().unwrap();
        block_in_place(|| self.rig.close(replica));
    }
}

/// Writes that a replica has shipped.
#[derive(Default, Clone)]
struct InBucket {
    holds: BTreeSet<usize>,
    /// Writes whose records were shipped as they were written, and since when.
    whole: BTreeMap<usize, u64>,
}

struct World {
    numbers: Numbers,
    now: u64,
    store: Arc<Dated>,
    bucket: Bucket,
    /// Nodes in the order of preference.
    nodes: Vec<Node>,
    writes: Vec<Write>,
    shipped: BTreeMap<ReplicaId, InBucket>,
    given_up: Vec<GivenUp>,
    version: CatalogVersion,
    next_replica: u64,
    /// Time when the shard gave keys away.
    resized: Option<u64>,
    story: Vec<String>,
    restored: u32,
    refused: u32,
    planted: Planted,
    /// The deviation found.
    wrong: Option<String>,
}

/// Planted fault, which the model must detect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// The restore does not know which losses were accepted.
    GivenUpIsForgotten,
    /// The store does not report when it got an object: only commit times are known.
    StampsAreBelieved,
}

impl World {
    fn new(seed: u64, planted: Planted) -> Self {
        let store = Dated::new(START_US);
        store.date_after_now(planted == Planted::StampsAreBelieved);
        let mut world = Self {
            numbers: Numbers::new(seed),
            now: START_US,
            bucket: store.bucket(),
            store,
            nodes: Vec::new(),
            writes: Vec::new(),
            shipped: BTreeMap::new(),
            given_up: Vec::new(),
            version: CatalogVersion(1),
            next_replica: 3,
            resized: None,
            story: vec![format!("seed {seed}")],
            restored: 0,
            refused: 0,
            planted,
            wrong: None,
        };
        for id in 1..=2 {
            let rig = member(id);
            let replica = block_in_place(|| rig.create());
            world.nodes.push(Node {
                rig,
                open: Some(replica),
                present: true,
                offset: 0,
                holds: BTreeSet::new(),
                whole: BTreeSet::new(),
            });
        }
        world
    }

    fn note(&mut self, what: String) {
        self.story.push(format!("{:8.1} s: {what}", (self.now - START_US) as f64 / SECOND as f64));
    }

    fn set_clocks(&self) {
        self.store.set(self.now);
        for node in &self.nodes {
            node.rig.clock.set(self.now.saturating_add_signed(node.offset));
        }
    }

    fn present(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|at| self.nodes[*at].present).collect()
    }

    /// Returns the node that serves and ships: the first that is present.
    fn acting(&self) -> usize {
        self.present()[0]
    }

    fn pass(&mut self, us: u64) {
        self.now += us;
        self.set_clocks();
    }

    fn write(&mut self, at: usize) {
        let key = format!("k{:02}", self.numbers.below(12));
        let moved =
            self.resized.is_some() && jump(partition_hash(key.as_bytes()), 2).shard != ShardId(0);
        if moved {
            return;
        }
        let value = (self.numbers.below(4) > 0).then(|| format!("v{}", self.writes.len()));
        let op = value.as_deref().map_or_else(|| delete(&key), |value| put(&key, value));
        let node = &mut self.nodes[at];
        let event_time = applied_at(block_in_place(|| write_one(node.replica(), op)));
        let index = self.writes.len();
        node.holds.insert(index);
        node.whole.insert(index);
        let by = node.replica().id;
        let commit_time = block_in_place(|| last_record(node.replica()).commit_time);
        self.note(format!(
            "{by} takes {index}: {key} = {value:?} at {event_time}, stamped {commit_time}"
        ));
        self.writes.push(Write { key, value, event_time, by, at: self.now, commit_time });
        self.pass(1_000);
    }

    fn pull(&mut self, to: usize, from: usize) {
        block_in_place(|| pull(self.nodes[to].replica(), self.nodes[from].replica()));
        let (theirs, their_whole) =
            (self.nodes[from].holds.clone(), self.nodes[from].whole.clone());
        let mine = &self.nodes[to].holds;
        let loses = |index: &usize| {
            let write = &self.writes[*index];
            mine.iter()
                .map(|other| &self.writes[*other])
                .any(|other| other.key == write.key && other.event_time > write.event_time)
        };
        let whole: Vec<usize> = theirs
            .difference(mine)
            .copied()
            .filter(|index| their_whole.contains(index) && !loses(index))
            .collect();
        self.nodes[to].whole.extend(whole);
        self.nodes[to].holds.extend(theirs);
    }

    /// Lets each present node pull from every other.
    fn replicate(&mut self) {
        let present = self.present();
        for _ in 0..2 {
            for to in &present {
                for from in present.iter().filter(|from| *from != to) {
                    self.pull(*to, *from);
                }
            }
        }
    }

    fn shipping(&self, at: usize) -> Shipping {
        let node = &self.nodes[at];
        let shipping =
            Shipping::start(&node.rig, &node.rig.path, node.replica(), &self.bucket, HOUR);
        shipping.handle.assign(if at == 0 { Assignment::Preferred } else { Assignment::StandIn });
        shipping
    }

    async fn ship(&mut self, at: usize, checkpoint: bool) {
        let shipping = self.shipping(at);
        shipping.handle.log().await.unwrap();
        if checkpoint {
            shipping.handle.checkpoint(None).await.unwrap();
        }
        shipping.stop().await;
        let node = &self.nodes[at];
        let (id, holds, whole) = (node.replica().id, node.holds.clone(), node.whole.clone());
        let in_bucket = self.shipped.entry(id).or_default();
        in_bucket.holds.extend(holds);
        for index in whole {
            in_bucket.whole.entry(index).or_insert(self.now);
        }
        self.note(format!("{id} ships{}", if checkpoint { " a checkpoint" } else { "" }));
    }

    fn apply_catalog(&mut self) {
        self.version = CatalogVersion(self.version.0 + 1);
        let (epoch, version) = (Epoch(self.version.0), self.version);
        for at in self.present() {
            let replica = self.nodes[at].replica();
            let order = Control::ApplyCatalog { epoch, version, role: replica.view().role };
            block_in_place(|| control(replica, order)).unwrap();
        }
    }

    fn restart(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.close();
        let began = Instant::now();
        node.open = loop {
            match block_in_place(|| node.rig.open(&node.rig.path, false)) {
                Ok(replica) => break Some(replica),
                // The last poll of a stopped shipper may still run.
                Err(error) => assert!(began.elapsed() < DEADLINE, "{error}"),
            }
            std::thread::park_timeout(Duration::from_millis(2));
        };
        let id = self.nodes[at].replica().id;
        self.note(format!("{id} restarts"));
    }

    /// Runs a gc floor round: all promise, all hold all, the floor is logged, and tombstones that
    /// it covers are removed.
    fn collect(&mut self) {
        if self.present().len() < self.nodes.len() {
            return;
        }
        self.replicate();
        let clocks = self.nodes.iter().map(|node| self.now.saturating_add_signed(node.offset));
        let floor = clocks.min().unwrap().saturating_sub(SECOND);
        let acting = self.acting();
        block_in_place(|| {
            for node in &self.nodes {
                control(node.replica(), Control::FenceCommitTime { commit_time: floor }).unwrap();
            }
        });
        self.replicate();
        block_in_place(|| control(self.nodes[acting].replica(), Control::GcFloor { floor }))
            .unwrap();
        self.replicate();
        for node in &self.nodes {
            block_in_place(|| {
                node.replica().engine().flush().unwrap();
                node.replica().engine().compact_all();
            });
        }
        self.note(format!("deletes until {floor} are forgotten"));
    }

    /// Gives up a node that is away: the serving node takes over what that node had shipped, or
    /// not. A new replica takes its place.
    async fn give_up(&mut self) {
        let Some(at) = (0..self.nodes.len()).find(|at| !self.nodes[*at].present) else { return };
        let mut lost = self.nodes.remove(at);
        let id = lost.replica().id;
        lost.close();
        drop(lost);
        let acting = self.acting();
        if self.numbers.below(2) == 0 && self.shipped.contains_key(&id) {
            let node = &self.nodes[acting];
            let dir = memory_dir();
            let bootstrap = bootstrap_into(&node.rig, &self.bucket, dir.path());
            let shards = if self.resized.is_some() { 2 } else { 1 };
            if bootstrap.join_what_was_shipped(node.replica(), id, shards).await.is_ok() {
                let taken = self.shipped[&id].holds.clone();
                self.nodes[acting].holds.extend(taken);
                self.note(format!("what {id} had shipped is taken over"));
            }
        }
        self.apply_catalog();
        self.given_up.push(GivenUp { replica: id, version: self.version });
        self.note(format!("{id} is given up"));
        self.copy().await;
    }

    /// Adds a replica from a checkpoint of the serving replica.
    async fn copy(&mut self) {
        let acting = self.acting();
        self.ship(acting, true).await;
        let shipping = self.shipping(acting);
        let pinned = shipping.handle.checkpoint(None).await.unwrap();
        shipping.stop().await;
        let id = ReplicaId(self.next_replica);
        self.next_replica += 1;
        let shards = if self.resized.is_some() { 2 } else { 1 };
        let rig = Rig::of(ShardId(0), id, shards, RangeState::Owned);
        let owned: BandRange = Band::owned(shards).into();
        let (version, epoch) = (self.version, Epoch(self.version.0));
        let adoption = Adoption { keyspace: KEYSPACE, replica: id, owned, version, epoch };
        let base = manifest_at(&self.bucket, &pinned.key).await.unwrap();
        let bootstrap = bootstrap_into(&rig, &self.bucket, &rig.path);
        bootstrap.take(&base, adoption, Log::Replicate).await.unwrap();
        let replica = block_in_place(|| rig.open(&rig.path, true)).unwrap();
        let holds = self.nodes[acting].holds.clone();
        self.nodes.push(Node {
            rig,
            open: Some(replica),
            present: true,
            offset: 0,
            holds,
            whole: BTreeSet::new(),
        });
        self.set_clocks();
        self.note(format!("{id} is made"));
    }

    /// Makes the shard one of two: keys of the other shard are given away.
    fn resize(&mut self) {
        if self.resized.is_some() || self.present().len() < self.nodes.len() {
            return;
        }
        self.replicate();
        let (all, left) = (Band::owned(1), Band::owned(2));
        let range = BandRange { first: *all.start(), last: Band(left.start().0 - 1) };
        for node in &self.nodes {
            block_in_place(|| set_range(node.replica(), range, RangeState::Leaving));
        }
        self.resized = Some(self.now);
        self.pass(SECOND);
        self.note("the shard gives keys away".into());
    }

    /// Returns the winner of these writes, by key.
    fn winners(&self, of: impl Iterator<Item = usize>) -> BTreeMap<&str, &Write> {
        let mut winners: BTreeMap<&str, &Write> = BTreeMap::new();
        for index in of {
            let write = &self.writes[index];
            let winner = winners.entry(&write.key).or_insert(write);
            if winner.event_time < write.event_time {
                *winner = write;
            }
        }
        winners
    }

    /// Returns the writes that a restore to a point in time must contain unless it is refused.
    fn required(&self, at: Option<u64>) -> BTreeSet<usize> {
        let given_up = |id: &ReplicaId| self.given_up.iter().any(|lost| lost.replica == *id);
        let counted: Vec<&InBucket> = self
            .shipped
            .iter()
            .filter(|(id, _)| !given_up(id))
            .map(|(_, shipped)| shipped)
            .collect();
        let Some(until) = at else {
            return counted.iter().flat_map(|shipped| &shipped.holds).copied().collect();
        };
        let mut whole: BTreeMap<usize, u64> = BTreeMap::new();
        for (index, held) in counted.iter().flat_map(|shipped| &shipped.whole) {
            let first = whole.entry(*index).or_insert(*held);
            *first = (*held).min(*first);
        }
        // A clock that is ahead by less than a write waited to be shipped goes undetected, and so
        // do the writes after it.
        let hides = |write: &Write, held: u64| {
            write.commit_time > until && write.commit_time <= held + SLACK
        };
        let mut hidden = BTreeSet::new();
        let mut required = BTreeSet::new();
        for (index, held) in whole {
            let write = &self.writes[index];
            if write.at + SLACK > until || hidden.contains(&write.by) {
                continue;
            }
            if hides(write, held) {
                hidden.insert(write.by);
            } else {
                required.insert(index);
            }
        }
        required
    }

    async fn restore(&mut self, at: Option<u64>) {
        // The present nodes ship first.
        self.replicate();
        let acting = self.acting();
        let checkpoint = self.numbers.below(2) == 0;
        self.ship(acting, checkpoint).await;
        let shards = match (self.resized, at) {
            (Some(resized), Some(at)) if at < resized => 1,
            (Some(_), _) => 2,
            (None, _) => 1,
        };
        // A point in time during the resize belongs to neither shape.
        if self
            .resized
            .zip(at)
            .is_some_and(|(resized, at)| at.abs_diff(resized) < 2 * 3_600 * SECOND)
        {
            return;
        }
        let forgotten = self.planted == Planted::GivenUpIsForgotten;
        let without = Without {
            given_up: if forgotten { &[] } else { &self.given_up },
            ..Without::default()
        };
        let restored =
            restore_from(&self.nodes[acting].rig, &self.bucket, without, shards, at).await;
        let restored = match restored {
            Ok(restored) => restored,
            Err(error) => {
                self.refused += 1;
                self.note(format!("refused at {at:?}: {error}"));
                if at.is_none() {
                    self.wrong = Some(format!("a restore of everything is refused: {error}"));
                }
                return;
            }
        };
        self.restored += 1;
        let everything: BTreeSet<usize> =
            self.shipped.values().flat_map(|shipped| &shipped.holds).copied().collect();
        let required = self.required(at);
        let may_be_in = |write: &Write| {
            at.is_none_or(|until| write.at <= until + SLACK || write.commit_time <= until)
        };
        let allowed: Vec<&Write> = everything
            .iter()
            .map(|index| &self.writes[*index])
            .filter(|write| may_be_in(write))
            .collect();
        let winners = self.winners(required.iter().copied());
        let mut wrong = Vec::new();
        for n in 0..12 {
            let key = format!("k{n:02}");
            if shards == 2 && jump(partition_hash(key.as_bytes()), 2).shard != ShardId(0) {
                continue;
            }
            let got = restored.get(&key);
            let winner = winners.get(key.as_str()).copied();
            let event_time = winner.map_or(0, |write| write.event_time);
            let expected = winner.and_then(|write| write.value.clone());
            let later = allowed.iter().any(|write| {
                write.key == key && write.event_time >= event_time && write.value == got
            });
            if got != expected && !later {
                wrong.push(format!("{key}: {got:?} instead of {expected:?} ({winner:?})"));
            }
        }
        restored.close().await;
        if !wrong.is_empty() {
            self.wrong =
                Some(format!("restored at {at:?} with {shards} shards:\n{}", wrong.join("\n")));
        }
        self.note(format!("restored at {at:?}"));
    }

    async fn step(&mut self) {
        match self.numbers.below(100) {
            0..30 => {
                let acting = self.acting();
                self.write(acting);
            }
            30..36 => {
                let present = self.present();
                let at = self.numbers.of(&present);
                self.write(at);
            }
            36..48 => self.replicate(),
            48..58 => {
                let acting = self.acting();
                self.ship(acting, false).await;
            }
            58..62 => {
                let acting = self.acting();
                self.ship(acting, true).await;
            }
            62..72 => {
                let long = if self.numbers.below(20) == 0 { 4 * 3_600 } else { 120 };
                let us = self.numbers.of(&[SECOND, 20 * SECOND, long * SECOND]);
                self.pass(us);
            }
            72..77 => {
                let at = self.numbers.below(self.nodes.len() as u64) as usize;
                if self.present() != [at] {
                    self.nodes[at].present = !self.nodes[at].present;
                    let (id, present) = (self.nodes[at].replica().id, self.nodes[at].present);
                    self.note(format!("{id} is {}", if present { "back" } else { "away" }));
                    if present {
                        self.replicate();
                    }
                }
            }
            77..82 => {
                let at = self.numbers.below(self.nodes.len() as u64) as usize;
                let second = SECOND as i64;
                self.nodes[at].offset = self.numbers.of(&[
                    0,
                    second,
                    -second,
                    600 * second,
                    3_600 * second,
                    -3_600 * second,
                ]);
                let (id, offset) = (self.nodes[at].replica().id, self.nodes[at].offset / second);
                self.note(format!("the clock of {id} is {offset} s ahead"));
                self.set_clocks();
            }
            82..85 => {
                let present = self.present();
                let at = self.numbers.of(&present);
                self.restart(at);
            }
            85..88 => self.collect(),
            88..90 => self.give_up().await,
            90..91 => self.resize(),
            91..94 => self.restore(None).await,
            _ => {
                let past = self.now - START_US;
                let at = START_US + self.numbers.below(past.max(1));
                self.restore(Some(at)).await;
            }
        }
    }

    /// Runs a history; returns the numbers of restores and of refusals, or the deviation found.
    async fn run_history(seed: u64, planted: Planted) -> Result<(u32, u32), String> {
        let mut world = Self::new(seed, planted);
        for step in 0..=120 {
            match step {
                120 => world.restore(None).await,
                _ => world.step().await,
            }
            if world.wrong.is_some() {
                break;
            }
        }
        for mut node in world.nodes.drain(..) {
            node.close();
        }
        match world.wrong {
            Some(wrong) => Err(format!("{wrong}\n{}", world.story.join("\n"))),
            None => Ok((world.restored, world.refused)),
        }
    }
}

/// Returns the last record of a log.
fn last_record(replica: &Replica) -> Record {
    control(replica, Control::Sync).unwrap();
    let mut reader = replica.log().reader(Lsn(replica.applied_lsn().0 - 1)).unwrap();
    Record::decode(&reader.next_batch(1).unwrap()[0].1).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_at_any_moment_is_what_was_there_or_is_refused() {
    let (histories, first) = (setting("VASTO_MOMENTS", 12), setting("VASTO_MOMENTS_SEED", 1));
    let (mut restored, mut refused) = (0, 0);
    for seed in first..first + histories {
        let (restores, refusals) = World::run_history(seed, Planted::Nothing)
            .await
            .unwrap_or_else(|wrong| panic!("{wrong}"));
        (restored, refused) = (restored + restores, refused + refusals);
    }
    println!("{histories} histories from seed {first}: {restored} restored, {refused} refused");
    assert!(restored > refused / 4, "too little is restored: {restored}, and {refused} refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_model_notices_a_wrong_restore() {
    for planted in [Planted::GivenUpIsForgotten, Planted::StampsAreBelieved] {
        let mut seed = 1;
        let wrong = loop {
            assert!(seed < 200, "nobody notices {planted:?}");
            match World::run_history(seed, planted).await {
                Err(wrong) => break wrong,
                Ok(_) => seed += 1,
            }
        };
        println!(
            "{planted:?} is noticed in history {seed}: {}",
            wrong.lines().take(2).collect::<Vec<_>>().join(" ")
        );
    }
}
