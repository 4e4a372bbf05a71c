//! Tests of the JSON documents.

#![allow(clippy::unwrap_used)]
use super::cost::cost;
use super::drain::drain;
use super::estimate::{Asked, ShardsOrNode, estimate};
use super::keyspace::{describe, summary};
use super::operation::{OperationDoc, operations};
use super::status::{check, cluster};
use super::*;
use crate::forecast::resize::resize;
use crate::forecast::time::Paces;
use crate::state::tests::{copy_in_tail, replica_report, two_nodes};
use crate::state::{ClusterState, Delivery, Keyspace};
use serde_json::{Value, json as value};
use vasto_core::catalog::{NodeDrain, Quarantine, RetiredReplica};
use vasto_core::ids::{KeyspaceId, NodeId, PlanId, ShardId};
use vasto_core::operation::{OperationKind, OperationOutcome, operation_id};
use vasto_core::reconcile::start_resize;
use vasto_core::report::{ReplicaPhase, ReplicaReport, TargetProgress};
use vasto_proto::v1;
use vasto_shipping::{Prices, Usage};

const KS: KeyspaceId = KeyspaceId(1);

fn parsed(document: &impl Serialize) -> Value {
    serde_json::from_str(&json(document)).unwrap()
}

fn keys(document: &Value) -> Vec<&str> {
    document.as_object().unwrap().keys().map(String::as_str).collect()
}

fn has(document: &Value, fields: &[&str]) {
    for field in fields {
        assert!(
            document.get(field).is_some(),
            "`{field}` is promised and missing in {:?}",
            keys(document)
        );
    }
}

#[test]
fn describe_has_what_the_interface_promises() {
    let (mut state, first, _) = two_nodes();
    state.report(NodeId(1), first, &v1::Report::default(), vec![replica_report(1, 1)], 20);
    let document = parsed(&describe(&state, &state.keyspaces[&KS]));
    has(
        &document,
        &["name", "shards", "replicas", "epoch", "ack", "state", "placement", "operation"],
    );
    has(&document, &["keyspace_id", "version", "quarantines"]);
    assert_eq!(
        document["placement"][0],
        value!({"shard": 0, "replicas": [{
            "node_id": "n-0000000000000001", "replica_id": 1, "role": "primary", "state": "serving", "lsn": 100,
            "shipped_lsn": 90, "lag_ms": 0, "keys": 1000, "keys_estimate": 1000, "bytes": 1 << 20,
        }]})
    );
    let silent = &document["placement"][1]["replicas"][0];
    assert_eq!(
        (&silent["state"], &silent["keys"]),
        (&value!("unknown"), &Value::Null),
        "nothing is made up"
    );
    assert_eq!(
        (&document["ack"], &document["state"], &document["operation"]),
        (&value!("fsync"), &value!("active"), &Value::Null)
    );
}

#[test]
fn retired_replicas_are_shown_while_there_are_any() {
    let (mut state, first, _) = two_nodes();
    state.report(NodeId(1), first, &v1::Report::default(), vec![replica_report(1, 1)], 20);
    let shown = |state: &ClusterState| {
        let keyspace = &state.keyspaces[&KS];
        (parsed(&describe(state, keyspace)), parsed(&summary(keyspace)))
    };
    let (described, line) = shown(&state);
    assert_eq!((described.get("retired"), line.get("retired_replicas")), (None, None));
    let mut one = state.keyspaces[&KS].catalog.next(2_000, 2);
    let shard = one.placement.pop().unwrap();
    one.retired.push(RetiredReplica {
        shard: shard.shard,
        replica: shard.replicas[0].replica,
        node: NodeId(2),
        plan: PlanId(1),
    });
    one.quarantines.push(Quarantine {
        plan: PlanId(1),
        range: one.owned_bands(),
        replicas: vec![shard.replicas[0].replica],
        targets: Vec::new(),
        others: Vec::new(),
        sources: Vec::new(),
        until_us: 9_000,
        dropping: false,
    });
    state.install(one, Delivery::Push);
    let (described, line) = shown(&state);
    let retired = value!({"shard": 1, "replica_id": 2, "node_id": "n-0000000000000002", "bytes": null, "until_us": 9_000});
    assert_eq!(described["retired"], value!([retired]));
    assert_eq!(line["retired_replicas"], 1);
}

#[test]
fn operations_have_what_the_interface_promises() {
    let (mut state, ..) = two_nodes();
    let mut growing =
        start_resize(&state.keyspaces[&KS].catalog, 3, &[vec![NodeId(1)]], 5_000, 2).unwrap();
    growing.operations.push(vasto_core::reconcile::report_of(
        &growing,
        growing.plan.as_ref().unwrap(),
        &Default::default(),
        OperationOutcome::Done,
        None,
        6_000,
    ));
    growing.operations[0].id = operation_id(KS, PlanId(9));
    state.install(growing, Delivery::Push);
    let all = operations(&state.keyspaces[&KS]);
    assert_eq!(all.iter().map(OperationDoc::id).collect::<Vec<_>>(), ["op-1-1", "op-1-9"]);
    let running = parsed(&all[0]);
    has(
        &running,
        &["id", "kind", "keyspace", "from", "to", "state", "step", "waiting_for", "bytes_done"],
    );
    has(&running, &["bytes_total", "keys_moved", "started_at_us"]);
    assert_eq!((&running["state"], &running["step"]), (&value!("running"), &value!("prepare")));
    let done = parsed(&all[1]);
    has(
        &done,
        &["id", "kind", "keyspace", "from", "to", "keys_moved", "bytes_moved", "bytes_from_bucket"],
    );
    has(&done, &["bytes_from_peers", "objects_read", "write_pause_ms", "duration_ms", "state"]);
    has(&done["write_pause_ms"], &["p50", "p99", "max"]);
    assert_eq!(done["state"], "done");
}

#[test]
fn an_estimate_adds_up() {
    let (mut state, first, second) = two_nodes();
    let big = |replica| vasto_core::report::ReplicaReport {
        bytes: 300 << 20,
        ..replica_report(replica, 1)
    };
    state.report(NodeId(1), first, &v1::Report::default(), vec![big(1)], 20);
    state.report(NodeId(2), second, &v1::Report::default(), vec![big(2)], 20);
    let prices = Prices { currency: "EUR".into(), egress_gib: 0.5, ..Prices::default() };
    let Keyspace { catalog, reports, .. } = &state.keyspaces[&KS];
    let forecast = resize(catalog, reports, 3, None, &Paces::of(&state));
    let asked = Asked {
        keyspace: "ks1".into(),
        kind: OperationKind::Grow,
        from: Some(ShardsOrNode::Shards(2)),
        to: Some(ShardsOrNode::Shards(3)),
        refused: None,
    };
    let estimate = parsed(&estimate(&state, asked, &forecast, &prices));
    has(
        &estimate,
        &["keyspace", "from", "to", "moving_fraction", "sources", "requests", "seconds"],
    );
    assert_eq!(estimate["sources"].as_array().unwrap().len(), 2);
    has(&estimate["sources"][0], &["shard", "keys", "bytes", "bytes_to_read"]);
    assert_eq!(estimate["sources"][0]["bytes_to_read"], 100 << 20);
    has(&estimate, &["kind", "bytes_moved", "bytes_from_bucket", "disk_needed", "cost", "refused"]);
    has(&estimate["sources"][0], &["node_id"]);
    assert_eq!((&estimate["kind"], &estimate["refused"]), (&value!("grow"), &Value::Null));
    assert_eq!(estimate["bytes_moved"], 200 << 20);
    assert_eq!(estimate["requests"], value!({"get": 2 * (1 + 13), "put": 2 * (2 + 8) + (2 + 25)}));
    // 28 reads and 47 writes, and 200 of 1,024 MiB read at 0.50.
    assert_eq!(estimate["cost"], value!({"currency": "EUR", "amount": 0.097902}));
    // Beside 0.6 s, a fifth of 300 MiB is shipped first; 200 MiB are read, rewritten and shipped.
    assert_eq!(estimate["seconds"], 5.4);
}

#[test]
fn a_drain_counts_the_bytes_of_its_own_copies_and_not_those_of_a_repair() {
    let (mut state, _, second) = two_nodes();
    let leaving = NodeDrain::new(NodeId(1), false, 20);
    for (wanted, bytes) in [(2, 0), (1, 100)] {
        // With two wanted, the shard lacks a replica whether or not the node is drained.
        let mut next = state.keyspaces[&KS].catalog.next(30, 2);
        next.spec.replicas = wanted;
        next.draining_nodes = vec![leaving.clone()];
        next.plan = Some(copy_in_tail(&next, 7, 3, 30));
        let version = next.version.0;
        state.install(next, Delivery::Push);
        let progress = TargetProgress { bytes_total: 100, ..TargetProgress::new(PlanId(7)) };
        let report = ReplicaReport {
            shard: ShardId(0),
            target: Some(progress),
            ..replica_report(3, version)
        };
        state.report(NodeId(2), second, &v1::Report::default(), vec![report], 40);
        let shown = parsed(&drain(&state, &leaving.operation_id(), 50).unwrap());
        assert_eq!(shown["bytes_total"], bytes, "{shown}");
    }
}

#[test]
fn the_cluster_warns_of_what_a_person_must_look_at() {
    let (mut state, first, second) = two_nodes();
    let report = v1::Report { disk_used: 1 << 40, disk_free: 1 << 20, ..v1::Report::default() };
    state.report(NodeId(1), first, &report, vec![replica_report(1, 1)], 20);
    let broken = vasto_core::report::ReplicaReport {
        phase: ReplicaPhase::Failed("bad record".into()),
        ..replica_report(2, 1)
    };
    state.report(NodeId(2), second, &v1::Report::default(), vec![broken], 20);
    let status = |state: &ClusterState| {
        let own = Usage::default();
        let bill = cost(state, own, None, &Default::default(), "memory://x", 5_000_010);
        parsed(&cluster(state, "c-1".into(), "memory://x", own, bill, Vec::new(), 5_000_010))
    };
    let document = status(&state);
    has(&document, &["cluster_id", "term", "nodes", "keyspaces", "warnings", "master", "bill"]);
    has(
        &document["bill"],
        &["currency", "per_month", "processes", "measured_s", "stored_bytes", "note"],
    );
    has(&document["bill"]["per_month"], &["requests", "storage", "egress", "total"]);
    for process in [&document["nodes"][0], &document["master"]] {
        let counts = &process["bucket_requests"];
        has(
            counts,
            &["get", "put", "list", "head", "delete", "bytes_read", "bytes_written", "elapsed_s"],
        );
    }
    has(
        &document["nodes"][0],
        &["node_id", "address", "zone", "state", "disk_used", "disk_free", "bucket_requests"],
    );
    let warnings = |document: &Value| -> Vec<String> {
        document["warnings"]
            .as_array()
            .unwrap()
            .iter()
            .map(|text| text.as_str().unwrap().to_owned())
            .collect()
    };
    let said = warnings(&document);
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("n-0000000000000001") && said[0].contains("disk"));
    assert!(said[1].contains("bad record"));

    state.disconnect(NodeId(1), first, 10);
    let away = status(&state);
    assert_eq!(away["nodes"][0]["state"], "away");
    let said = warnings(&away);
    assert!(said[0].contains("away for 5 s"), "{said:?}");
    assert_eq!(said.iter().filter(|text| text.contains("away")).count(), 1, "{said:?}");
}

#[test]
fn a_check_has_a_finding_for_each_warning_and_for_each_check_without_one() {
    let well = parsed(&check(&ClusterState::default(), Vec::new(), 20));
    assert_eq!(well["ok"], true);
    let findings = well["findings"].as_array().unwrap();
    let checks: Vec<&str> =
        findings.iter().map(|finding| finding["check"].as_str().unwrap()).collect();
    assert_eq!(checks, ["bucket", "nodes", "shards", "shipping", "replicas", "operations"]);
    assert!(findings.iter().all(|finding| finding["ok"] == true));

    // A running operation that a node which is away holds up.
    let (mut state, first, second) = two_nodes();
    let growing =
        start_resize(&state.keyspaces[&KS].catalog, 3, &[vec![NodeId(1)]], 5_000, 2).unwrap();
    state.install(growing, Delivery::Push);
    for (node, session, replica) in [(1, first, 1), (2, second, 2)] {
        let replicas = vec![replica_report(replica, 2)];
        state.report(NodeId(node), session, &v1::Report::default(), replicas, 20);
    }
    state.observe(20, None);
    state.disconnect(NodeId(2), second, 30);
    state.observe(9_000_000, None);
    let bad = parsed(&check(&state, vec!["the bucket is odd".into()], 9_000_000));
    assert_eq!(bad["ok"], false);
    let of = |check: &str| -> Vec<String> {
        let findings = bad["findings"].as_array().unwrap().iter();
        let of_check = findings.filter(|finding| finding["check"] == check);
        of_check.map(|finding| finding["message"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(of("bucket"), ["the bucket is odd"]);
    assert!(of("nodes")[0].contains("has been away for 8 s"), "{:?}", of("nodes"));
    assert!(of("shards")[0].contains("shard 1 of ks1"), "{:?}", of("shards"));
    let held_up = of("operations");
    assert!(
        held_up[0].starts_with(
            "operation op-1-1 on ks1 has not gone on for 8 s: n-0000000000000002 is away"
        ),
        "{held_up:?}"
    );
    assert_eq!(of("shipping"), ["nothing to warn of"]);
}

#[test]
fn hundreds_of_warnings_of_a_kind_are_told_as_a_few_and_a_number() {
    let (mut state, ..) = two_nodes();
    let spec = vasto_core::catalog::KeyspaceSpec { replicas: 2, ..Default::default() };
    for id in 2..=200 {
        let (id, name, nodes) = (KeyspaceId(id), format!("ks{id}"), [vec![NodeId(1)]]);
        let catalog =
            vasto_core::catalog::Catalog::first(id, &name, spec.clone(), &nodes, 1_000, 1);
        state.install(catalog, Delivery::Push);
    }
    let bad = parsed(&check(&state, Vec::new(), 20));
    let findings = bad["findings"].as_array().unwrap();
    let texts: Vec<&str> =
        findings.iter().map(|finding| finding["message"].as_str().unwrap()).collect();
    let lack = texts.iter().filter(|text| text.contains("has 1 of 2 replicas")).count();
    assert_eq!((bad["ok"].as_bool(), lack), (Some(false), 20));
    assert!(texts.iter().any(|text| text.contains("and 179 more warnings")), "{texts:?}");
    assert!(texts.len() < 60, "{}", texts.len());
}
