//! Resizes whose master dies, or stands still, between seal and decision: the nodes undo the seal,
//! or find the decision, without it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vasto_client::Keyspace;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::ShardId;
use vasto_core::limits::SEAL_UNDECIDED;
use vasto_core::operation::OperationOutcome;
use vasto_core::plan::Step;
use vasto_testkit::http_store::{Fault, HttpStore};
use vasto_tests::{
    Cluster, DEADLINE, Front, Kept, Load, Port, Resizing, missing, put_all, resized, setting, until,
};

const PACE: Duration = Duration::from_millis(4);
/// What the body of a version that commits contains.
const COMMIT: &str = "\"step\":\"committed\"";
/// Time within which writes to the moving keys go on without a master: the patience of the nodes,
/// a few requests, and the rest for a busy machine.
const GOES_ON_WITHIN: Duration = Duration::from_secs(10);

/// A change of the number of shards.
struct Shape {
    name: &'static str,
    from: u32,
    to: u32,
    replicas: &'static str,
}

const SHAPES: [Shape; 3] = [
    Shape { name: "grow", from: 2, to: 3, replicas: "1" },
    Shape { name: "several", from: 1, to: 4, replicas: "2" },
    Shape { name: "shrink", from: 3, to: 1, replicas: "2" },
];

impl Shape {
    async fn create(&self, cluster: &Cluster) -> Result<()> {
        let options = ["--replicas", self.replicas, "--quarantine", "1s"];
        cluster.create(self.name, self.from, &options).await
    }
}

/// Starts a resize and waits until the version that commits it has met the fault: all are sealed.
async fn sealed(
    cluster: &Cluster,
    store: &HttpStore,
    name: &str,
    to: u32,
    fault: Fault,
) -> Result<Resizing> {
    store.fail_puts_of(COMMIT, fault);
    let resize = Resizing::start(cluster, name, to).await?;
    until("the commit to fail", DEADLINE, async || store.has_failed_a_put().then_some(()))
        .await
        .with_context(|| format!("{name}: {:?}", resize.tip()))?;
    Ok(resize)
}

/// Waits until every writer goes on, whichever keys it writes next.
async fn goes_on(load: &Load, what: &str) -> Result<()> {
    let began = Instant::now();
    tokio::time::timeout(GOES_ON_WITHIN, load.goes_on(40))
        .await
        .with_context(|| format!("{what}: no progress, {:?}", load.summary()))??;
    println!("{what}: all writers go on after {:?}", began.elapsed());
    Ok(())
}

/// Waits for the end of a resize, and repeats it when it was aborted.
async fn take_effect(cluster: &Cluster, resize: &Resizing, name: &str, to: u32) -> Result<()> {
    let report = resize.ended().await?;
    println!("{name}: {:?}, {}", report.outcome, resized(&serde_json::to_value(&report)?));
    if report.outcome == OperationOutcome::Aborted {
        cluster.resize(name, to).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_dies_between_seal_and_decision_is_not_needed_to_undo_it() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let mut cluster = Cluster::builder().nodes(3).http(&store).allow_warnings().start().await?;
    for shape in SHAPES {
        let Shape { name, to, .. } = shape;
        shape.create(&cluster).await?;
        let kept = Kept::start(&cluster, name, 2_000, PACE).await?;
        let resize = sealed(&cluster, &store, name, to, Fault::ResetBefore).await?;
        cluster.kill9_master().await?;
        store.heal();
        kept.load().reset_longest();
        goes_on(kept.load(), name).await?;
        let tip = resize.tip()?;
        let plan = tip.plan.as_ref().context("the plan has ended without a master")?;
        ensure!(plan.step == Step::Tail && plan.seals_undone > 0, "{name}: {plan:?}");
        ensure!((tip.epoch, &tip.placement) == (resize.began.epoch, &resize.began.placement));
        // Nothing is sealed again, and nobody writes anything more, until a master is there.
        tokio::time::sleep(SEAL_UNDECIDED * 2).await;
        ensure!(resize.tip()?.version == tip.version, "{name}: {:?}", resize.tip());
        cluster.start_master(Port::Same).await?;
        take_effect(&cluster, &resize, name, to).await?;
        kept.load().goes_on(5).await?;
        kept.end(&cluster).await?.completely()?;
    }
    cluster.fsck().await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_a_dead_master_told_nobody_is_found_by_all() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let mut cluster = Cluster::builder().nodes(3).http(&store).allow_warnings().start().await?;
    for shape in SHAPES {
        let Shape { name, to, .. } = shape;
        shape.create(&cluster).await?;
        let kept = Kept::start(&cluster, name, 2_000, PACE).await?;
        // The version is in the bucket, and its writer never learns that.
        let resize = sealed(&cluster, &store, name, to, Fault::SilentAfter).await?;
        cluster.kill9_master().await?;
        store.heal();
        goes_on(kept.load(), name).await?;
        let tip = resize.tip()?;
        ensure!(tip.spec.shards == to, "{name}: {tip:?}");
        ensure!(resize.step()? == Some(Step::Committed), "{name}: only a master ends a plan");
        cluster.start_master(Port::Same).await?;
        resize.done().await.with_context(|| name.to_owned())?;
        kept.load().goes_on(5).await?;
        kept.end(&cluster).await?.completely()?;
    }
    cluster.fsck().await?;
    cluster.finish().await
}

/// Returns keys that leave a shard in a grow from two shards to three.
fn leaving(shard: u32) -> Vec<String> {
    let moves = |name: &String| {
        let hash = partition_hash(name.as_bytes());
        jump(hash, 2).shard == ShardId(shard) && jump(hash, 3).shard == ShardId(2)
    };
    (0..).map(|n| format!("leaves{shard}-{n}")).filter(moves).take(20).collect()
}

async fn put_now(keyspace: &Keyspace, keys: &[String], value: &str) -> Result<()> {
    let puts = keys.iter().map(|key| async { keyspace.put(key.as_str(), value).await });
    let all = futures::future::try_join_all(puts);
    tokio::time::timeout(GOES_ON_WITHIN, all).await.context("the keys are not writable")??;
    Ok(())
}

/// The source of one shard stands still while the others undo the seal, and its master dies: when it
/// goes on it finds out what happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealed_source_that_stood_still_finds_that_others_have_undone_the_seal() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let mut cluster = Cluster::builder().nodes(3).http(&store).allow_warnings().start().await?;
    cluster.create("still", 2, &["--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("still").await?;
    put_all(&keyspace, "row", 2_000).await?;
    let keys = [leaving(0), leaving(1)];
    let resize = sealed(&cluster, &store, "still", 3, Fault::ResetBefore).await?;
    let [first, second] = [0, 1].map(|index: usize| resize.plan.sources[index].node);
    ensure!(first != second, "one node has both sources");
    let node = cluster.node_of(&first.to_string())?;
    cluster.node_process(node)?.signal(Signal::STOP);
    cluster.kill9_master().await?;
    store.heal();
    put_now(&keyspace, &keys[1], "undone").await?;
    ensure!(resize.step()? == Some(Step::Tail), "{:?}", resize.tip());
    let undone = resize.tip()?;
    // Longer than it takes to undo a seal: it must not do that again.
    tokio::time::sleep(SEAL_UNDECIDED * 2).await;
    cluster.node_process(node)?.signal(Signal::CONT);
    put_now(&keyspace, &keys[0], "goes on").await?;
    ensure!(resize.tip()?.version == undone.version, "{:?}", resize.tip());
    cluster.start_master(Port::Same).await?;
    take_effect(&cluster, &resize, "still", 3).await?;
    ensure!(missing(&keyspace, "row", 2_000).await? == 0);
    for (keys, value) in keys.iter().zip(["goes on", "undone"]) {
        for found in keyspace.get_many(keys).await? {
            let found = found.context("an acknowledged write is lost")?;
            ensure!(found.bytes() == value.as_bytes(), "{found:?} instead of {value}");
        }
    }
    cluster.finish().await
}

/// A master stands still with its commit on the way, another one goes on in its place, and then the
/// first comes back: once within the time in which it still repeats the write, and in long runs
/// (`VASTO_STANDSTILL`, seconds) once after that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_masters_of_which_one_stands_still_come_to_one_outcome() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let front = Arc::new(Front::start().await?);
    let builder = Cluster::builder().nodes(3).http(&store).behind(&front).allow_warnings();
    let mut cluster = builder.start().await?;
    cluster.start_second_master().await?;
    for (name, from, to, seconds) in
        [("short", 2, 3, 12), ("long", 3, 1, setting("VASTO_STANDSTILL", 12))]
    {
        cluster.create(name, from, &["--replicas", "2", "--quarantine", "1s"]).await?;
        let kept = Kept::start(&cluster, name, 2_000, PACE).await?;
        let resize = sealed(&cluster, &store, name, to, Fault::ResetBefore).await?;
        cluster.master_process()?.signal(Signal::STOP);
        let goes_on_at = tokio::time::Instant::now() + Duration::from_secs(seconds);
        store.heal();
        cluster.lead_to_second(true)?;
        goes_on(kept.load(), name).await?;
        let report = resize.ended().await?;
        println!("{name}: {:?} by the second master", report.outcome);
        tokio::time::sleep_until(goes_on_at).await;
        cluster.master_process()?.signal(Signal::CONT);
        cluster.lead_to_second(false)?;
        kept.load().goes_on(5).await?;
        if report.outcome == OperationOutcome::Aborted {
            cluster.resize(name, to).await?;
        }
        until("the first master to know the outcome", DEADLINE, async || {
            let described = cluster.json(&["keyspace", "describe", name]).await.ok()?;
            (described["shards"] == to).then_some(())
        })
        .await?;
        cluster.settled(name).await?;
        let tip = resize.tip()?;
        let outcomes: Vec<_> = tip.operations.iter().filter(|end| end.id == resize.id).collect();
        ensure!(outcomes.len() == 1 && *outcomes[0] == report, "{outcomes:?} and {report:?}");
        kept.end(&cluster).await?.completely()?;
    }
    cluster.fsck().await?;
    cluster.finish().await
}
