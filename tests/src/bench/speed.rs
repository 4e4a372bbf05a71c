//! Bytes a second of a grow, a rebalance and restores, beside a plain download of the same objects to
//! files, taken before and after each of them.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde::Serialize;
use vasto_client::Ack;
use vasto_core::band::Band;
use vasto_core::record::BandRange;
use vasto_shipping::Manifest;
use vasto_testkit::S3Server;

use super::args::Args;
use super::cpu::CpuUsed;
use super::follow::{Ended, StepTime, steps_text};
use super::limit::Limit;
use super::stage::{Garbage, Stage};
use super::table::{Goal, Table, gb, goal_text, mib, note};
use super::values::{Values, rows_of};
use super::{Part, early};
use crate::figures::median;
use crate::raw::{RawDownload, download_raw};

const NAME: &str = "bulk";
/// Minutes that the part has, and the most GiB of rows with which they are enough.
const MINUTES: u64 = 10;
const GIB_MAX: f64 = 1.0;
/// Shards, and those after a grow.
const SHARDS: (u32, u32) = (6, 7);
/// Nodes; the last one is spare: a rebalance fills it and a drain empties it.
const NODES: usize = 3;
const SPARE: usize = NODES - 1;

/// The part of the run.
#[derive(Debug, Serialize)]
pub(super) struct Speed {
    samples: Vec<Sample>,
    medians: Vec<Median>,
    /// Why it ended before all repetitions were done.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<String>,
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Change {
    Grow,
    Shrink,
    Rebalance,
    Drain,
    RestoreOn1,
    RestoreOn2,
    RestoreOn3,
}

const CHANGES: [Change; 7] = [
    Change::Grow,
    Change::Shrink,
    Change::Rebalance,
    Change::Drain,
    Change::RestoreOn1,
    Change::RestoreOn2,
    Change::RestoreOn3,
];

#[derive(Debug, Clone, Serialize)]
struct Sample {
    change: Change,
    repeat: u32,
    bytes_moved: u64,
    seconds: f64,
    mib_per_s: f64,
    /// CPU of nodes and master for 10^9 bytes, seconds.
    cpu_s_per_gb: f64,
    cpu: CpuUsed,
    /// Nodes that took part as targets of a restore.
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes: Option<usize>,
    /// The plain download of the same objects, before and after.
    #[serde(skip_serializing_if = "Option::is_none")]
    raw: Option<Raw>,
    steps: Vec<StepTime>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Raw {
    bytes: u64,
    mib_per_s: f64,
    cpu_s_per_gb: f64,
}

#[derive(Debug, Serialize)]
struct Median {
    change: Change,
    samples: usize,
    mib_per_s: f64,
    cpu_s_per_gb: f64,
    raw_mib_per_s: Option<f64>,
    raw_cpu_s_per_gb: Option<f64>,
    /// Of the bytes a second to those of the plain download.
    ratio: Option<f64>,
    goal: Option<Goal>,
}

/// Measures until all repetitions are done, a change fails, or the time is over.
pub(super) async fn measure(args: &Args, s3: Option<&S3Server>) -> Speed {
    let (limit, mut samples) = (args.limit(MINUTES), Vec::new());
    let ended = limit.run(Box::pin(run(args, s3, limit, &mut samples))).await;
    let medians = CHANGES.iter().filter_map(|change| median_of(*change, &samples)).collect();
    Speed { samples, medians, stopped: ended.err().map(|error| format!("{error:#}")) }
}

async fn run(
    args: &Args,
    s3: Option<&S3Server>,
    limit: Limit,
    samples: &mut Vec<Sample>,
) -> Result<()> {
    let mut stage = Stage::start(args, s3, "speed", NODES, Garbage::Stays).await?;
    stage.cordon(SPARE, true).await?;
    let keyspace = stage.create(NAME, SHARDS.0, 1, Ack::Os).await?;
    let (values, rows) = (Values::new(args.seed), rows_of(args.gib.min(GIB_MAX)));
    values.fill(&keyspace, rows).await?;
    for repeat in 1..=args.repeats {
        let before = limit.left();
        let mut bench = Bench { args, stage: &mut stage, repeat, samples: &mut *samples };
        Box::pin(bench.grow_and_shrink()).await.context("grow, shrink")?;
        Box::pin(bench.rebalance_and_drain()).await.context("rebalance, drain")?;
        Box::pin(bench.restores()).await.context("restore")?;
        let (took, left) = (before.saturating_sub(limit.left()), limit.left());
        if repeat < args.repeats && left < took.mul_f64(1.2) {
            note(&format!("{repeat} of {} repetitions: there is no time for more", args.repeats));
            break;
        }
    }
    values.check(&keyspace, rows).await?;
    stage.finish().await
}

/// One repetition.
struct Bench<'a> {
    args: &'a Args,
    stage: &'a mut Stage,
    repeat: u32,
    samples: &'a mut Vec<Sample>,
}

impl Bench<'_> {
    /// Makes a change and keeps what it took; with the keys of the objects that it reads, beside a
    /// plain download of these before and after it.
    async fn timed(
        &mut self,
        change: Change,
        keys: Option<&[String]>,
        go: impl AsyncFnOnce(&mut Stage) -> Result<Timed>,
    ) -> Result<()> {
        let before = self.raw(keys).await?;
        let cpu = self.stage.cpu()?;
        let Timed { ended, nodes } = Box::pin(go(&mut *self.stage)).await?;
        let used = cpu.until(&self.stage.cpu()?);
        let after = self.raw(keys).await?;
        take(self.samples, change, self.repeat, ended, used, before.zip(after), nodes);
        Ok(())
    }

    /// Downloads these objects with object_store alone.
    async fn raw(&self, keys: Option<&[String]>) -> Result<Option<RawDownload>> {
        let Some(keys) = keys else { return Ok(None) };
        let dir = match &self.args.dir {
            Some(dir) => tempfile::tempdir_in(dir)?,
            None => tempfile::tempdir()?,
        };
        let done = download_raw(&self.stage.bucket, keys, dir.path()).await;
        done.map(Some).context("the plain download")
    }

    async fn grow_and_shrink(&mut self) -> Result<()> {
        self.stage.tidy(NAME).await?;
        let leaving = BandRange::from(Band::leaving(SHARDS.0, SHARDS.1));
        let manifests = self.stage.manifests(NAME).await?;
        let files = manifests.iter().flat_map(|manifest| manifest.files_overlapping(leaving));
        let keys: Vec<String> = files.map(|file| file.key.clone()).collect();
        self.timed(Change::Grow, Some(&keys), async |stage: &mut Stage| {
            stage.resize(NAME, SHARDS.1).await.map(Timed::of)
        })
        .await?;
        self.stage.settled(NAME).await?;
        self.timed(Change::Shrink, None, async |stage: &mut Stage| {
            stage.resize(NAME, SHARDS.0).await.map(Timed::of)
        })
        .await?;
        self.stage.settled(NAME).await
    }

    async fn rebalance_and_drain(&mut self) -> Result<()> {
        self.stage.tidy(NAME).await?;
        self.stage.cordon(SPARE, false).await?;
        let plan = self.stage.vasto.plan_rebalance().await?;
        let moving: BTreeSet<u32> = plan.moves.iter().map(|one| one.shard).collect();
        let manifests = self.stage.manifests(NAME).await?;
        let files = manifests.iter().filter(|manifest| moving.contains(&manifest.shard.0));
        let keys = keys_of(files);
        self.timed(Change::Rebalance, Some(&keys), async |stage: &mut Stage| {
            stage.rebalance().await.map(Timed::of)
        })
        .await?;
        self.stage.settled(NAME).await?;
        self.timed(Change::Drain, None, async |stage: &mut Stage| {
            stage.empty(SPARE, false).await.map(Timed::of)
        })
        .await?;
        self.stage.settled(NAME).await
    }

    /// Restores everything onto one, two and three nodes.
    async fn restores(&mut self) -> Result<()> {
        self.stage.tidy(NAME).await?;
        let keys = keys_of(&self.stage.manifests(NAME).await?);
        let onto = [Change::RestoreOn1, Change::RestoreOn2, Change::RestoreOn3];
        for (change, nodes) in onto.into_iter().zip(1..) {
            for node in 0..NODES {
                self.stage.cordon(node, node >= nodes).await?;
            }
            let into = format!("restored-{nodes}-{}", self.repeat);
            self.timed(change, Some(&keys), async |stage: &mut Stage| {
                let ended = stage.restore(NAME, &into).await?;
                let described = stage.vasto.describe_keyspace(&into).await?;
                let replicas = described.placement.iter().flat_map(|shard| &shard.replicas);
                let holders: BTreeSet<&str> = replicas.map(|one| one.node_id.as_str()).collect();
                anyhow::Ok(Timed { ended, nodes: Some(holders.len()) })
            })
            .await?;
            self.stage.delete(&into).await?;
        }
        for node in 0..NODES {
            self.stage.cordon(node, node == SPARE).await?;
        }
        Ok(())
    }
}

/// A change that was timed, and the nodes that took part as targets of a restore.
struct Timed {
    ended: Ended,
    nodes: Option<usize>,
}

impl Timed {
    fn of(ended: Ended) -> Self {
        Self { ended, nodes: None }
    }
}

fn keys_of<'a>(manifests: impl IntoIterator<Item = &'a Manifest>) -> Vec<String> {
    let files = manifests.into_iter().flat_map(|manifest| &manifest.files);
    files.map(|file| file.key.clone()).collect()
}

fn take(
    samples: &mut Vec<Sample>,
    change: Change,
    repeat: u32,
    ended: Ended,
    cpu: CpuUsed,
    raws: Option<(RawDownload, RawDownload)>,
    nodes: Option<usize>,
) {
    let raw = raws.map(|(before, after)| {
        let (bytes, seconds) = (before.bytes + after.bytes, before.seconds + after.seconds);
        Raw {
            bytes: before.bytes,
            mib_per_s: rate(bytes, seconds),
            cpu_s_per_gb: per_gb(before.cpu_seconds + after.cpu_seconds, bytes),
        }
    });
    let (bytes_moved, seconds) = (ended.bytes_moved(), ended.seconds());
    let mib_per_s = rate(bytes_moved, seconds);
    let plain = raw.map_or_else(String::new, |raw| format!(", plain {:.0} MiB/s", raw.mib_per_s));
    let what = change.text();
    note(&ended.line(&format!("{what}, repetition {repeat}, {mib_per_s:.0} MiB/s{plain}")));
    samples.push(Sample {
        change,
        repeat,
        bytes_moved,
        seconds,
        mib_per_s,
        cpu_s_per_gb: per_gb(cpu.cluster_s(), bytes_moved),
        cpu,
        nodes,
        raw,
        steps: ended.steps,
    });
}

fn rate(bytes: u64, seconds: f64) -> f64 {
    mib(bytes) / seconds.max(1e-3)
}

fn per_gb(seconds: f64, bytes: u64) -> f64 {
    seconds / gb(bytes.max(1))
}

impl Change {
    fn text(self) -> String {
        match self {
            Change::Grow => format!("grow {} -> {}", SHARDS.0, SHARDS.1),
            Change::Shrink => format!("shrink {} -> {}", SHARDS.1, SHARDS.0),
            Change::Rebalance => "rebalance onto an empty node".to_owned(),
            Change::Drain => "drain of that node".to_owned(),
            Change::RestoreOn1 => "restore on 1 node".to_owned(),
            Change::RestoreOn2 => "restore on 2 nodes".to_owned(),
            Change::RestoreOn3 => "restore on 3 nodes".to_owned(),
        }
    }

    /// Returns the least ratio to the plain download.
    fn least(self) -> Option<f64> {
        match self {
            Change::Grow => Some(0.5),
            Change::Rebalance => Some(0.8),
            _ => None,
        }
    }
}

fn median_of(change: Change, samples: &[Sample]) -> Option<Median> {
    let of: Vec<&Sample> = samples.iter().filter(|sample| sample.change == change).collect();
    if of.is_empty() {
        return None;
    }
    let raws = |figure: fn(&Sample, Raw) -> f64| {
        let all: Vec<f64> =
            of.iter().filter_map(|one| one.raw.map(|raw| figure(one, raw))).collect();
        (!all.is_empty()).then(|| median(all))
    };
    let ratio = raws(|one, raw| one.mib_per_s / raw.mib_per_s);
    Some(Median {
        change,
        samples: of.len(),
        mib_per_s: median(of.iter().map(|one| one.mib_per_s).collect()),
        cpu_s_per_gb: median(of.iter().map(|one| one.cpu_s_per_gb).collect()),
        raw_mib_per_s: raws(|_, raw| raw.mib_per_s),
        raw_cpu_s_per_gb: raws(|_, raw| raw.cpu_s_per_gb),
        ratio,
        goal: change.least().zip(ratio).map(|(least, ratio)| Goal::at_least(least, ratio)),
    })
}

impl Part for Speed {
    fn missed(&self) -> Vec<String> {
        let of = |change: Change| self.medians.iter().find(|one| one.change == change);
        let missed = CHANGES.into_iter().filter_map(|change| {
            let least = change.least()?;
            let Some((goal, ratio)) = of(change).and_then(|one| one.goal.zip(one.ratio)) else {
                return Some(format!("{}: not measured, the goal is >= {least}", change.text()));
            };
            goal.missed(&format!("{}, ratio to the plain download", change.text()), ratio)
        });
        early(self.stopped.as_deref()).into_iter().chain(missed).collect()
    }

    fn text(&self) -> String {
        let number = |figure: Option<f64>, digits: usize| {
            figure.map_or_else(|| "–".to_owned(), |figure| format!("{figure:.digits$}"))
        };
        let mut medians = Table::new(&[
            "change",
            "repetitions",
            "MiB/s",
            "plain download, MiB/s",
            "ratio",
            "goal",
            "CPU s/GB",
            "of the plain download",
        ]);
        for one in &self.medians {
            medians.row([
                one.change.text(),
                one.samples.to_string(),
                format!("{:.0}", one.mib_per_s),
                number(one.raw_mib_per_s, 0),
                number(one.ratio, 2),
                goal_text(one.goal),
                format!("{:.2}", one.cpu_s_per_gb),
                number(one.raw_cpu_s_per_gb, 2),
            ]);
        }
        let mut all = Table::new(&[
            "change",
            "MiB",
            "s",
            "MiB/s",
            "plain, MiB/s",
            "nodes",
            "CPU: generator/cluster/others",
            "s of each step",
        ]);
        for one in &self.samples {
            all.row([
                one.change.text(),
                format!("{:.0}", mib(one.bytes_moved)),
                format!("{:.1}", one.seconds),
                format!("{:.0}", one.mib_per_s),
                number(one.raw.map(|raw| raw.mib_per_s), 0),
                one.nodes.map_or_else(|| "–".to_owned(), |nodes| nodes.to_string()),
                one.cpu.shares(),
                steps_text(&one.steps),
            ]);
        }
        format!(
            "## Bytes a second, medians\n\n{}\n### Each repetition\n\n{}",
            medians.text(),
            all.text()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(change: Change, mib_per_s: f64, plain: Option<f64>) -> Sample {
        Sample {
            change,
            repeat: 1,
            bytes_moved: 1 << 30,
            seconds: 1.0,
            mib_per_s,
            cpu_s_per_gb: 1.0,
            cpu: CpuUsed::default(),
            nodes: None,
            raw: plain.map(|mib_per_s| Raw { bytes: 1 << 30, mib_per_s, cpu_s_per_gb: 0.5 }),
            steps: Vec::new(),
        }
    }

    #[test]
    fn the_goal_is_about_the_median_of_the_ratios() {
        let samples = [
            sample(Change::Grow, 100.0, Some(100.0)),
            sample(Change::Grow, 90.0, Some(200.0)),
            sample(Change::Grow, 10.0, Some(100.0)),
            sample(Change::Drain, 10.0, None),
        ];
        let grow = median_of(Change::Grow, &samples).unwrap();
        assert_eq!((grow.ratio, grow.samples), (Some(0.45), 3));
        assert_eq!(grow.goal, Some(Goal::at_least(0.5, 0.45)));
        let drain = median_of(Change::Drain, &samples).unwrap();
        assert_eq!((drain.ratio, drain.goal), (None, None));
        assert!(median_of(Change::Rebalance, &samples).is_none());
    }

    #[test]
    fn what_was_not_measured_is_missed() {
        let samples = vec![sample(Change::Grow, 90.0, Some(100.0))];
        let medians = CHANGES.iter().filter_map(|change| median_of(*change, &samples)).collect();
        let missed = Speed { samples, medians, stopped: None }.missed();
        assert_eq!(
            missed,
            ["rebalance onto an empty node: not measured, the goal is >= 0.8"],
            "{missed:?}"
        );
    }
}
