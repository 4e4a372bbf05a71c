//! `vasto keyspace resize`: starts it, follows it, prints the report.
//!
//! The master runs the operation and continues without this process: a client that stops waiting loses only the
//! progress display. While no master answers, the client waits, because the next master continues the operation.

use std::time::{Duration, Instant};

use serde_json::Value;
use vasto_client::{ErrorKind, Vasto};

use super::{bytes, count, list, operation, text};
use crate::{
    args::KeyspaceResize,
    connect,
    output::{self, Failure, OutputFormat, ProgressLine, Unit, format_bytes, format_duration, table},
};

/// Interval between polls of the operation.
const POLL: Duration = Duration::from_millis(100);
/// Time without a master after which the client gives up.
const AWAY_MAX: Duration = Duration::from_secs(120);

/// Runs `vasto keyspace resize`.
///
/// # Errors
/// An error of the cluster; an operation that was aborted.
pub async fn run(vasto: &Vasto, args: &KeyspaceResize, format: OutputFormat) -> anyhow::Result<()> {
    if args.plan {
        let plan = connect::document(vasto.plan_resize(&args.name, args.shards).await)?;
        return show(&plan, format, estimate);
    }
    let started = connect::operation(vasto.start_resize(&args.name, args.shards).await)?;
    wait(vasto, started, args.no_wait, format).await
}

/// Follows an operation that was just started to its end, unless `no_wait` is set.
///
/// # Errors
/// An error of the cluster; an operation that was aborted.
pub async fn wait(vasto: &Vasto, started: Value, no_wait: bool, format: OutputFormat) -> anyhow::Result<()> {
    let id = text(&started["id"]);
    if no_wait {
        return show(&started, format, |started| {
            format!("{}\nfollow it with `vasto operation show {}`\n", operation::line(started), text(&started["id"]))
        });
    }
    let ended = tokio::select! {
        ended = follow(vasto, &id, &started) => ended?,
        _ = tokio::signal::ctrl_c() => {
            let failure = Failure::new(format!("stopped waiting; operation {id} goes on"));
            return Err(failure
                .hint(format!("follow it with `vasto operation show {id}`, undo it with `vasto operation cancel {id}`"))
                .into());
        }
    };
    show(&ended, format, operation::report)?;
    if ended["state"] == "done" {
        return Ok(());
    }
    let reason = ended["reason"].as_str().unwrap_or("no reason is known");
    let failure = Failure::new(format!("operation {id} was aborted: {reason}"));
    Err(failure.hint("nothing has changed; try again when the reason is gone").into())
}

fn show(document: &Value, format: OutputFormat, shown: fn(&Value) -> String) -> anyhow::Result<()> {
    match format {
        OutputFormat::Json => output::print_json(document)?,
        OutputFormat::Table => output::print(&shown(document))?,
    }
    Ok(())
}

/// Shows the progress on stderr until the operation has ended; returns its final document.
async fn follow(vasto: &Vasto, id: &str, started: &Value) -> anyhow::Result<Value> {
    let name = match started["kind"].as_str() {
        Some("restore") => format!("restore of {}", text(&started["keyspace"])),
        Some("replace") => format!("replacement of {}", text(&started["from"])),
        _ => format!("{} {} -> {}", text(&started["keyspace"]), text(&started["from"]), text(&started["to"])),
    };
    let mut step = text(&started["step"]);
    let mut progress = ProgressLine::start(format!("{name} {step}"), Unit::Bytes, None);
    let mut poll = tokio::time::interval(POLL);
    let mut away_since: Option<Instant> = None;
    loop {
        poll.tick().await;
        let now = match vasto.show_operation(id).await {
            Ok(answer) => connect::operation(Ok(answer))?,
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::DeadlineExceeded) => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() < AWAY_MAX {
                    set_step(&mut progress, &mut step, &name, "waiting for a master");
                    continue;
                }
                progress.clear();
                let failure = Failure::new(format!("no master for {}: {error}", format_duration(since.elapsed())));
                return Err(failure.hint(format!("a master goes on with it; see `vasto operation show {id}`")).into());
            }
            Err(error) => {
                progress.clear();
                return Err(connect::failure(error).into());
            }
        };
        away_since = None;
        if now["state"] != "running" {
            progress.finish(&summary(&name, &now));
            return Ok(now);
        }
        set_step(&mut progress, &mut step, &name, &doing(&now));
        let total = now["bytes_total"].as_u64().filter(|total| *total > 0);
        progress.set(now["bytes_done"].as_u64().unwrap_or_default(), total);
    }
}

fn set_step(progress: &mut ProgressLine, step: &mut String, name: &str, now: &str) {
    if step != now {
        now.clone_into(step);
        progress.label(format!("{name} {now}"));
    }
}

/// Formats the current step, and what the step waits for while no bytes are moving.
fn doing(now: &Value) -> String {
    let moves = now["bytes_done"].as_u64() < now["bytes_total"].as_u64();
    match now["waiting_for"].as_str() {
        Some(what) if !moves => format!("{}, waiting for {what}", text(&now["step"])),
        _ => text(&now["step"]),
    }
}

fn summary(name: &str, ended: &Value) -> String {
    let took = Duration::from_millis(ended["duration_ms"].as_u64().unwrap_or_default());
    format!("{name} {} after {}", text(&ended["state"]), format_duration(took))
}

fn estimate(plan: &Value) -> String {
    let percent = plan["moving_fraction"].as_f64().unwrap_or_default() * 100.0;
    let sources = list(&plan["sources"]);
    let rows = sources.iter().map(|source| {
        vec![text(&source["shard"]), count(&source["keys"]), bytes(&source["bytes"]), bytes(&source["bytes_to_read"])]
    });
    let to_read: u64 = sources.iter().filter_map(|source| source["bytes_to_read"].as_u64()).sum();
    let seconds = plan["seconds"].as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    format!(
        "{} from {} to {} shards: {percent:.1} % of the keys move; nothing was changed\n\n{}\n\
         in all about {} in {} requests, {}\n",
        text(&plan["keyspace"]),
        text(&plan["from"]),
        text(&plan["to"]),
        table(&[">SHARD", ">KEYS", ">BYTES", ">BYTES TO READ"], rows),
        format_bytes(to_read),
        count(&plan["requests"]),
        seconds.map_or_else(|| "-".to_owned(), format_duration),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_estimate_names_what_each_source_gives() {
        let text = estimate(&json!({"keyspace": "users", "from": 2, "to": 3, "moving_fraction": 0.3333,
            "sources": [{"shard": 0, "keys": 1000, "bytes": 4096, "bytes_to_read": 1366},
                        {"shard": 1, "keys": 1000, "bytes": 4096, "bytes_to_read": 1366}],
            "requests": 7, "seconds": 2.0}));
        for part in [
            "users from 2 to 3 shards: 33.3 % of the keys move; nothing was changed\n",
            "SHARD   KEYS    BYTES  BYTES TO READ\n",
            "    1  1,000  4.0 KiB        1.3 KiB\n",
            "in all about 2.7 KiB in 7 requests, 2.00 s\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn the_progress_says_what_is_waited_for() {
        let mut now = json!({"step": "2 replicas left", "waiting_for": "a node", "bytes_done": 0, "bytes_total": 0});
        assert_eq!(doing(&now), "2 replicas left, waiting for a node");
        now["bytes_total"] = json!(9);
        assert_eq!(doing(&now), "2 replicas left", "it moves");
        assert_eq!(doing(&json!({"step": "tail", "waiting_for": null})), "tail");
    }

    #[test]
    fn the_last_line_of_the_progress_says_how_it_ended() {
        let ended = json!({"state": "aborted", "duration_ms": 1_500});
        assert_eq!(summary("users 2 -> 3", &ended), "users 2 -> 3 aborted after 1.50 s");
    }
}
