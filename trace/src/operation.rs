//! The trace of one operation, and the spans that a process adds to it.
//!
//! **Invariant:** a span that the work ends in the open (it is dropped) is exported as cut off; the
//! length of a span is measured by a clock that does not jump.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{
    Link, Span as _, SpanBuilder, SpanContext, Status, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, KeyValue, Value, global};
use vasto_core::ids::{KeyspaceId, PlanId};
use vasto_core::operation::operation_id;

use crate::ids::root_of;
use crate::{IS_ROOT, LOG_TARGET, is_enabled};

/// Spans of failed work that are exported of one handle and its clones.
const FAILED_MAX: u32 = 16;
/// Spans of one name that are exported once so many have failed: what succeeds is repeated with what
/// fails behind it.
const REPEATED_MAX: u32 = 64;

/// The trace of one operation. Clones share what they count.
#[derive(Debug, Clone)]
pub struct OperationTrace {
    operation: Arc<str>,
    /// `NONE` when nothing is exported.
    root: SpanContext,
    /// What every span says besides its own.
    attributes: Vec<KeyValue>,
    ended: Arc<Mutex<Ended>>,
}

/// The spans of a handle and its clones that have ended.
#[derive(Debug, Default)]
struct Ended {
    /// Those of failed work.
    failed: u32,
    /// By name, those of other work since [`FAILED_MAX`] have failed.
    repeated: BTreeMap<&'static str, u32>,
}

impl Ended {
    /// Counts one more; returns true when it is one too many.
    fn add(&mut self, name: &'static str, failed: bool) -> bool {
        if failed {
            self.failed = self.failed.saturating_add(1);
            return self.failed > FAILED_MAX;
        }
        if self.failed < FAILED_MAX {
            return false;
        }
        let times = self.repeated.entry(name).or_default();
        *times = times.saturating_add(1);
        *times > REPEATED_MAX
    }
}

/// A span that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// What was done.
    pub name: Cow<'static, str>,
    /// Start, microseconds since 1970.
    pub from_us: u64,
    /// End, microseconds since 1970; a clock that was set back meanwhile makes it the start.
    pub to_us: u64,
    /// What there is to say of it.
    pub attributes: Vec<KeyValue>,
    /// Why it failed.
    pub error: Option<String>,
}

impl Past {
    fn time(&self) -> (SystemTime, SystemTime) {
        let at = |us| SystemTime::UNIX_EPOCH + Duration::from_micros(us);
        (at(self.from_us), at(self.to_us.max(self.from_us)))
    }
}

/// Returns the value of an attribute that counts something.
fn counted(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl OperationTrace {
    /// Returns the trace of an operation of a cluster.
    pub fn new(cluster: &str, operation: &str) -> Self {
        Self {
            operation: operation.into(),
            root: root_of(cluster, operation),
            attributes: Vec::new(),
            ended: Arc::default(),
        }
    }

    /// Returns the trace of the operation that is a plan of a keyspace.
    pub fn of_plan(cluster: &str, keyspace: KeyspaceId, plan: PlanId) -> Self {
        Self::new(cluster, &operation_id(keyspace, plan))
    }

    /// Returns a trace of which nothing is exported, for work that is part of no operation.
    pub fn silent() -> Self {
        Self { root: SpanContext::NONE, ..Self::new("", "") }
    }

    /// Lets every span say this, too.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.attributes.push(KeyValue::new(key, value));
        self
    }

    /// Lets every span count this, too.
    #[must_use]
    pub fn with_count(self, key: &'static str, value: u64) -> Self {
        self.with(key, counted(value))
    }

    /// Returns the id of the trace, 32 hexadecimal digits.
    pub fn trace_id(&self) -> String {
        self.root.trace_id().to_string()
    }

    /// Returns a span of the log: every line that is logged inside it names the operation and its
    /// trace, whatever the log filter.
    pub fn log_span(&self) -> tracing::Span {
        if !self.root.is_valid() {
            return tracing::Span::none();
        }
        tracing::error_span!(
            target: LOG_TARGET, "operation",
            operation = &*self.operation, trace_id = %self.root.trace_id()
        )
    }

    /// Begins a span now.
    pub fn begin(&self, name: &'static str) -> OpenSpan {
        self.began(name, Instant::now())
    }

    /// Begins a span that began then.
    pub fn began(&self, name: &'static str, at: Instant) -> OpenSpan {
        let now = opentelemetry::time::now();
        OpenSpan {
            trace: self.clone(),
            name,
            started: now.checked_sub(at.elapsed()).unwrap_or(now),
            began: at,
            attributes: Vec::new(),
            open: true,
        }
    }

    /// Exports a span that is over.
    pub fn add(&self, past: Past) {
        self.export(past.time(), past, Vec::new());
    }

    /// Exports the root span. `part_of` are the operations that this one is a part of.
    pub fn end(&self, mut past: Past, part_of: &[OperationTrace]) {
        past.attributes.push(KeyValue::new(IS_ROOT, true));
        let links = part_of.iter().map(|whole| Link::with_context(whole.root.clone()));
        self.export(past.time(), past, links.collect());
    }

    fn export(&self, (from, to): (SystemTime, SystemTime), past: Past, links: Vec<Link>) {
        if !is_enabled() || !self.root.is_valid() {
            return;
        }
        let Past { name, mut attributes, error, .. } = past;
        attributes.push(KeyValue::new("vasto.operation", self.operation.clone()));
        attributes.extend(self.attributes.iter().cloned());
        let parent = Context::new().with_remote_span_context(self.root.clone());
        let span = SpanBuilder::from_name(name)
            .with_start_time(from)
            .with_attributes(attributes)
            .with_links(links);
        let mut span = global::tracer("vasto").build_with_context(span, &parent);
        span.set_status(error.map_or(Status::Ok, Status::error));
        span.end_with_timestamp(to);
    }
}

/// A span whose work goes on. It is exported when it has ended; dropped before, as cut off.
#[derive(Debug)]
pub struct OpenSpan {
    trace: OperationTrace,
    name: &'static str,
    started: SystemTime,
    began: Instant,
    attributes: Vec<KeyValue>,
    open: bool,
}

impl OpenSpan {
    /// Says something of the work; a number that counts something with [`OpenSpan::count`].
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.attributes.push(KeyValue::new(key, value));
    }

    /// Counts something.
    pub fn count(&mut self, key: &'static str, value: u64) {
        self.set(key, counted(value));
    }

    /// Ends the span of work that has succeeded.
    pub fn done(self) {
        self.done_at(Instant::now());
    }

    /// Ends the span of work that had succeeded then.
    pub fn done_at(mut self, at: Instant) {
        let took = at.saturating_duration_since(self.began);
        self.close(None, took);
    }

    /// Ends the span with the result of its work.
    pub fn end<T, E: Display>(mut self, result: &Result<T, E>) {
        let took = self.began.elapsed();
        self.close(result.as_ref().err().map(ToString::to_string), took);
    }

    fn close(&mut self, error: Option<String>, took: Duration) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let too_many = {
            let mut ended = self.trace.ended.lock().unwrap_or_else(PoisonError::into_inner);
            ended.add(self.name, error.is_some())
        };
        if too_many {
            return;
        }
        let past = Past {
            name: self.name.into(),
            from_us: 0,
            to_us: 0,
            attributes: std::mem::take(&mut self.attributes),
            error,
        };
        let end = self.started.checked_add(took).unwrap_or(self.started);
        self.trace.export((self.started, end), past, Vec::new());
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        self.close(Some("it was cut off".to_owned()), took);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};

    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    impl Kept {
        fn take(&self) -> Vec<SpanData> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    fn value_of(span: &SpanData, key: &str) -> Option<String> {
        let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
        found.map(|attribute| attribute.value.to_string())
    }

    // One test: the provider is the process's.
    #[test]
    fn spans_of_one_operation_are_children_of_its_root_and_bounded_when_they_fail() {
        let trace = OperationTrace::of_plan("c-1", KeyspaceId(4), PlanId(2));
        trace.begin("before anybody receives traces").done();
        let kept = Kept::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build();
        global::set_tracer_provider(provider);
        crate::enable();
        assert!(kept.take().is_empty());
        OperationTrace::silent().begin("of no operation").done();
        assert!(kept.take().is_empty());

        // As another process has it.
        let node = OperationTrace::new("c-1", "op-4-2").with("vasto.node", "n-1");
        let began = Instant::now().checked_sub(Duration::from_millis(250)).unwrap();
        let mut span = node.began("bucket get", began);
        span.count("vasto.bytes_from_bucket", u64::MAX);
        span.end(&Ok::<_, String>(()));
        drop(node.begin("left alone"));
        let ended = began.checked_add(Duration::from_millis(100)).unwrap();
        node.began("over since", began).done_at(ended);
        for _ in 0..100 {
            node.begin("before").done();
            node.clone().begin("again").end(&Err::<(), _>("the bucket is away"));
        }
        node.begin("at last").done();
        let spans = kept.take();
        let parent = root_of("c-1", "op-4-2");
        for span in &spans {
            assert_eq!(span.span_context.trace_id(), parent.trace_id(), "{span:?}");
            assert_eq!(span.parent_span_id, parent.span_id(), "{span:?}");
            assert_eq!(value_of(span, "vasto.operation").unwrap(), "op-4-2");
            assert_eq!(value_of(span, "vasto.node").unwrap(), "n-1");
        }
        let first = &spans[0];
        assert_eq!((first.name.as_ref(), &first.status), ("bucket get", &Status::Ok));
        assert_eq!(value_of(first, "vasto.bytes_from_bucket").unwrap(), i64::MAX.to_string());
        let took = first.end_time.duration_since(first.start_time).unwrap();
        assert!(took >= Duration::from_millis(250) && took < Duration::from_secs(60), "{took:?}");
        assert_eq!(spans[1].status, Status::error("it was cut off"));
        let took = spans[2].end_time.duration_since(spans[2].start_time).unwrap();
        assert_eq!(took, Duration::from_millis(100), "it ended before it was exported");
        let times = |name: &str| spans.iter().filter(|span| span.name == name).count() as u32;
        assert_eq!(times("again"), FAILED_MAX - 1, "one more was cut off");
        assert_eq!(times("before"), FAILED_MAX - 1 + REPEATED_MAX, "what fails comes behind it");
        assert_eq!(spans.last().unwrap().name, "at last");

        let whole = OperationTrace::new("c-1", "rebalance-9");
        let past = |error: Option<&str>| Past {
            name: "operation grow".into(),
            from_us: 2_000_000,
            to_us: 1_000_000,
            attributes: Vec::new(),
            error: error.map(str::to_owned),
        };
        trace.add(past(None));
        trace.end(past(Some("cancelled by an administrator")), std::slice::from_ref(&whole));
        let spans = kept.take();
        assert_eq!(spans.len(), 2);
        assert_eq!(spans[0].end_time, spans[0].start_time, "the clock was set back");
        assert_eq!(value_of(&spans[0], IS_ROOT), None);
        assert_eq!(value_of(&spans[1], IS_ROOT).unwrap(), "true");
        assert_eq!(spans[1].status, Status::error("cancelled by an administrator"));
        let links: Vec<String> =
            spans[1].links.iter().map(|link| link.span_context.trace_id().to_string()).collect();
        assert_eq!(links, [whole.trace_id()]);
        assert_eq!(spans[1].span_context.trace_id().to_string(), trace.trace_id());
    }
}
