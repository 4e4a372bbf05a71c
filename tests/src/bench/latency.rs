//! Latency of clients in calm and during each kind of change, on the keyspace that changes: while half of
//! the processors are busy, and while all are.
//!
//! Half of the requests that a saturated machine answers keep much more than half of it busy: the more
//! requests wait, the more of them a frame, a group commit and a wake-up carry. So the rate is looked
//! for at which the processors are half busy.
//!
//! **Invariant:** a change is compared with the calm just before it, on the same cluster, with the same
//! clients.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use vasto_client::{Ack, Keyspace};
use vasto_testkit::{Numbers, S3Server};

use super::args::Args;
use super::cpu::CpuUsed;
use super::follow::Ended;
use super::foreground::{self, Arrivals, Foreground, Peak};
use super::phase::{Figures, Percentiles, excess_ms_s, mean_p99_ms};
use super::stage::{Garbage, Stage};
use super::table::{Goal, Table, gb, note};
use super::values::{Values, rows_of};
use super::{Part, early};

const NAME: &str = "bulk";
/// Minutes that the part has, and the most GiB of rows with which they are enough.
const MINUTES: u64 = 10;
const GIB_MAX: f64 = 0.5;
/// Time for each look at the peak, and at a rate, at most.
const PEAK: Duration = Duration::from_secs(5);
/// Rates that are looked at to find one.
const RATES: usize = 6;
/// How far the share of the processors may be from the one that is looked for.
const SHARE_NEAR: f64 = 0.04;
/// Where the restore goes.
const RESTORED: &str = "restored";
/// Shards, and those after a grow.
const SHARDS: (u32, u32) = (4, 5);
const REPLICAS: u32 = 2;
/// Nodes; the last one is spare: a rebalance fills it, a drain empties it, a replacement takes it.
const NODES: usize = 4;
const SPARE: usize = NODES - 1;
/// The node that is lost.
const LOST: usize = SPARE - 1;
/// Part of the rows that is written once more before a checkpoint.
const CHECKPOINT_SHARE: f64 = 0.125;
/// Time for a change to die down before the next calm.
const REST: Duration = Duration::from_secs(4);
/// Time in which nodes have reported what they sent to the bucket.
const REPORTED: Duration = Duration::from_secs(2);
/// The most times by which the p99 may grow, at half of the load and at all of it.
const TIMES_MAX: (f64, f64) = (2.0, 5.0);

/// The part of the run.
#[derive(Debug, Serialize)]
pub(super) struct Latency {
    levels: Vec<Level>,
    /// Why it ended before all changes were done.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<String>,
}

#[derive(Debug, Serialize)]
struct Level {
    name: &'static str,
    /// The most requests a second that were found, each of several rows.
    peak_requests_per_s: f64,
    /// Clients at the peak.
    peak_clients: u64,
    /// Requests a second that are sent; none when clients send the next one after the last.
    paced_requests_per_s: Option<f64>,
    changes: Vec<Change>,
}

#[derive(Debug, Serialize)]
struct Change {
    change: &'static str,
    seconds: f64,
    bytes_moved: u64,
    /// Nodes that run.
    nodes: usize,
    calm: Figures,
    during: Figures,
    calm_cpu: CpuUsed,
    cpu: CpuUsed,
    puts_p99_times: f64,
    gets_p99_times: f64,
    goal: Goal,
    /// By how much the p99 of each window exceeds that of calm, times its length.
    excess_ms_s: f64,
    excess_ms_s_per_gb_and_node: Option<f64>,
}

/// Measures until all changes are done at both loads, one fails, or the time is over.
pub(super) async fn measure(args: &Args, s3: Option<&S3Server>) -> Latency {
    let mut levels = Vec::new();
    let ended = args.limit(MINUTES).run(Box::pin(run(args, s3, &mut levels))).await;
    Latency { levels, stopped: ended.err().map(|error| format!("{error:#}")) }
}

async fn run(args: &Args, s3: Option<&S3Server>, levels: &mut Vec<Level>) -> Result<()> {
    for (name, part, times_max) in
        [("half of the machine", Some(0.5), TIMES_MAX.0), ("saturation", None, TIMES_MAX.1)]
    {
        let prefix = if part.is_some() { "latency-half" } else { "latency-full" };
        let stage = Stage::start(args, s3, prefix, NODES, Garbage::Goes).await?;
        levels.push(Level::new(name));
        let level = levels.last_mut().context("no level")?;
        let measured = Box::pin(measure_level(args, stage, level, part, times_max)).await;
        measured.with_context(|| format!("latency at {name}"))?;
    }
    Ok(())
}

/// Runs all changes at one load: a part of the processors, or all that the clients of the peak ask for.
async fn measure_level(
    args: &Args,
    mut stage: Stage,
    level: &mut Level,
    part: Option<f64>,
    times_max: f64,
) -> Result<()> {
    stage.cordon(SPARE, true).await?;
    let keyspace = stage.create(NAME, SHARDS.0, REPLICAS, Ack::Fsync).await?;
    let (values, rows) = (Values::new(args.seed), rows_of(args.gib.min(GIB_MAX)));
    values.fill(&keyspace, rows).await?;
    foreground::fill(&keyspace, &values).await?;
    stage.tidy(NAME).await?;
    let peak = foreground::peak(&keyspace, &values, args.calm().min(PEAK), args.seed).await?;
    let Peak { clients, requests_per_s } = peak;
    (level.peak_requests_per_s, level.peak_clients) = (requests_per_s, clients);
    let arrivals = match part {
        Some(part) => {
            let first = (requests_per_s * part, part);
            let rate = rate_that_takes(args, &mut stage, &keyspace, &values, first).await?;
            level.paced_requests_per_s = Some(rate);
            Arrivals::Paced(rate)
        }
        None => Arrivals::Closed(clients),
    };
    note(&format!("latency at {}: {arrivals:?}", level.name));
    let clients = Foreground::start(&keyspace, &values, arrivals, args.seed)?;
    let seen = &mut level.changes;
    let mut scene = Scene { args, stage, clients, keyspace, values, rows, times_max, seen };
    Box::pin(scene.run()).await?;
    let Scene { stage, clients, .. } = scene;
    drop(clients);
    stage.finish().await
}

/// Returns the requests a second that keep a part of all processors busy, given a first guess.
async fn rate_that_takes(
    args: &Args,
    stage: &mut Stage,
    keyspace: &Keyspace,
    values: &Values,
    (guess, part): (f64, f64),
) -> Result<f64> {
    let mut rate = guess;
    for _ in 0..RATES {
        let clients = Foreground::start(keyspace, values, Arrivals::Paced(rate), args.seed)?;
        tokio::time::sleep(REST).await;
        let before = stage.cpu()?;
        clients.measure(args.calm().min(PEAK)).await?;
        let busy = before.until(&stage.cpu()?).busy();
        drop(clients);
        note(&format!("{rate:.0} requests a second keep {:.0} % busy", busy * 100.0));
        if (busy - part).abs() <= SHARE_NEAR {
            break;
        }
        rate *= (part / busy.max(0.01)).clamp(0.25, 1.5);
        tokio::time::sleep(REST).await;
    }
    Ok(rate)
}

/// A cluster under load.
struct Scene<'a> {
    args: &'a Args,
    clients: Foreground,
    stage: Stage,
    keyspace: Keyspace,
    values: Values,
    rows: u64,
    times_max: f64,
    seen: &'a mut Vec<Change>,
}

impl Scene<'_> {
    async fn run(&mut self) -> Result<()> {
        Box::pin(self.checkpoint()).await.context("checkpoint")?;
        self.observe("grow 4 -> 5", async |stage: &mut Stage| stage.resize(NAME, SHARDS.1).await)
            .await?;
        self.observe("shrink 5 -> 4", async |stage: &mut Stage| stage.resize(NAME, SHARDS.0).await)
            .await?;
        let into = "restore into another keyspace";
        self.observe(into, async |stage: &mut Stage| stage.restore(NAME, RESTORED).await).await?;
        self.stage.delete(RESTORED).await?;
        self.stage.cordon(SPARE, false).await?;
        self.observe("rebalance", async |stage: &mut Stage| stage.rebalance().await).await?;
        self.observe("drain", async |stage: &mut Stage| stage.empty(SPARE, false).await).await?;
        self.stage.cordon(SPARE, false).await?;
        // Clients have gone over to the other replicas when the calm begins.
        self.stage.lose(LOST).await?;
        self.observe("replacement", async |stage: &mut Stage| stage.empty(LOST, true).await).await
    }

    async fn checkpoint(&mut self) -> Result<()> {
        let mut numbers = Numbers::new(self.args.seed);
        let Self { values, keyspace, rows, .. } = &*self;
        values.overwrite(keyspace, *rows, CHECKPOINT_SHARE, &mut numbers).await?;
        let calm = self.calm().await?;
        let before = self.stage.bytes_written().await?;
        let (cpu, phase, began) = (self.stage.cpu()?, self.clients.begin(), Instant::now());
        self.stage.vasto.checkpoint_keyspace(NAME).await?;
        let seconds = began.elapsed().as_secs_f64();
        let during = self.clients.end(&phase).await?;
        let used = cpu.until(&self.stage.cpu()?);
        tokio::time::sleep(REPORTED).await;
        let moved = self.stage.bytes_written().await?.saturating_sub(before);
        self.note_change("checkpoint", seconds, moved, calm, (during, used));
        self.rest().await
    }

    /// Measures the calm, then a change.
    async fn observe(
        &mut self,
        change: &'static str,
        go: impl AsyncFnOnce(&mut Stage) -> Result<Ended>,
    ) -> Result<()> {
        let calm = self.calm().await?;
        let (cpu, phase) = (self.stage.cpu()?, self.clients.begin());
        let ended = Box::pin(go(&mut self.stage)).await.context(change)?;
        let during = self.clients.end(&phase).await?;
        let used = cpu.until(&self.stage.cpu()?);
        self.note_change(change, ended.seconds(), ended.bytes_moved(), calm, (during, used));
        self.rest().await.context(change)
    }

    async fn calm(&mut self) -> Result<(Figures, CpuUsed)> {
        tokio::time::sleep(REST).await;
        let cpu = self.stage.cpu()?;
        let figures = self.clients.measure(self.args.calm()).await?;
        Ok((figures, cpu.until(&self.stage.cpu()?)))
    }

    async fn rest(&mut self) -> Result<()> {
        // What a lost node held leaves only once it is back, which it is not.
        if self.stage.running() == self.stage.cluster.nodes() {
            self.stage.settled(NAME).await?;
            self.stage.collect().await;
        }
        Ok(())
    }

    fn note_change(
        &mut self,
        change: &'static str,
        seconds: f64,
        bytes_moved: u64,
        (calm, calm_cpu): (Figures, CpuUsed),
        (during, cpu): (Figures, CpuUsed),
    ) {
        let nodes = self.stage.running();
        let times =
            |of: fn(&Figures) -> Percentiles| of(&during).p99_ms / of(&calm).p99_ms.max(1e-3);
        let (puts, gets) = (times(|figures| figures.puts), times(|figures| figures.gets));
        let excess = excess_ms_s(&during.windows, mean_p99_ms(&calm.windows));
        let per = (bytes_moved > 0).then(|| excess / gb(bytes_moved) / nodes.max(1) as f64);
        note(&format!(
            "{change}: {seconds:.1} s, {:.2} GB; p99 of gets {:.2} -> {:.2} ms ({gets:.1} x), of puts \
             {:.2} -> {:.2} ms ({puts:.1} x), {} errors",
            gb(bytes_moved),
            calm.gets.p99_ms,
            during.gets.p99_ms,
            calm.puts.p99_ms,
            during.puts.p99_ms,
            calm.errors + during.errors
        ));
        self.seen.push(Change {
            change,
            seconds,
            bytes_moved,
            nodes,
            puts_p99_times: puts,
            gets_p99_times: gets,
            goal: Goal::at_most(self.times_max, puts.max(gets)),
            excess_ms_s: excess,
            excess_ms_s_per_gb_and_node: per,
            calm,
            during,
            calm_cpu,
            cpu,
        });
    }
}

fn latencies(figures: Percentiles) -> String {
    format!("{:.2} / {:.2} / {:.2}", figures.p50_ms, figures.p99_ms, figures.p999_ms)
}

impl Part for Latency {
    fn missed(&self) -> Vec<String> {
        let missed = self.levels.iter().flat_map(|level| {
            let name = level.name;
            level.changes.iter().flat_map(move |one| {
                let what = format!("{} at {name}", one.change);
                let times = one.puts_p99_times.max(one.gets_p99_times);
                let p99 = one.goal.missed(&format!("{what}, p99 in times that of calm"), times);
                let errors = one.calm.errors + one.during.errors;
                let first = one.during.first_error.as_ref().or(one.calm.first_error.as_ref());
                let failed =
                    first.map(|first| format!("{what}: {errors} requests failed: {first}"));
                p99.into_iter().chain(failed)
            })
        });
        early(self.stopped.as_deref()).into_iter().chain(missed).collect()
    }

    fn text(&self) -> String {
        let mut text = "## Latency of clients, p50 / p99 / p99.9 in ms\n".to_owned();
        for level in &self.levels {
            text += &format!(
                "\n### At {}{}; the peak is {:.0} requests a second with {} clients\n\n{}",
                level.name,
                level
                    .paced_requests_per_s
                    .map_or_else(String::new, |rate| format!(", {rate:.0} requests a second")),
                level.peak_requests_per_s,
                level.peak_clients,
                level.table().text()
            );
        }
        text
    }
}

impl Level {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            peak_requests_per_s: 0.0,
            peak_clients: 0,
            paced_requests_per_s: None,
            changes: Vec::new(),
        }
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            "change",
            "s",
            "GB moved",
            "requests/s calm, during",
            "gets, calm",
            "gets, during",
            "p99 x",
            "puts, calm",
            "puts, during",
            "p99 x",
            "goal",
            "errors",
            "excess ms s/GB/node",
            "CPU calm: generator/cluster/others",
            "CPU during",
        ]);
        for one in &self.changes {
            let excess = one.excess_ms_s_per_gb_and_node;
            table.row([
                one.change.to_owned(),
                format!("{:.1}", one.seconds),
                format!("{:.2}", gb(one.bytes_moved)),
                format!("{:.0}, {:.0}", one.calm.requests_per_s, one.during.requests_per_s),
                latencies(one.calm.gets),
                latencies(one.during.gets),
                format!("{:.1}", one.gets_p99_times),
                latencies(one.calm.puts),
                latencies(one.during.puts),
                format!("{:.1}", one.puts_p99_times),
                one.goal.text(),
                (one.calm.errors + one.during.errors).to_string(),
                excess.map_or_else(|| "–".to_owned(), |excess| format!("{excess:.0}")),
                one.calm_cpu.shares(),
                one.cpu.shares(),
            ]);
        }
        table
    }
}
