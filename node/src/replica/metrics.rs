//! What a writer tells the meter.

use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::metrics::{Counter, Histogram};

struct Instruments {
    groups: Counter<u64>,
    writes: Counter<u64>,
    sync_seconds: Histogram<f64>,
}

fn instruments() -> &'static Instruments {
    static INSTRUMENTS: OnceLock<Instruments> = OnceLock::new();
    INSTRUMENTS.get_or_init(|| {
        let meter = opentelemetry::global::meter("vasto-node");
        Instruments {
            groups: meter.u64_counter("vasto_group_commits").with_description("Group commits of all replicas").build(),
            writes: meter.u64_counter("vasto_writes").with_description("Write requests committed").build(),
            sync_seconds: meter
                .f64_histogram("vasto_log_sync")
                .with_unit("s")
                .with_boundaries(vec![0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0])
                .with_description("Duration of log syncs")
                .build(),
        }
    })
}

/// A group commit of this many requests.
pub(super) fn group(requests: usize) {
    if requests > 0 {
        instruments().groups.add(1, &[]);
        instruments().writes.add(requests as u64, &[]);
    }
}

/// A sync of the log took this long.
pub(super) fn sync(duration: Duration) {
    instruments().sync_seconds.record(duration.as_secs_f64(), &[]);
}
