//! `vasto operation`.

use std::time::Duration;

use vasto_client::{Operation, OperationState, answer::WritePauseMs};

use super::{bytes, count, print, text};
use crate::{
    args::{self, OperationCommand},
    connect,
    output::{OutputFormat, format_bytes, format_duration, table},
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
    match operation.state {
        OperationState::Running => line(operation) + "\n",
        _ => report(operation),
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
        text(operation.step.as_ref()),
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
