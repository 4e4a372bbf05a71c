//! `vasto keyspace resize`: ends a quarantine that is in its way if asked to, starts it, follows
//! it, prints the report.
//!
//! The master runs the operation and continues without this process: a client that stops waiting
//! loses only the progress display. While no master answers, the client waits, because the next
//! master continues the operation.

use std::time::{Duration, Instant};

use vasto_client::{Answer, ErrorKind, Operation, OperationState, Vasto, answer::QuarantinesLeft};

use super::{operation, plan, print, text};
use crate::{
    args::KeyspaceResize,
    connect,
    output::{Failure, OutputFormat, ProgressLine, Unit, format_duration},
};

/// Interval between polls of the operation.
const POLL: Duration = Duration::from_millis(100);
/// Time without a master after which the client gives up.
const AWAY_MAX: Duration = Duration::from_secs(120);

/// Runs `vasto keyspace resize`.
///
/// # Errors
/// An error of the cluster; an operation that was aborted.
pub(crate) async fn run(
    vasto: &Vasto,
    args: &KeyspaceResize,
    format: OutputFormat,
) -> anyhow::Result<()> {
    if args.plan {
        let planned = vasto.plan_resize_at(&args.name, args.shards, args.start.max_rate).await;
        return print(&planned.map_err(connect::failure)?, format, plan::text_of);
    }
    if args.end_quarantine {
        tokio::select! {
            ended = end_quarantine(vasto, &args.name, args.shards) => ended?,
            _ = tokio::signal::ctrl_c() => {
                let failure = Failure::new("stopped waiting; nothing was resized");
                return Err(failure.hint("the quarantine ends all the same; run the command again").into());
            }
        }
    }
    let started = vasto.start_resize_at(&args.name, args.shards, args.start.max_rate).await;
    let started = started.map_err(connect::failure)?;
    wait(vasto, started, args.start.no_wait, format).await
}

/// Ends the quarantines that keep a keyspace from shrinking, and waits until their keys are
/// removed.
async fn end_quarantine(vasto: &Vasto, name: &str, shards: u32) -> anyhow::Result<()> {
    let label = format!("{name} quarantine");
    let mut shown = String::new();
    let mut progress: Option<ProgressLine> = None;
    let mut poll = tokio::time::interval(POLL);
    let mut away_since: Option<Instant> = None;
    loop {
        poll.tick().await;
        let now = match vasto.end_quarantine(name, shards).await {
            Ok(left) if left.quarantines.is_empty() => {
                if let Some(progress) = progress {
                    progress.finish(&format!("{label} ended"));
                }
                return Ok(());
            }
            Ok(left) => {
                away_since = None;
                removing(&left)
            }
            // The call changes nothing when it is repeated.
            Err(error) if error.kind() == ErrorKind::Unknown || is_away(error.kind()) => {
                if away_since.get_or_insert_with(Instant::now).elapsed() >= AWAY_MAX {
                    return Err(connect::failure(error).into());
                }
                "waiting for a master".to_owned()
            }
            Err(error) => return Err(connect::failure(error).into()),
        };
        let progress =
            progress.get_or_insert_with(|| ProgressLine::start(label.clone(), Unit::Items, None));
        set_step(progress, &mut shown, &label, &now);
    }
}

/// Formats what the end of the quarantines waits for.
fn removing(left: &QuarantinesLeft) -> String {
    match (&left.waiting_for, left.quarantines.iter().all(|kept| kept.dropping)) {
        (Some(what), false) => format!("waiting for {what}"),
        (None, false) => "waiting for the bucket to hold the keys elsewhere".to_owned(),
        (_, true) => "removing the kept keys".to_owned(),
    }
}

/// Returns true for the error of a call that no master has answered.
fn is_away(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unavailable | ErrorKind::DeadlineExceeded)
}

/// Follows an operation that was just started to its end, unless `no_wait` is set.
///
/// # Errors
/// An error of the cluster; an operation that was aborted.
pub(crate) async fn wait(
    vasto: &Vasto,
    started: Answer<Operation>,
    no_wait: bool,
    format: OutputFormat,
) -> anyhow::Result<()> {
    let id = &started.id;
    if no_wait {
        return print(&started, format, |started| {
            format!("{}\nfollow it with `vasto operation show {id}`\n", operation::line(started))
        });
    }
    let ended = tokio::select! {
        ended = follow(vasto, &started) => ended?,
        _ = tokio::signal::ctrl_c() => {
            let failure = Failure::new(format!("stopped waiting; operation {id} goes on"));
            return Err(failure
                .hint(format!("follow it with `vasto operation show {id}`, undo it with `vasto operation cancel {id}`"))
                .into());
        }
    };
    print(&ended, format, operation::report)?;
    let failure = match &ended.state {
        OperationState::Done => return Ok(()),
        OperationState::Aborted => {
            let reason = ended.reason.as_deref().unwrap_or("no reason is known");
            let failure = Failure::new(format!("operation {id} was aborted: {reason}"));
            failure.hint("nothing has changed; try again when the reason is gone")
        }
        state => {
            let failure = Failure::new(format!(
                "operation {id} is in the state `{state}`, which this version does not know"
            ));
            failure.hint(format!(
                "follow it with `vasto operation show {id}` of the version of the master"
            ))
        }
    };
    Err(failure.into())
}

/// Shows the progress on stderr until the operation has ended; returns its final document.
async fn follow(vasto: &Vasto, started: &Operation) -> anyhow::Result<Answer<Operation>> {
    let id = &started.id;
    let keyspace = text(started.keyspace.as_ref());
    let (from, to) = (text(started.from.as_ref()), text(started.to.as_ref()));
    let name = match started.kind.as_deref() {
        Some("restore") => format!("restore of {keyspace}"),
        Some("replace") => format!("replacement of {from}"),
        Some("rebalance") => "rebalance".to_owned(),
        _ => format!("{keyspace} {from} -> {to}"),
    };
    let mut step = text(started.step.as_ref());
    let mut progress = ProgressLine::start(format!("{name} {step}"), Unit::Bytes, None);
    let mut poll = tokio::time::interval(POLL);
    let mut away_since: Option<Instant> = None;
    loop {
        poll.tick().await;
        let now = match vasto.show_operation(id).await {
            Ok(now) => now,
            Err(error) if is_away(error.kind()) => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() < AWAY_MAX {
                    set_step(&mut progress, &mut step, &name, "waiting for a master");
                    continue;
                }
                progress.clear();
                let failure = Failure::new(format!(
                    "no master for {}: {error}",
                    format_duration(since.elapsed())
                ));
                return Err(failure
                    .hint(format!("a master goes on with it; see `vasto operation show {id}`"))
                    .into());
            }
            Err(error) => {
                progress.clear();
                return Err(connect::failure(error).into());
            }
        };
        away_since = None;
        if !now.state.is_under_way() {
            progress.finish(&summary(&name, &now));
            return Ok(now);
        }
        set_step(&mut progress, &mut step, &name, &doing(&now));
        progress
            .set(now.bytes_done.unwrap_or_default(), now.bytes_total.filter(|total| *total > 0));
    }
}

fn set_step(progress: &mut ProgressLine, step: &mut String, name: &str, now: &str) {
    if step != now {
        now.clone_into(step);
        progress.label(format!("{name} {now}"));
    }
}

/// Formats the current step, and what the step waits for while no bytes are moving.
fn doing(now: &Operation) -> String {
    let step = text(now.step.as_ref());
    if now.state == OperationState::Paused {
        return format!("{step}, paused; go on with `vasto operation resume {}`", now.id);
    }
    if let Some(trouble) = &now.trouble {
        return format!("{step}, held up: {}; {}", trouble.what, trouble.next);
    }
    let moves = now.bytes_done < now.bytes_total;
    match &now.waiting_for {
        Some(what) if !moves => format!("{step}, waiting for {what}"),
        _ => step,
    }
}

fn summary(name: &str, ended: &Operation) -> String {
    let took = Duration::from_millis(ended.duration_ms.unwrap_or_default());
    format!("{name} {} after {}", ended.state, format_duration(took))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, from_value, json};

    use super::*;

    fn operation(document: &Value) -> Operation {
        from_value(document.clone()).unwrap()
    }

    #[test]
    fn the_progress_says_what_is_waited_for() {
        let mut now = json!({"id": "node-n-1-2", "state": "running", "step": "2 replicas left", "waiting_for": "a node",
            "bytes_done": 0, "bytes_total": 0});
        assert_eq!(doing(&operation(&now)), "2 replicas left, waiting for a node");
        now["bytes_total"] = json!(9);
        assert_eq!(doing(&operation(&now)), "2 replicas left", "it moves");
        now["trouble"] = json!({"since_ms": 9_000, "what": "n-1 is away", "next": "start it"});
        assert_eq!(doing(&operation(&now)), "2 replicas left, held up: n-1 is away; start it");
        now["state"] = json!("paused");
        assert!(doing(&operation(&now)).ends_with("`vasto operation resume node-n-1-2`"));
        let tail = json!({"id": "op-1-1", "state": "running", "step": "tail", "waiting_for": null});
        assert_eq!(doing(&operation(&tail)), "tail");
    }

    #[test]
    fn the_end_of_a_quarantine_says_what_it_waits_for() {
        let left = |dropping: bool, waiting_for: Value| {
            let document =
                json!({"quarantines": [{"dropping": dropping}], "waiting_for": waiting_for});
            removing(&from_value(document).unwrap())
        };
        assert_eq!(left(false, json!("a manifest")), "waiting for a manifest");
        assert!(left(false, Value::Null).contains("the bucket"));
        assert_eq!(left(true, json!("moved ranges")), "removing the kept keys");
    }

    #[test]
    fn the_last_line_of_the_progress_says_how_it_ended() {
        let ended = operation(&json!({"id": "op-1-1", "state": "aborted", "duration_ms": 1_500}));
        assert_eq!(summary("users 2 -> 3", &ended), "users 2 -> 3 aborted after 1.50 s");
    }
}
