//! Logs whether telemetry reaches its collector: a collector that is away costs one line a minute.
//!
//! **Invariant:** the results of the exporters reach the SDK unchanged.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    metrics::{Temporality, data::ResourceMetrics, exporter::PushMetricExporter},
    trace::{SpanData, SpanExporter},
};

/// Interval between warnings about a collector that stays away.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// An exporter whose failures are logged.
#[derive(Debug)]
pub(crate) struct CountedExporter<E> {
    inner: E,
    what: &'static str,
    endpoint: String,
    failures: Mutex<Failures>,
}

#[derive(Debug, Default)]
struct Failures {
    /// Failures since the last delivery.
    count: u64,
    told: Option<Instant>,
}

/// The line to log after an export.
#[derive(Debug, PartialEq, Eq)]
enum Say {
    Nothing,
    /// This many exports in a row have failed.
    Failing(u64),
    /// An export succeeded after this many failures.
    Delivered(u64),
}

impl Failures {
    fn add(&mut self, failed: bool, now: Instant) -> Say {
        if !failed {
            let before = std::mem::take(self);
            return if before.count > 0 { Say::Delivered(before.count) } else { Say::Nothing };
        }
        self.count += 1;
        if self.told.is_some_and(|told| now.duration_since(told) < TOLD_EVERY) {
            return Say::Nothing;
        }
        self.told = Some(now);
        Say::Failing(self.count)
    }
}

impl<E> CountedExporter<E> {
    pub(crate) fn new(inner: E, what: &'static str, endpoint: &str) -> CountedExporter<E> {
        CountedExporter { inner, what, endpoint: endpoint.to_owned(), failures: Mutex::default() }
    }

    fn tell(&self, result: &OTelSdkResult) {
        let mut failures = self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let say = failures.add(result.is_err(), Instant::now());
        drop(failures);
        let (what, endpoint) = (self.what, &self.endpoint);
        match (say, result) {
            (Say::Failing(failed), Err(error)) => tracing::warn!(
                %endpoint, failed, %error,
                "{what} do not reach the OTLP collector; is it running, and is OTEL_EXPORTER_OTLP_ENDPOINT its address?"
            ),
            (Say::Delivered(failed), _) => {
                tracing::info!(%endpoint, failed, "{what} reach the OTLP collector again")
            }
            _ => {}
        }
    }
}

impl<E: SpanExporter> SpanExporter for CountedExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        self.tell(&result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for CountedExporter<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        let result = self.inner.export(metrics).await;
        self.tell(&result);
        result
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_that_is_away_is_told_once_a_minute_and_so_is_its_return() {
        let mut failures = Failures::default();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(failures.add(false, at(0)), Say::Nothing);
        assert_eq!(failures.add(true, at(1)), Say::Failing(1));
        for second in 2..61 {
            assert_eq!(failures.add(true, at(second)), Say::Nothing);
        }
        assert_eq!(failures.add(true, at(61)), Say::Failing(61));
        assert_eq!(failures.add(false, at(62)), Say::Delivered(61));
        assert_eq!(failures.add(false, at(63)), Say::Nothing);
        assert_eq!(failures.add(true, at(64)), Say::Failing(1));
    }
}
