//! `vasto operation`.

use std::time::Duration;

use serde_json::Value;

use super::{bytes, count, list, text};
use crate::{
    args::{Operation, OperationCommand},
    connect,
    output::{self, OutputFormat, format_duration, table},
};

/// Runs one command of `vasto operation`.
///
/// # Errors
/// An error of the cluster.
pub async fn run(args: &Operation, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    let (answer, shown): (Value, fn(&Value) -> String) = match &args.command {
        OperationCommand::List => (connect::document(vasto.list_operations().await)?, listing),
        OperationCommand::Show(which) => (connect::operation(vasto.show_operation(&which.id).await)?, show),
        OperationCommand::Cancel(which) => (connect::operation(vasto.cancel_operation(&which.id).await)?, cancelled),
    };
    match format {
        OutputFormat::Json => output::print_json(&answer)?,
        OutputFormat::Table => output::print(&shown(&answer))?,
    }
    Ok(())
}

fn cancelled(answer: &Value) -> String {
    let left = match answer["replicas_moved"].as_u64() {
        None | Some(0) => "nothing has changed".to_owned(),
        Some(moved) => format!("{moved} replicas have moved already and stay where they are"),
    };
    format!("cancelled {}; {left}\n", text(&answer["id"]))
}

fn listing(operations: &Value) -> String {
    let rows = list(operations).iter().map(|one| {
        let column = |name: &str| text(&one[name]);
        let state = match one["step"].as_str() {
            Some(step) => format!("{}, {step}", column("state")),
            None => column("state"),
        };
        vec![
            column("id"),
            column("keyspace"),
            column("kind"),
            column("from"),
            column("to"),
            state,
            count(&one["keys_moved"]),
            milliseconds(&one["duration_ms"]),
        ]
    });
    table(&["ID", "KEYSPACE", "KIND", ">FROM", ">TO", "STATE", ">KEYS MOVED", ">DURATION"], rows)
}

fn milliseconds(value: &Value) -> String {
    value.as_u64().map_or_else(|| text(value), |ms| format_duration(Duration::from_millis(ms)))
}

fn show(operation: &Value) -> String {
    match operation["state"].as_str() {
        Some("running") => line(operation) + "\n",
        _ => report(operation),
    }
}

/// Formats a running operation in one line.
pub fn line(operation: &Value) -> String {
    let column = |name: &str| text(&operation[name]);
    let mut out = format!(
        "{} {} {} from {} to {}: {}",
        column("id"),
        column("kind"),
        column("keyspace"),
        column("from"),
        column("to"),
        column("step"),
    );
    if operation["bytes_total"].as_u64().is_some_and(|total| total > 0) {
        out += &format!(", {} of {} read", bytes(&operation["bytes_done"]), bytes(&operation["bytes_total"]));
    }
    if let Some(waiting) = operation["waiting_for"].as_str() {
        out += &format!(", waiting for {waiting}");
    }
    out
}

/// Formats the report of a finished operation.
pub fn report(operation: &Value) -> String {
    let column = |name: &str| text(&operation[name]);
    let pause = &operation["write_pause_ms"];
    let ended = match operation["reason"].as_str() {
        Some(reason) => format!("{}: {reason}", column("state")),
        None => column("state"),
    };
    let rows = [
        ("operation", column("id")),
        (
            "what",
            match operation["kind"].as_str() {
                Some("grow") => {
                    format!("grow {} from {} to {} shards", column("keyspace"), column("from"), column("to"))
                }
                Some("replace") => format!("{} replicas of node {}", column("replicas_moved"), column("from")),
                _ => format!("{} {}", column("kind"), column("keyspace")),
            },
        ),
        ("state", ended),
        ("duration", milliseconds(&operation["duration_ms"])),
        ("keys moved", count(&operation["keys_moved"])),
        ("bytes moved", bytes(&operation["bytes_moved"])),
        (
            "from the bucket",
            format!("{} in {} reads", bytes(&operation["bytes_from_bucket"]), count(&operation["objects_read"])),
        ),
        ("from peers", bytes(&operation["bytes_from_peers"])),
        (
            "write pause",
            format!("p50 {} ms, p99 {} ms, max {} ms", text(&pause["p50"]), text(&pause["p99"]), text(&pause["max"])),
        ),
    ];
    // Records after this LSN that had not been shipped are missing from the result.
    let reached = operation["reached"].as_array().into_iter().flatten().map(|one| {
        let (shard, replica, lsn) = (text(&one["shard"]), text(&one["replica"]), text(&one["lsn"]));
        ("log reached", format!("shard {shard}: LSN {lsn} of replica {replica}"))
    });
    rows.into_iter().chain(reached).map(|(name, value)| format!("{name:<16} {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn finished() -> Value {
        json!({"id": "op-1-1", "kind": "grow", "keyspace": "users", "from": 2, "to": 3, "state": "done",
            "keys_moved": 372_553, "bytes_moved": 10_485_760, "bytes_from_bucket": 11_010_048, "bytes_from_peers": 2_048,
            "objects_read": 12, "write_pause_ms": {"p50": 20.5, "p99": 31.0, "max": 35.25}, "duration_ms": 4_200})
    }

    #[test]
    fn a_cancelled_operation_says_what_stays() {
        assert_eq!(cancelled(&json!({"id": "op-1-1"})), "cancelled op-1-1; nothing has changed\n");
        let some = cancelled(&json!({"id": "node-n-1-2", "replicas_moved": 2}));
        assert!(some.contains("2 replicas have moved already"), "{some}");
    }

    #[test]
    fn running_and_finished_operations_are_told_apart() {
        let running = json!({"id": "op-1-2", "kind": "grow", "keyspace": "users", "from": 3, "to": 4, "state": "running",
            "step": "tail", "waiting_for": "n-1 to catch up", "bytes_done": 1_048_576, "bytes_total": 2_097_152});
        assert_eq!(
            show(&running),
            "op-1-2 grow users from 3 to 4: tail, 1.0 MiB of 2.0 MiB read, waiting for n-1 to catch up\n"
        );
        let text = show(&finished());
        for part in [
            "what             grow users from 2 to 3 shards\n",
            "keys moved       372,553\n",
            "from the bucket  10.5 MiB in 12 reads\n",
            "write pause      p50 20.5 ms, p99 31.0 ms, max 35.25 ms\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let text = listing(&json!([running, finished()]));
        assert!(text.contains("running, tail") && text.contains("4.20 s"), "{text}");
    }
}
