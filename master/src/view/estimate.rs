//! The plan of a structural change, from what is known before it begins: `--plan` of `keyspace
//! resize`, `keyspace restore`, `node drain` and `node replace`.

use std::time::Duration;

use serde::Serialize;
use vasto_core::ids::{NodeId, ShardId};
use vasto_core::operation::OperationKind;
use vasto_shipping::cost::{MONTH, estimate as cost_of};
use vasto_shipping::{Prices, RequestCounts, Usage};

use crate::forecast::Forecast;
use crate::state::ClusterState;

/// The plan of a change.
#[derive(Serialize)]
pub(crate) struct EstimateDoc {
    keyspace: String,
    kind: OperationKind,
    from: Option<ShardsOrNode>,
    to: Option<ShardsOrNode>,
    #[serde(skip_serializing_if = "Option::is_none")]
    moving_fraction: Option<f64>,
    sources: Vec<SourceDoc>,
    #[serde(flatten)]
    takes: TakesDoc,
}

/// What any change takes, and whether it would begin.
#[derive(Serialize)]
pub(super) struct TakesDoc {
    bytes_moved: u64,
    bytes_from_bucket: u64,
    requests: RequestsDoc,
    disk_needed: Vec<DiskDoc>,
    seconds: f64,
    cost: AmountDoc,
    /// What the change itself would be answered now.
    refused: Option<String>,
}

impl TakesDoc {
    pub(super) fn of(
        state: &ClusterState,
        forecast: &Forecast,
        refused: Option<String>,
        prices: &Prices,
    ) -> Self {
        let Forecast { bytes_moved, bytes_from_bucket, gets: get, puts: put, .. } = *forecast;
        let disk_needed = forecast.disk.iter().map(|(node, bytes)| DiskDoc {
            node_id: *node,
            bytes: *bytes,
            free: state.disk_of(*node).filter(|disk| disk.bytes > 0).map(|disk| disk.free),
        });
        Self {
            bytes_moved,
            bytes_from_bucket,
            requests: RequestsDoc { get, put },
            disk_needed: disk_needed.collect(),
            seconds: (forecast.seconds * 1000.0).round() / 1000.0,
            cost: AmountDoc::of(get, put, bytes_from_bucket, prices),
            refused,
        }
    }
}

/// What changes: the number of shards, or the node that has the replicas.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum ShardsOrNode {
    Shards(u32),
    Node(NodeId),
}

/// The change that was asked for.
pub(crate) struct Asked {
    /// The keyspace, or the names of all that have a part in it.
    pub(crate) keyspace: String,
    pub(crate) kind: OperationKind,
    pub(crate) from: Option<ShardsOrNode>,
    pub(crate) to: Option<ShardsOrNode>,
    /// The error that it would be answered.
    pub(crate) refused: Option<String>,
}

#[derive(Serialize)]
struct SourceDoc {
    keyspace: String,
    shard: ShardId,
    /// `null` when the bytes come from the bucket alone.
    node_id: Option<NodeId>,
    keys: u64,
    bytes: u64,
    bytes_to_read: u64,
}

#[derive(Serialize)]
struct RequestsDoc {
    get: u64,
    put: u64,
}

/// Disk that a node needs while the change runs.
#[derive(Serialize)]
struct DiskDoc {
    node_id: NodeId,
    bytes: u64,
    /// Its free disk; `null` while it has not reported.
    free: Option<u64>,
}

/// The price of the requests, and of what is read.
#[derive(Serialize)]
struct AmountDoc {
    currency: String,
    amount: f64,
}

impl AmountDoc {
    /// Returns the price of so many requests, and of what they read.
    fn of(get: u64, put: u64, bytes_read: u64, prices: &Prices) -> Self {
        let amount = amount(get, put, bytes_read, prices);
        Self { currency: prices.currency.clone(), amount }
    }
}

/// Shows what a change would move and take.
pub(crate) fn estimate(
    state: &ClusterState,
    asked: Asked,
    forecast: &Forecast,
    prices: &Prices,
) -> EstimateDoc {
    let sources = forecast.sources.iter().map(|source| SourceDoc {
        keyspace: source.keyspace.clone(),
        shard: source.shard,
        node_id: source.node,
        keys: source.keys,
        bytes: source.bytes,
        bytes_to_read: source.moves,
    });
    EstimateDoc {
        keyspace: asked.keyspace,
        kind: asked.kind,
        from: asked.from,
        to: asked.to,
        moving_fraction: forecast.moving_fraction,
        sources: sources.collect(),
        takes: TakesDoc::of(state, forecast, asked.refused, prices),
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
