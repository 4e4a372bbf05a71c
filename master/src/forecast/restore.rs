//! The forecast of a restore: one replica of each shard out of the bucket. More of them are copied
//! from it once it serves, by operations of their own.
//!
//! **Invariant:** what the nodes ship before the restore reads it counts as they report it; what
//! only the bucket holds, as the caller has weighed it.

use std::collections::BTreeSet;

use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{NodeId, ShardId};
use vasto_core::report::ReplicaReport;
use vasto_shipping::Weight;

use super::copies::Weighed;
use super::size::{database_list_bytes, gets, puts, unshipped};
use super::time::{Paces, RESTORE, SideBySide};
use super::{Forecast, Source};
use crate::state::ClusterState;

/// What is restored, and onto which nodes.
pub(crate) struct Restored<'a> {
    /// The catalog of the source keyspace that is in force now.
    pub(crate) tip: &'a Catalog,
    /// Its catalog at the target time.
    pub(crate) then: &'a Catalog,
    /// The nodes of each shard; empty when none could be chosen.
    pub(crate) nodes: &'a [Vec<NodeId>],
    /// The bucket is used as it is: to a time, or because it was asked for.
    pub(crate) as_it_is: bool,
}

impl Restored<'_> {
    /// Returns the report of the live replica that ships a checkpoint of the shard first.
    fn ships_first<'a>(
        &self,
        state: &'a ClusterState,
        shard: ShardId,
    ) -> Option<(NodeId, &'a ReplicaReport)> {
        if self.as_it_is || self.tip.state != KeyspaceState::Active {
            return None;
        }
        let reports = &state.keyspaces.get(&self.tip.keyspace)?.reports;
        let shard = self.tip.shard(shard)?;
        shard.shipper().into_iter().chain(shard.primary_first()).find_map(|placed| {
            let report = reports.get(&placed.replica)?;
            (state.is_live(placed.node) && !report.has_failed()).then_some((placed.node, report))
        })
    }

    /// Returns the shards of which only the bucket says what a restore reads.
    pub(crate) fn known_by_the_bucket(&self, state: &ClusterState) -> Vec<ShardId> {
        let shards = self.then.placement.iter().map(|shard| shard.shard);
        shards.filter(|shard| self.ships_first(state, *shard).is_none()).collect()
    }
}

/// Returns the forecast of a restore.
pub(crate) fn restore(
    state: &ClusterState,
    restored: &Restored<'_>,
    weighed: &Weighed,
    paces: &Paces,
) -> Forecast {
    let mut forecast = Forecast::default();
    let (mut at_sources, mut at_targets) = (SideBySide::default(), SideBySide::default());
    let chosen: BTreeSet<NodeId> = restored.nodes.iter().flatten().copied().collect();
    let sharing = if chosen.is_empty() { restored.then.placement.len() } else { chosen.len() };
    for (at, shard) in restored.then.placement.iter().enumerate() {
        let shard = shard.shard;
        let ships_first = restored.ships_first(state, shard);
        let weight = match ships_first {
            Some((node, report)) => {
                let (weight, unshipped) = weight_of(report);
                at_sources.add(Some(node), unshipped / paces.at(Some(node)).upload);
                forecast.puts += 2 + puts(unshipped.round() as u64);
                weight
            }
            None => weighed.get(&(restored.then.keyspace, shard)).copied().unwrap_or_default(),
        };
        let bytes = weight.file_bytes + weight.chunk_bytes;
        let report = ships_first.map(|(_, report)| report);
        forecast.sources.push(Source {
            keyspace: restored.then.name.clone(),
            shard,
            node: ships_first.map(|(node, _)| node),
            keys: report.map_or(0, |report| report.keys),
            bytes: report.map_or(bytes, |report| report.bytes),
            moves: bytes,
        });
        // The SSTs of the log that is replayed are not those of the checkpoint.
        forecast.bytes_moved += if weight.files > 0 { weight.file_bytes } else { bytes };
        forecast.bytes_from_bucket += bytes;
        let requests = weight.files.max(gets(weight.file_bytes)) + weight.chunks;
        forecast.gets += requests;
        // Its first manifest names the files of the source; the log that was replayed is new.
        forecast.puts += 2 + puts(weight.chunk_bytes);
        let node = restored.nodes.get(at).and_then(|nodes| nodes.first().copied());
        let rates = paces.shared_at(node, sharing);
        let log = weight.chunk_bytes as f64;
        let reads = paces.downloads(rates, bytes as f64, requests);
        at_targets.add(node, reads + log / rates.rewrite);
        if let Some(node) = node {
            *forecast.disk.entry(node).or_default() += bytes;
        }
    }
    forecast.seconds = paces.fixed(RESTORE) + at_sources.seconds() + at_targets.seconds();
    forecast
}

/// Returns what a checkpoint of a replica made now weighs, and the bytes of it that are not in the
/// bucket yet.
fn weight_of(report: &ReplicaReport) -> (Weight, f64) {
    let (files, bytes) = match &report.stored {
        Some(stored) => {
            let list = database_list_bytes(stored.checkpoint_files as f64).round() as u64;
            (stored.checkpoint_files + 1, stored.checkpoint_bytes + list)
        }
        None => (gets(report.bytes) + 1, report.bytes),
    };
    let weight = Weight { files, file_bytes: bytes, ..Weight::default() };
    (weight, unshipped(report, bytes as f64))
}
