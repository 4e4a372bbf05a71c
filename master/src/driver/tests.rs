//! Tests of the driver of a keyspace.

#![allow(clippy::unwrap_used)]
use super::write::{delivery_of, failpoints_of};
use super::*;
use crate::cluster::Settings;
use crate::state::Delivery;
use object_store::memory::InMemory;
use object_store::throttle::{ThrottleConfig, ThrottledStore};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::{KeyspaceSpec, Quarantine};
use vasto_core::ids::{Epoch, Incarnation, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::limits::SEALING_WRITE_MAX;
use vasto_core::plan::{PinnedManifest, PlanKind, Step};
use vasto_core::reconcile::{MoveOrder, Pace, WholePace, start_moves, start_resize, undo_seal};
use vasto_core::report::{
    ReplicaPhase, ReplicaReport, Sealed, SourceProgress, TargetProgress, TargetStage,
};
use vasto_failpoint::points;
use vasto_proto::v1;
use vasto_shipping::{Bucket, CatalogWrite, ClusterSettings, RetryBudget};
use vasto_testkit::faulty::{Call, Fault, Faulty};

const DEADLINE: Duration = Duration::from_secs(20);

fn first(keyspace: KeyspaceId) -> Catalog {
    Catalog::first(keyspace, "ks1", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1_000, 1)
}

fn growing(step: Step) -> Catalog {
    let mut catalog = start_resize(&first(KeyspaceId(1)), 2, &[vec![NodeId(1)]], 2_000, 2).unwrap();
    catalog.plan.as_mut().unwrap().step = step;
    catalog
}

#[test]
fn only_a_slow_sealing_version_is_held_back() {
    let (fast, slow) = (SEALING_WRITE_MAX, SEALING_WRITE_MAX + Duration::from_millis(1));
    for step in [Step::Prepare, Step::Tail, Step::Committed] {
        assert_eq!(delivery_of(&growing(step), slow), Delivery::Push, "{step:?}");
    }
    assert_eq!(delivery_of(&growing(Step::Sealing), fast), Delivery::Push);
    assert_eq!(delivery_of(&growing(Step::Sealing), slow), Delivery::Undo);
    assert_eq!(delivery_of(&first(KeyspaceId(1)), slow), Delivery::Push);
}

#[test]
fn idle_keyspaces_are_not_looked_at() {
    let mut catalog = first(KeyspaceId(1));
    assert_eq!(next_check(&catalog, 5), None);
    assert_eq!(next_check(&growing(Step::Tail), 5), Some(TICK));
    let mut copying = growing(Step::Tail);
    copying.plan.as_mut().unwrap().kind = PlanKind::AddReplica { shard: ShardId(0) };
    assert_eq!(next_check(&copying, 5), Some(CHECK_COPIES), "hundreds may run");
    catalog.quarantines.push(Quarantine {
        plan: PlanId(1),
        range: catalog.owned_bands(),
        replicas: vec![ReplicaId(1)],
        targets: Vec::new(),
        others: Vec::new(),
        sources: Vec::new(),
        until_us: 3_000_000,
        dropping: false,
    });
    assert_eq!(next_check(&catalog, 1_000_000), Some(Duration::from_secs(2)));
    assert_eq!(next_check(&catalog, 9_000_000), Some(TICK), "it is due");
    catalog.quarantines[0].until_us = u64::MAX;
    assert_eq!(next_check(&catalog, 0), Some(CHECK_MAX));
    catalog.quarantines[0].dropping = true;
    assert_eq!(next_check(&catalog, 0), Some(TICK));
    catalog.state = KeyspaceState::Deleted;
    assert_eq!(next_check(&catalog, 0), Some(CHECK_DELETED));
}

/// Returns the keyspace after a change while these nodes are live.
fn asked(
    catalog: &Catalog,
    change: &CatalogChange,
    nodes: &[NodeId],
) -> Result<Catalog, VastoError> {
    let mut state = ClusterState::default();
    for node in nodes {
        state.connect(&crate::state::tests::hello(node.0, "a:1"), false, 1).unwrap();
    }
    state.install(catalog.clone(), Delivery::Push);
    changed(&state, &state.keyspaces[&catalog.keyspace], change, 9, 9, 9)
}

#[test]
fn changes_that_are_refused_say_what_to_do() {
    let refused =
        |catalog: &Catalog, change, nodes: &[NodeId]| asked(catalog, &change, nodes).unwrap_err();
    let idle = first(KeyspaceId(1));
    assert_eq!(
        refused(&idle, CatalogChange::Resize { to: 1, max_rate: None }, &[NodeId(1)]).code,
        ErrorCode::InvalidArgument
    );
    assert_eq!(
        refused(&idle, CatalogChange::Resize { to: 5000, max_rate: None }, &[NodeId(1)]).code,
        ErrorCode::InvalidArgument
    );
    assert_eq!(
        refused(&idle, CatalogChange::Resize { to: 72, max_rate: None }, &[NodeId(1)]).code,
        ErrorCode::FailedPrecondition
    );
    assert!(
        asked(&idle, &CatalogChange::Resize { to: 3, max_rate: None }, &[NodeId(1)]).is_ok(),
        "several shards at once"
    );
    assert!(
        refused(&idle, CatalogChange::Resize { to: 2, max_rate: None }, &[])
            .message
            .contains("vasto serve node")
    );
    assert_eq!(
        refused(&idle, CatalogChange::Cancel { plan: PlanId(1) }, &[]).code,
        ErrorCode::FailedPrecondition
    );
    let busy = growing(Step::Tail);
    for change in [
        CatalogChange::Resize { to: 2, max_rate: None },
        CatalogChange::Resize { to: 3, max_rate: None },
        CatalogChange::Delete,
    ] {
        assert_eq!(
            refused(&busy, change.clone(), &[NodeId(1)]).code,
            ErrorCode::FailedPrecondition,
            "{change:?}"
        );
    }
    let committed = growing(Step::Committed);
    assert!(
        refused(&committed, CatalogChange::Cancel { plan: PlanId(1) }, &[])
            .message
            .contains("changed ownership")
    );
    let other = CatalogChange::Cancel { plan: PlanId(2) };
    assert!(
        refused(&busy, other, &[]).message.contains("ended"),
        "only the operation that was named"
    );
}

/// The settings in which the rebalance 7 runs.
fn rebalancing() -> ClusterSettings {
    ClusterSettings::default().with_rebalance(7, 1).unwrap()
}

#[test]
fn moves_begin_only_while_their_rebalance_runs_and_where_there_is_a_place() {
    let hello = crate::state::tests::hello;
    let spec = KeyspaceSpec { replicas: 2, ..KeyspaceSpec::default() };
    let catalog =
        Catalog::first(KeyspaceId(1), "ks1", spec, &[vec![NodeId(1), NodeId(2)]], 1_000, 1);
    let mut state = ClusterState::default();
    for node in 1..=3 {
        state.connect(&hello(node, &format!("a:{node}")), false, 1).unwrap();
    }
    state.install(catalog, Delivery::Push);
    let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(3) };
    let moves = CatalogChange::Move { orders: vec![order], rebalance_us: 7 };
    let prefer = CatalogChange::Prefer { replica: ReplicaId(2), rebalance_us: 7 };
    let begin = |state: &ClusterState, change: &CatalogChange| {
        changed(state, &state.keyspaces[&KeyspaceId(1)], change, 9, 9, 9)
    };
    let ended = rebalancing().without_rebalance(7, true, 8, 2).unwrap();
    let another = ended.with_rebalance(9, 3).unwrap();
    for settings in [ClusterSettings::default(), ended, another] {
        state.settings = Arc::new(settings);
        for change in [&moves, &prefer] {
            let refused = begin(&state, change).unwrap_err();
            assert!(refused.message.contains("rebalance-7 has ended"), "{refused:?}");
        }
    }
    state.settings = Arc::new(rebalancing());
    assert!(begin(&state, &prefer).is_ok());
    assert_eq!(begin(&state, &moves).unwrap().moves.len(), 1);
    // Another master has given all permits of the node away.
    let copies = vasto_core::limits::COPIES_PER_NODE_MAX;
    let hold = state.loads.hold((0..copies).map(|_| (NodeId(3), 0)), true);
    assert!(begin(&state, &moves).is_err());
    state.loads.give_back(hold);
    assert!(begin(&state, &moves).is_ok());
    state.settings = Arc::new(rebalancing().with_cordon(NodeId(3), true, 8, 2).unwrap());
    assert!(begin(&state, &moves).is_err());
}

#[test]
fn the_versions_of_a_move_pass_the_failpoints_of_its_steps() {
    let before = first(KeyspaceId(1));
    let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(2) };
    let mut known = start_moves(&before, &[order], 7, 9, 9).unwrap();
    assert_eq!(failpoints_of(Some(&before), &known).0, points::MASTER_PREPARE_BEFORE);
    for (step, point) in [
        (Step::Tail, points::MASTER_TAIL_BEFORE),
        (Step::Committed, points::MASTER_COMMITTED_BEFORE),
    ] {
        let mut next = known.next(10, 10);
        next.moves[0].plan.step = step;
        assert_eq!(failpoints_of(Some(&known), &next).0, point);
        assert_eq!(failpoints_of(Some(&next), &next.next(11, 11)).0, points::MASTER_REST_BEFORE);
        known = next;
    }
    let ended = Catalog { moves: Vec::new(), ..known.next(12, 12) };
    assert_eq!(failpoints_of(Some(&known), &ended).0, points::MASTER_REST_BEFORE);
    assert_eq!(failpoints_of(None, &known).0, points::MASTER_REST_BEFORE);
    let grows = growing(Step::Committed);
    assert_eq!(failpoints_of(None, &grows).0, points::MASTER_COMMITTED_BEFORE);
}

#[tokio::test]
async fn a_move_that_another_master_overtakes_is_decided_anew() {
    let fixture = driven().await;
    let hello = crate::state::tests::hello(2, "a:2");
    fixture.cluster.state().connect(&hello, false, 0).unwrap();
    let nothing = ClusterSettings::default();
    let store = &fixture.cluster.store;
    store.change_settings(&nothing, |_| Some(rebalancing())).await.unwrap();
    let first = fixture.cluster.state().keyspaces[&fixture.keyspace].catalog.as_ref().clone();
    store.write(&first.next(5_000, 77)).await.unwrap();
    let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(2) };
    let moves = CatalogChange::Move { orders: vec![order], rebalance_us: 7 };
    let overtaken = fixture.ask(moves.clone()).await.unwrap_err();
    assert_eq!(overtaken.code, ErrorCode::Unavailable);
    assert_eq!(fixture.ask(moves).await.unwrap().moves.len(), 1, "as the next look decides");
    fixture.cluster.shutdown.cancel();
}

#[tokio::test]
async fn a_rebalance_that_another_master_has_resumed_is_not_paused_by_older_settings() {
    let fixture = driven().await;
    let hello = crate::state::tests::hello(2, "a:2");
    fixture.cluster.state().connect(&hello, false, 0).unwrap();
    let store = &fixture.cluster.store;
    let nothing = ClusterSettings::default();
    let begun = store.change_settings(&nothing, |_| Some(rebalancing())).await.unwrap();
    let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(2) };
    let moves = CatalogChange::Move { orders: vec![order], rebalance_us: 7 };
    let plan = fixture.ask(moves).await.unwrap().moves[0].id();
    let stands = WholePace { paused: true, max_rate: None };
    let old = store.change_settings(&begun, |now| now.with_pace(7, stands, 8, 2)).await.unwrap();
    let goes_on = WholePace::default();
    store.change_settings(&old, |now| now.with_pace(7, goes_on, 9, 3)).await.unwrap();
    fixture.cluster.state().settings = Arc::new(old);
    let slower = CatalogChange::Pace { plan, pace: Pace::Rate(Some(1 << 20)) };
    let next = fixture.ask(slower).await.unwrap();
    assert_eq!((next.moves[0].plan.paused, next.moves[0].plan.max_rate), (false, Some(1 << 20)));
    fixture.cluster.shutdown.cancel();
}

#[test]
fn a_resize_that_a_node_has_no_disk_for_is_refused_with_the_figures() {
    const GIB: u64 = 1 << 30;
    let spec = KeyspaceSpec { shards: 2, ..KeyspaceSpec::default() };
    let nodes = [vec![NodeId(1)], vec![NodeId(2)]];
    let catalog = Catalog::first(KeyspaceId(1), "ks1", spec, &nodes, 1_000, 1);
    let mut state = ClusterState::default();
    let hello = crate::state::tests::hello;
    let first = state.connect(&hello(1, "a:1"), false, 1).unwrap().session;
    let second = state.connect(&hello(2, "a:2"), false, 1).unwrap().session;
    state.install(catalog, Delivery::Push);
    let disk = |free: u64| v1::Report {
        disk_used: 100 * GIB - free,
        disk_free: free,
        ..v1::Report::default()
    };
    let mut shrunk = |free: [u64; 2], bytes: u64| {
        let given = ReplicaReport { bytes, ..crate::state::tests::replica_report(2, 1) };
        state.report(NodeId(1), first, &disk(free[0]), Vec::new(), 2);
        state.report(NodeId(2), second, &disk(free[1]), vec![given], 2);
        let change = CatalogChange::Resize { to: 1, max_rate: None };
        changed(&state, &state.keyspaces[&KeyspaceId(1)], &change, 9, 9, 9)
    };
    // A survivor needs twice what it receives, a source once what it exports; 1 GiB is reserved.
    let refused = shrunk([8 * GIB, 50 * GIB], 4 * GIB).unwrap_err();
    assert_eq!(refused.code, ErrorCode::FailedPrecondition);
    for part in
        ["n-0000000000000001 needs about 8192 MiB", "7168 MiB of the 8192 MiB", "node drain"]
    {
        assert!(refused.message.contains(part), "{}", refused.message);
    }
    let refused = shrunk([50 * GIB, 4 * GIB], 4 * GIB).unwrap_err();
    assert!(refused.message.contains("n-0000000000000002 needs about 4096 MiB"), "{refused}");
    assert!(shrunk([9 * GIB, 5 * GIB], 4 * GIB).is_ok());
}

#[test]
fn a_delete_raises_the_epoch_and_forgets_what_waits() {
    let deleted = asked(&first(KeyspaceId(1)), &CatalogChange::Delete, &[]).unwrap();
    assert_eq!(
        (deleted.state, deleted.epoch, deleted.version.0),
        (KeyspaceState::Deleted, Epoch(2), 2)
    );
    assert_eq!(deleted.placement.len(), 1, "nodes find their part in it");
}

struct Fixture {
    cluster: Arc<Cluster>,
    keyspace: KeyspaceId,
    session: u64,
    store: Arc<ThrottledStore<InMemory>>,
}

fn throttled() -> Arc<ThrottledStore<InMemory>> {
    Arc::new(ThrottledStore::new(InMemory::new(), ThrottleConfig::default()))
}

/// Starts a keyspace in a bucket with a real driver, and one registered node.
async fn driven() -> Fixture {
    let store = throttled();
    driven_in(Bucket::from_store("memory://driver", store.clone()), store).await
}

async fn driven_in(bucket: Bucket, store: Arc<ThrottledStore<InMemory>>) -> Fixture {
    let settings = Settings {
        dial_back: false,
        node_silence: Duration::from_secs(10),
        retention: Default::default(),
        prices: Default::default(),
        rebalance: false,
        moves_at_once: 4,
    };
    let cluster = Cluster::new("c-1".into(), bucket, settings, CancellationToken::new());
    let created = cluster.store.create_keyspace(first).await.unwrap();
    let keyspace = created.keyspace;
    let hello = v1::Hello { node_id: 1, address: "a:1".into(), ..v1::Hello::default() };
    let session = cluster.state().connect(&hello, false, 0).unwrap().session;
    install(&cluster, created, Delivery::Push);
    Fixture { cluster, keyspace, session, store }
}

impl Fixture {
    async fn ask(&self, change: CatalogChange) -> Result<Arc<Catalog>, VastoError> {
        let requests = self.cluster.state().keyspaces[&self.keyspace].requests.clone();
        let (reply, answer) = oneshot::channel();
        requests.send(ChangeRequest { change, reply }).await.unwrap();
        tokio::time::timeout(DEADLINE, answer).await.unwrap().unwrap()
    }

    fn report(&self, reports: Vec<ReplicaReport>) {
        let odd = self.cluster.state().report(
            NodeId(1),
            self.session,
            &v1::Report::default(),
            reports,
            1,
        );
        assert_eq!(odd, []);
    }

    async fn until(&self, what: &str, holds: impl Fn(&crate::state::Keyspace) -> bool) {
        let mut changes = self.cluster.state().keyspaces[&self.keyspace].changes();
        let wait = async {
            while !holds(&self.cluster.state().keyspaces[&self.keyspace]) {
                changes.changed().await.unwrap();
            }
        };
        assert!(tokio::time::timeout(DEADLINE, wait).await.is_ok(), "waited in vain for {what}");
    }

    fn replica(&self, replica: u64) -> ReplicaReport {
        let shard = ShardId(replica as u32 - 1);
        ReplicaReport {
            incarnation: Incarnation(1),
            version: vasto_core::ids::CatalogVersion(1),
            lsn: Lsn(100),
            shipped_lsn: Lsn(100),
            manifest_lsn: Lsn(100),
            replication: vasto_core::report::ReplicationReport {
                ready: true,
                ..Default::default()
            },
            ..ReplicaReport::new(self.keyspace, shard, ReplicaId(replica), ReplicaPhase::Serving)
        }
    }

    /// Returns reports of a source with its checkpoint and a target that tails: ready to seal.
    fn ready_to_seal(&self) -> Vec<ReplicaReport> {
        let source = SourceProgress {
            plan: PlanId(1),
            manifest: Some(PinnedManifest { key: "m".into(), lsn: Lsn(10) }),
            ..SourceProgress::new(PlanId(1))
        };
        let target = TargetProgress {
            stage: TargetStage::Tailing,
            manifest_shipped: true,
            ..TargetProgress::new(PlanId(1))
        };
        vec![
            ReplicaReport { source: Some(source), ..self.replica(1) },
            ReplicaReport { target: Some(target), ..self.replica(2) },
        ]
    }
}

#[tokio::test]
async fn a_slow_bucket_never_makes_a_node_seal() {
    let fixture = driven().await;
    let mut sent = crate::state::Sent::default();
    let shown = |sent: &mut crate::state::Sent| -> Vec<Catalog> {
        let messages = fixture.cluster.state().outstanding(NodeId(1), fixture.session, sent);
        let catalogs = messages.into_iter().filter_map(|message| match message.message? {
            v1::master_message::Message::Keyspace(version) => {
                Some(serde_json::from_str(&version.catalog_json).unwrap())
            }
            _ => None,
        });
        catalogs.collect()
    };
    fixture.ask(CatalogChange::Resize { to: 2, max_rate: None }).await.unwrap();
    shown(&mut sent);
    fixture.store.config_mut(|config| {
        config.wait_put_per_call = SEALING_WRITE_MAX + Duration::from_millis(20)
    });
    fixture.report(fixture.ready_to_seal());
    // Two rounds of tail -> sealing -> tail, checked after each change: no sealing version is
    // shown.
    let seals = |keyspace: &crate::state::Keyspace| {
        keyspace.catalog.plan.as_ref().map_or(0, |plan| plan.seals_undone)
    };
    let mut changes = fixture.cluster.state().keyspaces[&fixture.keyspace].changes();
    let rounds = async {
        while seals(&fixture.cluster.state().keyspaces[&fixture.keyspace]) < 2 {
            changes.changed().await.unwrap();
            for catalog in shown(&mut sent) {
                assert_ne!(catalog.plan.unwrap().step, Step::Sealing, "a node was told to seal");
            }
        }
    };
    assert!(tokio::time::timeout(DEADLINE, rounds).await.is_ok(), "the slow seals were not undone");
    // The bucket holds the sealing versions, each followed by the version that undoes it.
    fixture.store.config_mut(|config| config.wait_put_per_call = Duration::ZERO);
    fixture
        .until("a fast seal", |keyspace| {
            keyspace.catalog.plan.as_ref().is_some_and(|plan| {
                plan.step == Step::Sealing && keyspace.delivery == Delivery::Push
            })
        })
        .await;
    assert!(
        shown(&mut sent).iter().any(|catalog| catalog.plan.as_ref().unwrap().step == Step::Sealing)
    );
    fixture.cluster.shutdown.cancel();
}

#[tokio::test]
async fn a_lost_race_adopts_the_winners_tip_and_decides_again() {
    let fixture = driven().await;
    // Another master changes the time to live three times while this one knows version 1 only.
    let mut tip = fixture.cluster.state().keyspaces[&fixture.keyspace].catalog.as_ref().clone();
    for round in 0..3 {
        tip = tip.next(5_000 + round, 100 + round);
        tip.spec.ttl_ms = Some(round);
        assert!(matches!(fixture.cluster.store.write(&tip).await.unwrap(), CatalogWrite::Won));
    }
    let grown = fixture.ask(CatalogChange::Resize { to: 2, max_rate: None }).await.unwrap();
    assert_eq!(
        (grown.version.0, grown.spec.ttl_ms),
        (5, Some(2)),
        "it went on from the winner's tip"
    );
    fixture.cluster.shutdown.cancel();
}

#[tokio::test]
async fn a_commit_behind_which_a_node_has_undone_the_seal_loses_and_the_plan_goes_on() {
    let fixture = driven().await;
    fixture.ask(CatalogChange::Resize { to: 2, max_rate: None }).await.unwrap();
    fixture.report(fixture.ready_to_seal());
    let is_sealing = |keyspace: &crate::state::Keyspace| {
        keyspace.catalog.plan.as_ref().is_some_and(|plan| plan.step == Step::Sealing)
    };
    fixture.until("the seal", is_sealing).await;
    let sealing = fixture.cluster.state().keyspaces[&fixture.keyspace].catalog.clone();
    let plan = sealing.plan.as_ref().unwrap();
    let undone = undo_seal(&sealing, plan, sealing.written_at_us + 2_000_000, 99);
    assert!(matches!(fixture.cluster.store.write(&undone).await.unwrap(), CatalogWrite::Won));
    // Only now this master learns that all are sealed: it decides to commit.
    let mut reports = fixture.ready_to_seal();
    reports[0].source.as_mut().unwrap().sealed =
        Some(Sealed { version: sealing.version, lsn: Lsn(20) });
    reports[1].target.as_mut().unwrap().cursors.insert(ReplicaId(1), Lsn(20));
    fixture.report(reports);
    fixture
        .until("the next seal", |keyspace| {
            is_sealing(keyspace) && keyspace.catalog.version > undone.version
        })
        .await;
    let next = fixture.cluster.state().keyspaces[&fixture.keyspace].catalog.clone();
    assert_eq!((next.version.0, next.epoch), (undone.version.0 + 1, sealing.epoch));
    assert_eq!(next.plan.as_ref().unwrap().seals_undone, 1);
    let stored = fixture.cluster.store.version(fixture.keyspace, undone.version).await.unwrap();
    assert_eq!(stored, Some(undone));
    fixture.cluster.shutdown.cancel();
}

#[tokio::test]
async fn a_node_that_is_ahead_makes_the_master_read_the_tip() {
    let fixture = driven().await;
    let first = fixture.cluster.state().keyspaces[&fixture.keyspace].catalog.as_ref().clone();
    let second = first.next(5_000, 77);
    fixture.cluster.store.write(&second).await.unwrap();
    fixture.report(vec![ReplicaReport { version: second.version, ..fixture.replica(1) }]);
    fixture
        .until("version 2", |keyspace| keyspace.catalog.version.0 == 2 && !keyspace.behind)
        .await;
    fixture.cluster.shutdown.cancel();
}

#[tokio::test]
async fn a_cancelled_plan_cannot_be_cancelled_twice() {
    let fixture = driven().await;
    fixture.ask(CatalogChange::Resize { to: 2, max_rate: None }).await.unwrap();
    let cancelled = fixture.ask(CatalogChange::Cancel { plan: PlanId(1) }).await.unwrap();
    assert!(cancelled.plan.is_none());
    assert_eq!(
        fixture.ask(CatalogChange::Cancel { plan: PlanId(1) }).await.unwrap_err().code,
        ErrorCode::FailedPrecondition
    );
    assert_eq!(
        fixture
            .ask(CatalogChange::Resize { to: 2, max_rate: None })
            .await
            .unwrap()
            .plan
            .as_ref()
            .unwrap()
            .id,
        PlanId(2)
    );
    fixture.cluster.shutdown.cancel();
}

#[tokio::test]
async fn a_write_whose_outcome_is_unknown_is_settled_by_the_tip() {
    for arrives in [true, false] {
        let store = Faulty::in_memory();
        let patience = RetryBudget { total: Duration::from_millis(20), ..RetryBudget::default() };
        let bucket = Bucket::from_store("memory://outage", store.clone()).with_retry(patience);
        let fixture = driven_in(bucket, throttled()).await;
        store.fail(
            Call::Put,
            if arrives { Fault::UnknownAfter } else { Fault::UnknownBefore },
            u32::MAX,
        );
        for call in [Call::Multipart, Call::Get, Call::Head] {
            store.fail(call, Fault::UnknownBefore, u32::MAX);
        }
        let end = async {
            // Several attempts to write and to read the tip fail; then the bucket is back.
            while store.hit() < 5 {
                tokio::task::yield_now().await;
            }
            let shown = fixture.cluster.state().keyspaces[&fixture.keyspace].catalog.version.0;
            assert_eq!(shown, 1, "no version is shown before its write is known to have won");
            store.heal();
        };
        let (grown, ()) =
            tokio::join!(fixture.ask(CatalogChange::Resize { to: 2, max_rate: None }), end);
        let grown = grown.unwrap();
        assert_eq!(
            (grown.version.0, grown.plan.as_ref().unwrap().id),
            (2, PlanId(1)),
            "arrives: {arrives}"
        );
        let tip =
            fixture.cluster.store.tip(fixture.keyspace, grown.version).await.unwrap().unwrap();
        assert_eq!(tip, *grown, "what is answered is what is in the bucket");
        fixture.cluster.shutdown.cancel();
    }
}
