//! The estimated monthly cost of the bucket, as `cluster status` shows it.
//!
//! **Invariant:** a pure view of known state: no request is sent for it, and an unknown figure is
//! `null` with a note that says how to learn it. The arithmetic is in
//! [`vasto_shipping::cost`].

use std::time::Duration;

use serde::Serialize;
use vasto_proto::v1;
use vasto_shipping::cost::{MEASURED_MIN, estimate};
use vasto_shipping::{Prices, RequestCounts, Usage};

use crate::cluster::Stored;
use crate::state::ClusterState;

/// The estimated cost.
#[derive(Serialize)]
pub(crate) struct CostDoc {
    currency: String,
    per_month: PerMonthDoc,
    /// Processes that were measured: live nodes and this master.
    processes: usize,
    /// The shortest measured time of these processes.
    measured_s: u64,
    stored_bytes: Option<u64>,
    /// The age of `stored_bytes`.
    stored_age_s: Option<u64>,
    note: Option<String>,
}

#[derive(Serialize)]
struct PerMonthDoc {
    requests: Option<f64>,
    storage: Option<f64>,
    egress: Option<f64>,
    total: Option<f64>,
}

/// Converts the requests that a node has reported.
pub(crate) fn usage_of(reported: &v1::BucketRequests) -> Usage {
    Usage {
        counts: RequestCounts {
            get: reported.get,
            put: reported.put,
            list: reported.list,
            head: reported.head,
            delete: reported.delete,
            bytes_read: reported.bytes_read,
            bytes_written: reported.bytes_written,
        },
        elapsed: Duration::from_millis(reported.elapsed_ms),
    }
}

/// Returns the cost of the live nodes and of this master, `own`.
pub(crate) fn cost(
    state: &ClusterState,
    own: Usage,
    stored: Option<Stored>,
    prices: &Prices,
    bucket: &str,
    mono_us: u64,
) -> CostDoc {
    let live = state.live();
    let usages: Vec<Usage> = live.map(|(_, node)| usage_of(&node.bucket)).chain([own]).collect();
    let estimate = estimate(&usages, stored.map(|stored| stored.bytes), prices);

    let mut notes = Vec::new();
    if estimate.is_short {
        notes.push(format!(
            "a process has run for {} s only, and what it did at its start is taken for what it always does: look \
             again when all have run for {} min",
            estimate.measured.as_secs(),
            MEASURED_MIN.as_secs() / 60
        ));
    }
    let all = state.node_ids().len() + 1;
    let left_out = all.saturating_sub(estimate.processes);
    if left_out > 0 {
        notes.push(format!(
            "{left_out} of {all} processes left out: away, or no report of theirs has come"
        ));
    }
    if stored.is_none() {
        notes.push(
            "this master has not yet looked at how much is stored: the next collection of garbage does, or `vasto \
             bucket gc --dry-run` now"
                .into(),
        );
    }
    if ["file:", "memory:"].iter().any(|local| bucket.starts_with(local)) {
        notes.push(
            "this bucket is local and costs nothing: it is what the configured prices make of it"
                .into(),
        );
    }
    let rounded = |amount: Option<f64>| amount.map(|amount| (amount * 1e4).round() / 1e4);
    CostDoc {
        currency: prices.currency.clone(),
        per_month: PerMonthDoc {
            requests: rounded(estimate.requests),
            storage: rounded(estimate.storage),
            egress: rounded(estimate.egress),
            total: rounded(estimate.total),
        },
        processes: estimate.processes,
        measured_s: estimate.measured.as_secs(),
        stored_bytes: stored.map(|stored| stored.bytes),
        stored_age_s: stored.map(|stored| mono_us.saturating_sub(stored.at_us) / 1_000_000),
        note: (!notes.is_empty()).then(|| notes.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::state::tests::two_nodes;
    use serde_json::{Value, json};
    use vasto_core::ids::NodeId;

    const HOUR: Duration = Duration::from_secs(3600);

    /// 1,000 PUTs an hour are 720,000 a month: 3.60.
    fn reported(put: u64) -> v1::Report {
        let bucket =
            v1::BucketRequests { put, elapsed_ms: 3_600_000, ..v1::BucketRequests::default() };
        v1::Report { bucket: Some(bucket), ..v1::Report::default() }
    }

    fn shown(state: &ClusterState, own: Usage, stored: Option<Stored>, bucket: &str) -> Value {
        let doc = cost(state, own, stored, &Prices::default(), bucket, 90_000_000);
        serde_json::to_value(doc).unwrap()
    }

    #[test]
    fn nodes_and_master_are_added_up_with_what_is_stored() {
        let (mut state, first, second) = two_nodes();
        state.report(NodeId(1), first, &reported(1000), Vec::new(), 20);
        state.report(NodeId(2), second, &reported(500), Vec::new(), 20);
        let counts = RequestCounts { list: 1000, bytes_read: 1 << 30, ..RequestCounts::default() };
        let own = Usage { counts, elapsed: 2 * HOUR };
        let stored = Stored { bytes: 10 << 30, at_us: 30_000_000 };
        assert_eq!(
            shown(&state, own, Some(stored), "s3://b/p"),
            json!({
                "currency": "USD",
                "per_month": {"requests": 3.6 + 1.8 + 1.8, "storage": 0.23, "egress": 0.0, "total": 7.43},
                "processes": 3, "measured_s": 3600, "stored_bytes": 10u64 << 30, "stored_age_s": 60, "note": null,
            })
        );
    }

    #[test]
    fn unknown_figures_are_null_and_the_note_says_how_to_learn_them() {
        let (mut state, first, second) = two_nodes();
        state.report(NodeId(1), first, &reported(1000), Vec::new(), 20);
        state.report(NodeId(2), second, &reported(1000), Vec::new(), 20);
        state.disconnect(NodeId(2), second, 30);
        let own = Usage { elapsed: Duration::from_secs(59), ..Usage::default() };
        let document = shown(&state, own, None, "file:///b");
        assert_eq!(
            document["per_month"],
            json!({"requests": 3.6, "storage": null, "egress": 0.0, "total": null}),
            "a node that is away asks for nothing"
        );
        assert_eq!((&document["processes"], &document["measured_s"]), (&json!(2), &json!(59)));
        assert_eq!(
            (&document["stored_bytes"], &document["stored_age_s"]),
            (&Value::Null, &Value::Null)
        );
        let note = document["note"].as_str().unwrap();
        for part in [
            "for 59 s only",
            "60 min",
            "1 of 3 processes left out",
            "vasto bucket gc --dry-run",
            "is local",
        ] {
            assert!(note.contains(part), "{part:?} is not in: {note}");
        }
    }

    #[test]
    fn nodes_that_have_not_reported_yet_are_left_out() {
        let (state, ..) = two_nodes();
        let own = Usage { elapsed: HOUR, ..Usage::default() };
        let document = shown(&state, own, Some(Stored { bytes: 0, at_us: 0 }), "s3://b");
        assert_eq!(document["processes"], 1);
        assert_eq!(document["per_month"]["total"], 0.0);
        assert!(document["note"].as_str().unwrap().contains("2 of 3 processes"), "{document}");
    }
}
