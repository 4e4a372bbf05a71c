//! A grow completes, whatever restarts or interferes.

use std::time::{Duration, Instant};

use serde_json::json;
use vasto_core::ErrorCode;
use vasto_core::ids::KeyspaceId;
use vasto_core::plan::Step;
use vasto_proto::v1;

use crate::harness::{TestMaster, code, eventually, json as parse, within};
use crate::node::{Crew, Session, hello, reports};

async fn cluster(bucket: &str, shards: u32) -> (TestMaster, Crew) {
    let master = TestMaster::start(bucket).await;
    let crew = Crew::start(&master.url, [1, 2]);
    eventually("two nodes", async || {
        (master.status().await["nodes"].as_array()?.len() == 2).then_some(())
    })
    .await;
    master.create("ks1", shards).await.unwrap();
    (master, crew)
}

#[tokio::test]
async fn a_grow_driven_step_by_step() {
    let master = TestMaster::start("memory://grow-steps").await;
    let node = Session::join(&master.url, hello(1)).await;
    let create = async {
        let seen = node.until("the keyspace", |seen| !seen.catalogs.is_empty()).await;
        node.report(reports(&seen.catalogs[&KeyspaceId(1)], node.node, None)).await;
    };
    let (created, ()) = tokio::join!(master.create("ks1", 1), create);
    created.unwrap();

    let estimate = master.resize("ks1", 2, true).await.unwrap();
    assert_eq!(
        (&estimate["from"], &estimate["to"], &estimate["moving_fraction"]),
        (&json!(1), &json!(2), &json!(0.5))
    );
    assert_eq!(estimate["sources"][0]["bytes_to_read"], 1 << 19);
    assert_eq!(master.describe("ks1").await.unwrap()["version"], 1, "a plan changes nothing");

    let mut topologies = master.watch("ks1").await;
    let started = master.resize("ks1", 2, false).await.unwrap();
    assert_eq!(
        (&started["id"], &started["state"], &started["step"]),
        (&json!("op-1-1"), &json!("running"), &json!("prepare"))
    );
    assert_eq!(
        code(master.resize("ks1", 2, false).await).0,
        ErrorCode::FailedPrecondition,
        "one plan at a time"
    );

    let mut fastest = Duration::MAX;
    for step in [Step::Prepare, Step::Tail, Step::Sealing, Step::Committed] {
        let at = |seen: &crate::node::Seen| {
            let catalog = seen.catalogs[&KeyspaceId(1)].clone();
            catalog.plan.as_ref().is_some_and(|plan| plan.step == step).then_some(catalog)
        };
        let seen = node.until(&format!("{step:?}"), |seen| at(seen).is_some()).await;
        let catalog = at(&seen).unwrap();
        if step == Step::Committed {
            assert_eq!((catalog.epoch.0, catalog.spec.shards), (2, 2));
        } else {
            assert_eq!(
                (catalog.epoch.0, catalog.spec.shards),
                (1, 1),
                "nothing changes hands before the commit"
            );
            let running = master.operation("op-1-1").await;
            assert_eq!(running["state"], "running");
        }
        let reported = Instant::now();
        node.report(reports(&catalog, node.node, None)).await;
        node.until("the next version", |seen| {
            seen.catalogs[&KeyspaceId(1)].version > catalog.version
        })
        .await;
        fastest = fastest.min(reported.elapsed());
    }
    // The time from the last seal to the commit is the pause that writers see: a decision that
    // waited for the driver's tick (100 ms) would show in every step.
    assert!(
        fastest < Duration::from_millis(50),
        "reports must be acted on at once, not after {fastest:?}"
    );
    let done = master.operation_until("op-1-1", "state", "done").await;
    assert_eq!((&done["keys_moved"], &done["bytes_moved"]), (&json!(7), &json!(1)));
    assert_eq!(done["write_pause_ms"], json!({"p50": 5.0, "p99": 5.0, "max": 5.0}));
    let steps: Vec<_> =
        node.seen.borrow().versions.iter().map(|(_, version, step)| (version.0, *step)).collect();
    let want = [
        (1, None),
        (2, Some(Step::Prepare)),
        (3, Some(Step::Tail)),
        (4, Some(Step::Sealing)),
        (5, Some(Step::Committed)),
    ];
    assert_eq!(steps[..5], want, "every version reached the node, in order");

    // Clients see the new shard with the epoch of the commit.
    let topology = within("the new topology", async {
        loop {
            let topology = topologies.message().await.unwrap().unwrap();
            if topology.epoch == 2 {
                return topology;
            }
        }
    })
    .await;
    assert_eq!(topology.shards.len(), 2);

    // The quarantine of this keyspace is 0: the clean-up follows under versions of its own.
    let seen = node
        .until("the clean-up", |seen| {
            seen.catalogs[&KeyspaceId(1)].quarantines.iter().any(|quarantine| quarantine.dropping)
        })
        .await;
    node.report(reports(&seen.catalogs[&KeyspaceId(1)], node.node, None)).await;
    node.until("its end", |seen| seen.catalogs[&KeyspaceId(1)].quarantines.is_empty()).await;
    let list = parse(master.client.clone().list_operations(v1::Empty {}).await).unwrap();
    assert_eq!((list.as_array().unwrap().len(), &list[0]["id"]), (1, &json!("op-1-1")));
    master.stop().await;
}

/// Holds the nodes at `step` of the plan, then replaces the master with a new one on the same
/// bucket.
async fn restart_at(step: Step, bucket: &str) {
    let (master, crew) = cluster(bucket, 2).await;
    crew.hold_at(Some(step));
    master.resize("ks1", 3, false).await.unwrap();
    let name = serde_json::to_value(step).unwrap();
    let running = master.operation_until("op-1-1", "step", name.as_str().unwrap()).await;
    assert_eq!(running["state"], "running");
    master.stop().await;

    let master = TestMaster::start(bucket).await;
    crew.follow(&master.url);
    if step != Step::Sealing {
        // A seal that no node completes is undone; every other step is still in force.
        assert_eq!(master.operation("op-1-1").await["step"], name);
    }
    crew.hold_at(None);
    let done = master.operation_until("op-1-1", "state", "done").await;
    assert_eq!((&done["from"], &done["to"]), (&json!(2), &json!(3)));
    let described = master.describe("ks1").await.unwrap();
    assert_eq!((&described["shards"], &described["epoch"]), (&json!(3), &json!(2)));
    master.stop().await;
}

#[tokio::test]
async fn a_new_master_goes_on_from_prepare() {
    restart_at(Step::Prepare, "memory://grow-restart-prepare").await;
}

#[tokio::test]
async fn a_new_master_goes_on_from_tail() {
    restart_at(Step::Tail, "memory://grow-restart-tail").await;
}

#[tokio::test]
async fn a_new_master_goes_on_from_sealing() {
    restart_at(Step::Sealing, "memory://grow-restart-sealing").await;
}

#[tokio::test]
async fn a_new_master_goes_on_from_committed() {
    let dir = tempfile::tempdir().unwrap();
    restart_at(Step::Committed, &format!("file://{}", dir.path().display())).await;
}

#[tokio::test]
async fn an_incomplete_seal_is_undone_and_the_plan_can_be_cancelled() {
    let (master, crew) = cluster("memory://grow-cancel", 1).await;
    let watcher = Session::join(&master.url, hello(9)).await;
    crew.hold_at(Some(Step::Sealing));
    master.resize("ks1", 2, false).await.unwrap();
    let draining = |seen: &crate::node::Seen| {
        let steps: Vec<_> = seen.versions.iter().map(|(.., step)| *step).collect();
        steps.windows(2).any(|pair| pair == [Some(Step::Sealing), Some(Step::Tail)])
    };
    watcher.until("the seal to be undone", draining).await;

    let cancel = async |id: &str| {
        parse(
            within(
                "a cancel",
                master.client.clone().cancel_operation(v1::OperationRequest { id: id.into() }),
            )
            .await,
        )
    };
    let cancelled = cancel("op-1-1").await.unwrap();
    assert_eq!(
        (&cancelled["state"], &cancelled["reason"]),
        (&json!("aborted"), &json!("cancelled by an administrator"))
    );
    assert_eq!(code(cancel("op-1-1").await).0, ErrorCode::FailedPrecondition);
    assert_eq!(code(cancel("op-1-9").await).0, ErrorCode::NotFound);
    let described = master.describe("ks1").await.unwrap();
    assert_eq!(
        (&described["shards"], &described["epoch"]),
        (&json!(1), &json!(1)),
        "nothing changed"
    );

    crew.hold_at(Some(Step::Committed));
    master.resize("ks1", 2, false).await.unwrap();
    master.operation_until("op-1-2", "step", "committed").await;
    let refused = code(cancel("op-1-2").await);
    assert_eq!(refused.0, ErrorCode::FailedPrecondition);
    assert!(refused.1.contains("changed ownership"), "{}", refused.1);
    assert_eq!(
        code(parse(
            within(
                "a refusal",
                master.client.clone().delete_keyspace(v1::KeyspaceRequest { name: "ks1".into() })
            )
            .await
        ))
        .0,
        ErrorCode::FailedPrecondition
    );
    crew.hold_at(None);
    master.operation_until("op-1-2", "state", "done").await;
    master.stop().await;
}

#[tokio::test]
async fn of_two_masters_the_one_that_loses_adopts_what_the_other_did() {
    let (first, _crew) = cluster("memory://grow-two-masters", 1).await;
    // The second learns of version 1 at its start, then the first goes far ahead.
    let second = TestMaster::start("memory://grow-two-masters").await;
    let _spare = Crew::start(&second.url, [5]);
    eventually("a node", async || {
        (second.status().await["nodes"].as_array()?.len() == 2).then_some(())
    })
    .await;
    first.resize("ks1", 2, false).await.unwrap();
    first.operation_until("op-1-1", "state", "done").await;
    assert_eq!(second.describe("ks1").await.unwrap()["shards"], 1, "nobody told the second");

    // Its write loses against the first's version 2; from that tip, growing to 2 shards is no
    // change.
    let lost = code(second.resize("ks1", 2, false).await);
    assert_eq!(lost.0, ErrorCode::InvalidArgument, "{}", lost.1);
    assert!(lost.1.contains("already has 2 shards"), "{}", lost.1);
    assert_eq!(second.describe("ks1").await.unwrap()["epoch"], 2);

    // The name is taken for both masters, and the second finds a keyspace of the first.
    first.create("ks2", 1).await.unwrap();
    assert_eq!(code(second.create("ks2", 1).await).0, ErrorCode::AlreadyExists);
    assert_eq!(second.describe("ks2").await.unwrap()["name"], "ks2");

    // Both masters change the same keyspace at once: one version wins, the other request gets an
    // error.
    let (a, b) = tokio::join!(first.resize("ks1", 3, false), second.resize("ks1", 3, false));
    assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1, "{a:?} {b:?}");
    first.stop().await;
    second.stop().await;
}
