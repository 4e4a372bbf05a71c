//! The instruments that the exporter reads from the state, through the global OpenTelemetry meter:
//! `vasto_master_nodes{state}`, `vasto_master_plan_step{keyspace}` (0 none, 1 prepare, 2 tail, 3
//! sealing, 4 committed), `vasto_master_plans_stuck`. Requests to the bucket are in [`vasto_shipping::metrics`].
//!
//! **Invariant:** a stopped master reports nothing.

use std::sync::{Arc, Weak};

use opentelemetry::KeyValue;
use vasto_core::plan::Step;

use crate::cluster::Cluster;

/// Registers the instruments that are observed on demand. Only a weak handle is kept: a stopped
/// master reports nothing.
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
                (state.live().count(), state.nodes.len())
            };
            observer.observe(live as u64, &[KeyValue::new("state", "live")]);
            observer.observe((all - live) as u64, &[KeyValue::new("state", "away")]);
        })
        .build();
    let weak = Arc::downgrade(cluster);
    meter
        .u64_observable_gauge("vasto_master_plan_step")
        .with_description(
            "Step of the running plan: 0 none, 1 prepare, 2 tail, 3 sealing, 4 committed",
        )
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
                let steps = state.active().map(|keyspace| {
                    (
                        keyspace.catalog.name.clone(),
                        keyspace.catalog.plan.as_ref().map_or(0, |plan| step(plan.step)),
                    )
                });
                steps.collect()
            };
            for (keyspace, step) in steps {
                observer.observe(step, &[KeyValue::new("keyspace", keyspace)]);
            }
        })
        .build();
    let weak = Arc::downgrade(cluster);
    meter
        .u64_observable_gauge("vasto_master_plans_stuck")
        .with_description(
            "Running operations that do not go on; `vasto cluster status` says why and what to do",
        )
        .with_callback(move |observer| {
            let Some(cluster) = running(&weak) else { return };
            let stuck = cluster.state().stuck();
            observer.observe(stuck as u64, &[]);
        })
        .build();
}

fn running(weak: &Weak<Cluster>) -> Option<Arc<Cluster>> {
    weak.upgrade().filter(|cluster| !cluster.shutdown.is_cancelled())
}
