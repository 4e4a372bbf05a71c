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
use super::stage::{Garbage, Stage};
use super::table::{Goal, Table, gb, goal_text, mib, note};
use super::values::{Values, rows_of};
use crate::figures::median;
use crate::raw::{RawDownload, download_raw};

const NAME: &str = "bulk";
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

pub(super) async fn measure(args: &Args, s3: Option<&S3Server>) -> Result<Speed> {
    let mut stage = Stage::start(args, s3, "speed", NODES, Garbage::Stays).await?;
    stage.cordon(SPARE, true).await?;
    let keyspace = stage.create(NAME, SHARDS.0, 1, Ack::Os).await?;
    let (values, rows) = (Values::new(args.seed), rows_of(args.gib));
    values.fill(&keyspace, rows).await?;
    let mut samples = Vec::new();
    for repeat in 1..=args.repeats {
        grow_and_shrink(args, &mut stage, repeat, &mut samples).await.context("grow, shrink")?;
        rebalance_and_drain(args, &mut stage, repeat, &mut samples)
            .await
            .context("rebalance, drain")?;
        restores(args, &mut stage, repeat, &mut samples).await.context("restore")?;
    }
    values.check(&keyspace, rows).await?;
    stage.finish().await?;
    let medians = CHANGES.iter().filter_map(|change| median_of(*change, &samples)).collect();
    Ok(Speed { samples, medians })
}

async fn grow_and_shrink(
    args: &Args,
    stage: &mut Stage,
    repeat: u32,
    samples: &mut Vec<Sample>,
) -> Result<()> {
    stage.tidy(NAME).await?;
    let leaving = BandRange::from(Band::leaving(SHARDS.0, SHARDS.1));
    let manifests = stage.manifests(NAME).await?;
    let files = manifests.iter().flat_map(|manifest| manifest.files_overlapping(leaving));
    let keys: Vec<String> = files.map(|file| file.key.clone()).collect();
    let before = raw(args, stage, &keys).await?;
    let cpu = stage.cpu()?;
    let grown = stage.resize(NAME, SHARDS.1).await?;
    let used = cpu.until(&stage.cpu()?);
    let after = raw(args, stage, &keys).await?;
    take(samples, Change::Grow, repeat, grown, used, Some((before, after)), None);
    stage.settled(NAME).await?;
    stage.tidy(NAME).await?;
    let cpu = stage.cpu()?;
    let shrunk = stage.resize(NAME, SHARDS.0).await?;
    let used = cpu.until(&stage.cpu()?);
    take(samples, Change::Shrink, repeat, shrunk, used, None, None);
    stage.settled(NAME).await
}

async fn rebalance_and_drain(
    args: &Args,
    stage: &mut Stage,
    repeat: u32,
    samples: &mut Vec<Sample>,
) -> Result<()> {
    stage.tidy(NAME).await?;
    stage.cordon(SPARE, false).await?;
    let plan = stage.vasto.plan_rebalance().await?;
    let moving: BTreeSet<u32> = plan.moves.iter().map(|one| one.shard).collect();
    let manifests = stage.manifests(NAME).await?;
    let files = manifests.iter().filter(|manifest| moving.contains(&manifest.shard.0));
    let keys = keys_of(files);
    let before = raw(args, stage, &keys).await?;
    let cpu = stage.cpu()?;
    let moved = stage.rebalance().await?;
    let used = cpu.until(&stage.cpu()?);
    let after = raw(args, stage, &keys).await?;
    take(samples, Change::Rebalance, repeat, moved, used, Some((before, after)), None);
    stage.settled(NAME).await?;
    stage.tidy(NAME).await?;
    let cpu = stage.cpu()?;
    let drained = stage.empty(SPARE, false).await?;
    let used = cpu.until(&stage.cpu()?);
    take(samples, Change::Drain, repeat, drained, used, None, None);
    stage.settled(NAME).await
}

/// Restores everything onto one, two and three nodes.
async fn restores(
    args: &Args,
    stage: &mut Stage,
    repeat: u32,
    samples: &mut Vec<Sample>,
) -> Result<()> {
    stage.tidy(NAME).await?;
    let keys = keys_of(&stage.manifests(NAME).await?);
    let onto = [Change::RestoreOn1, Change::RestoreOn2, Change::RestoreOn3];
    for (change, nodes) in onto.into_iter().zip(1..) {
        for node in 0..NODES {
            stage.cordon(node, node >= nodes).await?;
        }
        let into = format!("restored-{nodes}-{repeat}");
        let before = raw(args, stage, &keys).await?;
        let cpu = stage.cpu()?;
        let restored = stage.restore(NAME, &into).await?;
        let used = cpu.until(&stage.cpu()?);
        let after = raw(args, stage, &keys).await?;
        let described = stage.vasto.describe_keyspace(&into).await?;
        let replicas = described.placement.iter().flat_map(|shard| &shard.replicas);
        let holders: BTreeSet<&str> = replicas.map(|one| one.node_id.as_str()).collect();
        let raws = Some((before, after));
        take(samples, change, repeat, restored, used, raws, Some(holders.len()));
        stage.delete(&into).await?;
    }
    for node in 0..NODES {
        stage.cordon(node, node == SPARE).await?;
    }
    Ok(())
}

fn keys_of<'a>(manifests: impl IntoIterator<Item = &'a Manifest>) -> Vec<String> {
    let files = manifests.into_iter().flat_map(|manifest| &manifest.files);
    files.map(|file| file.key.clone()).collect()
}

async fn raw(args: &Args, stage: &Stage, keys: &[String]) -> Result<RawDownload> {
    let dir = match &args.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    download_raw(&stage.bucket, keys, dir.path()).await.context("the plain download")
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
    let sample = Sample {
        change,
        repeat,
        bytes_moved,
        seconds,
        mib_per_s: rate(bytes_moved, seconds),
        cpu_s_per_gb: per_gb(cpu.cluster_s(), bytes_moved),
        cpu,
        nodes,
        raw,
        steps: ended.steps,
    };
    let plain = raw.map_or_else(String::new, |raw| format!(", plain {:.0} MiB/s", raw.mib_per_s));
    note(&format!(
        "{}, repetition {repeat}: {:.0} MiB in {seconds:.1} s, {:.0} MiB/s{plain}; {}",
        change.text(),
        mib(bytes_moved),
        sample.mib_per_s,
        steps_text(&sample.steps)
    ));
    samples.push(sample);
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

impl Speed {
    /// Formats the tables of the part.
    pub(super) fn text(&self) -> String {
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
}
