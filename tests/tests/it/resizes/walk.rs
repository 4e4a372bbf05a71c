//! One random walk: its cluster, its rounds, and what must hold in the end.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vasto_testkit::http_store::HttpStore;
use vasto_tests::netns::{Network, available};
use vasto_tests::{Cluster, DEADLINE, Kept, Numbers, Writer, until};

use super::choices;
use super::events::{EVENTS, Event};
use super::goal::{Goal, SHARDS};

/// The keyspaces of a walk: name, replicas, acknowledgement. With these, no single failure loses an
/// acknowledged increment, except with three replicas.
pub(super) const KEYSPACES: [(&str, &str, &str); 3] =
    [("one", "1", "fsync"), ("two", "2", "replica"), ("three", "3", "replica")];
pub(super) const NODES: usize = 3;
/// Time from one fault to the next.
const FAULT_EVERY: Duration = Duration::from_secs(3);
/// Time from the beginning of a round after which nothing fails any more.
const FAULTS_FOR: Duration = Duration::from_secs(12);
/// Time from then on within which all resizes of the round end.
const CALM_MAX: Duration = Duration::from_secs(90);
/// Pause of each client between two operations.
const PACE: Duration = Duration::from_millis(10);

/// A running walk.
pub(super) struct Walk {
    pub(super) cluster: Cluster,
    pub(super) network: Arc<Network>,
    pub(super) store: Arc<HttpStore>,
    kept: Vec<Kept>,
    /// Clients that are processes of their own, one of each keyspace.
    pub(super) writers: Vec<Writer>,
    seed: u64,
    told: Told,
}

/// What a walk was like.
#[derive(Debug, Default)]
pub(super) struct Told {
    resizes: u64,
    asked: u64,
    events: BTreeMap<Event, u64>,
    acked: u64,
    unknown: u64,
    increments_lost: i64,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resizes, asked, events, acked, unknown, increments_lost } = self;
        let all: u64 = events.values().sum();
        write!(
            f,
            "{resizes} resizes, asked for {asked} times, {all} faults {events:?}, {acked} writes acknowledged, {unknown} \
             unknown, 0 lost, 0 stuck, {increments_lost} increments of three replicas lost"
        )
    }
}

/// Walks to its end; nothing is lost then.
pub(super) async fn walked(seed: u64, rounds: u64) -> Result<Told> {
    let mut walk = Walk::start(seed).await.context("start")?;
    for round in 0..rounds {
        walk.round(round).await.with_context(|| format!("round {round}"))?;
    }
    walk.end().await.context("end")
}

impl Walk {
    async fn start(seed: u64) -> Result<Self> {
        ensure!(
            available(),
            "networks cannot be cut here: run `scripts/setup.sh test`, and this test as root with the right to make \
             network namespaces"
        );
        // A host for each node, for the master and for clients.
        let network = Arc::new(Network::new(NODES + 2)?);
        let store = Arc::new(HttpStore::start_on(&network.address(None)).await);
        let builder = Cluster::builder().nodes(NODES).http(&store).on(&network);
        let builder = builder.keeps_no_garbage().keep_when_unfinished().tells_of_faults();
        let cluster = builder.start().await?;
        let mut numbers = Numbers::new(seed);
        let (mut kept, mut writers) = (Vec::new(), Vec::new());
        for (name, replicas, ack) in KEYSPACES {
            let shards = 1 + numbers.below(SHARDS) as u32;
            let mut options = vec!["--replicas", replicas, "--ack", ack];
            options.extend(["--quarantine", "1s", "--tombstone-grace", "1s"]);
            cluster.create(name, shards, &options).await?;
            kept.push(Kept::start(&cluster, name, 500, PACE).await?.beside(Writer::PREFIX));
            let mut writer = Writer::new(name, name);
            writer.start(&cluster)?;
            writers.push(writer);
        }
        Ok(Self { cluster, network, store, kept, writers, seed, told: Told::default() })
    }

    /// Resizes every keyspace, under faults.
    async fn round(&mut self, round: u64) -> Result<()> {
        println!("  round {round} of seed {}", self.seed);
        let [mut of_goals, mut of_events] =
            [0, 1].map(|purpose| choices(self.seed, round, purpose));
        let mut goals = Vec::new();
        for (name, _, _) in KEYSPACES {
            goals.push(Goal::of(&self.cluster, name, &mut of_goals).await?);
        }
        let began = Instant::now();
        let mut next = began + Duration::from_millis(of_events.below(1_000));
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
                let event = of_events.of(&EVENTS);
                *self.told.events.entry(event).or_default() += 1;
                let happened = self.happens(event, &mut of_events).await;
                happened.with_context(|| format!("{event:?}"))?;
                next += FAULT_EVERY;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for goal in &goals {
            println!("    {} {} -> {}, asked {} times", goal.name, goal.from, goal.to, goal.asked);
            self.told.resizes += 1;
            self.told.asked += goal.asked;
        }
        println!("    took {:.1} s", began.elapsed().as_secs_f64());
        Ok(())
    }

    /// Checks everything once all is at rest.
    async fn end(self) -> Result<Told> {
        let Self { cluster, kept, mut writers, mut told, .. } = self;
        ensure!(!told.events.is_empty(), "nothing has failed: this shows nothing");
        for kept in &kept {
            kept.load().goes_on(3).await.context("after the last fault")?;
        }
        for writer in &mut writers {
            writer.keep_running(&cluster)?;
            let acked = writer.acked();
            until("the client process to go on", DEADLINE, async || {
                (writer.acked() > acked).then_some(())
            })
            .await?;
            writer.kill9().await?;
        }
        let all = kept.into_iter().zip(writers).zip(KEYSPACES);
        for ((kept, writer), (name, replicas, _)) in all {
            cluster.whole(name).await?;
            cluster.settled(name).await?;
            let ended = kept.end(&cluster).await?;
            let of_writer = writer.end(&cluster.keyspace(name).await?).await?;
            told.acked += ended.summary.acked + of_writer as u64;
            told.unknown += ended.summary.unknown;
            if replicas == "3" {
                told.increments_lost += ended.increments_lost;
            } else {
                ended.completely().with_context(|| name.to_owned())?;
            }
            cluster.shipped(name).await?;
        }
        cluster.fsck().await?;
        println!("  collected {}", cluster.collect().await?["deleted"]);
        cluster.finish().await?;
        Ok(told)
    }
}
