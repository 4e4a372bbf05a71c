//! Grows and shrinks while clients write to the moving keys alone, as many as the machine gives.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vasto_client::{Ack, Keyspace};
use vasto_testkit::S3Server;

use super::args::Args;
use super::cpu::CpuUsed;
use super::follow::{Ended, StepTime, steps_text};
use super::stage::{Garbage, Stage};
use super::table::{Goal, Table, note};
use crate::figures::{median, percentile};
use crate::full_writes::{FullLosses, FullWrites, SHARDS};

const NAME: &str = "full";
/// Keys that are written between two changes.
const BETWEEN: u64 = 20_000;
/// Writers that stand still for so long are stuck.
const WRITES_GO_ON: Duration = Duration::from_secs(60);

/// The part of the run.
#[derive(Debug, Serialize)]
pub(super) struct Cutover {
    changes: Vec<Change>,
    grows: Summary,
    shrinks: Summary,
    all: Summary,
    batch_errors: u64,
    first_errors: Vec<String>,
    keys: u64,
    writes_lost: u64,
    strange_keys: u64,
    cpu: CpuUsed,
    goals: Goals,
}

#[derive(Debug, Serialize)]
struct Change {
    to: u32,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<String>,
    seconds: f64,
    writes: u64,
    writes_per_s: f64,
    pause: Pause,
    longest_write_ms: f64,
    /// Parts that were tried again, and seals that were undone.
    retries: u64,
    steps: Vec<StepTime>,
}

/// Time for which writes of moving keys waited, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Pause {
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

/// Several changes in one.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Summary {
    changes: usize,
    failed: usize,
    seconds_median: f64,
    /// All writes over all of the time.
    writes_per_s: f64,
    /// Median of the medians, p99 of the p99s, and the longest of all.
    pause: Pause,
    longest_write_ms: f64,
}

#[derive(Debug, Serialize)]
struct Goals {
    failed_changes: Goal,
    writes_per_s: Goal,
    pause_p50_ms: Goal,
    pause_p99_ms: Goal,
    client_errors: Goal,
    writes_lost: Goal,
}

pub(super) async fn measure(args: &Args, s3: Option<&S3Server>) -> Result<Cutover> {
    let mut stage = Stage::start(args, s3, "cutover", 2, Garbage::Goes).await?;
    let keyspace = stage.create(NAME, SHARDS.0, 1, Ack::Os).await?;
    let full = FullWrites::start(&keyspace);
    let mut changes = Vec::new();
    let mut cpu = CpuUsed::default();
    let mut shards = SHARDS.0;
    for number in 0..args.changes * 2 {
        let to = if shards == SHARDS.0 { SHARDS.1 } else { SHARDS.0 };
        go_on(&full, BETWEEN).await?;
        let before = stage.cpu()?;
        let change = change(&stage, &full, to).await;
        cpu.add(&before.until(&stage.cpu()?));
        if change.failed.is_none() {
            shards = to;
        }
        note(&change.line(number + 1, args.changes * 2));
        changes.push(change);
        stage.settled(NAME).await?;
        if number % 2 == 1 {
            // The chunks of a long run would fill the disk.
            stage.collect().await?;
        }
    }
    let written = full.stop().await;
    let losses = written.losses(&keyspace).await?;
    let cutover = of(changes, cpu, (written.failed, written.errors), losses);
    finish(stage, keyspace).await?;
    Ok(cutover)
}

async fn finish(stage: Stage, keyspace: Keyspace) -> Result<()> {
    drop(keyspace);
    stage.finish().await
}

/// Waits until so many more keys were written.
async fn go_on(full: &FullWrites, keys: u64) -> Result<()> {
    let (aim, began) = (full.acked() + keys, Instant::now());
    while full.acked() < aim {
        ensure!(
            began.elapsed() < WRITES_GO_ON,
            "the writers stand still; {} batches have failed",
            full.failed()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Resizes once; a change that fails is a result, too.
async fn change(stage: &Stage, full: &FullWrites, to: u32) -> Change {
    full.take_longest();
    let (before, began) = (full.acked(), Instant::now());
    let ended = stage.resize(NAME, to).await.with_context(|| format!("to {to} shards"));
    let seconds = began.elapsed().as_secs_f64();
    let writes = full.acked() - before;
    let (failed, pause, retries, steps) = match ended {
        Ok(ended) => (None, pause_of(&ended), ended.retries, ended.steps),
        Err(error) => (Some(format!("{error:#}")), Pause::default(), 0, Vec::new()),
    };
    Change {
        to,
        failed,
        seconds,
        writes,
        writes_per_s: writes as f64 / seconds.max(1e-9),
        pause,
        longest_write_ms: full.take_longest().as_secs_f64() * 1_000.0,
        retries,
        steps,
    }
}

fn pause_of(ended: &Ended) -> Pause {
    let pause = ended.operation.write_pause_ms.unwrap_or_default();
    Pause { p50_ms: pause.p50, p99_ms: pause.p99, max_ms: pause.max }
}

fn summary<'a>(changes: impl Iterator<Item = &'a Change>) -> Summary {
    let changes: Vec<&Change> = changes.collect();
    let done: Vec<&&Change> = changes.iter().filter(|one| one.failed.is_none()).collect();
    let of = |figure: fn(&Change) -> f64| done.iter().map(|one| figure(one)).collect::<Vec<f64>>();
    let most =
        |figure: fn(&Change) -> f64| changes.iter().map(|one| figure(one)).fold(0.0, f64::max);
    let seconds: f64 = changes.iter().map(|one| one.seconds).sum();
    let writes: u64 = changes.iter().map(|one| one.writes).sum();
    Summary {
        changes: changes.len(),
        failed: changes.len() - done.len(),
        seconds_median: median(of(|one| one.seconds)),
        writes_per_s: writes as f64 / seconds.max(1e-9),
        pause: Pause {
            p50_ms: median(of(|one| one.pause.p50_ms)),
            p99_ms: percentile(of(|one| one.pause.p99_ms), 0.99),
            max_ms: most(|one| one.pause.max_ms),
        },
        longest_write_ms: most(|one| one.longest_write_ms),
    }
}

fn of(
    changes: Vec<Change>,
    cpu: CpuUsed,
    (batch_errors, first_errors): (u64, Vec<String>),
    losses: FullLosses,
) -> Cutover {
    let all = summary(changes.iter());
    let wrong = losses.lost + losses.strange;
    let goals = Goals {
        failed_changes: Goal::at_most(0.0, all.failed as f64),
        writes_per_s: Goal::at_least(100_000.0, all.writes_per_s),
        pause_p50_ms: Goal::at_most(50.0, all.pause.p50_ms),
        pause_p99_ms: Goal::at_most(500.0, all.pause.p99_ms),
        client_errors: Goal::at_most(0.0, batch_errors as f64),
        writes_lost: Goal::at_most(0.0, wrong as f64),
    };
    Cutover {
        grows: summary(changes.iter().filter(|one| one.to == SHARDS.1)),
        shrinks: summary(changes.iter().filter(|one| one.to == SHARDS.0)),
        all,
        changes,
        batch_errors,
        first_errors,
        keys: losses.keys,
        writes_lost: losses.lost,
        strange_keys: losses.strange,
        cpu,
        goals,
    }
}

impl Change {
    fn line(&self, number: u32, total: u32) -> String {
        let Self { to, seconds, writes_per_s, pause, longest_write_ms, .. } = self;
        let failed = self.failed.as_deref();
        let failed = failed.map_or_else(String::new, |why| format!(" FAILED: {why};"));
        format!(
            "cutover {number} of {total}, to {to} shards:{failed} {seconds:.1} s, {writes_per_s:.0} \
             writes/s, pause {:.1} / {:.1} / {:.1} ms, longest write {longest_write_ms:.0} ms; {}",
            pause.p50_ms,
            pause.p99_ms,
            pause.max_ms,
            steps_text(&self.steps)
        )
    }
}

impl Cutover {
    /// Returns what makes the run fail: what must never happen.
    pub(super) fn fault(&self) -> Option<String> {
        let failed = self.all.failed;
        let wrong = self.writes_lost + self.strange_keys;
        (failed > 0 || wrong > 0)
            .then(|| format!("{failed} changes failed, {wrong} keys do not hold what was written"))
    }

    /// Formats the tables of the part.
    pub(super) fn text(&self) -> String {
        let mut table = Table::new(&[
            "changes",
            "count",
            "failed",
            "s, median",
            "writes/s",
            "pause p50 / p99 / max, ms",
            "longest write, ms",
        ]);
        let named = [
            (format!("grow {} -> {}", SHARDS.0, SHARDS.1), &self.grows),
            (format!("shrink {} -> {}", SHARDS.1, SHARDS.0), &self.shrinks),
            ("all".to_owned(), &self.all),
        ];
        for (name, of) in named {
            let pause = of.pause;
            table.row([
                name,
                of.changes.to_string(),
                of.failed.to_string(),
                format!("{:.1}", of.seconds_median),
                format!("{:.0}", of.writes_per_s),
                format!("{:.1} / {:.1} / {:.1}", pause.p50_ms, pause.p99_ms, pause.max_ms),
                format!("{:.0}", of.longest_write_ms),
            ]);
        }
        let mut goals = Table::new(&["what", "found", "goal"]);
        let Goals {
            failed_changes,
            writes_per_s,
            pause_p50_ms,
            pause_p99_ms,
            client_errors,
            writes_lost,
        } = self.goals;
        let (all, wrong) = (&self.all, self.writes_lost + self.strange_keys);
        for (what, found, goal) in [
            ("failed changes", all.failed.to_string(), failed_changes),
            ("writes/s to moving keys", format!("{:.0}", all.writes_per_s), writes_per_s),
            ("pause p50, ms", format!("{:.1}", all.pause.p50_ms), pause_p50_ms),
            ("pause p99, ms", format!("{:.1}", all.pause.p99_ms), pause_p99_ms),
            ("batches that clients saw fail", self.batch_errors.to_string(), client_errors),
            ("keys without their last acknowledged write", wrong.to_string(), writes_lost),
        ] {
            goals.row([what.to_owned(), found, goal.text()]);
        }
        format!(
            "## Cutover under full writes to the moving keys\n\n{}\n{}\nCPU, generator/cluster/others: {}\n",
            table.text(),
            goals.text(),
            self.cpu.shares()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(to: u32, pause_ms: f64, failed: bool) -> Change {
        Change {
            to,
            failed: failed.then(|| "no reason".to_owned()),
            seconds: 2.0,
            writes: 300_000,
            writes_per_s: 150_000.0,
            pause: Pause { p50_ms: pause_ms, p99_ms: pause_ms * 2.0, max_ms: pause_ms * 3.0 },
            longest_write_ms: pause_ms * 4.0,
            retries: 0,
            steps: Vec::new(),
        }
    }

    #[test]
    fn a_failed_change_counts_as_failed_and_not_as_a_short_pause() {
        let changes = vec![
            change(SHARDS.1, 10.0, false),
            change(SHARDS.0, 0.0, true),
            change(SHARDS.0, 30.0, false),
        ];
        let found = of(changes, CpuUsed::default(), (0, Vec::new()), FullLosses::default());
        assert_eq!((found.all.changes, found.all.failed), (3, 1));
        assert_eq!((found.all.pause.p50_ms, found.all.pause.max_ms), (10.0, 90.0));
        assert_eq!(found.all.writes_per_s, 150_000.0);
        assert!(!found.goals.failed_changes.held && found.goals.pause_p50_ms.held);
        assert!(found.fault().is_some() && found.text().contains("| all | 3 | 1 |"));
    }

    #[test]
    fn a_lost_write_makes_the_run_fail() {
        let lost = FullLosses { keys: 9, lost: 1, ..FullLosses::default() };
        let found = of(Vec::new(), CpuUsed::default(), (0, Vec::new()), lost);
        assert!(found.fault().is_some() && !found.goals.writes_lost.held);
        let fine = of(Vec::new(), CpuUsed::default(), (1, Vec::new()), FullLosses::default());
        assert!(fine.fault().is_none() && !fine.goals.client_errors.held);
    }
}
