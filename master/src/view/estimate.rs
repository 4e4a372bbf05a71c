//! The plan of a resize, from what the nodes have reported: `keyspace resize --plan`.

use std::time::Duration;

use serde::Serialize;
use vasto_core::ids::{NodeId, ShardId};
use vasto_core::operation::OperationKind;
use vasto_core::plan::Plan;
use vasto_shipping::cost::{MONTH, estimate as cost_of};
use vasto_shipping::{Prices, RequestCounts, Usage};

use crate::forecast::Forecast;
use crate::state::{ClusterState, Keyspace};

/// `keyspace resize --plan`.
#[derive(Serialize)]
pub(crate) struct EstimateDoc {
    keyspace: String,
    kind: OperationKind,
    from: u32,
    to: u32,
    moving_fraction: f64,
    sources: Vec<SourceDoc>,
    bytes_moved: u64,
    bytes_from_bucket: u64,
    requests: RequestsDoc,
    disk_needed: Vec<DiskDoc>,
    seconds: f64,
    cost: AmountDoc,
    /// What the resize itself would be answered now.
    refused: Option<String>,
}

#[derive(Serialize)]
struct SourceDoc {
    shard: ShardId,
    node_id: NodeId,
    keys: u64,
    bytes: u64,
    bytes_to_read: u64,
}

#[derive(Serialize)]
pub(super) struct RequestsDoc {
    pub(super) get: u64,
    pub(super) put: u64,
}

/// Disk that a node needs while the change runs.
#[derive(Serialize)]
pub(super) struct DiskDoc {
    pub(super) node_id: NodeId,
    pub(super) bytes: u64,
    /// Its free disk; `null` while it has not reported.
    pub(super) free: Option<u64>,
}

/// The price of the requests, and of what is read.
#[derive(Serialize)]
pub(super) struct AmountDoc {
    currency: String,
    amount: f64,
}

impl AmountDoc {
    /// Returns the price of so many requests, and of what they read.
    pub(super) fn of(get: u64, put: u64, bytes_read: u64, prices: &Prices) -> Self {
        let amount = amount(get, put, bytes_read, prices);
        Self { currency: prices.currency.clone(), amount }
    }
}

/// Estimates from the reports what changing to `to` shards moves, and what that takes. `plan` is
/// the plan that would begin, `refused` the error that the change would be answered.
pub(crate) fn estimate(
    state: &ClusterState,
    keyspace: &Keyspace,
    to: u32,
    plan: Option<&Plan>,
    refused: Option<String>,
    prices: &Prices,
) -> EstimateDoc {
    let catalog = &keyspace.catalog;
    let forecast = Forecast::of(catalog, &keyspace.reports, to, plan);
    let (get, put, bytes_moved) = (forecast.gets(), forecast.puts(), forecast.bytes_moved());
    let sources = forecast.sources.iter().map(|source| SourceDoc {
        shard: source.shard,
        node_id: source.node,
        keys: source.keys,
        bytes: source.bytes,
        bytes_to_read: source.moves,
    });
    let disk_needed = forecast.disk_needed().into_iter().map(|(node, bytes)| DiskDoc {
        node_id: node,
        bytes,
        free: state.disk_of(node).filter(|disk| disk.bytes > 0).map(|disk| disk.free),
    });
    EstimateDoc {
        keyspace: catalog.name.clone(),
        kind: match to < catalog.spec.shards {
            true => OperationKind::Shrink,
            false => OperationKind::Grow,
        },
        from: catalog.spec.shards,
        to,
        moving_fraction: forecast.moving_fraction,
        sources: sources.collect(),
        bytes_moved,
        bytes_from_bucket: bytes_moved,
        requests: RequestsDoc { get, put },
        disk_needed: disk_needed.collect(),
        seconds: forecast.seconds(),
        cost: AmountDoc::of(get, put, bytes_moved, prices),
        refused,
    }
}

/// Returns the price of so many requests: that of a month in which nothing else is done.
fn amount(get: u64, put: u64, bytes_read: u64, prices: &Prices) -> f64 {
    let counts = RequestCounts { get, put, bytes_read, ..RequestCounts::default() };
    let elapsed: Duration = MONTH;
    let month = cost_of(&[Usage { counts, elapsed }], None, prices);
    let amount = month.requests.unwrap_or_default() + month.egress.unwrap_or_default();
    (amount * 1e6).round() / 1e6
}
