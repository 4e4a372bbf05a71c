//! Metrics that a writer records.

use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram};

struct Instruments {
    groups: Counter<u64>,
    writes: Counter<u64>,
    sync_seconds: Histogram<f64>,
    sync_errors: Counter<u64>,
    replicated: Counter<u64>,
    conflicts: Counter<u64>,
    given_away: Counter<u64>,
    ahead: Counter<u64>,
    refused_times: Counter<u64>,
    throttled: Counter<f64>,
}

fn instruments() -> &'static Instruments {
    static INSTRUMENTS: OnceLock<Instruments> = OnceLock::new();
    INSTRUMENTS.get_or_init(|| {
        let meter = opentelemetry::global::meter("vasto-node");
        Instruments {
            groups: meter
                .u64_counter("vasto_group_commits")
                .with_description("Group commits of all replicas")
                .build(),
            writes: meter
                .u64_counter("vasto_writes")
                .with_description("Write requests committed")
                .build(),
            sync_errors: meter
                .u64_counter("vasto_log_sync_errors")
                .with_description("Syncs of a log that failed; each closes its replica to writes")
                .build(),
            replicated: meter
                .u64_counter("vasto_replicated_records")
                .with_description("Records taken from other replicas")
                .build(),
            conflicts: meter
                .u64_counter("vasto_conflicts")
                .with_description("Entries of other replicas that met another entry of their key")
                .build(),
            given_away: meter
                .u64_counter("vasto_given_away_entries")
                .with_description(
                    "Entries of other replicas for bands that were given away already",
                )
                .build(),
            ahead: meter
                .u64_counter("vasto_event_times_ahead")
                .with_description("Entries of other replicas that are too far ahead of the clock")
                .build(),
            refused_times: meter
                .u64_counter("vasto_refused_event_times")
                .with_description("Writes of clients refused because of their event time")
                .build(),
            throttled: meter
                .f64_counter("vasto_writes_throttled")
                .with_unit("s")
                .with_description(
                    "Time for which writes of moving keys were held back so that a plan catches up",
                )
                .build(),
            sync_seconds: meter
                .f64_histogram("vasto_log_sync")
                .with_unit("s")
                .with_boundaries(vec![
                    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0,
                ])
                .with_description("Duration of log syncs")
                .build(),
        }
    })
}

/// Counts a group commit of this many requests.
pub(super) fn group(requests: usize) {
    if requests > 0 {
        instruments().groups.add(1, &[]);
        instruments().writes.add(requests as u64, &[]);
    }
}

/// Records the duration of a log sync.
pub(super) fn sync(duration: Duration) {
    instruments().sync_seconds.record(duration.as_secs_f64(), &[]);
}

/// Counts a failed log sync.
pub(super) fn sync_error() {
    instruments().sync_errors.add(1, &[]);
}

/// Counts records taken from other replicas.
pub(super) fn replicated(records: u64) {
    instruments().replicated.add(records, &[]);
}

/// Counts an entry of another replica that met a different one, and won or lost.
pub(super) fn conflict(won: bool) {
    let winner = if won { "incoming" } else { "stored" };
    instruments().conflicts.add(1, &[KeyValue::new("winner", winner)]);
}

/// Counts an entry of another replica for bands that were given away.
pub(super) fn given_away() {
    instruments().given_away.add(1, &[]);
}

/// Counts an entry of another replica that is too far ahead of the clock.
pub(super) fn event_time_ahead() {
    instruments().ahead.add(1, &[]);
}

/// Counts time for which writes of moving keys were held back.
pub(super) fn throttled(time: Duration) {
    instruments().throttled.add(time.as_secs_f64(), &[]);
}

/// Counts a refused event time of a client.
pub(crate) fn refused_event_time() {
    instruments().refused_times.add(1, &[]);
}
