//! Processes that are killed: `kill -9` of nodes and masters, while idle and in the middle of a
//! grow.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use rustix::process::Signal;
use vasto_client::Keyspace;
use vasto_core::operation::OperationOutcome;
use vasto_core::plan::Step;
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;
use vasto_tests::replicas::Direct;
use vasto_tests::{
    Cluster, DEADLINE, History, Load, LoadSpec, Numbers, Port, Resizing, Seen, key_of, number_of,
    preload, resized, until, verify,
};

/// Expected log lines when a peer was killed.
const PEER_GONE: [&str; 1] = ["away"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_kills_of_a_node_under_fsync_load_lose_nothing() -> Result<()> {
    let mut builder = Cluster::builder().nodes(1);
    for text in PEER_GONE {
        builder = builder.allow(text);
    }
    let mut cluster = builder.start().await?;
    cluster.create("kills", 2, &["--ack", "fsync"]).await?;
    let history = Arc::new(History::default());
    let load = Load::start(&cluster.master(), "kills", &history, LoadSpec::default()).await?;
    let reading = cluster.keyspace("kills").await?;
    let mut numbers = Numbers::new(30);
    for kill in 0..30 {
        load.acks(1 + numbers.below(2_000)).await?;
        cluster.kill9_node(0).await?;
        // Writes acknowledged before this point must exist when the node is back.
        let promised = history.all();
        cluster.start_node(0, if kill % 2 == 0 { Port::New } else { Port::Same }).await?;
        let names: Vec<&String> = promised.keys().step_by(promised.len() / 300 + 1).collect();
        let values = reading.get_many(names.iter().map(|name| key_of(name))).await?;
        for (name, value) in names.iter().zip(values) {
            let seen = value.map_or(Seen::Absent, |value| {
                Seen::Number(number_of(name, &value.bytes()).unwrap_or(u64::MAX))
            });
            // Writers continue meanwhile: the key may hold a newer write, not an older one.
            let (then, now) = (&promised[*name], history.get(name));
            let newer =
                matches!(seen, Seen::Number(number) if number >= then.acked && number <= now.tried);
            ensure!(
                newer
                    || then.allows(seen)
                    || (seen == Seen::Absent
                        && (then.acked..=now.tried).any(vasto_tests::is_delete)),
                "kill {kill}: {name} is {seen:?}; promised then {then:?}, now {now:?}"
            );
        }
    }
    load.goes_on(20).await?;
    let summary = load.stop().await?;
    println!("{summary:?}");
    println!("{:?}", verify(&cluster.master(), "kills", &history).await?);
    cluster.kill9_node(0).await?;
    cluster.start_node(0, Port::New).await?;
    verify(&cluster.master(), "kills", &history).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_says_that_it_is_ready_when_its_replicas_are_open() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("many", 64, &["--replicas", "2"]).await?;
    let tip = cluster.catalog("many").await?.tip()?;
    cluster.kill9_node(1).await?;
    cluster.kill9_node(0).await?;
    cluster.start_node(0, Port::Same).await?;
    let address = format!("127.0.0.1:{}", cluster.port(0));
    let answers = tip.placement.iter().map(|shard| {
        let (address, tip) = (&address, &tip);
        async move {
            let mut direct = Direct::connect(address, tip, shard.shard).await?;
            direct.ask(Op::Get(v1::GetRequest::default())).await
        }
    });
    for answer in futures::future::join_all(answers).await {
        let answer = answer?;
        let not_open = matches!(&answer, Reply::Error(error) if error.message.contains("not open"));
        ensure!(!not_open, "{answer:?}");
    }
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn master_restart_disturbs_no_read_or_write() -> Result<()> {
    let mut cluster = Cluster::builder().start().await?;
    cluster.create("calm", 3, &[]).await?;
    let history = Arc::new(History::default());
    let load = Load::start(&cluster.master(), "calm", &history, LoadSpec::default()).await?;
    load.goes_on(50).await?;
    load.reset_longest();
    for round in 0..3 {
        if round == 0 {
            cluster.stop_master().await?;
        } else {
            cluster.kill9_master().await?;
        }
        load.goes_on(100).await?;
        cluster.start_master(Port::Same).await?;
        load.goes_on(50).await?;
        // The new master has learned the complete state again.
        until("all nodes and replicas to be back", DEADLINE, async || {
            let status = cluster.json(&["cluster", "status"]).await.ok()?;
            let described = cluster.json(&["keyspace", "describe", "calm"]).await.ok()?;
            let nodes = status["nodes"].as_array()?;
            let shards = described["placement"].as_array()?;
            (nodes.len() == 3
                && nodes.iter().all(|node| node["state"] == "live")
                && shards.len() == 3
                && shards.iter().all(|shard| shard["replicas"][0]["state"] == "serving"))
            .then_some(())
        })
        .await
        .with_context(|| format!("after restart {round}"))?;
    }
    let summary = load.stop().await?;
    println!("{summary:?}");
    ensure!(
        summary.refused + summary.unknown + summary.read_errors == 0,
        "clients saw errors: {summary:?}"
    );
    ensure!(
        summary.longest_write.max(summary.longest_read) < Duration::from_secs(1),
        "a client waited: {summary:?}"
    );
    verify(&cluster.master(), "calm", &history).await?;
    cluster.finish().await
}

/// Creates a keyspace with some data and clients under load.
async fn busy(cluster: &Cluster, name: &str, keys: u64) -> Result<(Keyspace, Load)> {
    cluster.create(name, 1, &["--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    let keyspace = cluster.keyspace(name).await?;
    preload(&keyspace, &history, "s:", keys).await?;
    let spec = LoadSpec { writers: 6, pace: Duration::from_millis(1), ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), name, &history, spec).await?;
    Ok((keyspace, load))
}

/// Waits for the end of a grow; returns whether it took effect.
async fn ended(grow: &Resizing, what: &str) -> Result<bool> {
    let report = grow.ended().await.with_context(|| what.to_owned())?;
    println!("{what}: {:?}, {}", report.outcome, resized(&serde_json::to_value(&report)?));
    Ok(report.outcome == OperationOutcome::Done)
}

/// The time of a kill: when a step is reached, or this many acknowledged writes later.
#[derive(Debug, Clone, Copy)]
struct KillTime {
    step: Step,
    acks_later: u64,
}

/// Returns each step at its beginning, then `more` random points in time.
fn moments(more: usize, numbers: &mut Numbers) -> Vec<KillTime> {
    const STEPS: [Step; 4] = [Step::Prepare, Step::Tail, Step::Sealing, Step::Committed];
    // Sealing and committing take milliseconds: both are over after a few writes.
    let drawn = (0..more).map(|index| {
        let step = STEPS[index % STEPS.len()];
        let most = if matches!(step, Step::Prepare | Step::Tail) { 400 } else { 12 };
        KillTime { step, acks_later: 1 + numbers.below(most) }
    });
    STEPS.into_iter().map(|step| KillTime { step, acks_later: 0 }).chain(drawn).collect()
}

/// Starts growing by one shard and waits for the point in time.
async fn grow_until(
    cluster: &Cluster,
    keyspace: &str,
    load: &Load,
    moment: KillTime,
) -> Result<Resizing> {
    load.goes_on(3).await?;
    let shards = cluster.catalog(keyspace).await?.tip()?.spec.shards + 1;
    let grow = Resizing::start(cluster, keyspace, shards).await?;
    grow.reaches(moment.step).await?;
    if moment.acks_later > 0 {
        load.acks(moment.acks_later).await?;
    }
    Ok(grow)
}

/// Grows of one keyspace before the next keyspace is used: few shards keep the grows quick.
const GROWS: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn master_killed_during_a_resize() -> Result<()> {
    let mut cluster = Cluster::builder().start().await?;
    let moments = moments(8, &mut Numbers::new(4));
    for (group, moments) in moments.chunks(GROWS).enumerate() {
        let name = format!("orphan{group}");
        let (_, load) = busy(&cluster, &name, 10_000).await?;
        for moment in moments {
            let grow = grow_until(&cluster, &name, &load, *moment).await?;
            cluster.kill9_master().await?;
            let left_in = grow.step()?;
            let what = format!("{moment:?}, left in {left_in:?}");
            // Reads and writes do not need the master, except for keys under a seal.
            if left_in != Some(Step::Sealing) && left_in != Some(Step::Committed) {
                load.goes_on(20).await.with_context(|| what.clone())?;
            }
            cluster.start_master(Port::Same).await?;
            let grown = ended(&grow, &what).await?;
            ensure!(grown || left_in != Some(Step::Committed), "a committed grow was undone");
            load.goes_on(10).await.with_context(|| what.clone())?;
        }
        let (summary, history) = load.stop_with_history().await?;
        println!("{summary:?}");
        ensure!(
            summary.refused + summary.unknown + summary.read_errors == 0,
            "clients saw errors: {summary:?}"
        );
        println!("{:?}", verify(&cluster.master(), &name, &history).await?);
        cluster.settled(&name).await?;
        verify(&cluster.master(), &name, &history).await?;
    }
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_killed_during_a_resize() -> Result<()> {
    let mut builder = Cluster::builder();
    for text in PEER_GONE {
        builder = builder.allow(text);
    }
    let mut cluster = builder.start().await?;
    let mut numbers = Numbers::new(5);
    let rounds: Vec<(KillTime, bool)> = moments(4, &mut numbers)
        .into_iter()
        .flat_map(|moment| [(moment, true), (moment, false)])
        .collect();
    for (group, rounds) in rounds.chunks(GROWS).enumerate() {
        let name = format!("victim{group}");
        let (_, load) = busy(&cluster, &name, 10_000).await?;
        for (moment, target) in rounds {
            let grow = grow_until(&cluster, &name, &load, *moment).await?;
            let plan = &grow.plan;
            let node = if *target {
                plan.targets[0].node
            } else {
                plan.sources[numbers.below(plan.sources.len() as u64) as usize].node
            };
            let victim = cluster.node_of(&node.to_string())?;
            cluster.kill9_node(victim).await?;
            let left_in = grow.step()?;
            cluster.start_node(victim, Port::New).await?;
            let victim = if *target { "target" } else { "source" };
            let what = format!("{victim} killed, {moment:?}, left in {left_in:?}");
            let grown = ended(&grow, &what).await?;
            ensure!(grown || left_in != Some(Step::Committed), "a committed grow was undone");
            load.goes_on(10).await.with_context(|| what.clone())?;
        }
        let (summary, history) = load.stop_with_history().await?;
        println!("{summary:?}");
        println!("{:?}", verify(&cluster.master(), &name, &history).await?);
        cluster.settled(&name).await?;
        for node in 0..cluster.nodes() {
            cluster.kill9_node(node).await?;
            cluster.start_node(node, Port::Same).await?;
        }
        verify(&cluster.master(), &name, &history).await?;
    }
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_stands_still_during_the_seal_is_not_opened_too_early() -> Result<()> {
    let mut cluster = Cluster::builder().start().await?;
    let mut undone = 0;
    for round in 0..4 {
        let name = format!("still{round}");
        cluster.create(&name, 1, &["--quarantine", "1s"]).await?;
        let history = Arc::new(History::default());
        let load = Load::start(&cluster.master(), &name, &history, LoadSpec::default()).await?;
        let moment = KillTime { step: Step::Sealing, acks_later: 0 };
        let grow = grow_until(&cluster, &name, &load, moment).await?;
        let target = grow.plan.targets[0].node;
        let target = cluster.node_of(&target.to_string())?;
        cluster.node_process(target)?.signal(Signal::STOP);
        // Either the target had received all records already, or the seal must be undone.
        let decided = until("the seal to be decided", DEADLINE, async || {
            let plan = grow.tip().ok()?.plan;
            let step = plan.as_ref().map(|plan| plan.step);
            (step != Some(Step::Sealing)).then_some(plan)
        })
        .await;
        cluster.node_process(target)?.signal(Signal::CONT);
        let plan = decided?;
        println!("{name}: {:?}", plan.as_ref().map(|plan| (plan.step, plan.seals_undone)));
        undone += plan.map_or(0, |plan| plan.seals_undone);
        ended(&grow, &name).await?;
        load.goes_on(10).await?;
        let summary = load.stop().await?;
        ensure!(
            summary.refused + summary.unknown + summary.read_errors == 0,
            "clients saw errors: {summary:?}"
        );
        verify(&cluster.master(), &name, &history).await?;
    }
    ensure!(undone > 0, "the target was never stopped in time: this shows nothing");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_cluster_killed_at_once_comes_back() -> Result<()> {
    let mut cluster = Cluster::builder().start().await?;
    let (keyspace, load) = busy(&cluster, "dark", 5_000).await?;
    let grow = Resizing::start(&cluster, "dark", 2).await?;
    grow.reaches(Step::Tail).await?;
    let (_, history) = load.stop_with_history().await?;
    cluster.kill9_master().await?;
    for node in 0..cluster.nodes() {
        cluster.kill9_node(node).await?;
    }
    cluster.start_master(Port::Same).await?;
    for node in 0..cluster.nodes() {
        cluster.start_node(node, Port::New).await?;
    }
    ended(&grow, "everything killed").await?;
    verify(&cluster.master(), "dark", &history).await?;
    // A client from before the kills finds the new addresses by itself.
    let rows = keyspace.scan().prefix("s:").stream().count().await;
    ensure!(rows == 5_000, "the old client scans {rows} of 5000 keys");
    cluster.finish().await
}
