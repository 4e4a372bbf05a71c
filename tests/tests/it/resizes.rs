//! A random walk: keyspaces with one, two and three replicas change their shard counts at random
//! under writers that record what was acknowledged, while nodes, the master and the bucket fail.
//!
//! A fault may undo a resize, which is asked for again then. Faults stop a while after each round
//! has begun, and all its resizes end within a bound from then on. After each walk nothing is lost,
//! no delete is undone, replicas are the same, and the bucket is complete and holds no garbage.
//!
//! `VASTO_RESIZES` sets the number of resizes (5); `VASTO_RESIZES_SEED` repeats the choices of a
//! seed, which is printed, but not their interleaving with the processes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vasto_testkit::http_store::{Fault, HttpStore};
use vasto_tests::{CatalogDir, Cluster, Kept, Numbers, Port, Ran, setting};

/// The keyspaces of a walk: name, replicas, acknowledgement. With these, no single failure loses an
/// acknowledged increment, except with three replicas.
const KEYSPACES: [(&str, &str, &str); 3] =
    [("one", "1", "fsync"), ("two", "2", "replica"), ("three", "3", "replica")];
/// The greatest shard count of a walk.
const SHARDS: u64 = 16;
/// Rounds of a walk; each resizes every keyspace once.
const ROUNDS: u64 = 6;
const NODES: usize = 3;
/// Time from one fault to the next.
const FAULT_EVERY: Duration = Duration::from_secs(3);
/// Time from the beginning of a round after which nothing fails any more.
const FAULTS_FOR: Duration = Duration::from_secs(8);
/// Time from then on within which all resizes of the round end.
const CALM_MAX: Duration = Duration::from_secs(90);
/// Time between two requests for the same resize.
const ASK_EVERY: Duration = Duration::from_millis(300);
/// Pause of each client between two operations.
const PACE: Duration = Duration::from_millis(10);

#[derive(Debug, Clone, Copy)]
enum Event {
    NodeKilled,
    MasterKilled,
    NodeStandsStill,
    BucketAway,
    BucketThrottles,
    BucketSlow,
    Compaction,
}

const EVENTS: [Event; 7] = [
    Event::NodeKilled,
    Event::MasterKilled,
    Event::NodeStandsStill,
    Event::BucketAway,
    Event::BucketThrottles,
    Event::BucketSlow,
    Event::Compaction,
];

/// A resize of a round.
struct Goal {
    name: &'static str,
    catalog: CatalogDir,
    from: u32,
    to: u32,
    asked: u32,
    asked_at: Option<Instant>,
    /// Why it was refused the last time.
    refused: Option<Ran>,
}

impl Goal {
    /// Returns true when the keyspace has the shard count; asks for it when nothing is under way.
    async fn look(&mut self, cluster: &Cluster) -> Result<bool> {
        let tip = self.catalog.tip()?;
        if tip.plan.is_some() {
            return Ok(false);
        }
        if tip.spec.shards == self.to {
            return Ok(true);
        }
        ensure!(tip.spec.shards == self.from, "half a resize: {tip:?}");
        if self.asked_at.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
            let shards = self.to.to_string();
            let ask = ["keyspace", "resize", self.name, "--shards", &shards, "--no-wait"];
            let ran = cluster.vasto(&ask).await?;
            self.asked += 1;
            self.asked_at = Some(Instant::now());
            self.refused = (ran.code != 0).then_some(ran);
        }
        Ok(false)
    }

    fn says(&self) -> String {
        let plan = self.catalog.tip().map(|tip| tip.plan);
        let Self { name, from, to, asked, refused, .. } = self;
        format!("{name} {from} -> {to}, asked {asked} times, {refused:?}, the plan is {plan:?}")
    }
}

struct Walk {
    cluster: Cluster,
    store: Arc<HttpStore>,
    numbers: Numbers,
    kept: Vec<Kept>,
}

impl Walk {
    async fn start(seed: u64) -> Result<Self> {
        let store = Arc::new(HttpStore::start().await);
        let cluster = Cluster::builder()
            .nodes(NODES)
            .http(&store)
            .keeps_no_garbage()
            .allow_warnings()
            .allow("could not be applied")
            .allow("the target cannot be built")
            .start()
            .await?;
        let mut numbers = Numbers::new(seed);
        let mut kept = Vec::new();
        for (name, replicas, ack) in KEYSPACES {
            let shards = 1 + numbers.below(SHARDS) as u32;
            let mut options = vec!["--replicas", replicas, "--ack", ack];
            options.extend(["--quarantine", "1s", "--tombstone-grace", "1s"]);
            cluster.create(name, shards, &options).await?;
            kept.push(Kept::start(&cluster, name, 500, PACE).await?);
        }
        Ok(Self { cluster, store, numbers, kept })
    }

    async fn goal(&mut self, name: &'static str) -> Result<Goal> {
        let catalog = self.cluster.catalog(name).await?;
        let from = catalog.tip()?.spec.shards;
        // One of the other counts.
        let drawn = 1 + self.numbers.below(SHARDS - 1) as u32;
        let to = if drawn >= from { drawn + 1 } else { drawn };
        Ok(Goal { name, catalog, from, to, asked: 0, asked_at: None, refused: None })
    }

    /// Lets something fail for a while.
    async fn happens(&mut self, event: Event) -> Result<()> {
        let node = self.numbers.below(NODES as u64) as usize;
        let lasts = Duration::from_millis(self.numbers.below(2_000));
        println!("    {event:?} of node {node} for {lasts:?}");
        match event {
            Event::NodeKilled => {
                self.cluster.kill9_node(node).await?;
                tokio::time::sleep(lasts).await;
                let port = if lasts.as_millis().is_multiple_of(2) { Port::Same } else { Port::New };
                self.cluster.start_node(node, port).await?;
            }
            Event::MasterKilled => {
                self.cluster.kill9_master().await?;
                tokio::time::sleep(lasts).await;
                self.cluster.start_master(Port::Same).await?;
            }
            Event::NodeStandsStill => {
                self.cluster.node_process(node)?.signal(Signal::STOP);
                tokio::time::sleep(lasts * 2).await;
                self.cluster.node_process(node)?.signal(Signal::CONT);
            }
            Event::BucketAway | Event::BucketThrottles | Event::BucketSlow => {
                match event {
                    Event::BucketAway => self.store.fail_everything(Some(Fault::SlowDown)),
                    Event::BucketThrottles => self.store.throttle_half(),
                    _ => self.store.answer_later(Duration::from_millis(150)),
                }
                tokio::time::sleep(lasts).await;
                self.store.heal();
            }
            Event::Compaction => {
                // It may be refused, or fail with a plan that ends meanwhile.
                let name = self.numbers.of(&KEYSPACES).0;
                let ran = self.cluster.vasto(&["keyspace", "compact", name]).await?;
                ensure!(!ran.stderr.contains("panicked"), "{ran:?}");
            }
        }
        Ok(())
    }

    async fn round(&mut self) -> Result<()> {
        let mut goals = Vec::new();
        for (name, _, _) in KEYSPACES {
            goals.push(self.goal(name).await?);
        }
        let began = Instant::now();
        let mut next = began + Duration::from_millis(self.numbers.below(1_500));
        loop {
            let mut open = false;
            for goal in &mut goals {
                open |= !goal.look(&self.cluster).await?;
            }
            if !open {
                break;
            }
            if began.elapsed() > FAULTS_FOR + CALM_MAX {
                let stuck: Vec<String> = goals.iter().map(Goal::says).collect();
                anyhow::bail!("resizes do not end: {}", stuck.join("\n"));
            }
            if Instant::now() >= next && began.elapsed() < FAULTS_FOR {
                let event = self.numbers.of(&EVENTS);
                self.happens(event).await.with_context(|| format!("{event:?}"))?;
                next += FAULT_EVERY;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for goal in &goals {
            println!("    {} {} -> {}, asked {} times", goal.name, goal.from, goal.to, goal.asked);
        }
        println!("    took {:.1} s", began.elapsed().as_secs_f64());
        Ok(())
    }

    /// Checks everything once all is at rest.
    async fn end(self) -> Result<()> {
        let Self { cluster, kept, .. } = self;
        for kept in &kept {
            kept.load().goes_on(3).await.context("after the last fault")?;
        }
        for (kept, (name, replicas, _)) in kept.into_iter().zip(KEYSPACES) {
            cluster.whole(name).await?;
            cluster.settled(name).await?;
            let ended = kept.end(&cluster).await?;
            if replicas == "3" {
                println!("{name}: {} increments lost", ended.increments_lost);
            } else {
                ended.completely().with_context(|| name.to_owned())?;
            }
            cluster.shipped(name).await?;
        }
        cluster.fsck().await?;
        println!("collected {}", cluster.collect().await?["deleted"]);
        cluster.finish().await
    }
}

fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let drawn = std::collections::hash_map::RandomState::new().build_hasher().finish();
    setting("VASTO_RESIZES_SEED", drawn)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_resizes_under_faults_lose_nothing_and_end() -> Result<()> {
    let resizes: u64 = setting("VASTO_RESIZES", 5);
    let rounds = resizes.div_ceil(KEYSPACES.len() as u64);
    let seed = seed();
    println!("{resizes} resizes, VASTO_RESIZES_SEED={seed}");
    for walk in 0..rounds.div_ceil(ROUNDS) {
        let context = |what: &str| format!("seed {seed}, walk {walk}, {what}");
        let mut running =
            Walk::start(seed.wrapping_add(walk)).await.with_context(|| context("start"))?;
        for round in walk * ROUNDS..rounds.min((walk + 1) * ROUNDS) {
            println!("walk {walk}, round {round}");
            running.round().await.with_context(|| context(&format!("round {round}")))?;
        }
        running.end().await.with_context(|| context("end"))?;
    }
    Ok(())
}
