//! `vasto operation`.

use std::time::Duration;

use vasto_client::{Operation, OperationState, answer::WritePauseMs};

use super::{bytes, count, print, text};
use crate::{
    args::{self, OperationCommand},
    connect,
    output::{OutputFormat, format_bytes, format_count, format_duration, table},
};

/// Runs one command of `vasto operation`.
///
/// # Errors
/// An error of the cluster.
pub(crate) async fn run(args: &args::Operation, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    match &args.command {
        OperationCommand::List => {
            print(&vasto.list_operations().await.map_err(connect::failure)?, format, |all| {
                listing(all)
            })
        }
        OperationCommand::Show(which) => {
            print(&vasto.show_operation(&which.id).await.map_err(connect::failure)?, format, show)
        }
        OperationCommand::Cancel(which) => print(
            &vasto.cancel_operation(&which.id).await.map_err(connect::failure)?,
            format,
            cancelled,
        ),
        OperationCommand::Pause(which) => {
            print(&vasto.pause_operation(&which.id).await.map_err(connect::failure)?, format, show)
        }
        OperationCommand::Resume(which) => {
            print(&vasto.resume_operation(&which.id).await.map_err(connect::failure)?, format, show)
        }
        OperationCommand::Rate(which) => {
            let limited = vasto.limit_operation(&which.id, which.rate.0).await;
            print(&limited.map_err(connect::failure)?, format, show)
        }
    }
}

fn cancelled(operation: &Operation) -> String {
    let left = match operation.replicas_moved {
        None | Some(0) => "nothing has changed".to_owned(),
        Some(moved) => format!("{moved} replicas have moved already and stay where they are"),
    };
    format!("cancelled {}; {left}\n", operation.id)
}

fn listing(operations: &[Operation]) -> String {
    let rows = operations.iter().map(|operation| {
        let state = match &operation.step {
            Some(step) => format!("{}, {step}", operation.state),
            None => operation.state.to_string(),
        };
        vec![
            operation.id.clone(),
            text(operation.keyspace.as_ref()),
            text(operation.kind.as_ref()),
            text(operation.from.as_ref()),
            text(operation.to.as_ref()),
            state,
            count(operation.keys_moved),
            milliseconds(operation.duration_ms),
        ]
    });
    table(&["ID", "KEYSPACE", "KIND", ">FROM", ">TO", "STATE", ">KEYS MOVED", ">DURATION"], rows)
}

fn milliseconds(value: Option<u64>) -> String {
    text(value.map(|ms| format_duration(Duration::from_millis(ms))))
}

fn show(operation: &Operation) -> String {
    match operation.state.is_under_way() {
        true => line(operation) + "\n" + &details(operation),
        false => report(operation),
    }
}

/// Formats what is known of a running operation beyond its line: one line for each figure, each
/// source and each target.
fn details(operation: &Operation) -> String {
    let a_second = |rate: u64| format!("{}/s", format_bytes(rate));
    let mut rows: Vec<(&str, String)> = Vec::new();
    if let Some(rate) = operation.rate {
        let left = operation.seconds_left.map(Duration::from_secs).map(format_duration);
        let left = left.map_or_else(String::new, |left| format!(", {left} left"));
        rows.push(("rate", a_second(rate) + &left));
    }
    rows.extend(operation.max_rate.map(|rate| ("at most", a_second(rate))));
    if !operation.yields_on.is_empty() {
        let nodes = operation.yields_on.join(", ");
        rows.push(("yields", format!("to the requests on {nodes}")));
    }
    for source in &operation.sources {
        let does = match (source.prepared, source.bytes_total) {
            (true, _) => "prepared".to_owned(),
            (false, 0) => "preparing".to_owned(),
            (false, total) => exported(source.bytes_done, total),
        };
        let tried = tried(source.retries, source.last_error.as_ref());
        rows.push((
            "source",
            format!("shard {} on {}: {does}{tried}", source.shard, source.node_id),
        ));
    }
    for target in &operation.targets {
        let mut does = text(target.stage.as_ref());
        if target.bytes_total > 0 {
            let (done, total) = (format_bytes(target.bytes_done), format_bytes(target.bytes_total));
            does += &format!(", {done} of {total} read");
        }
        let tried = tried(target.retries, target.last_error.as_ref());
        rows.push((
            "target",
            format!("shard {} on {}: {does}{tried}", target.shard, target.node_id),
        ));
    }
    rows.extend(operation.retries.filter(|n| *n > 0).map(|n| ("retries", format_count(n))));
    if let Some(pause) = operation.write_pause_ms.filter(|pause| pause.max > 0.0) {
        rows.push(("write pause", format!("p50 {:?} ms, max {:?} ms", pause.p50, pause.max)));
    }
    if let Some(trouble) = &operation.trouble {
        let since = format_duration(Duration::from_millis(trouble.since_ms));
        rows.push(("held up", format!("for {since}: {}", trouble.what)));
        rows.push(("what to do", trouble.next.clone()));
    }
    rows.into_iter().map(|(name, value)| format!("  {name:<14} {value}\n")).collect()
}

fn exported(done: u64, total: u64) -> String {
    format!("{} of {} exported", format_bytes(done), format_bytes(total))
}

/// Formats how often a part was tried again, and why.
fn tried(retries: u64, error: Option<&String>) -> String {
    match (retries, error) {
        (0, _) => String::new(),
        (retries, None) => format!(", tried again {retries} times"),
        (retries, Some(error)) => format!(", tried again {retries} times: {error}"),
    }
}

/// Formats a running operation in one line.
pub(crate) fn line(operation: &Operation) -> String {
    let mut out = format!(
        "{} {} {} from {} to {}: {}",
        operation.id,
        text(operation.kind.as_ref()),
        text(operation.keyspace.as_ref()),
        text(operation.from.as_ref()),
        text(operation.to.as_ref()),
        match operation.state {
            OperationState::Paused => format!("paused in {}", text(operation.step.as_ref())),
            _ => text(operation.step.as_ref()),
        },
    );
    if let Some(total) = operation.bytes_total.filter(|total| *total > 0) {
        out += &format!(", {} of {} read", bytes(operation.bytes_done), format_bytes(total));
    }
    if let Some(waiting) = &operation.waiting_for {
        out += &format!(", waiting for {waiting}");
    }
    out
}

/// Formats the report of a finished operation.
pub(crate) fn report(operation: &Operation) -> String {
    let keyspace = text(operation.keyspace.as_ref());
    let (from, to) = (text(operation.from.as_ref()), text(operation.to.as_ref()));
    // With a fraction, as in JSON: `20.0`.
    let pause = |percentile: fn(&WritePauseMs) -> f64| {
        text(operation.write_pause_ms.as_ref().map(|pause| format!("{:?}", percentile(pause))))
    };
    let rows = [
        ("operation", operation.id.clone()),
        (
            "what",
            match operation.kind.as_deref() {
                Some(kind @ ("grow" | "shrink")) => {
                    format!("{kind} {keyspace} from {from} to {to} shards")
                }
                Some("rebalance") => format!(
                    "{} replicas moved, {} other primaries, {} moves failed",
                    text(operation.replicas_moved),
                    text(operation.primaries_moved),
                    text(operation.moves_failed),
                ),
                Some("replace") => {
                    format!("{} replicas of node {from}", text(operation.replicas_moved))
                }
                kind => format!("{} {keyspace}", text(kind)),
            },
        ),
        (
            "state",
            match &operation.reason {
                Some(reason) => format!("{}: {reason}", operation.state),
                None => operation.state.to_string(),
            },
        ),
        ("duration", milliseconds(operation.duration_ms)),
        ("keys moved", count(operation.keys_moved)),
        ("bytes moved", bytes(operation.bytes_moved)),
        (
            "from the bucket",
            format!(
                "{} in {} reads",
                bytes(operation.bytes_from_bucket),
                count(operation.objects_read)
            ),
        ),
        ("from peers", bytes(operation.bytes_from_peers)),
        (
            "write pause",
            format!(
                "p50 {} ms, p99 {} ms, max {} ms",
                pause(|pause| pause.p50),
                pause(|pause| pause.p99),
                pause(|pause| pause.max)
            ),
        ),
    ];
    let estimated = operation.estimate.iter().map(|estimate| {
        let (moved, read) =
            (bytes(Some(estimate.bytes_moved)), bytes(Some(estimate.bytes_from_bucket)));
        let time = milliseconds(Some(estimate.duration_ms));
        ("estimated", format!("{moved} moved, {read} from the bucket, {time}"))
    });
    // Records after this LSN that had not been shipped are missing from the result.
    let reached = operation.reached.iter().map(|log| {
        ("log reached", format!("shard {}: LSN {} of replica {}", log.shard, log.lsn, log.replica))
    });
    rows.into_iter()
        .chain(estimated)
        .chain(reached)
        .map(|(name, value)| format!("{name:<16} {value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, from_value, json};

    use super::*;

    fn operation(document: Value) -> Operation {
        from_value(document).unwrap()
    }

    fn finished() -> Operation {
        operation(
            json!({"id": "op-1-1", "kind": "grow", "keyspace": "users", "from": 2, "to": 3, "state": "done",
            "keys_moved": 372_553, "bytes_moved": 10_485_760, "bytes_from_bucket": 11_010_048, "bytes_from_peers": 2_048,
            "objects_read": 12, "estimate": {"bytes_moved": 10_000_000, "bytes_from_bucket": 10_500_000, "duration_ms": 4_000},
            "write_pause_ms": {"p50": 20.5, "p99": 31.0, "max": 35.25}, "duration_ms": 4_200}),
        )
    }

    #[test]
    fn a_cancelled_operation_says_what_stays() {
        assert_eq!(
            cancelled(&operation(json!({"id": "op-1-1", "state": "aborted"}))),
            "cancelled op-1-1; nothing has changed\n"
        );
        let some = json!({"id": "node-n-1-2", "state": "aborted", "replicas_moved": 2});
        let some = cancelled(&operation(some));
        assert!(some.contains("2 replicas have moved already"), "{some}");
    }

    #[test]
    fn running_and_finished_operations_are_told_apart() {
        let running = operation(
            json!({"id": "op-1-2", "kind": "grow", "keyspace": "users", "from": 3, "to": 4, "state": "running",
            "step": "tail", "waiting_for": "n-1 to catch up", "bytes_done": 1_048_576, "bytes_total": 2_097_152}),
        );
        assert_eq!(
            show(&running),
            "op-1-2 grow users from 3 to 4: tail, 1.0 MiB of 2.0 MiB read, waiting for n-1 to catch up\n"
        );
        let paused = operation(
            json!({"id": "op-1-2", "kind": "grow", "keyspace": "users", "from": 3, "to": 4, "state": "paused",
            "step": "tail", "rate": 1_048_576, "seconds_left": 90, "max_rate": 2_097_152, "retries": 2,
            "yields_on": ["n-2", "n-3"],
            "sources": [{"shard": 0, "node_id": "n-1", "prepared": true}],
            "targets": [{"shard": 3, "node_id": "n-2", "stage": "downloading", "bytes_done": 1_024,
                "bytes_total": 2_048, "retries": 2, "last_error": "timed out"}],
            "trouble": {"since_ms": 12_000, "what": "n-2 is away", "next": "start it"}}),
        );
        assert_eq!(
            show(&paused),
            "op-1-2 grow users from 3 to 4: paused in tail\n\
             \x20 rate           1.0 MiB/s, 1 min 30 s left\n\
             \x20 at most        2.0 MiB/s\n\
             \x20 yields         to the requests on n-2, n-3\n\
             \x20 source         shard 0 on n-1: prepared\n\
             \x20 target         shard 3 on n-2: downloading, 1.0 KiB of 2.0 KiB read, tried again 2 times: timed out\n\
             \x20 retries        2\n\
             \x20 held up        for 12.0 s: n-2 is away\n\
             \x20 what to do     start it\n"
        );
        let shrink = Operation { kind: Some("shrink".to_owned()), ..finished() };
        assert!(show(&shrink).contains("what             shrink users from 2 to 3 shards\n"));
        let text = show(&finished());
        for part in [
            "what             grow users from 2 to 3 shards\n",
            "keys moved       372,553\n",
            "from the bucket  10.5 MiB in 12 reads\n",
            "write pause      p50 20.5 ms, p99 31.0 ms, max 35.25 ms\n",
            "estimated        9.5 MiB moved, 10.0 MiB from the bucket, 4.00 s\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let text = listing(&[running, finished()]);
        assert!(text.contains("running, tail") && text.contains("4.20 s"), "{text}");
    }
}
