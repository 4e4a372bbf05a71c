//! Bytes that a resize reads from the bucket for each byte that moves: over compacted rows, and
//! straight after heavy writes.

use anyhow::{Context, Result};
use serde::Serialize;
use vasto_client::{Ack, Keyspace};
use vasto_testkit::{Numbers, S3Server};

use super::args::Args;
use super::follow::{StepTime, steps_text};
use super::stage::{Garbage, Stage};
use super::table::{Goal, Table, mib, note};
use super::values::{Values, rows_of};

/// Shards in the beginning.
const FIRST: u32 = 1;
/// The resizes: the number of shards after it, and the most that may be read for each byte that
/// moves, compacted and after writes; what has no such bound only leads to the next one.
const RESIZES: [(u32, Option<[f64; 2]>); 9] = [
    (16, Some([2.0, 2.0])),
    (10, Some([1.1, 1.1])),
    (8, None),
    (9, Some([1.15, 1.5])),
    (8, None),
    (4, Some([1.1, 1.1])),
    (5, Some([1.15, 1.5])),
    (4, None),
    (8, Some([1.4, 1.4])),
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
    Compacted,
    HeavyWrites,
}

/// The part of the run.
#[derive(Debug, Serialize)]
pub(super) struct Traffic {
    resizes: Vec<Resize>,
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
    seconds: f64,
    steps: Vec<StepTime>,
    goal: Goal,
    /// Bulk bytes come from the bucket alone.
    peers_goal: Goal,
}

pub(super) async fn measure(args: &Args, s3: Option<&S3Server>) -> Result<Traffic> {
    let stage = Stage::start(args, s3, "bytes", 2, Garbage::Goes).await?;
    let (values, mut numbers) = (Values::new(args.seed), Numbers::new(args.seed));
    let mut resizes = Vec::new();
    for before in [Before::Compacted, Before::HeavyWrites] {
        let name = match before {
            Before::Compacted => "compacted",
            Before::HeavyWrites => "written",
        };
        let keyspace = stage.create(name, FIRST, 1, Ack::Os).await?;
        let rows = rows_of(args.gib);
        values.fill(&keyspace, rows).await?;
        let mut from = FIRST;
        for (to, bounds) in RESIZES {
            let what = || format!("{name}: {from} -> {to}");
            if bounds.is_some() {
                prepare(&stage, &keyspace, &values, rows, before, &mut numbers)
                    .await
                    .with_context(what)?;
            }
            let resize = resize(&stage, name, before, (from, to), bounds).await;
            resizes.extend(resize.with_context(what)?);
            stage.settled(name).await?;
            stage.collect().await?;
            from = to;
        }
        values.check(&keyspace, rows).await?;
        stage.delete(name).await?;
    }
    stage.finish().await?;
    Ok(Traffic { resizes })
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
        Before::Compacted => stage.tidy(&keyspace.name()).await,
        Before::HeavyWrites => values.overwrite(keyspace, rows, OVERWRITTEN, numbers).await,
    }
}

/// Resizes, and returns the figures if there are bounds for them.
async fn resize(
    stage: &Stage,
    name: &str,
    before: Before,
    (from, to): (u32, u32),
    bounds: Option<[f64; 2]>,
) -> Result<Option<Resize>> {
    let ended = stage.resize(name, to).await?;
    let moved = ended.bytes_moved();
    let (read, peers) = (ended.bytes_from_bucket(), ended.bytes_from_peers());
    let part = |bytes: u64| bytes as f64 / moved.max(1) as f64;
    note(&format!(
        "{name}: {from} -> {to}: {:.0} MiB moved, {:.0} MiB read, {:.1} s",
        mib(moved),
        mib(read),
        ended.seconds()
    ));
    let Some([compacted, written]) = bounds else { return Ok(None) };
    let bound = if before == Before::Compacted { compacted } else { written };
    Ok(Some(Resize {
        before,
        from,
        to,
        keys_moved: ended.operation.keys_moved.unwrap_or_default(),
        bytes_moved: moved,
        bytes_from_bucket: read,
        bytes_from_peers: peers,
        ratio: part(read),
        seconds: ended.seconds(),
        goal: Goal::at_most(bound, part(read)),
        peers_goal: Goal::at_most(PEERS_MAX, part(peers)),
        steps: ended.steps,
    }))
}

impl Traffic {
    /// Formats the tables of the part.
    pub(super) fn text(&self) -> String {
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
            let rows = match one.before {
                Before::Compacted => "compacted",
                Before::HeavyWrites => "straight after heavy writes",
            };
            table.row([
                rows.to_owned(),
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
        let mut from = FIRST;
        let mut measured = Vec::new();
        for (to, bounds) in RESIZES {
            assert_ne!(from, to);
            measured.extend(bounds.map(|bounds| (from, to, bounds)));
            from = to;
        }
        measured.sort_by_key(|(from, to, _)| (*from, *to));
        assert_eq!(
            measured,
            [
                (1, 16, [2.0, 2.0]),
                (4, 5, [1.15, 1.5]),
                (4, 8, [1.4, 1.4]),
                (8, 4, [1.1, 1.1]),
                (8, 9, [1.15, 1.5]),
                (16, 10, [1.1, 1.1]),
            ]
        );
    }
}
