//! Tests of the state of the master.

#![allow(clippy::unwrap_used)]
use super::sessions::{COMMANDS_MAX, Conflict};
use super::*;
use tokio::sync::oneshot;
use vasto_core::catalog::{Catalog, KeyspaceSpec};
use vasto_core::ids::{CatalogVersion, Incarnation, Lsn, PlanId, ReplicaId, ShardId};
use vasto_core::limits::{COPIES_PER_NODE_MAX, NODE_FORGOTTEN_AFTER};
use vasto_core::plan::{
    NODE_AWAY_MAX_US, PinnedManifest, Plan, PlanKind, SEALS_UNDONE_MAX, Step, Target,
};
use vasto_core::reconcile::{Advance, Presence, start_resize};
use vasto_core::report::{
    ReplicaPhase, ReplicaReport, Sealed, SourceProgress, TargetProgress, TargetStage,
};
use vasto_proto::v1;

const KS: KeyspaceId = KeyspaceId(1);

/// Returns the plan that copies shard 0 to node 2, as this replica, while it reads the log.
pub(crate) fn copy_in_tail(catalog: &Catalog, plan: u64, replica: u64, started_at_us: u64) -> Plan {
    let shard = ShardId(0);
    Plan {
        id: PlanId(plan),
        kind: PlanKind::AddReplica { shard },
        from_epoch: catalog.epoch,
        started_at_us,
        step: Step::Tail,
        sources: Vec::new(),
        targets: vec![Target { shard, replica: ReplicaId(replica), node: NodeId(2) }],
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    }
}

pub(crate) fn hello(node: u64, address: &str) -> v1::Hello {
    v1::Hello {
        node_id: node,
        cluster_id: String::new(),
        address: address.into(),
        zone: "z1".into(),
        pid: 1,
        protocol: vasto_proto::PROTOCOL,
        max_replicas: 0,
    }
}

pub(crate) fn replica_report(replica: u64, version: u64) -> ReplicaReport {
    ReplicaReport {
        keyspace: KS,
        shard: ShardId(replica as u32 - 1),
        replica: ReplicaId(replica),
        incarnation: Incarnation(1),
        version: CatalogVersion(version),
        phase: ReplicaPhase::Serving,
        lsn: Lsn(100),
        shipped_lsn: Lsn(90),
        manifest_lsn: Lsn(80),
        ships_behind: None,
        keys: 1000,
        bytes: 1 << 20,
        load: 0,
        load_unknown: false,
        source: None,
        target: None,
        cleaned: Vec::new(),
        replication: vasto_core::report::ReplicationReport { ready: true, ..Default::default() },
        stored: None,
    }
}

fn catalog() -> Catalog {
    let spec = KeyspaceSpec { shards: 2, ..KeyspaceSpec::default() };
    Catalog::first(KS, "ks1", spec, &[vec![NodeId(1)], vec![NodeId(2)]], 1_000, 1)
}

/// Returns a state with live nodes 1 and 2, and keyspace `ks1` with a shard on each.
pub(crate) fn two_nodes() -> (ClusterState, u64, u64) {
    let mut state = ClusterState::default();
    let first = state.connect(&hello(1, "a:1"), false, 10).unwrap().session;
    let second = state.connect(&hello(2, "a:2"), false, 10).unwrap().session;
    state.install(catalog(), Delivery::Push);
    (state, first, second)
}

fn report(
    state: &mut ClusterState,
    node: u64,
    session: u64,
    replicas: Vec<ReplicaReport>,
    now_us: u64,
) -> Vec<Odd> {
    state.report(NodeId(node), session, &v1::Report::default(), replicas, now_us)
}

fn kinds(messages: &[v1::MasterMessage]) -> Vec<&'static str> {
    use v1::master_message::Message::*;
    let kind = |message: &v1::MasterMessage| match message.message.as_ref().unwrap() {
        Nodes(_) => "nodes",
        Keyspace(_) => "keyspace",
        Command(_) => "command",
        Welcome(_) | Rejected(_) | Presence(_) => "other",
    };
    messages.iter().map(kind).collect()
}

#[test]
fn a_session_gets_everything_once_and_everything_again_after_a_reconnect() {
    let (mut state, first, _) = two_nodes();
    let mut sent = Sent::default();
    assert_eq!(kinds(&state.outstanding(NodeId(1), first, &mut sent)), ["nodes", "keyspace"]);
    assert!(state.outstanding(NodeId(1), first, &mut sent).is_empty());
    state.install(catalog().next(2_000, 2), Delivery::Push);
    assert_eq!(kinds(&state.outstanding(NodeId(1), first, &mut sent)), ["keyspace"]);
    state.connect(&hello(3, "a:3"), false, 20).unwrap();
    assert_eq!(kinds(&state.outstanding(NodeId(1), first, &mut sent)), ["nodes"]);

    let again = state.connect(&hello(1, "a:1"), false, 30).unwrap().session;
    let mut sent = Sent::default();
    assert_eq!(kinds(&state.outstanding(NodeId(1), again, &mut sent)), ["nodes", "keyspace"]);
}

#[test]
fn one_write_that_was_held_up_does_not_make_the_bucket_slow() {
    let mut state = ClusterState::default();
    assert_eq!(state.write_seconds(), None);
    for (took, then) in [(10, 10), (60_000, 10), (20, 20), (20, 20), (90_000, 20)] {
        state.note_write(Duration::from_millis(took));
        assert_eq!(state.write_seconds(), Some(then as f64 / 1_000.0));
    }
    // The bucket is slow.
    (0..3).for_each(|_| state.note_write(Duration::from_secs(2)));
    assert_eq!(state.write_seconds(), Some(2.0));
}

#[test]
fn lower_versions_never_replace_higher_ones() {
    let (mut state, ..) = two_nodes();
    let third = Catalog { version: CatalogVersion(3), ..catalog() };
    assert!(state.install(third.clone(), Delivery::Push).0);
    assert!(!state.install(catalog().next(2_000, 2), Delivery::Push).0);
    assert!(!state.install(third, Delivery::Push).0);
    assert_eq!(state.keyspaces[&KS].catalog.version, CatalogVersion(3));
}

#[test]
fn a_replaced_session_can_change_nothing() {
    let (mut state, old, _) = two_nodes();
    report(&mut state, 1, old, vec![replica_report(1, 1)], 20);
    assert_eq!(state.keyspaces[&KS].reports.len(), 1);
    let new = state.connect(&hello(1, "a:1"), false, 30).unwrap().session;
    assert!(state.keyspaces[&KS].reports.is_empty(), "what the last session said is not news");
    report(&mut state, 1, old, vec![replica_report(1, 1)], 40);
    assert!(state.keyspaces[&KS].reports.is_empty());
    assert!(!state.disconnect(NodeId(1), old, 50));
    assert_eq!(state.away_us(NodeId(1), 60), 0);
    assert!(state.disconnect(NodeId(1), new, 50));
    assert_eq!(state.away_us(NodeId(1), 60), 10);
    assert_eq!(state.away_us(NodeId(9), 60), 60, "never seen: since the master's start");
}

#[test]
fn another_address_is_a_conflict_while_the_session_lives() {
    let (mut state, first, _) = two_nodes();
    let conflict = state.connect(&hello(1, "b:1"), false, 20).unwrap_err();
    assert_eq!(conflict, Conflict { address: "a:1".into(), session: first, heard_us: 10 });
    let replaced = state.nodes[&NodeId(1)].session.as_ref().unwrap().replaced.clone();
    assert!(state.connect(&hello(1, "b:1"), true, 20).is_ok());
    assert!(replaced.is_cancelled());
    let second = state.connect(&hello(2, "a:2"), false, 20).unwrap().session;
    state.disconnect(NodeId(2), second, 30);
    assert!(state.connect(&hello(2, "b:2"), false, 40).is_ok(), "nobody has the id any more");
}

#[test]
fn clients_see_a_nodes_new_address_with_the_same_version() {
    let (mut state, first, _) = two_nodes();
    let mut topology = state.keyspaces[&KS].topology();
    assert_eq!(topology.borrow_and_update().shards[0].replicas[0].address, "a:1");
    state.disconnect(NodeId(1), first, 20);
    assert!(!topology.has_changed().unwrap(), "the last address of a node that is away stays");
    state.connect(&hello(1, "b:1"), false, 30).unwrap();
    let now = topology.borrow_and_update().clone();
    assert_eq!((now.shards[0].replicas[0].address.as_str(), now.version), ("b:1", 1));
}

#[test]
fn odd_reports_are_told_and_not_taken() {
    let (mut state, first, second) = two_nodes();
    let foreign = ReplicaReport { keyspace: KeyspaceId(77), ..replica_report(1, 1) };
    assert_eq!(
        report(&mut state, 1, first, vec![foreign], 20),
        [Odd::UnknownKeyspace(KeyspaceId(77))]
    );
    assert_eq!(
        report(&mut state, 2, second, vec![replica_report(1, 1)], 20),
        [Odd::NotItsReplica(KS, ReplicaId(1))],
        "replica 1 is placed on node 1"
    );
    assert!(state.keyspaces[&KS].reports.is_empty());
    assert!(!state.keyspaces[&KS].behind);
    report(&mut state, 1, first, vec![replica_report(1, 5)], 30);
    assert!(
        state.keyspaces[&KS].behind,
        "the node applies a version that this master does not know"
    );
}

#[test]
fn the_end_of_a_session_ends_the_wait_for_its_commands() {
    let (mut state, first, _) = two_nodes();
    let mut done = state.command(NodeId(1), v1::command::Kind::Compact, KS).unwrap();
    let mut lost = state.command(NodeId(1), v1::command::Kind::Compact, KS).unwrap();
    let mut sent = Sent::default();
    assert_eq!(
        kinds(&state.outstanding(NodeId(1), first, &mut sent)),
        ["nodes", "keyspace", "command", "command"]
    );
    state.command_done(
        NodeId(1),
        first,
        &v1::CommandDone { id: 1, ..v1::CommandDone::default() },
        20,
    );
    assert_eq!(done.try_recv().unwrap(), Ok(Vec::new()));
    state.disconnect(NodeId(1), first, 30);
    assert!(matches!(lost.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
    assert!(state.command(NodeId(1), v1::command::Kind::Compact, KS).is_none(), "nobody is there");
}

#[test]
fn commands_that_may_wait_are_bounded() {
    let (mut state, ..) = two_nodes();
    let waiting: Vec<_> =
        std::iter::from_fn(|| state.command(NodeId(1), v1::command::Kind::Compact, KS))
            .take(1000)
            .collect();
    assert_eq!(waiting.len(), COMMANDS_MAX);
}

#[test]
fn a_deleted_keyspace_concerns_only_nodes_that_held_or_report_it() {
    let (mut state, first, _) = two_nodes();
    let third = state.connect(&hello(3, "a:3"), false, 20).unwrap().session;
    let deleted = Catalog { state: KeyspaceState::Deleted, ..catalog().next(2_000, 2) };
    state.install(deleted, Delivery::Push);
    assert_eq!(
        kinds(&state.outstanding(NodeId(1), first, &mut Sent::default())),
        ["nodes", "keyspace"]
    );
    assert_eq!(kinds(&state.outstanding(NodeId(3), third, &mut Sent::default())), ["nodes"]);
    assert!(state.named("ks1").is_none());
    assert_eq!(state.decide(KS, 0, u64::MAX / 2, 1), Advance::Idle);
}

fn growing(step: Step, written_at_us: u64) -> Catalog {
    let mut catalog = start_resize(&catalog(), 3, &[vec![NodeId(1)]], written_at_us, 2).unwrap();
    catalog.plan.as_mut().unwrap().step = step;
    catalog
}

fn write(advance: Advance) -> Catalog {
    match advance {
        Advance::Write(next) => *next,
        other => panic!("expected a version, got {other:?}"),
    }
}

#[test]
fn a_slow_sealing_version_is_never_shown_and_undone_at_once() {
    let (mut state, first, _) = two_nodes();
    let mut sent = Sent::default();
    state.outstanding(NodeId(1), first, &mut sent);
    state.install(growing(Step::Sealing, 5_000), Delivery::Undo);
    assert!(state.outstanding(NodeId(1), first, &mut sent).is_empty(), "no node may seal by it");
    let undone = write(state.decide(KS, 100, 5_001, 3));
    assert_eq!(
        undone.plan.as_ref().map(|plan| (plan.step, plan.seals_undone)),
        Some((Step::Tail, 1))
    );
    state.install(undone, Delivery::Push);
    assert_eq!(kinds(&state.outstanding(NodeId(1), first, &mut sent)), ["keyspace"]);
}

#[test]
fn a_bucket_that_is_always_slow_ends_the_plan() {
    let (mut state, ..) = two_nodes();
    let mut sealing = growing(Step::Sealing, 5_000);
    sealing.plan.as_mut().unwrap().seals_undone = SEALS_UNDONE_MAX;
    state.install(sealing, Delivery::Undo);
    let aborted = write(state.decide(KS, 100, 5_001, 3));
    assert!(aborted.plan.is_none());
    assert!(aborted.operations[0].reason.as_ref().unwrap().contains("too slow"));
}

fn sealed_reports(sealing: &Catalog) -> Vec<ReplicaReport> {
    let plan = sealing.plan.as_ref().unwrap();
    let progress = SourceProgress {
        plan: PlanId(1),
        manifest: Some(PinnedManifest { key: "m".into(), lsn: Lsn(10) }),
        sealed: Some(Sealed { version: sealing.version, lsn: Lsn(20) }),
        ..SourceProgress::new(PlanId(1))
    };
    let target = TargetProgress {
        stage: TargetStage::Tailing,
        cursors: plan.sources.iter().map(|source| (source.replica, Lsn(20))).collect(),
        manifest_shipped: true,
        ..TargetProgress::new(PlanId(1))
    };
    vec![
        ReplicaReport { source: Some(progress.clone()), ..replica_report(1, 2) },
        ReplicaReport { source: Some(progress), ..replica_report(2, 2) },
        ReplicaReport { target: Some(target), ..replica_report(3, 2) },
    ]
}

#[test]
fn a_restarted_master_decides_a_seal_by_reports_and_tells_no_further_node_to_seal() {
    let (mut state, first, second) = two_nodes();
    let sealing = growing(Step::Sealing, 5_000);
    state.install(sealing.clone(), Delivery::Hold);
    assert_eq!(kinds(&state.outstanding(NodeId(1), first, &mut Sent::default())), ["nodes"]);
    assert!(matches!(state.decide(KS, 100, 6_000, 3), Advance::Wait(_)), "nothing is reported yet");
    let mut reports = sealed_reports(&sealing);
    let of_two = reports.remove(1);
    report(&mut state, 1, first, reports, 20);
    assert!(matches!(state.decide(KS, 100, 6_000, 3), Advance::Wait(_)), "one seal is missing");
    report(&mut state, 2, second, vec![of_two], 20);
    let committed = write(state.decide(KS, 100, 9_000_000, 3));
    assert_eq!(committed.epoch.0, 2, "complete seals commit, however late");
}

#[test]
fn without_any_node_nothing_is_decided() {
    let (mut state, first, second) = two_nodes();
    state.install(growing(Step::Prepare, 5_000), Delivery::Push);
    state.disconnect(NodeId(1), first, 10);
    let long = 10 * NODE_AWAY_MAX_US;
    state.disconnect(NodeId(2), second, 10);
    assert!(
        matches!(state.decide(KS, long, long, 3), Advance::Wait(_)),
        "this master hears nobody, so it knows nothing"
    );
    state.connect(&hello(1, "a:1"), false, long).unwrap();
    let aborted = write(state.decide(KS, long, long, 3));
    assert!(
        aborted.operations[0].reason.as_ref().unwrap().contains("away"),
        "node 2 is a source and gone"
    );
}

#[test]
fn a_node_gets_no_more_replicas_than_its_maximum() {
    let (mut state, ..) = two_nodes();
    let full = v1::Hello { max_replicas: 1, ..hello(3, "a:3") };
    state.connect(&full, false, 10).unwrap();
    let catalog = state.keyspaces[&KS].catalog.clone();
    assert_eq!(state.copy_target(&catalog, ShardId(0), &BTreeMap::new(), 1), Some(NodeId(3)));
    let mut more =
        Catalog::first(KeyspaceId(2), "ks2", KeyspaceSpec::default(), &[vec![NodeId(3)]], 1_000, 1);
    more.version = CatalogVersion(2);
    state.install(more, Delivery::Push);
    assert_eq!(
        state.copy_target(&catalog, ShardId(0), &BTreeMap::new(), 1),
        Some(NodeId(2)),
        "the other one is full"
    );
    assert_eq!(state.grow_targets(&state.keyspaces[&KS], 3).unwrap(), [[NodeId(1)]]);
}

const GIB: u64 = 1 << 30;

fn disk(state: &mut ClusterState, node: u64, session: u64, bytes: u64, free: u64) {
    let report = v1::Report { disk_used: bytes - free, disk_free: free, ..Default::default() };
    state.report(NodeId(node), session, &report, Vec::new(), 20);
}

/// Returns keyspace 1 with one shard on node 1 that lacks a replica; nodes 2 and 3 could take it.
fn lacking() -> (ClusterState, [u64; 3]) {
    let mut state = ClusterState::default();
    let sessions = [1, 2, 3]
        .map(|node| state.connect(&hello(node, &format!("a:{node}")), false, 10).unwrap().session);
    let spec = KeyspaceSpec { replicas: 2, ..KeyspaceSpec::default() };
    state.install(Catalog::first(KS, "ks1", spec, &[vec![NodeId(1)]], 1_000, 1), Delivery::Push);
    let big = ReplicaReport { bytes: 3 * GIB, ..replica_report(1, 1) };
    report(&mut state, 1, sessions[0], vec![big], 20);
    (state, sessions)
}

fn target(state: &ClusterState, now_us: u64) -> Option<NodeId> {
    match state.decide(KS, 100, now_us, 3) {
        Advance::Write(next) => Some(next.plan.unwrap().targets[0].node),
        _ => None,
    }
}

#[test]
fn a_copy_goes_to_a_node_whose_disk_has_room_for_it() {
    let (mut state, sessions) = lacking();
    assert_eq!(target(&state, 5_000), Some(NodeId(2)));
    disk(&mut state, 2, sessions[1], 100 * GIB, GIB);
    assert_eq!(target(&state, 5_000), Some(NodeId(3)), "node 2 is down to its reserve");
    disk(&mut state, 3, sessions[2], 100 * GIB, 4 * GIB);
    assert_eq!(target(&state, 5_000), None, "the files of the shard and the reserve do not fit");
    let Advance::Wait(what) = state.decide(KS, 100, 5_000, 3) else { panic!("it says nothing") };
    assert!(
        what.contains("room for a replica and its files") && what.contains("vasto serve node"),
        "{what}"
    );
    disk(&mut state, 3, sessions[2], 100 * GIB, 5 * GIB);
    assert_eq!(target(&state, 5_000), Some(NodeId(3)));
    // The bytes of a replica under construction there are promised.
    let hold = state.loads.hold([(NodeId(3), 3 * GIB)], true);
    assert_eq!(target(&state, 5_000), None);
    state.loads.give_back(hold);
    assert_eq!(target(&state, 5_000), Some(NodeId(3)));
    // New keyspaces do not go to a full node either.
    let nodes = crate::placement::place(4, 1, &state.candidates(None)).unwrap();
    assert!(nodes.iter().all(|nodes| nodes[0] != NodeId(2)), "{nodes:?}");
}

#[test]
fn a_copy_whose_target_runs_out_of_disk_is_given_up_and_made_elsewhere() {
    let (mut state, sessions) = lacking();
    let Advance::Write(copying) = state.decide(KS, 100, 5_000, 3) else { panic!("no copy begins") };
    assert_eq!(copying.plan.as_ref().unwrap().targets[0].node, NodeId(2));
    state.install(*copying, Delivery::Push);
    let waits = |state: &ClusterState| matches!(state.decide(KS, 100, 6_000, 3), Advance::Wait(_));
    disk(&mut state, 2, sessions[1], 100 * GIB, GIB / 2);
    assert!(waits(&state), "the reserve is there to be used");
    disk(&mut state, 2, sessions[1], 100 * GIB, GIB / 5);
    let given_up = write(state.decide(KS, 100, 6_000, 3));
    let report = given_up.operations.last().unwrap();
    assert!(report.reason.as_ref().unwrap().contains("no disk left"), "{report:?}");
    state.install(given_up, Delivery::Push);
    // Also when the node has room again at once, as when the files of the aborted replica are
    // removed.
    disk(&mut state, 2, sessions[1], 100 * GIB, 90 * GIB);
    assert_eq!(target(&state, 30_000_000), Some(NodeId(3)));
    state.disconnect(NodeId(3), sessions[2], 100);
    assert_eq!(target(&state, 30_000_000), Some(NodeId(2)), "better than nowhere");
}

#[test]
fn a_shrink_ends_when_a_node_that_exports_runs_out_of_disk() {
    let (mut state, first, second) = two_nodes();
    state.install(start_resize(&catalog(), 1, &[], 2_000, 2).unwrap(), Delivery::Push);
    report(&mut state, 1, first, vec![replica_report(1, 2)], 20);
    report(&mut state, 2, second, vec![replica_report(2, 2)], 20);
    let next = write(state.decide(KS, 100, 6_000, 3));
    assert_eq!(next.plan.as_ref().unwrap().floor, Some(1), "it goes on");
    disk(&mut state, 2, second, 100 * GIB, GIB / 5);
    let given_up = write(state.decide(KS, 100, 6_000, 3));
    let reason = given_up.operations[0].reason.as_deref().unwrap();
    assert!(reason.contains("n-0000000000000002 has no disk left"), "{reason}");
}

#[test]
fn a_retired_replica_keeps_no_node_from_a_copy_of_a_new_shard_with_its_number() {
    let (mut state, sessions) = lacking();
    let mut retired = state.keyspaces[&KS].catalog.next(3_000, 3);
    retired.retired.push(vasto_core::catalog::RetiredReplica {
        shard: ShardId(0),
        replica: ReplicaId(77),
        node: NodeId(2),
        plan: PlanId(1),
    });
    state.install(retired, Delivery::Push);
    state.disconnect(NodeId(3), sessions[2], 100);
    assert_eq!(target(&state, 5_000), Some(NodeId(2)));
}

#[test]
fn a_cordoned_node_gets_nothing() {
    let (mut state, _) = lacking();
    let settings = ClusterSettings::default().with_cordon(NodeId(2), true, 1, 1).unwrap();
    state.settings = Arc::new(settings.clone());
    assert_eq!(target(&state, 5_000), Some(NodeId(3)));
    let nodes = crate::placement::place(6, 2, &state.candidates(None)).unwrap();
    assert!(nodes.iter().flatten().all(|node| *node != NodeId(2)), "{nodes:?}");
    assert!(
        state
            .grow_targets(&state.keyspaces[&KS], 3)
            .unwrap()
            .iter()
            .flatten()
            .all(|node| *node != NodeId(2))
    );
    state.settings = Arc::new(settings.with_cordon(NodeId(3), true, 1, 1).unwrap());
    assert_eq!(target(&state, 5_000), None);
    let error = state.grow_targets(&state.keyspaces[&KS], 3).unwrap_err().to_string();
    assert!(error.contains("cordoned"), "{error}");
}

/// Returns `keyspaces` of 4 shards that each lack one of three replicas, and `spare` more nodes
/// than the two that hold them.
fn many_lacking(keyspaces: u64, spare: u64) -> ClusterState {
    let mut state = ClusterState::default();
    let sessions: Vec<u64> = (1..=spare + 2)
        .map(|node| state.connect(&hello(node, &format!("a:{node}")), false, 10).unwrap().session)
        .collect();
    let spec = KeyspaceSpec { shards: 4, replicas: 3, ..KeyspaceSpec::default() };
    let nodes = vec![vec![NodeId(1), NodeId(2)]; 4];
    for id in 1..=keyspaces {
        let name = format!("ks{id}");
        state.install(
            Catalog::first(KeyspaceId(id), &name, spec.clone(), &nodes, 1_000, 1),
            Delivery::Push,
        );
        let of = |node: u64| {
            let shards = (0..4).map(move |shard| (shard, shard * 2 + node));
            let report = move |(shard, replica): (u64, u64)| ReplicaReport {
                keyspace: KeyspaceId(id),
                shard: ShardId(shard as u32),
                ..replica_report(replica, 1)
            };
            shards.map(report).collect::<Vec<_>>()
        };
        for node in [1, 2] {
            assert!(report(&mut state, node, sessions[node as usize - 1], of(node), 20).is_empty());
        }
    }
    for node in state.nodes.values_mut() {
        node.max_replicas = 100_000;
    }
    state
}

#[test]
fn decisions_that_are_not_written_yet_do_not_all_choose_one_node() {
    let mut state = many_lacking(50, 25);
    let mut chosen: BTreeMap<NodeId, usize> = BTreeMap::new();
    // Each version is decided before any other is known.
    for id in 1..=50 {
        let Advance::Write(next) = state.decide(KeyspaceId(id), 100, 5_000, 3) else {
            panic!("{id}: no copy begins")
        };
        assert!(state.hold_places(&next).is_some());
        *chosen.entry(next.plan.unwrap().targets[0].node).or_default() += 1;
    }
    assert_eq!(chosen.len(), 25);
    assert!(chosen.values().all(|count| *count == 2), "{chosen:?}");
}

#[test]
fn a_node_makes_few_copies_at_a_time() {
    let mut state = many_lacking(50, 5);
    let mut chosen: BTreeMap<NodeId, usize> = BTreeMap::new();
    for id in 1..=50 {
        if let Advance::Write(next) = state.decide(KeyspaceId(id), 100, 5_000, 3) {
            state.hold_places(&next);
            *chosen.entry(next.plan.unwrap().targets[0].node).or_default() += 1;
        }
    }
    assert!(
        chosen.len() == 5 && chosen.values().all(|count| *count == COPIES_PER_NODE_MAX),
        "{chosen:?}"
    );
    // Held places are given back once the outcome of a write is known; then the next keyspaces get
    // replicas.
    for hold in 1..=20 {
        state.loads.give_back(hold);
    }
    assert!(matches!(state.decide(KeyspaceId(50), 100, 5_000, 3), Advance::Write(_)));
    // A drain is not refused because its replicas have to wait.
    let busy =
        state.loads.hold((3..=7).flat_map(|node| [(NodeId(node), 0); COPIES_PER_NODE_MAX]), true);
    assert!(matches!(state.decide(KeyspaceId(50), 100, 5_000, 3), Advance::Wait(_)));
    let catalog = state.keyspaces[&KeyspaceId(50)].catalog.clone();
    assert!(state.copy_target(&catalog, ShardId(0), &BTreeMap::new(), 5_000).is_some());
    state.loads.give_back(busy);
}

/// Decisions for 1,000 keyspaces that lack replicas: each examines every node once, with and
/// without room, and no other keyspace.
#[test]
fn a_look_at_many_keyspaces_that_lack_copies_is_bounded() {
    let nodes = 12;
    for room in [true, false] {
        let mut state = many_lacking(1_000, nodes - 2);
        if !room {
            state.nodes.values_mut().for_each(|node| node.max_replicas = 0);
        }
        state.examined.set(0);
        let began = std::time::Instant::now();
        for id in 1..=1_000 {
            let decided = state.decide(KeyspaceId(id), 100, 5_000, 3);
            assert_eq!(matches!(decided, Advance::Write(_)), room, "{decided:?}");
        }
        let examined = state.examined.get();
        println!("room {room}: {examined} candidates, {:?} for 1,000 keyspaces", began.elapsed());
        assert!(examined <= 1_000 * nodes, "{examined}");
    }
}

#[test]
fn what_is_over_is_forgotten_and_what_is_not_stays() {
    let (mut state, first, second) = two_nodes();
    report(&mut state, 1, first, vec![replica_report(1, 1)], 20);
    // The report of a replica that is removed is forgotten with it.
    let mut without = catalog().next(2_000, 2);
    without.placement.remove(0);
    without.removed.push(ReplicaId(1));
    state.install(without, Delivery::Push);
    assert!(state.keyspaces[&KS].reports.is_empty() && state.keyspaces[&KS].reporters.is_empty());
    // A node that has been away for long is forgotten if it holds nothing, and kept if it holds
    // something.
    state.disconnect(NodeId(1), first, 100);
    state.disconnect(NodeId(2), second, 100);
    let late = 100 + NODE_FORGOTTEN_AFTER.as_micros() as u64;
    state.connect(&hello(3, "a:3"), false, late - 1).unwrap();
    assert!(state.nodes.contains_key(&NodeId(1)), "too early");
    state.connect(&hello(4, "a:4"), false, late).unwrap();
    assert_eq!(state.nodes.keys().copied().collect::<Vec<_>>(), [NodeId(2), NodeId(3), NodeId(4)]);
    // A deleted keyspace is forgotten some time after its deletion and after this master learned of
    // it.
    let kept_us = 1_000_000;
    let (long, at_once) = (Duration::from_secs(600), Duration::ZERO);
    assert!(!state.forget_deleted(KS, u64::MAX, kept_us, at_once), "it serves");
    let deleted =
        Catalog { state: KeyspaceState::Deleted, ..state.keyspaces[&KS].catalog.next(3_000, 3) };
    state.install(deleted, Delivery::Push);
    assert!(!state.forget_deleted(KS, u64::MAX, kept_us, long), "nodes have to hear of it first");
    assert!(!state.forget_deleted(KS, 3_000 + kept_us - 1, kept_us, at_once));
    assert!(state.forget_deleted(KS, 3_000 + kept_us, kept_us, at_once));
    assert!(state.keyspaces.is_empty());
    // A report of the keyspace has it looked up again.
    let third = state.connect(&hello(3, "a:3"), false, late).unwrap().session;
    assert_eq!(
        report(&mut state, 3, third, vec![replica_report(1, 1)], late),
        [Odd::UnknownKeyspace(KS)]
    );
}

#[test]
fn a_node_that_has_not_registered_since_the_start_counts_as_gone_after_the_silence_that_is_set() {
    let mut state = ClusterState::default();
    state.install(catalog(), Delivery::Push);
    let presence =
        |state: &ClusterState, seconds: u64| state.presence(NodeId(1), seconds * 1_000_000);
    assert_eq!((presence(&state, 9), presence(&state, 10)), (Presence::Away, Presence::Gone));
    state.node_silence = Some(Duration::from_secs(60));
    assert_eq!((presence(&state, 59), presence(&state, 60)), (Presence::Away, Presence::Gone));
}
