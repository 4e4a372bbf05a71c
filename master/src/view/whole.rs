//! What the operations show alike whose parts are plans: the drain of a node and the rebalance.

use serde::Serialize;
use vasto_core::report::PauseMs;

use super::plan::{RunningDoc, TroubleDoc};

/// How far such an operation is.
#[derive(Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(super) enum ProgressDoc {
    Running(UnderWayDoc),
    Paused(UnderWayDoc),
    Aborted { reason: Option<String> },
    Done,
}

/// What its parts do.
#[derive(Serialize)]
pub(super) struct UnderWayDoc {
    step: String,
    waiting_for: Option<String>,
    bytes_done: u64,
    bytes_total: u64,
    /// Bytes a second of all parts together.
    rate: Option<u64>,
    /// The bound of the rate of all parts together, bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_rate: Option<u64>,
    trouble: Option<TroubleDoc>,
}

impl UnderWayDoc {
    /// Adds up the parts that run. `trouble` is that of the operation itself, should no part have
    /// any.
    pub(super) fn of(
        step: String,
        waiting_for: Option<String>,
        parts: &[RunningDoc],
        max_rate: Option<u64>,
        trouble: Option<TroubleDoc>,
    ) -> Self {
        let of_part = parts.iter().find_map(|part| part.trouble.clone());
        Self {
            step,
            waiting_for,
            bytes_done: parts.iter().map(|part| part.bytes_done).sum(),
            bytes_total: parts.iter().map(|part| part.bytes_total).sum(),
            rate: parts.iter().filter_map(|part| part.rate).reduce(|sum, rate| sum + rate),
            max_rate,
            trouble: of_part.or(trouble),
        }
    }

    /// Returns the state of the operation.
    pub(super) fn progress(self, paused: bool) -> ProgressDoc {
        match paused {
            true => ProgressDoc::Paused(self),
            false => ProgressDoc::Running(self),
        }
    }
}

/// What has moved since it began.
#[derive(Serialize)]
pub(super) struct TotalsDoc {
    pub(super) keys_moved: u64,
    pub(super) bytes_moved: u64,
    pub(super) bytes_from_bucket: u64,
    pub(super) bytes_from_peers: u64,
    pub(super) objects_read: u64,
    /// No write waits for such an operation.
    pub(super) write_pause_ms: PauseMs,
    pub(super) duration_ms: u64,
    pub(super) started_at_us: u64,
}
