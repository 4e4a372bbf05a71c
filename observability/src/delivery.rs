//! The last station of telemetry before its collector: the spans of whole operations take their
//! place in their traces, and what does not arrive is logged, at most one line a minute.
//!
//! **Invariant:** the results of the exporters reach the SDK unchanged.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use opentelemetry::trace::{SpanContext, SpanId};
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

/// Lets the span that stands for a whole operation take the place of its parent: the parent's id is
/// derived from the operation, and the SDK gives every span one of its own.
fn with_roots(mut batch: Vec<SpanData>) -> Vec<SpanData> {
    for span in &mut batch {
        let mark = span.attributes.iter().position(|one| one.key.as_str() == vasto_trace::IS_ROOT);
        let Some(mark) = mark else { continue };
        span.attributes.remove(mark);
        let own = span.span_context.clone();
        let id = std::mem::replace(&mut span.parent_span_id, SpanId::INVALID);
        span.parent_span_is_remote = false;
        span.span_context = SpanContext::new(
            own.trace_id(),
            id,
            own.trace_flags(),
            false,
            own.trace_state().clone(),
        );
    }
    batch
}

impl<E: SpanExporter> SpanExporter for CountedExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(with_roots(batch)).await;
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
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use opentelemetry::{
        Context, KeyValue,
        trace::{
            Span as _, SpanBuilder, TraceContextExt as _, TraceFlags, TraceId, TraceState,
            Tracer as _, TracerProvider as _,
        },
    };
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    #[test]
    fn the_span_of_a_whole_operation_becomes_the_parent_of_the_others() {
        let kept = Kept::default();
        let exporter = CountedExporter::new(kept.clone(), "traces", "http://nowhere");
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter).build();
        let (trace, root) = (TraceId::from(7u128), SpanId::from(9u64));
        let parent =
            SpanContext::new(trace, root, TraceFlags::SAMPLED, true, TraceState::default());
        let parent = Context::new().with_remote_span_context(parent);
        for name in ["step", "whole"] {
            let marks = (name == "whole").then(|| KeyValue::new(vasto_trace::IS_ROOT, true));
            let attributes = marks.into_iter().chain([KeyValue::new("other", 1i64)]);
            let span = SpanBuilder::from_name(name).with_attributes(attributes);
            provider.tracer("test").build_with_context(span, &parent).end();
        }
        let spans = kept.0.lock().unwrap().clone();
        let [step, whole] = &spans[..] else { panic!("{spans:?}") };
        assert_eq!((step.parent_span_id, step.span_context.trace_id()), (root, trace));
        assert_eq!((whole.span_context.span_id(), whole.span_context.trace_id()), (root, trace));
        assert_eq!(whole.parent_span_id, SpanId::INVALID);
        assert_eq!(whole.attributes, [KeyValue::new("other", 1i64)]);
        assert_ne!(step.span_context.span_id(), root);
    }

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
