//! `vasto keyspace`, except for `resize`, which has its own module.

use serde_json::Value;
use vasto_client::KeyspaceSpec;

use super::{bytes, count, list, resize, text};
use crate::{
    args::{Keyspace, KeyspaceCommand, KeyspaceCreate},
    connect,
    output::{self, OutputFormat, ProgressLine, Unit, table},
};

/// Runs one command of `vasto keyspace`.
///
/// # Errors
/// An error of the cluster.
pub async fn run(args: &Keyspace, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    let (answer, shown): (Value, fn(&Value) -> String) = match &args.command {
        KeyspaceCommand::Create(create) => {
            (connect::document(vasto.create_keyspace(&create.name, spec(create)).await)?, created)
        }
        KeyspaceCommand::List => (connect::document(vasto.list_keyspaces().await)?, listing),
        KeyspaceCommand::Describe(which) => {
            (connect::document(vasto.describe_keyspace(&which.name).await)?, description)
        }
        KeyspaceCommand::Delete(delete) => (connect::document(vasto.delete_keyspace(&delete.name).await)?, |answer| {
            format!("deleted keyspace {}; its objects stay in the bucket\n", text(&answer["name"]))
        }),
        KeyspaceCommand::Evict(evict) => {
            let answer = vasto.evict_replica(&evict.name, evict.replica, evict.accept_loss).await;
            (connect::document(answer)?, |answer| {
                format!(
                    "replica {} of {} is {}\n",
                    text(&answer["replica_id"]),
                    text(&answer["name"]),
                    text(&answer["state"])
                )
            })
        }
        KeyspaceCommand::Checkpoint(which) => {
            let progress = ProgressLine::start(format!("checkpoint of {}", which.name), Unit::Items, None);
            let answer = connect::document(vasto.checkpoint_keyspace(&which.name).await);
            progress.clear();
            (answer?, |answer| format!("every shard of {} has a checkpoint in the bucket\n", text(&answer["keyspace"])))
        }
        KeyspaceCommand::Compact(which) => {
            let progress = ProgressLine::start(format!("compaction of {}", which.name), Unit::Items, None);
            let answer = connect::document(vasto.compact_keyspace(&which.name).await);
            progress.clear();
            (answer?, |answer| format!("every shard of {} is compacted\n", text(&answer["keyspace"])))
        }
        KeyspaceCommand::Resize(args) => return resize::run(&vasto, args, format).await,
        KeyspaceCommand::Restore(restore) => {
            let at_us = restore.at.map(|at| u64::try_from(at.as_microsecond()).unwrap_or_default());
            let started = match restore.from_bucket {
                true => vasto.start_restore_from_bucket(&restore.name, &restore.into, at_us).await,
                false => vasto.start_restore(&restore.name, &restore.into, at_us).await,
            };
            let started = connect::operation(started)?;
            for absent in started["without"].as_array().into_iter().flatten() {
                eprintln!(
                    "warning: node {} is away, or its replica has failed: what it alone holds of shard {} is missing",
                    text(&absent["node_id"]),
                    absent["shards"].as_array().into_iter().flatten().map(text).collect::<Vec<_>>().join(", ")
                );
            }
            return resize::wait(&vasto, started, restore.no_wait, format).await;
        }
    };
    match format {
        OutputFormat::Json => output::print_json(&answer)?,
        OutputFormat::Table => output::print(&shown(&answer))?,
    }
    Ok(())
}

fn spec(create: &KeyspaceCreate) -> KeyspaceSpec {
    let spec = KeyspaceSpec::default()
        .shards(create.shards)
        .replicas(create.replicas)
        .ack(connect::ack(create.ack))
        .quarantine(create.quarantine)
        .tombstone_grace(create.tombstone_grace);
    match create.ttl {
        Some(ttl) => spec.ttl(ttl),
        None => spec,
    }
}

fn created(keyspace: &Value) -> String {
    let shards = keyspace["shards"].as_u64().unwrap_or_default();
    let nodes: std::collections::BTreeSet<_> =
        replicas(keyspace).map(|(_, replica)| text(&replica["node_id"])).collect();
    format!(
        "created keyspace {}: {shards} {} on {} {}, acknowledged at {}\n",
        text(&keyspace["name"]),
        if shards == 1 { "shard" } else { "shards" },
        nodes.len(),
        if nodes.len() == 1 { "node" } else { "nodes" },
        text(&keyspace["ack"]),
    )
}

/// The table of `keyspace list`, also part of `cluster status`.
pub(super) fn listing(keyspaces: &Value) -> String {
    let rows = list(keyspaces).iter().map(|one| {
        let column = |name: &str| text(&one[name]);
        vec![
            column("name"),
            column("shards"),
            column("replicas"),
            column("ack"),
            column("state"),
            count(keys(one)),
            bytes(&one["bytes"]),
            column("operation"),
        ]
    });
    table(&["NAME", ">SHARDS", ">REPLICAS", "ACK", "STATE", ">~KEYS", ">BYTES", "OPERATION"], rows)
}

/// Returns the estimated number of keys; a master of an older version names the field `keys`.
fn keys(document: &Value) -> &Value {
    match &document["keys_estimate"] {
        Value::Null => &document["keys"],
        estimate => estimate,
    }
}

/// Returns each replica with its shard.
fn replicas(keyspace: &Value) -> impl Iterator<Item = (&Value, &Value)> {
    let shards = list(&keyspace["placement"]).iter();
    shards.flat_map(|shard| list(&shard["replicas"]).iter().map(move |replica| (&shard["shard"], replica)))
}

fn description(keyspace: &Value) -> String {
    let column = |name: &str| text(&keyspace[name]);
    let mut out = format!(
        "{}: {}, {} shards x {} replicas, ack {}, epoch {}\n\n",
        column("name"),
        column("state"),
        column("shards"),
        column("replicas"),
        column("ack"),
        column("epoch"),
    );
    let rows = replicas(keyspace).map(|(shard, replica)| {
        let column = |name: &str| text(&replica[name]);
        let state = match replica["reason"].as_str() {
            Some(reason) => format!("{}: {reason}", column("state")),
            None => column("state"),
        };
        vec![
            text(shard),
            column("replica_id"),
            column("node_id"),
            column("role"),
            column("lsn"),
            column("shipped_lsn"),
            count(keys(replica)),
            bytes(&replica["bytes"]),
            state,
        ]
    });
    let headings = [">SHARD", ">REPLICA", "NODE", "ROLE", ">LSN", ">SHIPPED", ">~KEYS", ">BYTES", "STATE"];
    out += &table(&headings, rows);
    for (index, quarantine) in list(&keyspace["quarantines"]).iter().enumerate() {
        let replicas: Vec<String> = list(&quarantine["replicas"]).iter().map(text).collect();
        let until = quarantine["until_us"].as_i64().and_then(|micros| jiff::Timestamp::from_microsecond(micros).ok());
        let until = until.map_or_else(String::new, |until| format!(" until {until:.0}"));
        let blank = if index == 0 { "\n" } else { "" };
        out += &format!("{blank}moved keys are kept, unserved, on replicas {}{until}\n", replicas.join(", "));
    }
    let operation = &keyspace["operation"];
    if operation.is_object() {
        out += &format!("\nrunning: {}\n", super::operation::line(operation));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn keyspace() -> Value {
        json!({
            "name": "users", "shards": 2, "replicas": 1, "epoch": 3, "ack": "fsync", "state": "active",
            "placement": [
                {"shard": 0, "replicas": [{"node_id": "n-1", "replica_id": 1, "role": "primary", "state": "serving",
                    "lsn": 7, "shipped_lsn": 5, "lag_ms": 0, "keys": 1, "keys_estimate": 1200, "bytes": 4096}]},
                {"shard": 1, "replicas": [{"node_id": "n-2", "replica_id": 2, "role": "primary", "state": "failed",
                    "reason": "disk", "lsn": null, "shipped_lsn": null, "lag_ms": null, "keys": null, "bytes": null}]},
            ],
            "quarantines": [{"replicas": [1, 2], "until_us": 86_400_000_000_i64}],
            "operation": {"id": "op-1-1", "kind": "grow", "keyspace": "users", "from": 2, "to": 3, "state": "running",
                "step": "tail", "waiting_for": "n-2", "bytes_done": 1, "bytes_total": 2},
        })
    }

    #[test]
    fn a_description_shows_every_replica_and_what_goes_on() {
        let text = description(&keyspace());
        for part in [
            "users: active, 2 shards x 1 replicas, ack fsync, epoch 3\n",
            "SHARD  REPLICA  NODE  ROLE     LSN  SHIPPED  ~KEYS    BYTES  STATE\n",
            "    0        1  n-1   primary    7        5  1,200  4.0 KiB  serving\n",
            "    1        2  n-2   primary    -        -      -        -  failed: disk\n",
            "moved keys are kept, unserved, on replicas 1, 2 until 1970-01-02T00:00:00Z\n",
            "running: op-1-1",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn a_list_and_a_creation_read_well() {
        assert_eq!(created(&keyspace()), "created keyspace users: 2 shards on 2 nodes, acknowledged at fsync\n");
        let text = listing(&json!([{"name": "users", "shards": 2, "replicas": 1, "ack": "os", "state": "active",
            "keys": 1000, "bytes": 0, "operation": null}]));
        assert_eq!(text.lines().nth(1), Some("users       2         1  os   active  1,000    0 B  -"));
        assert_eq!(listing(&json!([])).lines().count(), 1);
    }
}
