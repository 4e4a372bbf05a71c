//! `vasto keyspace`, except for `resize`, which has its own module.

use std::collections::BTreeSet;

use vasto_client::{
    KeyspaceSpec, RestoreOptions, Vasto,
    answer::{KeyspaceDescription, KeyspaceSummary},
};

use super::{bytes, count, operation, plan, print, resize, text};
use crate::{
    args::{Keyspace, KeyspaceCommand, KeyspaceCreate, KeyspaceRestore},
    connect,
    output::{OutputFormat, ProgressLine, Unit, format_bytes, table},
};

/// Runs one command of `vasto keyspace`.
///
/// # Errors
/// An error of the cluster.
pub(crate) async fn run(args: &Keyspace, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    match &args.command {
        KeyspaceCommand::Create(create) => {
            let answer = vasto
                .create_keyspace(&create.name, spec(create))
                .await
                .map_err(connect::failure)?;
            print(&answer, format, created)
        }
        KeyspaceCommand::List => {
            print(&vasto.list_keyspaces().await.map_err(connect::failure)?, format, |all| {
                listing(all)
            })
        }
        KeyspaceCommand::Describe(which) => print(
            &vasto.describe_keyspace(&which.name).await.map_err(connect::failure)?,
            format,
            description,
        ),
        KeyspaceCommand::Delete(delete) => {
            let deleted = vasto.delete_keyspace(&delete.name).await.map_err(connect::failure)?;
            print(&deleted, format, |deleted| {
                format!("deleted keyspace {}; its objects stay in the bucket\n", deleted.name)
            })
        }
        KeyspaceCommand::Evict(evict) => {
            let evicted = vasto.evict_replica(&evict.name, evict.replica, evict.accept_loss).await;
            print(&evicted.map_err(connect::failure)?, format, |evicted| {
                format!("replica {} of {} is {}\n", evicted.replica_id, evicted.name, evicted.state)
            })
        }
        KeyspaceCommand::Checkpoint(which) => {
            let progress =
                ProgressLine::start(format!("checkpoint of {}", which.name), Unit::Items, None);
            let done = vasto.checkpoint_keyspace(&which.name).await;
            progress.clear();
            print(&done.map_err(connect::failure)?, format, |done| {
                format!("every shard of {} has a checkpoint in the bucket\n", done.keyspace)
            })
        }
        KeyspaceCommand::Compact(which) => {
            let progress =
                ProgressLine::start(format!("compaction of {}", which.name), Unit::Items, None);
            let done = vasto.compact_keyspace(&which.name).await;
            progress.clear();
            print(&done.map_err(connect::failure)?, format, |done| {
                format!("every shard of {} is compacted\n", done.keyspace)
            })
        }
        KeyspaceCommand::Resize(args) => resize::run(&vasto, args, format).await,
        KeyspaceCommand::Restore(args) => restore(&vasto, args, format).await,
    }
}

async fn restore(
    vasto: &Vasto,
    args: &KeyspaceRestore,
    format: OutputFormat,
) -> anyhow::Result<()> {
    let at_us = args.at.map(|at| u64::try_from(at.as_microsecond()).unwrap_or_default());
    let (from_bucket, max_rate) = (args.from_bucket, args.start.max_rate);
    let options = RestoreOptions { at_us, from_bucket, max_rate };
    if args.plan {
        let planned = vasto.plan_restore_with(&args.name, &args.into, options).await;
        return print(&planned.map_err(connect::failure)?, format, plan::text_of);
    }
    let started = vasto.start_restore_with(&args.name, &args.into, options).await;
    let started = started.map_err(connect::failure)?;
    for absent in &started.without {
        eprintln!(
            "warning: node {} is away, or its replica has failed: what it alone holds of shard {} is missing",
            absent.node_id,
            joined(&absent.shards)
        );
    }
    resize::wait(vasto, started, args.start.no_wait, format).await
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

fn created(keyspace: &KeyspaceDescription) -> String {
    let shards = keyspace.shards;
    let placed = keyspace.placement.iter().flat_map(|shard| &shard.replicas);
    let nodes: BTreeSet<&str> = placed.map(|replica| replica.node_id.as_str()).collect();
    format!(
        "created keyspace {}: {shards} {} on {} {}, acknowledged at {}\n",
        keyspace.name,
        if shards == 1 { "shard" } else { "shards" },
        nodes.len(),
        if nodes.len() == 1 { "node" } else { "nodes" },
        keyspace.ack,
    )
}

/// The table of `keyspace list`, also part of `cluster status`.
pub(super) fn listing(keyspaces: &[KeyspaceSummary]) -> String {
    let rows = keyspaces.iter().map(|keyspace| {
        vec![
            keyspace.name.clone(),
            keyspace.shards.to_string(),
            keyspace.replicas.to_string(),
            keyspace.ack.clone(),
            keyspace.state.clone(),
            count(keyspace.keys_estimate.or(keyspace.keys)),
            format_bytes(keyspace.bytes),
            text(keyspace.operation.as_ref()),
        ]
    });
    table(&["NAME", ">SHARDS", ">REPLICAS", "ACK", "STATE", ">~KEYS", ">BYTES", "OPERATION"], rows)
}

fn description(keyspace: &KeyspaceDescription) -> String {
    let mut out = format!(
        "{}: {}, {} shards x {} replicas, ack {}, epoch {}\n\n",
        keyspace.name,
        keyspace.state,
        keyspace.shards,
        keyspace.replicas,
        keyspace.ack,
        keyspace.epoch,
    );
    let replicas = keyspace
        .placement
        .iter()
        .flat_map(|shard| shard.replicas.iter().map(|replica| (shard.shard, replica)));
    let rows = replicas.map(|(shard, replica)| {
        let state = match &replica.reason {
            Some(reason) => format!("{}: {reason}", replica.state),
            None => replica.state.clone(),
        };
        vec![
            shard.to_string(),
            replica.replica_id.to_string(),
            replica.node_id.clone(),
            replica.role.clone(),
            text(replica.lsn),
            text(replica.shipped_lsn),
            count(replica.keys_estimate.or(replica.keys)),
            bytes(replica.bytes),
            state,
        ]
    });
    let headings =
        [">SHARD", ">REPLICA", "NODE", "ROLE", ">LSN", ">SHIPPED", ">~KEYS", ">BYTES", "STATE"];
    out += &table(&headings, rows);
    let is_retired =
        |replica: &u64| keyspace.retired.iter().any(|retired| retired.replica_id == *replica);
    let mut kept: Vec<String> = Vec::new();
    // The quarantine of a shrink keeps the retired replicas, which are listed by themselves.
    for quarantine in
        keyspace.quarantines.iter().filter(|kept| !kept.replicas.iter().any(is_retired))
    {
        let (replicas, until) = (joined(&quarantine.replicas), until(quarantine.until_us));
        kept.push(format!("moved keys are kept, unserved, on replicas {replicas}{until}\n"));
    }
    for retired in &keyspace.retired {
        kept.push(format!(
            "retired replica {} of the former shard {} is kept, unserved, on {}{}\n",
            retired.replica_id,
            retired.shard,
            retired.node_id,
            until(retired.until_us)
        ));
    }
    if !kept.is_empty() {
        out += &format!("\n{}", kept.concat());
    }
    if let Some(running) = &keyspace.operation {
        out += &format!("\nrunning: {}\n", operation::line(running));
    }
    out
}

/// Formats the end of a quarantine, if it is known.
fn until(micros: Option<u64>) -> String {
    let at = micros.and_then(|micros| i64::try_from(micros).ok());
    let at = at.and_then(|micros| jiff::Timestamp::from_microsecond(micros).ok());
    at.map_or_else(String::new, |at| format!(" until {at:.0}"))
}

fn joined(numbers: &[impl ToString]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{from_value, json};

    use super::*;

    fn keyspace() -> KeyspaceDescription {
        let document = json!({
            "name": "users", "shards": 2, "replicas": 1, "epoch": 3, "ack": "fsync", "state": "active",
            "placement": [
                {"shard": 0, "replicas": [{"node_id": "n-1", "replica_id": 1, "role": "primary", "state": "serving",
                    "lsn": 7, "shipped_lsn": 5, "lag_ms": 0, "keys": 1, "keys_estimate": 1200, "bytes": 4096}]},
                {"shard": 1, "replicas": [{"node_id": "n-2", "replica_id": 2, "role": "primary", "state": "failed",
                    "reason": "disk", "lsn": null, "shipped_lsn": null, "lag_ms": null, "keys": null, "bytes": null}]},
            ],
            "quarantines": [{"replicas": [1, 2], "until_us": 86_400_000_000_i64},
                {"replicas": [3], "until_us": 90_000_000_000_i64}],
            "retired": [{"shard": 2, "replica_id": 3, "node_id": "n-3", "bytes": 7, "until_us": 90_000_000_000_i64}],
            "operation": {"id": "op-1-1", "kind": "grow", "keyspace": "users", "from": 2, "to": 3, "state": "running",
                "step": "tail", "waiting_for": "n-2", "bytes_done": 1, "bytes_total": 2},
        });
        from_value(document).unwrap()
    }

    #[test]
    fn a_description_shows_every_replica_and_what_goes_on() {
        let text = description(&keyspace());
        for part in [
            "users: active, 2 shards x 1 replicas, ack fsync, epoch 3\n",
            "SHARD  REPLICA  NODE  ROLE     LSN  SHIPPED  ~KEYS    BYTES  STATE\n",
            "    0        1  n-1   primary    7        5  1,200  4.0 KiB  serving\n",
            "    1        2  n-2   primary    -        -      -        -  failed: disk\n",
            "\nmoved keys are kept, unserved, on replicas 1, 2 until 1970-01-02T00:00:00Z\n\
             retired replica 3 of the former shard 2 is kept, unserved, on n-3 until 1970-01-02T01:00:00Z\n\n",
            "running: op-1-1",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn a_list_and_a_creation_read_well() {
        assert_eq!(
            created(&keyspace()),
            "created keyspace users: 2 shards on 2 nodes, acknowledged at fsync\n"
        );
        let all = json!([{"name": "users", "shards": 2, "replicas": 1, "ack": "os", "state": "active",
            "keys": 1000, "bytes": 0, "operation": null}]);
        let text = listing(&from_value::<Vec<_>>(all).unwrap());
        assert_eq!(
            text.lines().nth(1),
            Some("users       2         1  os   active  1,000    0 B  -")
        );
        assert_eq!(listing(&[]).lines().count(), 1);
    }
}
