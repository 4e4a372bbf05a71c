//! Grows and shrinks while clients write to the moving keys alone, as many as the machine gives.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use vasto_client::Ack;
use vasto_testkit::S3Server;

use super::args::Args;
use super::cpu::CpuUsed;
use super::follow::{Ended, StepTime, steps_text};
use super::limit::Limit;
use super::stage::{Garbage, Stage};
use super::table::{Goal, Table, note};
use super::{Part, early};
use crate::figures::{median, percentile};
use crate::full_writes::{FullLoad, FullLosses, FullWrites, SHARDS};

const NAME: &str = "full";
/// Minutes that the part has.
const MINUTES: u64 = 25;
/// Bytes of a value: what is measured is the cutover, not how much log two cores can read and write.
const VALUE_BYTES: usize = 20;
/// Keys that are written between two changes.
const BETWEEN: u64 = 20_000;
/// Writers that stand still for so long are stuck.
const WRITES_GO_ON: Duration = Duration::from_secs(60);
/// A change that takes so long has failed.
const CHANGE_WITHIN: Duration = Duration::from_secs(120);
/// Time that is kept for what comes behind the last change: all keys are read.
const FOR_THE_END: Duration = Duration::from_secs(40);

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
    /// Both of these; not a number when nobody has looked at the keys.
    #[serde(skip)]
    wrong: f64,
    cpu: CpuUsed,
    goals: Goals,
    /// Why it ended before all changes were done.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<String>,
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
    changes: Goal,
    failed_changes: Goal,
    writes_per_s: Goal,
    pause_p50_ms: Goal,
    pause_p99_ms: Goal,
    client_errors: Goal,
    writes_lost: Goal,
}

/// What a run has measured, also when it ends early.
#[derive(Default)]
struct Seen {
    changes: Vec<Change>,
    cpu: CpuUsed,
    errors: (u64, Vec<String>),
    losses: FullLosses,
}

/// Measures until all changes are done, one does not end, or the time is over.
pub(super) async fn measure(args: &Args, s3: Option<&S3Server>) -> Cutover {
    let (limit, mut seen) = (args.limit(MINUTES), Seen::default());
    let ended = limit.run(Box::pin(run(args, s3, limit, &mut seen))).await;
    let stopped = ended.err().map(|error| format!("{error:#}"));
    of(seen, args.changes as usize * 2, stopped)
}

async fn run(args: &Args, s3: Option<&S3Server>, limit: Limit, seen: &mut Seen) -> Result<()> {
    let mut stage = Stage::start(args, s3, "cutover", 2, Garbage::Goes).await?;
    let keyspace = stage.create(NAME, SHARDS.0, 1, Ack::Os).await?;
    let writes_per_s = (args.writes_per_s > 0).then(|| f64::from(args.writes_per_s));
    let full = FullWrites::with(&keyspace, FullLoad { value_bytes: VALUE_BYTES, writes_per_s });
    let mut shards = SHARDS.0;
    for number in 0..args.changes * 2 {
        if limit.left() < FOR_THE_END {
            break;
        }
        let to = if shards == SHARDS.0 { SHARDS.1 } else { SHARDS.0 };
        go_on(&full, BETWEEN).await?;
        let before = stage.cpu()?;
        let change = change(&stage, &full, to).await;
        seen.cpu.add(&before.until(&stage.cpu()?));
        seen.errors.0 = full.failed();
        if change.failed.is_none() {
            shards = to;
        }
        note(&change.line(number + 1, args.changes * 2));
        seen.changes.push(change);
        // After a change that has failed, this finds out whether another one can begin.
        stage.settled(NAME).await?;
        if number % 2 == 1 {
            // The chunks of a long run would fill the disk.
            stage.collect().await;
        }
    }
    let written = full.stop().await;
    seen.losses = written.losses(&keyspace).await?;
    seen.errors = (written.failed, written.errors);
    drop(keyspace);
    stage.finish().await?;
    let done = seen.changes.len();
    ensure!(
        done == args.changes as usize * 2,
        "its time was over after {done} changes (`--minutes` gives it more)"
    );
    Ok(())
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
    let ended = match tokio::time::timeout(CHANGE_WITHIN, stage.resize(NAME, to)).await {
        Ok(ended) => ended.with_context(|| format!("to {to} shards")),
        Err(_) => Err(anyhow!("it did not end within {CHANGE_WITHIN:?}")),
    };
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

/// Returns the keys that do not hold what was written.
fn wrong_of(losses: &FullLosses) -> f64 {
    match losses.keys {
        // Nobody has looked at the keys of a run that was broken off.
        0 => f64::NAN,
        _ => (losses.lost + losses.strange) as f64,
    }
}

/// Sums up what was seen, of so many changes that were asked for.
fn of(seen: Seen, wanted: usize, stopped: Option<String>) -> Cutover {
    let Seen { changes, cpu, errors: (batch_errors, first_errors), losses } = seen;
    let all = summary(changes.iter());
    let goals = Goals {
        changes: Goal::at_least(wanted as f64, all.changes as f64),
        failed_changes: Goal::at_most(0.0, all.failed as f64),
        writes_per_s: Goal::at_least(100_000.0, all.writes_per_s),
        pause_p50_ms: Goal::at_most(50.0, all.pause.p50_ms),
        pause_p99_ms: Goal::at_most(500.0, all.pause.p99_ms),
        client_errors: Goal::at_most(0.0, batch_errors as f64),
        writes_lost: Goal::at_most(0.0, wrong_of(&losses)),
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
        wrong: wrong_of(&losses),
        cpu,
        goals,
        stopped,
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
    /// Returns what was found for each goal.
    fn found(&self) -> [(&'static str, f64, Goal); 7] {
        let Goals {
            changes,
            failed_changes,
            writes_per_s,
            pause_p50_ms,
            pause_p99_ms,
            client_errors,
            writes_lost,
        } = self.goals;
        let all = &self.all;
        [
            ("changes", all.changes as f64, changes),
            ("failed changes", all.failed as f64, failed_changes),
            ("writes/s to moving keys", all.writes_per_s, writes_per_s),
            ("pause p50, ms", all.pause.p50_ms, pause_p50_ms),
            ("pause p99, ms", all.pause.p99_ms, pause_p99_ms),
            ("batches that clients saw fail", self.batch_errors as f64, client_errors),
            ("keys without their last acknowledged write", self.wrong, writes_lost),
        ]
    }
}

impl Part for Cutover {
    fn missed(&self) -> Vec<String> {
        let missed =
            self.found().into_iter().filter_map(|(what, found, goal)| goal.missed(what, found));
        early(self.stopped.as_deref()).into_iter().chain(missed).collect()
    }

    fn text(&self) -> String {
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
        for (what, found, goal) in self.found() {
            goals.row([what.to_owned(), format!("{found:.1}"), goal.text()]);
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

    fn seen(changes: Vec<Change>, errors: u64, losses: FullLosses) -> Seen {
        Seen { changes, errors: (errors, Vec::new()), losses, ..Seen::default() }
    }

    fn kept() -> FullLosses {
        FullLosses { keys: 9, ..FullLosses::default() }
    }

    #[test]
    fn a_failed_change_counts_as_failed_and_not_as_a_short_pause() {
        let changes = vec![
            change(SHARDS.1, 10.0, false),
            change(SHARDS.0, 0.0, true),
            change(SHARDS.0, 30.0, false),
        ];
        let found = of(seen(changes, 0, kept()), 3, None);
        assert_eq!((found.all.changes, found.all.failed), (3, 1));
        assert_eq!((found.all.pause.p50_ms, found.all.pause.max_ms), (10.0, 90.0));
        assert_eq!(found.all.writes_per_s, 150_000.0);
        assert!(found.goals.changes.held && found.goals.pause_p50_ms.held);
        assert_eq!(found.missed(), ["failed changes: 1.000, the goal is <= 0"]);
        assert!(found.text().contains("| all | 3 | 1 |"));
    }

    #[test]
    fn a_lost_write_an_error_and_an_early_end_are_named() {
        let fine = || vec![change(SHARDS.1, 10.0, false)];
        let missed = of(seen(fine(), 0, FullLosses { lost: 1, ..kept() }), 1, None).missed();
        assert!(missed.len() == 1 && missed[0].contains("last acknowledged"), "{missed:?}");
        let missed = of(seen(fine(), 2, kept()), 1, None).missed();
        assert!(missed.len() == 1 && missed[0].contains("clients saw fail"), "{missed:?}");
        // Keys that nobody has looked at are not known to be kept.
        let stopped = Some("the writers stand still".to_owned());
        let missed = of(seen(fine(), 0, FullLosses::default()), 2, stopped).missed();
        assert!(missed.len() == 3 && missed[0].contains("stand still"), "{missed:?}");
        assert!(missed[1].starts_with("changes: 1.000"), "{missed:?}");
    }
}
