//! Replicas that lose contact, memory or the correct time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use vasto_client::{Ack, Keyspace, Outcome, ReadFrom};
use vasto_core::ErrorCode;
use vasto_core::ids::ShardId;
use vasto_core::record::{FILE_HEADER_BYTES, Record, frame_at, positions_at};
use vasto_proto::v1::request::Op;
use vasto_proto::v1::{Delete, KeyRef, Put, WriteOp, WriteRequest, reply, write_op};
use vasto_tests::replicas::{Direct, converged, floors_on};
use vasto_tests::{Cluster, DEADLINE, Port, missing, put_all, until};

/// Returns the node that is primary of a shard.
async fn primary(cluster: &Cluster, name: &str, shard: usize) -> Result<usize> {
    let tip = cluster.catalog(name).await?.tip()?;
    cluster.node_of(&tip.placement[shard].primary().context("no primary")?.node.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_dies_after_reaching_one_of_two_peers_has_reached_both() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("relay", 1, &["--replicas", "3"]).await?;
    let keyspace = cluster.keyspace("relay").await?;
    put_all(&keyspace, "before", 200).await?;
    converged(&cluster, "relay").await?;
    let origin = primary(&cluster, "relay", 0).await?;
    let (near, far) = ((origin + 1) % 3, (origin + 2) % 3);
    cluster.kill9_node(far).await?;
    // One of the two peers certainly has each write.
    for n in 0..200 {
        keyspace.put(format!("k{n}"), "v").ack(Ack::Replica).await?;
    }
    cluster.kill9_node(origin).await?;
    cluster.start_node(far, Port::Same).await?;
    until("the far replica to serve what it never got from its origin", DEADLINE, async || {
        let described = cluster.json(&["keyspace", "describe", "relay"]).await.ok()?;
        let all = described["placement"][0]["replicas"].as_array()?.clone();
        (all.iter().filter(|one| one["state"] == "serving").count() == 2).then_some(())
    })
    .await?;
    cluster.kill9_node(near).await?;
    ensure!(missing(&keyspace, "k", 200).await? == 0);
    cluster.start_node(near, Port::Same).await?;
    cluster.start_node(origin, Port::Same).await?;
    ensure!(converged(&cluster, "relay").await? == 400);
    cluster.finish().await
}

/// Truncates the logs of a node as a power loss could: records that no later record marks as
/// synced.
fn lose_power(node_dir: &Path) -> Result<usize> {
    let mut lost = 0;
    for replica in std::fs::read_dir(node_dir.join("replicas"))? {
        let log = replica?.path().join("log");
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(&log)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.retain(|path| {
            path.metadata().is_ok_and(|found| found.len() > FILE_HEADER_BYTES as u64)
        });
        files.sort();
        let Some(last) = files.last() else { continue };
        let bytes = std::fs::read(last)?;
        let mut records = Vec::new();
        let mut at = FILE_HEADER_BYTES;
        while let Ok(length) = frame_at(&bytes[at..]) {
            ensure!(Record::decode(&bytes[at..at + length]).is_ok());
            records.push((at, positions_at(&bytes[at..]).context("a record without positions")?));
            at += length;
        }
        let Some((_, (_, synced))) = records.last() else { continue };
        let keep =
            records.iter().find(|(_, (lsn, _))| lsn > synced).map_or(at, |(offset, _)| *offset);
        lost += records.iter().filter(|(offset, _)| *offset >= keep).count();
        std::fs::OpenOptions::new().write(true).open(last)?.set_len(keep as u64)?;
    }
    Ok(lost)
}

/// The primary loses records that it had only in memory, continues to write, and converges with the
/// others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_loss_after_os_acknowledgements_then_writes_then_all_are_the_same() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("power", 2, &["--replicas", "3", "--ack", "os"]).await?;
    let keyspace = cluster.keyspace("power").await?;
    let mut lost = 0;
    for round in 0..4 {
        put_all(&keyspace, &format!("r{round}:"), 500).await?;
        let victim = primary(&cluster, "power", round % 2).await?;
        cluster.kill9_node(victim).await?;
        lost += lose_power(&cluster.node_dir(victim))?;
        cluster.start_node(victim, Port::Same).await?;
        put_all(&keyspace, &format!("after{round}:"), 1_000).await?;
        converged(&cluster, "power").await?;
    }
    println!("{lost} records were cut from the logs of primaries");
    ensure!(lost > 0, "the power losses took nothing");
    cluster.finish().await
}

/// Each opening is a new incarnation, also when the previous one wrote almost nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adopt_write_kill_again_and_again() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("adopt", 1, &["--replicas", "3", "--ack", "replica"]).await?;
    let keyspace = cluster.keyspace("adopt").await?;
    let victim = primary(&cluster, "adopt", 0).await?;
    for round in 0..8 {
        keyspace.put(format!("k{round}"), "v").await?;
        cluster.kill9_node(victim).await?;
        cluster.start_node(victim, Port::Same).await?;
        if round % 2 == 0 {
            cluster.kill9_node(victim).await?;
            cluster.start_node(victim, Port::New).await?;
        }
    }
    ensure!(converged(&cluster, "adopt").await? == 8);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_restart_at_once_and_do_not_wait_in_a_circle() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("all", 3, &["--replicas", "3"]).await?;
    let keyspace = cluster.keyspace("all").await?;
    put_all(&keyspace, "k", 1_000).await?;
    for node in 0..3 {
        cluster.kill9_node(node).await?;
    }
    for node in 0..3 {
        cluster.start_node(node, Port::Same).await?;
    }
    ensure!(missing(&keyspace, "k", 1_000).await? == 0);
    ensure!(converged(&cluster, "all").await? == 1_000);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_with_an_old_event_time_beside_puts_in_flight_hides_nothing_newer() -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("late", 1, &["--replicas", "2"]).await?;
    let keyspace = cluster.keyspace("late").await?;
    // Sent to another replica than the put, with a slightly lower event time: the two cross.
    let tip = cluster.catalog("late").await?.tip()?;
    let secondary = tip.placement[0].replicas[1].node.to_string();
    let address = format!("127.0.0.1:{}", cluster.port(cluster.node_of(&secondary)?));
    let mut direct = Direct::connect(&address, &tip, ShardId(0)).await?;
    let Outcome::Applied { event_time: begun } = keyspace.put("k0", "v").await? else {
        bail!("the first put")
    };
    for n in 0..200 {
        let key = format!("k{n}");
        let at = begun + 1 + n;
        let put = async { keyspace.put(key.as_str(), "v").event_time(at).await };
        let key_ref = Some(KeyRef { key: key.clone().into(), partition_hash: None });
        let op = Some(write_op::Op::Delete(Delete::default()));
        let op = WriteOp { key: key_ref, event_time: Some(at - 1), op };
        let delete =
            direct.ask(Op::Write(WriteRequest { ops: vec![op], ..WriteRequest::default() }));
        let (put, delete) = tokio::join!(put, delete);
        put?;
        let delete = delete?;
        ensure!(matches!(delete, reply::Result::Write(_)), "{delete:?}");
    }
    ensure!(missing(&keyspace, "k", 200).await? == 0);
    ensure!(converged(&cluster, "late").await? == 200);
    cluster.finish().await
}

/// Writes its own keys in order until stopped; returns the last round written.
async fn write_in_order(keyspace: Keyspace, client: usize, stop: Arc<AtomicBool>) -> Result<u64> {
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        for n in 0..8 {
            keyspace.put(format!("{client}:{n}"), round.to_string()).await?;
        }
    }
    Ok(round)
}

/// The nodes' clocks differ by half a second, and leadership moves between the nodes and back: a
/// client's last write is current, through whichever replica it was made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_half_a_second_apart_lose_nothing() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(0).start().await?;
    for shift in [-250, 250] {
        cluster.add_node_with(&format!("node.clock_shift_ms={shift}")).await?;
    }
    cluster.create("skew", 2, &["--replicas", "2"]).await?;
    let catalog = cluster.catalog("skew").await?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for client in 0..2 {
        writers.push(tokio::spawn(write_in_order(
            cluster.keyspace("skew").await?,
            client,
            stop.clone(),
        )));
    }
    for node in [0, 1, 0, 1] {
        cluster.stop_node(node).await?;
        until("the other node to act as primary", DEADLINE, async || {
            catalog.tip().ok()?.placement.iter().any(|shard| shard.primary.is_some()).then_some(())
        })
        .await?;
        cluster.start_node(node, Port::Same).await?;
        until("the primaries to be at home", DEADLINE, async || {
            let tip = catalog.tip().ok()?;
            tip.placement
                .iter()
                .all(|shard| shard.primary.is_none() && shard.transferring_to.is_none())
                .then_some(())
        })
        .await?;
    }
    stop.store(true, Ordering::Relaxed);
    let keyspace = cluster.keyspace("skew").await?;
    ensure!(converged(&cluster, "skew").await? == 16);
    for (client, writer) in writers.into_iter().enumerate() {
        let last = writer.await??;
        println!("client {client} wrote {last} rounds");
        for n in 0..8 {
            let stands =
                keyspace.get(format!("{client}:{n}")).await?.context("a key is missing")?;
            ensure!(
                stands.bytes() == last.to_string().as_str(),
                "client {client}, key {n}: {stands:?}, not {last}"
            );
        }
    }
    cluster.finish().await
}

async fn floors(cluster: &Cluster, name: &str) -> Result<Vec<u64>> {
    floors_on(cluster, name, &[0, 1, 2]).await
}

/// Hazard 21: while a replica is away for long, tombstones are kept; after its return deleted keys
/// stay deleted, and only then are the tombstones forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_are_forgotten_only_when_every_replica_has_them() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("tombstones", 1, &["--replicas", "3", "--tombstone-grace", "1s"]).await?;
    let keyspace = cluster.keyspace("tombstones").await?;
    put_all(&keyspace, "k", 100).await?;
    converged(&cluster, "tombstones").await?;
    let away = (primary(&cluster, "tombstones", 0).await? + 1) % 3;
    cluster.kill9_node(away).await?;
    // A gc floor round for earlier writes may have completed already.
    let mut deleted = Vec::new();
    for n in 0..100 {
        match keyspace.delete(format!("k{n}")).await? {
            Outcome::Applied { event_time } => deleted.push(event_time),
            other => bail!("{other:?}"),
        }
    }
    let (first, last) = (*deleted.iter().min().unwrap(), *deleted.iter().max().unwrap());
    // For several rounds no replica forgets a tombstone, because one has not answered.
    let present: Vec<usize> = (0..3).filter(|node| *node != away).collect();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        let floors = floors_on(&cluster, "tombstones", &present).await?;
        ensure!(
            floors.len() == 2 && floors.iter().all(|floor| *floor < first),
            "{floors:?}, {first}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.start_node(away, Port::Same).await?;
    until("the floor to rise everywhere", DEADLINE, async || {
        let floors = floors(&cluster, "tombstones").await.ok()?;
        floors.iter().all(|floor| *floor > last).then_some(())
    })
    .await?;
    ensure!(cluster.json(&["keyspace", "compact", "tombstones"]).await.is_ok());
    ensure!(missing(&keyspace, "k", 100).await? == 100, "a deleted key came back");
    ensure!(converged(&cluster, "tombstones").await? == 0);
    for node in 0..3 {
        cluster.kill9_node(node).await?;
        cluster.start_node(node, Port::Same).await?;
        ensure!(
            missing(&keyspace, "k", 100).await? == 100,
            "a deleted key came back after a restart"
        );
    }
    // A keyspace becomes idle: no records are written once all tombstones are forgotten.
    let lsn = async || -> Result<String> {
        let described = cluster.json(&["keyspace", "describe", "tombstones"]).await?;
        Ok(described["placement"][0]["replicas"]
            .as_array()
            .context("no replicas")?
            .iter()
            .map(|one| one["lsn"].to_string())
            .collect::<Vec<_>>()
            .join(","))
    };
    let mut last = lsn().await?;
    until("the logs to come to rest", DEADLINE, async || {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let now = lsn().await.ok()?;
        let rests = now == last;
        last = now;
        rests.then_some(())
    })
    .await?;
    cluster.finish().await
}

/// Tests a clock that is a day slow and a clock that is an hour fast, with deletes and collection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_a_day_slow_and_one_an_hour_fast_converge_with_deletes_and_collection() -> Result<()>
{
    let mut cluster =
        Cluster::builder().nodes(0).allow("too far ahead of this node's clock").start().await?;
    for shift in ["-86400000", "0", "3600000"] {
        cluster.add_node_with(&format!("node.clock_shift_ms={shift}")).await?;
    }
    cluster.create("clocks", 3, &["--replicas", "3", "--tombstone-grace", "1s"]).await?;
    let keyspace = cluster.keyspace("clocks").await?;
    for round in 0..3 {
        put_all(&keyspace, "k", 300).await?;
        for n in 0..100 {
            keyspace.delete(format!("k{n}")).await?;
        }
        let victim = round % 3;
        converged(&cluster, "clocks").await?;
        let before = floors(&cluster, "clocks").await?;
        cluster.kill9_node(victim).await?;
        put_all(&keyspace, "while", 100).await?;
        cluster.start_node(victim, Port::Same).await?;
        converged(&cluster, "clocks").await?;
        // After a slow clock's turn a fast clock may have raised a floor already: not every shard's
        // floor rises.
        until("a floor to rise at all replicas", DEADLINE, async || {
            let floors = floors(&cluster, "clocks").await.ok()?;
            let rose =
                floors.iter().zip(&before).map(|(now, before)| now > before).collect::<Vec<_>>();
            rose.chunks(3).any(|shard| shard.iter().all(|rose| *rose)).then_some(())
        })
        .await?;
        cluster.json(&["keyspace", "compact", "clocks"]).await?;
        converged(&cluster, "clocks").await?;
    }
    ensure!(missing(&keyspace, "k", 100).await? == 100);
    let names: Vec<String> = (100..300).map(|n| format!("k{n}")).collect();
    ensure!(keyspace.get_many(&names).await?.iter().all(Option::is_some));
    cluster.finish().await
}

/// The clock of an origin jumps a day between two writes: the second write wins, and all replicas
/// agree.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_was_idle_for_a_day_goes_on() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(0).start().await?;
    for _ in 0..3 {
        cluster.add_node_with("node.clock_shift_ms=-86400000").await?;
    }
    cluster.create("idle", 1, &["--replicas", "3", "--tombstone-grace", "1s"]).await?;
    let keyspace = cluster.keyspace("idle").await?;
    put_all(&keyspace, "k", 50).await?;
    keyspace.delete("k7").await?;
    converged(&cluster, "idle").await?;
    for node in 0..3 {
        cluster.stop_node(node).await?;
        cluster.set_node(node, "node.clock_shift_ms=0");
    }
    for node in 0..3 {
        cluster.start_node(node, Port::Same).await?;
    }
    keyspace.put("k1", "a day later").await?;
    ensure!(converged(&cluster, "idle").await? == 49);
    ensure!(keyspace.get("k1").await?.unwrap().bytes() == "a day later");
    ensure!(keyspace.get("k7").await?.is_none());
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_go_where_they_are_told() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(0).start().await?;
    for zone in ["a", "b", "c"] {
        cluster.add_node_with(&format!("node.zone={zone}")).await?;
    }
    cluster.create("zones", 2, &["--replicas", "3", "--ack", "replica"]).await?;
    let keyspace = cluster.keyspace("zones").await?;
    put_all(&keyspace, "k", 100).await?;
    converged(&cluster, "zones").await?;
    for from in [ReadFrom::Any, ReadFrom::Zone("b".into()), ReadFrom::Zone("nowhere".into())] {
        let reader = keyspace.clone().read_from(from.clone());
        ensure!(missing(&reader, "k", 100).await? == 0, "{from:?}");
        ensure!(reader.scan().stream().count().await == 100, "{from:?}");
    }
    // With all other nodes gone, the zone's own replica answers.
    cluster.kill9_node(0).await?;
    cluster.kill9_node(2).await?;
    let reader = keyspace.clone().read_from(ReadFrom::Zone("b".into()));
    ensure!(missing(&reader, "k", 100).await? == 0);
    cluster.start_node(0, Port::Same).await?;
    cluster.start_node(2, Port::Same).await?;
    cluster.finish().await
}

/// The network delivers a delayed write whose sender has long been served elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_the_network_held_back_hides_nothing_that_was_written_since() -> Result<()> {
    use vasto_core::limits::ATTEMPT_PATIENCE;
    let cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("held", 1, &["--replicas", "2"]).await?;
    let keyspace = cluster.keyspace("held").await?;
    keyspace.put("k", "first").await?;
    let tip = cluster.catalog("held").await?.tip()?;
    let address = format!("127.0.0.1:{}", cluster.port(primary(&cluster, "held", 0).await?));
    let mut direct = Direct::connect(&address, &tip, ShardId(0)).await?;
    let key = || Some(KeyRef { key: "k".into(), partition_hash: None });
    let put = |value: &'static str| Put { value: value.into(), ..Put::default() };
    let write = |value| {
        let op = WriteOp { key: key(), event_time: None, op: Some(write_op::Op::Put(put(value))) };
        WriteRequest { ops: vec![op], ..WriteRequest::default() }
    };
    let soon = direct.write_late(write("soon"), Duration::from_millis(10)).await?;
    ensure!(matches!(soon, reply::Result::Write(_)), "{soon:?}");
    keyspace.put("k", "since").await?;
    let late =
        direct.write_late(write("late"), ATTEMPT_PATIENCE + Duration::from_millis(100)).await?;
    ensure!(
        matches!(&late, reply::Result::Error(error) if error.code == ErrorCode::CatchingUp as u32),
        "{late:?}"
    );
    ensure!(keyspace.get("k").await?.unwrap().bytes() == "since");
    cluster.finish().await
}
