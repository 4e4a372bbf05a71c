//! The master's own counters, through the global OpenTelemetry meter:
//! `vasto_catalog_writes{result}` and `vasto_primary_moves{why}` (the Prometheus exporter adds
//! `_total`).

use opentelemetry::KeyValue;
use opentelemetry::metrics::Counter;
use vasto_core::reconcile::LeadershipChanges;

/// The counters.
pub(crate) struct Metrics {
    catalog_writes: Counter<u64>,
    primary_moves: Counter<u64>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let meter = opentelemetry::global::meter("vasto-master");
        let catalog_writes = meter
            .u64_counter("vasto_catalog_writes")
            .with_description(
                "Catalog versions that this master tried to write, by result: won, lost or failed",
            )
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
