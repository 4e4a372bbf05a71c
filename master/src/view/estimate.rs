//! The estimate of a resize, from what the nodes have reported: `keyspace resize --plan`.

use serde::Serialize;
use vasto_core::ids::ShardId;

use crate::state::Keyspace;

/// The assumed rate at which objects of one source are read, rewritten and ingested, bytes a
/// second.
const ASSUMED_BYTES_PER_SECOND: u64 = 50 << 20;
/// Fixed costs of a resize: checkpoint, tail, seal.
const ASSUMED_SECONDS: f64 = 2.0;
/// The most bytes of an object that one GET takes.
const BYTES_PER_GET: u64 = 8 << 20;

/// `keyspace resize --plan`.
#[derive(Serialize)]
pub(crate) struct EstimateDoc {
    keyspace: String,
    from: u32,
    to: u32,
    moving_fraction: f64,
    sources: Vec<SourceDoc>,
    requests: u64,
    seconds: f64,
}

#[derive(Serialize)]
struct SourceDoc {
    shard: ShardId,
    keys: u64,
    bytes: u64,
    bytes_to_read: u64,
}

/// Estimates from the reports what growing to `to` shards would read and how long it would take.
pub(crate) fn estimate(keyspace: &Keyspace, to: u32) -> EstimateDoc {
    let catalog = &keyspace.catalog;
    let from = catalog.spec.shards;
    let moving_fraction = f64::from(to.saturating_sub(from)) / f64::from(to.max(1));
    let sources: Vec<SourceDoc> = catalog
        .placement
        .iter()
        .map(|shard| {
            let report =
                shard.replicas.first().and_then(|first| keyspace.reports.get(&first.replica));
            let (keys, bytes) = report.map_or((0, 0), |report| (report.keys, report.bytes));
            // Banded SSTs: only the moving keys must be read.
            SourceDoc {
                shard: shard.shard,
                keys,
                bytes,
                bytes_to_read: (bytes as f64 * moving_fraction) as u64,
            }
        })
        .collect();
    let bytes: u64 = sources.iter().map(|source| source.bytes_to_read).sum();
    // A manifest each, then the bytes in parts; sources and target ship with about as many requests
    // again.
    let gets: u64 =
        sources.iter().map(|source| 1 + source.bytes_to_read.div_ceil(BYTES_PER_GET)).sum();
    EstimateDoc {
        keyspace: catalog.name.clone(),
        from,
        to,
        moving_fraction,
        requests: 2 * gets,
        seconds: ASSUMED_SECONDS + bytes as f64 / ASSUMED_BYTES_PER_SECOND as f64,
        sources,
    }
}
