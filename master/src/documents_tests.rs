//! The exact text of every document that the master answers.
//!
//! `testdata/v1/documents.txt` holds a name and a document on each pair of lines. Scripts parse
//! these documents, so a difference here is a change of the interface: fields are added, never
//! renamed or removed.

#![allow(clippy::unwrap_used)]
use std::sync::Arc;
use std::time::Duration;

use object_store::memory::InMemory;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::{
    Ack, Catalog, DrainingReplica, KeyspaceSpec, Moved, NodeDrain, Quarantine,
};
use vasto_core::error::VastoError;
use vasto_core::ids::{KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::operation::{OperationKind, OperationOutcome, OperationReport, Reached};
use vasto_core::reconcile::start_resize;
use vasto_core::report::{
    PauseMs, ReplicaPhase, ReplicaReport, ReplicationReport, TargetProgress, TargetStage,
};
use vasto_proto::v1;
use vasto_shipping::{Bucket, ClusterSettings};

use crate::api::{self, evict, keyspace, node, operation, restore, ship};
use crate::cluster::{Cluster, Settings};
use crate::driver::install;
use crate::state::tests::{copy_in_tail, hello, replica_report};
use crate::state::{ClusterState, Delivery, Sent};
use crate::view::json;
use crate::view::outcome::RepairedDoc;

const PINNED: &str = include_str!("../testdata/v1/documents.txt");
const ORDERS: KeyspaceId = KeyspaceId(1);
const USERS: KeyspaceId = KeyspaceId(2);
const EVENTS: KeyspaceId = KeyspaceId(3);
const IDLE: KeyspaceId = KeyspaceId(4);

fn cluster() -> Arc<Cluster> {
    let settings = Settings {
        dial_back: false,
        node_silence: Duration::from_secs(10),
        retention: Default::default(),
        prices: Default::default(),
        rebalance: false,
        moves_at_once: 4,
    };
    let bucket = Bucket::from_store("memory://documents", Arc::new(InMemory::new()));
    Cluster::new("c-1".into(), bucket, settings, CancellationToken::new())
}

fn report(keyspace: KeyspaceId, shard: u32, replica: u64) -> ReplicaReport {
    ReplicaReport { keyspace, shard: ShardId(shard), ..replica_report(replica, 1) }
}

fn ended(
    id: &str,
    kind: OperationKind,
    keyspace: &str,
    outcome: OperationOutcome,
) -> OperationReport {
    OperationReport {
        id: id.into(),
        kind,
        keyspace: keyspace.into(),
        from: 1,
        to: 2,
        outcome,
        reason: None,
        keys_moved: 11,
        bytes_moved: 12,
        bytes_from_bucket: 13,
        bytes_from_peers: 14,
        objects_read: 15,
        write_pause_ms: PauseMs { p50: 0.5, p99: 12.25, max: 100.0 },
        duration_ms: 2_500,
        started_at_us: 7_000,
        reached: Vec::new(),
        copies: 0,
        shard: None,
        failed_on: Vec::new(),
        estimate: None,
    }
}

/// A keyspace that grows, with a replica in every state, a draining replica, a quarantine and ended
/// operations.
fn orders() -> Catalog {
    let spec = KeyspaceSpec {
        shards: 2,
        replicas: 2,
        ack: Ack::Replica,
        ttl_ms: Some(86_400_000),
        ..KeyspaceSpec::default()
    };
    let nodes = [vec![NodeId(1), NodeId(2)], vec![NodeId(2), NodeId(4)]];
    let first = Catalog::first(ORDERS, "orders", spec, &nodes, 1_000, 1);
    let mut growing = start_resize(&first, 3, &[vec![NodeId(1), NodeId(2)]], 5_000, 2).unwrap();
    growing.quarantines.push(Quarantine {
        plan: PlanId(9),
        range: first.owned_bands(),
        replicas: vec![ReplicaId(1)],
        targets: vec![(ReplicaId(2), Lsn(20))],
        others: Vec::new(),
        sources: Vec::new(),
        until_us: 9_000_000,
        dropping: true,
    });
    growing.draining.push(DrainingReplica {
        shard: ShardId(0),
        replica: ReplicaId(20),
        node: NodeId(3),
        since_us: 4_000,
    });
    growing.operations = vec![
        ended("op-1-8", OperationKind::Grow, "orders", OperationOutcome::Done),
        OperationReport {
            reason: Some("cancelled by an administrator".into()),
            started_at_us: 8_000,
            reached: vec![Reached { shard: ShardId(1), replica: ReplicaId(4), lsn: Lsn(77) }],
            copies: 1,
            shard: Some(ShardId(1)),
            failed_on: vec![NodeId(4)],
            ..ended("op-1-9", OperationKind::AddReplica, "orders", OperationOutcome::Aborted)
        },
    ];
    growing
}

/// A keyspace of which node 1 is drained, by a copy to node 2.
fn users(drain: &NodeDrain) -> Catalog {
    let spec = KeyspaceSpec::default();
    let mut catalog = Catalog::first(USERS, "users", spec, &[vec![NodeId(1)]], 1_000, 1);
    let moved = Moved {
        copies: 1,
        keys: 2,
        bytes: 3,
        bytes_from_bucket: 4,
        bytes_from_peers: 5,
        objects_read: 6,
        reached: vec![Reached { shard: ShardId(0), replica: ReplicaId(1), lsn: Lsn(33) }],
    };
    catalog.draining_nodes.push(NodeDrain { to: Some(NodeId(2)), moved, ..drain.clone() });
    catalog.plan = Some(copy_in_tail(&catalog, 3, 2, 6_000));
    catalog
}

/// A keyspace that remembers drains that have ended.
fn events(done: &str, aborted: &str) -> Catalog {
    let mut catalog =
        Catalog::first(EVENTS, "events", KeyspaceSpec::default(), &[vec![NodeId(3)]], 1_000, 1);
    catalog.operations = vec![
        OperationReport {
            copies: 2,
            ..ended(done, OperationKind::DrainNode, "events", OperationOutcome::Done)
        },
        OperationReport {
            reason: Some("no node has room".into()),
            ..ended(aborted, OperationKind::DrainNode, "events", OperationOutcome::Aborted)
        },
    ];
    catalog
}

/// Returns a state with every condition that a document can show.
fn rich(cluster: &Arc<Cluster>) -> [String; 3] {
    let drains = [(1, 6_500), (2, 3_000), (3, 3_500)]
        .map(|(node, since)| NodeDrain::new(NodeId(node), true, since));
    let ids = drains.clone().map(|drain| drain.operation_id());
    let mut state = ClusterState::default();
    let sessions = [1, 2, 3, 5]
        .map(|node| state.connect(&hello(node, &format!("a:{node}")), false, 10).unwrap().session);
    state.install(orders(), Delivery::Push);
    state.install(users(&drains[0]), Delivery::Push);
    state.install(events(&ids[1], &ids[2]), Delivery::Push);
    let spec = KeyspaceSpec { shards: 2, ..KeyspaceSpec::default() };
    state.install(
        Catalog::first(IDLE, "idle", spec, &[vec![NodeId(1)], vec![NodeId(2)]], 1_000, 1),
        Delivery::Push,
    );
    let loading = |plan, replica| ReplicaReport {
        phase: ReplicaPhase::Building,
        target: Some(TargetProgress {
            stage: TargetStage::Rewriting,
            bytes_total: 1_000,
            bytes_done: 250,
            keys_moved: 17,
            ..TargetProgress::new(PlanId(plan))
        }),
        ..replica
    };
    let failed = ReplicaReport {
        phase: ReplicaPhase::Failed("bad \"record\"".into()),
        ..report(ORDERS, 0, 2)
    };
    let replication =
        ReplicationReport { ready: true, stalled: true, lag_ms: 40, ..Default::default() };
    let stalled = ReplicaReport { replication, ..report(ORDERS, 1, 3) };
    let late = ReplicaReport { replication: Default::default(), ..report(IDLE, 1, 2) };
    let requests = v1::BucketRequests {
        get: 1,
        put: 2_000,
        list: 3,
        head: 4,
        delete: 5,
        bytes_read: 6,
        bytes_written: 7,
        elapsed_ms: 3_600_999,
    };
    let of_one = v1::Report {
        disk_used: 1 << 40,
        disk_free: 1 << 20,
        bucket: Some(requests),
        ..Default::default()
    };
    let of_two = v1::Report { bucket_trouble: "access denied".into(), ..Default::default() };
    let replicas = vec![
        report(ORDERS, 0, 1),
        loading(1, report(ORDERS, 2, 5)),
        report(USERS, 0, 1),
        report(IDLE, 0, 1),
    ];
    assert_eq!(state.report(NodeId(1), sessions[0], &of_one, replicas, 20), []);
    let replicas = vec![failed, stalled, loading(3, report(USERS, 0, 2)), late];
    assert_eq!(state.report(NodeId(2), sessions[1], &of_two, replicas, 20), []);
    state.reached(NodeId(2), sessions[1], Some("connection refused".into()));
    state.disconnect(NodeId(3), sessions[2], 30);
    state.keyspaces.get_mut(&ORDERS).unwrap().waiting_for = Some("shard 2 to load".into());
    state.settings =
        Arc::new(ClusterSettings::default().with_cordon(NodeId(2), true, 1, 1).unwrap());
    *cluster.state() = state;
    ids
}

/// Replaces the values of a field that depend on the clock, which have at least so many digits.
fn masked(document: &str, field: &str, digits_min: usize) -> String {
    let key = format!("\"{field}\":");
    let mut parts = document.split(&key);
    let mut out = parts.next().unwrap().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
        let value = &part[..part.len() - rest.len()];
        out += &key;
        out += if value.len() < digits_min { value } else { "N" };
        out += rest;
    }
    out
}

/// Runs a call while nodes 1 and 2 do every command at once.
async fn answered(
    cluster: &Arc<Cluster>,
    sessions: [u64; 2],
    call: impl Future<Output = Result<String, VastoError>>,
) -> String {
    let nodes = async {
        let mut sent = [Sent::default(), Sent::default()];
        loop {
            for (at, session) in sessions.into_iter().enumerate() {
                let node = NodeId(at as u64 + 1);
                let mut state = cluster.state();
                for message in state.outstanding(node, session, &mut sent[at]) {
                    if let Some(v1::master_message::Message::Command(command)) = message.message {
                        let done = v1::CommandDone { id: command.id, ..Default::default() };
                        state.command_done(node, session, &done, 20);
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        answer = call => answer.unwrap(),
        () = nodes => unreachable!("it never ends"),
    }
}

/// Returns the documents of calls that change something, of keyspaces with live nodes 1 and 2 and
/// the lost node 3.
async fn changes() -> Vec<(&'static str, String)> {
    let cluster = cluster();
    cluster.state().node_silence = Some(Duration::ZERO);
    let sessions =
        [1, 2].map(|node| cluster.state().connect(&hello(node, "a:1"), false, 0).unwrap().session);
    let placed = [
        ("one", [NodeId(1), NodeId(2)]),
        ("two", [NodeId(1), NodeId(2)]),
        ("three", [NodeId(1), NodeId(3)]),
    ];
    for (name, nodes) in placed {
        let spec = KeyspaceSpec { replicas: 2, ..KeyspaceSpec::default() };
        let build = |id| Catalog::first(id, name, spec.clone(), &[nodes.to_vec()], 1_000, 1);
        let created = cluster.store.create_keyspace(build).await.unwrap();
        let keyspace = created.keyspace;
        install(&cluster, created, Delivery::Push);
        let mut state = cluster.state();
        state.report(
            NodeId(1),
            sessions[0],
            &v1::Report::default(),
            vec![report(keyspace, 0, 1)],
            20,
        );
        if nodes[1] == NodeId(2) {
            state.report(
                NodeId(2),
                sessions[1],
                &v1::Report::default(),
                vec![report(keyspace, 0, 2)],
                20,
            );
        }
    }
    let four =
        v1::RestoreRequest { name: "three".into(), into: "four".into(), ..Default::default() };
    let second = v1::EvictRequest { name: "two".into(), replica_id: 2, ..Default::default() };
    let compact = api::command(&cluster, "one", v1::command::Kind::Compact);
    let compact = answered(&cluster, sessions, compact).await;
    let checkpoint = answered(&cluster, sessions, ship::checkpoint(&cluster, "one")).await;
    let evicted = answered(&cluster, sessions, evict::evict(&cluster, second)).await;
    let deleted = answered(&cluster, sessions, keyspace::delete(&cluster, "one")).await;
    let restored = answered(&cluster, sessions, restore::restore(&cluster, four)).await;
    cluster.shutdown.cancel();
    vec![
        ("keyspace compact", compact),
        ("keyspace checkpoint", checkpoint),
        ("keyspace evict", evicted),
        ("keyspace delete", deleted),
        ("keyspace restore", masked(&restored, "started_at_us", 1)),
    ]
}

#[tokio::test]
async fn documents_are_what_scripts_know() {
    let cluster = cluster();
    let [running, done, aborted] = rich(&cluster);
    cluster.bucket_holds(10 << 30);
    cluster.note_refused(NodeId(9), "c-9");
    let plan =
        v1::ResizeRequest { name: "idle".into(), shards: 3, plan_only: true, max_rate: None };
    let cordoned = json(&crate::view::node::node(&cluster.state(), NodeId(2), cluster.mono_us()));
    let pid = format!("\"master\":{{\"pid\":{},", std::process::id());
    let timed = |document: &str| {
        let document = masked(&masked(document, "away_ms", 1), "stored_age_s", 1);
        document.replace(&pid, "\"master\":{\"pid\":N,")
    };
    let show = |id: &str| operation::show(&cluster, id).unwrap();
    // A drain that runs has begun in 1970; how long an ended one ran is pinned.
    let runs = |document: &str| masked(document, "duration_ms", 10);
    let mut documents = vec![
        ("keyspace list", keyspace::list(&cluster)),
        ("keyspace describe", keyspace::describe(&cluster, "orders").unwrap()),
        ("keyspace describe, idle", keyspace::describe(&cluster, "idle").unwrap()),
        ("keyspace resize --plan", keyspace::resize(&cluster, plan).await.unwrap()),
        ("node list", timed(&node::list(&cluster))),
        ("node cordon", timed(&cordoned)),
        ("cluster status", timed(&node::status(&cluster))),
        ("operation list", runs(&operation::list(&cluster))),
        ("operation show, running", show("op-1-1")),
        ("operation show, done", show("op-1-8")),
        ("operation show, aborted", show("op-1-9")),
        ("operation show, a drain that runs", runs(&show(&running))),
        ("operation show, a drain that is done", show(&done)),
        ("operation show, a drain that was aborted", show(&aborted)),
    ];
    documents.extend(changes().await);
    documents.push(("bucket repair", json(&repaired())));
    let text: String =
        documents.iter().map(|(name, document)| format!("# {name}\n{document}\n")).collect();
    if text != PINNED {
        let differs = text.lines().zip(PINNED.lines()).find(|(is, was)| is != was);
        panic!("documents have changed, first here: {differs:#?}\nall of them are now:\n{text}");
    }
}

fn repaired() -> RepairedDoc {
    RepairedDoc {
        cluster_id: "c-1".into(),
        claimed: true,
        written: 3,
        keyspaces: vec!["orders".into()],
        shipped_anew: vec!["users".into()],
        unknown_keyspaces: vec![KeyspaceId(7)],
        away: vec![NodeId(1)],
        missing: vec!["data/1".into()],
        corrupt: vec!["data/2".into()],
        warnings: vec!["a stranger".into()],
    }
}
