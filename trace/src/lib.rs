//! One trace for each operation: across the master, its sources, its targets and their calls of the
//! bucket.
//!
//! Nothing is passed along between processes. The ids of a trace and of its root span are hashes of
//! the cluster and the operation, which every process knows: a master that goes on with an operation
//! goes on with its trace, and so does a node that was started again.
//!
//! | who | exports |
//! |---|---|
//! | the writer of a catalog version | the step that the version has ended, and its own call of the bucket |
//! | the writer of the version that ends an operation | the root span, from the start to the end that its report tells |
//! | a node | what it does as a source or a target, once that has ended |
//!
//! **Invariants**
//! - A span is exported when it has ended, by its own process; all are children of the root span.
//! - Failed work that is repeated for as long as it takes exports a bounded number of spans.
//! - While nobody receives traces, nothing is made of a span.
//!
//! Not here: where the spans go to (`observability`).

mod ids;
mod operation;
mod step;

use std::sync::atomic::{AtomicBool, Ordering};

pub use operation::{OpenSpan, OperationTrace, Past};
pub use step::step_ended;

/// The attribute of the span that stands for a whole operation. It is made as a child of the root
/// span, which has an id and no content; whoever exports it lets it take the place of its parent
/// and removes the attribute.
pub const IS_ROOT: &str = "vasto.is_root";

/// The target of the span that names an operation in log lines. It does not begin with `vasto`, and
/// so is not part of traces.
pub const LOG_TARGET: &str = "operation";

static EXPORTED: AtomicBool = AtomicBool::new(false);

/// Lets spans be exported from now on, through the global tracer provider.
pub fn enable() {
    EXPORTED.store(true, Ordering::Relaxed);
}

/// Returns true when spans are exported.
pub fn is_enabled() -> bool {
    EXPORTED.load(Ordering::Relaxed)
}
