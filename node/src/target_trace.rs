//! The spans of a target, and what each of them has read.
//!
//! **Invariant:** what a target tells the master that it has read counts in exactly one span: the
//! innermost one that was open then.

use std::fmt::Display;
use std::sync::Arc;

use opentelemetry::Value;
use parking_lot::Mutex;
use vasto_core::report::TargetProgress;
use vasto_trace::{OpenSpan, OperationTrace};

/// What a target has read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Read {
    from_bucket: u64,
    requests: u64,
    from_peers: u64,
}

impl Read {
    fn of(progress: &TargetProgress) -> Self {
        Self {
            from_bucket: progress.bytes_from_bucket,
            requests: progress.objects_read,
            from_peers: progress.bytes_from_peers,
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            from_bucket: self.from_bucket.saturating_sub(before.from_bucket),
            requests: self.requests.saturating_sub(before.requests),
            from_peers: self.from_peers.saturating_sub(before.from_peers),
        }
    }

    fn add(&mut self, more: Self) {
        self.from_bucket += more.from_bucket;
        self.requests += more.requests;
        self.from_peers += more.from_peers;
    }
}

/// The trace of a plan at one of its targets.
#[derive(Debug, Clone)]
pub(crate) struct TargetTrace {
    trace: OperationTrace,
    progress: Arc<Mutex<TargetProgress>>,
    /// What spans that have ended have read.
    counted: Arc<Mutex<Read>>,
}

/// A span of a target whose work goes on.
#[derive(Debug)]
pub(crate) struct TargetSpan {
    of: TargetTrace,
    /// `None` once it has ended.
    span: Option<OpenSpan>,
    /// What the target had read, and spans had counted, when this one began.
    before: (Read, Read),
}

impl TargetTrace {
    /// Creates the trace of a target whose progress the master receives.
    pub(crate) fn new(trace: OperationTrace, progress: Arc<Mutex<TargetProgress>>) -> Self {
        Self { trace, progress, counted: Arc::default() }
    }

    /// Creates a trace of which nothing is exported.
    pub(crate) fn silent() -> Self {
        let progress = TargetProgress::new(Default::default());
        Self::new(OperationTrace::silent(), Arc::new(Mutex::new(progress)))
    }

    /// Returns the span that names the operation in log lines.
    pub(crate) fn log_span(&self) -> tracing::Span {
        self.trace.log_span()
    }

    /// Begins a span.
    pub(crate) fn begin(&self, name: &'static str) -> TargetSpan {
        let read = Read::of(&self.progress.lock());
        TargetSpan {
            of: self.clone(),
            span: Some(self.trace.begin(name)),
            before: (read, *self.counted.lock()),
        }
    }
}

impl TargetSpan {
    /// Says something of the work.
    pub(crate) fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.span {
            span.set(key, value);
        }
    }

    /// Counts something.
    pub(crate) fn count(&mut self, key: &'static str, value: u64) {
        if let Some(span) = &mut self.span {
            span.count(key, value);
        }
    }

    /// Ends the span of work that has succeeded.
    pub(crate) fn done(mut self) {
        if let Some(span) = self.close() {
            span.done();
        }
    }

    /// Ends the span with the result of its work.
    pub(crate) fn end<T, E: Display>(mut self, result: &Result<T, E>) {
        if let Some(span) = self.close() {
            span.end(result);
        }
    }

    /// Counts what was read in this span and in none within it.
    fn close(&mut self) -> Option<OpenSpan> {
        let mut span = self.span.take()?;
        let all = Read::of(&self.of.progress.lock()).since(self.before.0);
        let own = {
            let mut counted = self.of.counted.lock();
            let own = all.since(counted.since(self.before.1));
            counted.add(own);
            own
        };
        span.count("vasto.bytes_from_bucket", own.from_bucket);
        span.count("vasto.requests", own.requests);
        if own.from_peers > 0 {
            span.count("vasto.bytes_from_peers", own.from_peers);
        }
        Some(span)
    }
}

impl Drop for TargetSpan {
    fn drop(&mut self) {
        drop(self.close());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_counts_in_one_span() {
        let trace = TargetTrace::silent();
        let read = |bytes: u64| {
            let mut progress = trace.progress.lock();
            progress.bytes_from_bucket += bytes;
            progress.objects_read += 1;
        };
        let counted = || {
            let counted = *trace.counted.lock();
            (counted.from_bucket, counted.requests)
        };
        read(1);
        let outer = trace.begin("outer");
        read(10);
        let inner = trace.begin("inner");
        read(100);
        inner.done();
        assert_eq!(counted(), (100, 1), "the outer one is open");
        read(1_000);
        drop(trace.begin("empty"));
        assert_eq!(counted(), (100, 1));
        outer.end(&Err::<(), _>("the bucket is away"));
        assert_eq!(counted(), (1_110, 3), "what was read before is not its own");
        let next = trace.begin("next");
        read(10_000);
        drop(next);
        assert_eq!(counted(), (11_110, 4));
    }
}
