//! Bytes that a resize reads from the bucket for each byte that moves: over compacted rows, straight
//! after heavy writes, and as the change before has left them.

use anyhow::{Context, Result};
use serde::Serialize;
use vasto_client::{Ack, Keyspace};
use vasto_testkit::{Numbers, S3Server};

use super::args::Args;
use super::follow::{StepTime, steps_text};
use super::stage::{Garbage, Stage};
use super::table::{Goal, Table, mib, note};
use super::values::{Values, rows_of};
use super::{Part, early};

/// Minutes that the part has.
const MINUTES: u64 = 10;

/// Resizes of one keyspace, one after the other.
struct Walk {
    name: &'static str,
    /// Shards in the beginning.
    first: u32,
    /// What the rows go through before each resize, the number of shards after it, and the most that
    /// may be read for each byte that moves; what has no such bound only leads to the next one.
    resizes: &'static [(Before, u32, Option<f64>)],
}

/// Only a grow by one shard reads files as they are, so that it depends on what the rows went through;
/// the others export, and are measured once, as the one before has left the keyspace.
const WALKS: [Walk; 2] = [
    Walk {
        name: "compacted",
        first: 1,
        resizes: &[
            (Before::AsLeft, 16, Some(2.0)),
            (Before::AsLeft, 10, Some(1.1)),
            (Before::AsLeft, 8, None),
            (Before::Compacted, 9, Some(1.15)),
            (Before::AsLeft, 8, None),
            (Before::AsLeft, 4, Some(1.1)),
            (Before::Compacted, 5, Some(1.15)),
            (Before::AsLeft, 4, None),
            (Before::AsLeft, 8, Some(1.4)),
        ],
    },
    Walk {
        name: "written",
        first: 4,
        resizes: &[
            (Before::HeavyWrites, 5, Some(1.5)),
            (Before::AsLeft, 8, None),
            (Before::HeavyWrites, 9, Some(1.5)),
        ],
    },
];
/// Share of the rows that are written once more, in random order, straight before a resize.
const OVERWRITTEN: f64 = 0.5;
/// No client writes: nodes stream the control records of the resize to each other, and nothing else.
/// What is more than this part of what moves would be rows.
const PEERS_MAX: f64 = 0.001;

/// What the rows went through before a resize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Before {
    AsLeft,
    Compacted,
    HeavyWrites,
}

/// The part of the run.
#[derive(Debug, Serialize)]
pub(super) struct Traffic {
    resizes: Vec<Resize>,
    /// Why it ended before all resizes were done.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<String>,
}

#[derive(Debug, Serialize)]
struct Resize {
    before: Before,
    from: u32,
    to: u32,
    keys_moved: u64,
    bytes_moved: u64,
    bytes_from_bucket: u64,
    bytes_from_peers: u64,
    /// Of the bytes from the bucket to those that moved.
    ratio: f64,
    #[serde(skip)]
    peers_ratio: f64,
    seconds: f64,
    steps: Vec<StepTime>,
    goal: Goal,
    /// Bulk bytes come from the bucket alone.
    peers_goal: Goal,
}

/// Measures until all resizes are done, one fails, or the time is over.
pub(super) async fn measure(args: &Args, s3: Option<&S3Server>) -> Traffic {
    let mut resizes = Vec::new();
    let ended = args.limit(MINUTES).run(Box::pin(run(args, s3, &mut resizes))).await;
    Traffic { resizes, stopped: ended.err().map(|error| format!("{error:#}")) }
}

async fn run(args: &Args, s3: Option<&S3Server>, resizes: &mut Vec<Resize>) -> Result<()> {
    let stage = Stage::start(args, s3, "bytes", 2, Garbage::Goes).await?;
    let (values, mut numbers) = (Values::new(args.seed), Numbers::new(args.seed));
    let rows = rows_of(args.gib);
    for Walk { name, first, resizes: walk } in WALKS {
        let keyspace = stage.create(name, first, 1, Ack::Os).await?;
        values.fill(&keyspace, rows).await?;
        let mut from = first;
        for (before, to, bound) in walk.iter().copied() {
            let what = || format!("{name}: {from} -> {to}");
            prepare(&stage, &keyspace, &values, rows, before, &mut numbers)
                .await
                .with_context(what)?;
            let resize = resize(&stage, name, before, (from, to), bound).await;
            resizes.extend(resize.with_context(what)?);
            stage.settled(name).await?;
            stage.collect().await;
            from = to;
        }
        values.check(&keyspace, rows).await?;
        stage.delete(name).await?;
    }
    stage.finish().await
}

async fn prepare(
    stage: &Stage,
    keyspace: &Keyspace,
    values: &Values,
    rows: u64,
    before: Before,
    numbers: &mut Numbers,
) -> Result<()> {
    match before {
        Before::AsLeft => Ok(()),
        Before::Compacted => stage.tidy(&keyspace.name()).await,
        Before::HeavyWrites => values.overwrite(keyspace, rows, OVERWRITTEN, numbers).await,
    }
}

/// Resizes, and returns the figures if there is a bound for them.
async fn resize(
    stage: &Stage,
    name: &str,
    before: Before,
    (from, to): (u32, u32),
    bound: Option<f64>,
) -> Result<Option<Resize>> {
    let ended = stage.resize(name, to).await?;
    let moved = ended.bytes_moved();
    let (read, peers) = (ended.bytes_from_bucket(), ended.bytes_from_peers());
    let part = |bytes: u64| bytes as f64 / moved.max(1) as f64;
    note(&ended.line(&format!("{name}: {from} -> {to}, {:.0} MiB read", mib(read))));
    let Some(bound) = bound else { return Ok(None) };
    Ok(Some(Resize {
        before,
        from,
        to,
        keys_moved: ended.operation.keys_moved.unwrap_or_default(),
        bytes_moved: moved,
        bytes_from_bucket: read,
        bytes_from_peers: peers,
        ratio: part(read),
        peers_ratio: part(peers),
        seconds: ended.seconds(),
        goal: Goal::at_most(bound, part(read)),
        peers_goal: Goal::at_most(PEERS_MAX, part(peers)),
        steps: ended.steps,
    }))
}

impl Before {
    fn text(self) -> &'static str {
        match self {
            Self::AsLeft => "as the change before left them",
            Self::Compacted => "compacted",
            Self::HeavyWrites => "straight after heavy writes",
        }
    }
}

impl Part for Traffic {
    fn missed(&self) -> Vec<String> {
        let missed = self.resizes.iter().flat_map(|one| {
            let what = format!("{} -> {}, rows {}", one.from, one.to, one.before.text());
            let read = one.goal.missed(&format!("{what}, bytes from the bucket"), one.ratio);
            let peers =
                one.peers_goal.missed(&format!("{what}, bytes from peers"), one.peers_ratio);
            read.into_iter().chain(peers)
        });
        early(self.stopped.as_deref()).into_iter().chain(missed).collect()
    }

    fn text(&self) -> String {
        let mut table = Table::new(&[
            "rows",
            "resize",
            "keys moved",
            "MiB moved",
            "MiB from the bucket",
            "ratio",
            "goal",
            "bytes from peers (log)",
            "no bulk bytes from peers",
            "s",
            "s of each step",
        ]);
        for one in &self.resizes {
            table.row([
                one.before.text().to_owned(),
                format!("{} -> {}", one.from, one.to),
                one.keys_moved.to_string(),
                format!("{:.0}", mib(one.bytes_moved)),
                format!("{:.0}", mib(one.bytes_from_bucket)),
                format!("{:.3}", one.ratio),
                one.goal.text(),
                one.bytes_from_peers.to_string(),
                (if one.peers_goal.held { "held" } else { "**missed**" }).to_owned(),
                format!("{:.1}", one.seconds),
                steps_text(&one.steps),
            ]);
        }
        format!("## Bytes from the bucket for each byte that moves\n\n{}", table.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_resize_that_has_a_goal_is_measured() {
        let mut measured = Vec::new();
        for walk in WALKS {
            let mut from = walk.first;
            for (before, to, bound) in walk.resizes.iter().copied() {
                assert_ne!(from, to);
                measured.extend(bound.map(|bound| (from, to, before.text(), bound)));
                from = to;
            }
        }
        measured.sort_by_key(|(from, to, _, bound)| (*from, *to, (bound * 100.0) as u64));
        let (left, compacted, written) =
            (Before::AsLeft.text(), Before::Compacted.text(), Before::HeavyWrites.text());
        assert_eq!(
            measured,
            [
                (1, 16, left, 2.0),
                (4, 5, compacted, 1.15),
                (4, 5, written, 1.5),
                (4, 8, left, 1.4),
                (8, 4, left, 1.1),
                (8, 9, compacted, 1.15),
                (8, 9, written, 1.5),
                (16, 10, left, 1.1),
            ]
        );
    }
}
