//! Bulk work yields to the foreground: four times a second the times of the requests are compared
//! with their calm (`calm`), and the gate of bulk work gets its bound (`control`).
//!
//! **Invariant:** nothing here is waited for: without it, or when it ends, bulk work is free.

mod calm;
mod control;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use tokio_util::sync::CancellationToken;

use crate::bulk::{Bound, BulkGate};
use crate::foreground::{CLASSES, Class, Latencies};
use crate::registry::NodeRegistry;
use control::{Control, Sample, TICK};

/// Interval of the samples while all replicas are idle.
const TICK_AT_REST: Duration = Duration::from_secs(1);

/// What the metrics show, microseconds; 0 while that is not known.
#[derive(Default)]
struct Shown {
    p99: [AtomicU64; CLASSES],
    calm: [AtomicU64; CLASSES],
}

/// Bounds the bulk work of one node.
pub(crate) struct Yielding {
    gate: Arc<BulkGate>,
    latencies: &'static Latencies,
    control: Control,
    began: Instant,
    shown: Arc<Shown>,
}

impl Yielding {
    /// Creates it with the multiple of its calm that a request may take while bulk work passes;
    /// `None` for 0: bulk work yields to nobody then.
    pub(crate) fn new(
        gate: Arc<BulkGate>,
        latencies: &'static Latencies,
        factor: f64,
    ) -> Option<Self> {
        (factor > 0.0).then(|| Self {
            gate,
            latencies,
            control: Control::new(factor),
            began: Instant::now(),
            shown: Arc::default(),
        })
    }

    /// Takes a sample and sets the bound.
    fn tick(&mut self, now: Instant) {
        let sample = Sample {
            at: now.saturating_duration_since(self.began),
            requests: self.latencies.counts(),
            bulk: self.gate.look(now),
        };
        self.gate.set_bound(self.control.next(&sample), now);
        let us = |time: Option<Duration>| time.map_or(0, |time| time.as_micros() as u64);
        for (at, class) in self.control.classes.iter().enumerate() {
            self.shown.p99[at].store(us(class.p99()), Ordering::Relaxed);
            self.shown.calm[at].store(us(class.calm()), Ordering::Relaxed);
        }
    }

    /// Registers the bound and the times of requests, to be read at each export.
    pub(crate) fn observe(&self, labels: &[KeyValue]) {
        let meter = opentelemetry::global::meter("vasto-node");
        let (gate, own) = (Arc::downgrade(&self.gate), labels.to_vec());
        meter
            .u64_observable_gauge("vasto_bulk_bound")
            .with_unit("By")
            .with_description(
                "Bytes a second that requests leave to bulk work, by lane: files or rows; absent while they leave all",
            )
            .with_callback(move |observer| {
                let Some(gate) = gate.upgrade() else { return };
                for (lane, rate) in gate.rates_left() {
                    let Some(rate) = rate else { continue };
                    observer.observe(rate, &with(&own, "lane", lane));
                }
            })
            .build();
        let (shown, own) = (Arc::downgrade(&self.shown), labels.to_vec());
        meter
            .f64_observable_gauge("vasto_request_p99")
            .with_unit("s")
            .with_description("99th percentile of the times of requests of late, by class")
            .with_callback(move |observer| {
                let Some(shown) = shown.upgrade() else { return };
                for (seconds, class) in known(&shown.p99) {
                    observer.observe(seconds, &with(&own, "class", class.name()));
                }
            })
            .build();
        let (shown, own) = (Arc::downgrade(&self.shown), labels.to_vec());
        meter
            .f64_observable_gauge("vasto_request_calm")
            .with_unit("s")
            .with_description("The same percentile while no bulk work passes")
            .with_callback(move |observer| {
                let Some(shown) = shown.upgrade() else { return };
                for (seconds, class) in known(&shown.calm) {
                    observer.observe(seconds, &with(&own, "class", class.name()));
                }
            })
            .build();
    }
}

impl Drop for Yielding {
    fn drop(&mut self) {
        self.gate.set_bound(Bound::Free, Instant::now());
    }
}

fn with(labels: &[KeyValue], name: &'static str, value: &'static str) -> Vec<KeyValue> {
    labels.iter().cloned().chain([KeyValue::new(name, value)]).collect()
}

/// Returns the times that are known, in seconds.
fn known(times: &[AtomicU64; CLASSES]) -> impl Iterator<Item = (f64, Class)> + '_ {
    let seconds = times.iter().map(|us| us.load(Ordering::Relaxed) as f64 / 1e6);
    seconds.zip(Class::ALL).filter(|(seconds, _)| *seconds > 0.0)
}

/// Runs until `cancel` fires.
pub(crate) async fn run(
    yielding: Option<Yielding>,
    registry: Arc<NodeRegistry>,
    cancel: CancellationToken,
) {
    let Some(mut yielding) = yielding else { return };
    loop {
        let tick = if registry.is_at_rest() { TICK_AT_REST } else { TICK };
        if cancel.run_until_cancelled(tokio::time::sleep(tick)).await.is_none() {
            return;
        }
        yielding.tick(Instant::now());
    }
}
