//! The master's own metrics, through the global OpenTelemetry meter.
//!
//! `vasto_master_nodes{state}`, `vasto_master_plan_step{keyspace}` (0 none, 1 prepare, 2 tail,
//! 3 sealing, 4 committed), `vasto_catalog_writes{result}` and `vasto_primary_moves{why}` (the
//! Prometheus exporter adds `_total`). Requests to the bucket are in [`vasto_shipping::metrics`].

use std::sync::{Arc, Weak};

use opentelemetry::KeyValue;
use opentelemetry::metrics::Counter;
use vasto_core::plan::Step;
use vasto_core::reconcile::LeadershipChanges;

use crate::cluster::Cluster;

/// The counters that are written to; the meter holds the observed instruments.
pub(crate) struct Metrics {
    catalog_writes: Counter<u64>,
    primary_moves: Counter<u64>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let meter = opentelemetry::global::meter("vasto-master");
        let catalog_writes = meter
            .u64_counter("vasto_catalog_writes")
            .with_description("Catalog versions that this master tried to write, by result: won, lost or failed")
            .build();
        let primary_moves = meter
            .u64_counter("vasto_primary_moves")
            .with_description("Primaries that changed, by why: failover (the node was gone) or handover (planned)")
            .build();
        Self { catalog_writes, primary_moves }
    }

    pub(crate) fn primaries_moved(&self, changes: LeadershipChanges) {
        self.primary_moves.add(changes.failovers, &[KeyValue::new("why", "failover")]);
        self.primary_moves.add(changes.handovers, &[KeyValue::new("why", "handover")]);
    }

    pub(crate) fn catalog_write(&self, result: &'static str) {
        self.catalog_writes.add(1, &[KeyValue::new("result", result)]);
    }
}

/// Registers the instruments that are observed on demand. Only a weak handle is kept: a stopped master
/// reports nothing.
pub(crate) fn observe(cluster: &Arc<Cluster>) {
    vasto_shipping::metrics::observe(&cluster.bucket, &[KeyValue::new("role", "master")]);
    let meter = opentelemetry::global::meter("vasto-master");
    let weak = Arc::downgrade(cluster);
    meter
        .u64_observable_gauge("vasto_master_nodes")
        .with_description("Nodes that registered since the master started, by state: live or away")
        .with_callback(move |observer| {
            let Some(cluster) = running(&weak) else { return };
            let (live, all) = {
                let state = cluster.state();
                (state.nodes.values().filter(|node| node.session.is_some()).count(), state.nodes.len())
            };
            observer.observe(live as u64, &[KeyValue::new("state", "live")]);
            observer.observe((all - live) as u64, &[KeyValue::new("state", "away")]);
        })
        .build();
    let weak = Arc::downgrade(cluster);
    meter
        .u64_observable_gauge("vasto_master_plan_step")
        .with_description("Step of the running plan: 0 none, 1 prepare, 2 tail, 3 sealing, 4 committed")
        .with_callback(move |observer| {
            let Some(cluster) = running(&weak) else { return };
            let steps: Vec<(String, u64)> = {
                let state = cluster.state();
                let step = |step: Step| match step {
                    Step::Prepare => 1,
                    Step::Tail => 2,
                    Step::Sealing => 3,
                    Step::Committed => 4,
                };
                let steps = state.active().map(|known| {
                    (known.catalog.name.clone(), known.catalog.plan.as_ref().map_or(0, |plan| step(plan.step)))
                });
                steps.collect()
            };
            for (keyspace, step) in steps {
                observer.observe(step, &[KeyValue::new("keyspace", keyspace)]);
            }
        })
        .build();
}

fn running(weak: &Weak<Cluster>) -> Option<Arc<Cluster>> {
    weak.upgrade().filter(|cluster| !cluster.shutdown.is_cancelled())
}
