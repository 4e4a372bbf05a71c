//! What a resize will move, and the disk that it needs while it runs: for `keyspace resize --plan`,
//! and for the refusal of a resize that a node has no room for.
//!
//! **Invariant:** pure, from the catalog and the reports of the nodes. What no node has reported
//! counts as nothing, so a master that has just started refuses nothing for lack of disk.

use std::collections::BTreeMap;

use vasto_core::catalog::Catalog;
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{NodeId, ReplicaId, ShardId};
use vasto_core::plan::Plan;
use vasto_core::report::Reports;

use crate::state::ClusterState;

/// The assumed rate at which the moving bytes are read, rewritten and ingested, or exported, bytes
/// a second.
pub(crate) const ASSUMED_BYTES_PER_SECOND: u64 = 50 << 20;
/// Fixed costs of a resize: checkpoint, tail, seal.
const ASSUMED_SECONDS: f64 = 2.0;
/// The most bytes of an object that one request takes.
const BYTES_PER_REQUEST: u64 = 8 << 20;
/// Bytes on the disk of a target for each byte that it receives: the download, and the tables
/// rewritten from it.
const TARGET_DISK: u64 = 2;

/// What a resize will move.
pub(crate) struct Forecast {
    /// The share of all keys that moves.
    pub(crate) moving_fraction: f64,
    pub(crate) sources: Vec<Source>,
    receivers: Vec<Receiver>,
    exports: bool,
}

/// A shard that keys move from.
pub(crate) struct Source {
    pub(crate) shard: ShardId,
    pub(crate) node: NodeId,
    /// Its keys and its bytes on disk.
    pub(crate) keys: u64,
    pub(crate) bytes: u64,
    /// The bytes of the keys that move.
    pub(crate) moves: u64,
}

/// A shard that keys move to.
struct Receiver {
    replicas: u64,
    /// Where its replicas are; empty while no node is chosen.
    nodes: Vec<NodeId>,
}

/// A node lacks the disk that a resize takes while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{node} needs about {} MiB of disk while this resize runs, and can give {} MiB of the {} MiB that are free; free \
     some there, or move replicas away from it with `vasto node drain {node}`", needed >> 20, usable >> 20, free >> 20
)]
pub(crate) struct NoRoom {
    node: NodeId,
    needed: u64,
    free: u64,
    /// The part of `free` that is neither promised nor reserved.
    usable: u64,
}

impl From<NoRoom> for VastoError {
    fn from(error: NoRoom) -> Self {
        VastoError::new(ErrorCode::FailedPrecondition, error.to_string())
    }
}

impl Forecast {
    /// Returns the forecast of a resize to `to` shards; `plan` is its plan once nodes are chosen.
    pub(crate) fn of(catalog: &Catalog, reports: &Reports, to: u32, plan: Option<&Plan>) -> Self {
        let from = catalog.spec.shards;
        let shrinks = to < from;
        let gives = catalog.placement.iter().filter(|shard| !shrinks || shard.shard.0 >= to);
        let sources = gives.filter_map(|shard| {
            let shipper = shard.shipper()?;
            let report = reports.get(&shipper.replica);
            let (keys, bytes) = report.map_or((0, 0), |report| (report.keys, report.bytes));
            let moves = (bytes as f64 * moving_part(catalog, shipper.replica, to)).round() as u64;
            Some(Source { shard: shard.shard, node: shipper.node, keys, bytes, moves })
        });
        let receivers = match shrinks {
            true => catalog
                .placement
                .iter()
                .filter(|shard| shard.shard.0 < to)
                .map(|shard| Receiver {
                    replicas: shard.replicas.len() as u64,
                    nodes: shard.replicas.iter().map(|member| member.node).collect(),
                })
                .collect(),
            false => (from..to)
                .map(|shard| Receiver {
                    replicas: u64::from(catalog.spec.replicas),
                    nodes: plan
                        .iter()
                        .flat_map(|plan| &plan.targets)
                        .filter(|target| target.shard.0 == shard)
                        .map(|target| target.node)
                        .collect(),
                })
                .collect(),
        };
        Self {
            moving_fraction: f64::from(from.abs_diff(to)) / f64::from(from.max(to).max(1)),
            sources: sources.collect(),
            receivers,
            exports: shrinks || to > from + 1,
        }
    }

    /// Returns the bytes of the keys that move, once.
    fn moves(&self) -> u64 {
        self.sources.iter().map(|source| source.moves).sum()
    }

    /// Returns the bytes that one replica of a receiving shard takes.
    fn received(&self) -> u64 {
        self.moves() / self.receivers.len().max(1) as u64
    }

    /// Returns the bytes that all targets hold of the keys that move; as many come from the bucket.
    pub(crate) fn bytes_moved(&self) -> u64 {
        self.receivers.iter().map(|receiver| receiver.replicas * self.received()).sum()
    }

    /// Returns the requests that read: of each target and source a manifest, then the bytes in
    /// parts.
    pub(crate) fn gets(&self) -> u64 {
        let shards = self.receivers.len().max(1) as u64;
        let of_target = self.sources.iter().map(|source| 1 + requests(source.moves / shards));
        let of_target: u64 = of_target.sum();
        self.receivers.iter().map(|receiver| receiver.replicas * of_target).sum()
    }

    /// Returns the requests that write: the manifest of each source and its export, and the first
    /// manifest of each receiving shard with what it has received.
    pub(crate) fn puts(&self) -> u64 {
        let export = |source: &Source| match self.exports {
            true => 1 + requests(source.moves),
            false => 0,
        };
        let of_sources: u64 = self.sources.iter().map(|source| 1 + export(source)).sum();
        of_sources + self.receivers.len() as u64 * (1 + requests(self.received()))
    }

    /// Returns how long the resize takes at the assumed rates, seconds: an export writes what the
    /// targets then read.
    pub(crate) fn seconds(&self) -> f64 {
        let passes = if self.exports { 2.0 } else { 1.0 };
        ASSUMED_SECONDS + passes * self.moves() as f64 / ASSUMED_BYTES_PER_SECOND as f64
    }

    /// Returns the bytes of disk that each node needs while the resize runs.
    pub(crate) fn disk_needed(&self) -> BTreeMap<NodeId, u64> {
        let mut needed: BTreeMap<NodeId, u64> = BTreeMap::new();
        for node in self.receivers.iter().flat_map(|receiver| &receiver.nodes) {
            *needed.entry(*node).or_default() += TARGET_DISK * self.received();
        }
        for source in self.sources.iter().filter(|_| self.exports) {
            *needed.entry(source.node).or_default() += source.moves;
        }
        needed
    }

    /// Refuses the resize when a node lacks the disk that it needs meanwhile.
    pub(crate) fn check_room(&self, state: &ClusterState) -> Result<(), NoRoom> {
        let short = self.disk_needed().into_iter().find_map(|(node, needed)| {
            let disk = state.disk_of(node)?;
            let usable = disk.room();
            (needed > usable).then_some(NoRoom { node, needed, free: disk.free, usable })
        });
        short.map_or(Ok(()), Err)
    }
}

/// Returns the part of a replica's bytes that moves in a resize to `to` shards.
///
/// A shard of `n` shards holds `1/n` of all keys; a replica that keeps the bands of an earlier grow
/// in quarantine holds as many as it did before that grow.
fn moving_part(catalog: &Catalog, replica: ReplicaId, to: u32) -> f64 {
    let from = catalog.spec.shards;
    let kept = catalog.quarantines.iter().filter(|kept| kept.replicas.contains(&replica));
    let held = kept.map(|kept| kept.range.first.low_edge()).chain([from]).min().unwrap_or(from);
    let (held, from, to) = (f64::from(held.max(1)), f64::from(from), f64::from(to.max(1)));
    match to < from {
        true => held / from,
        false => held / from - held / to,
    }
}

/// Returns the requests that move so many bytes.
pub(crate) fn requests(bytes: u64) -> u64 {
    bytes.div_ceil(BYTES_PER_REQUEST)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::state::tests::replica_report;
    use vasto_core::catalog::{KeyspaceSpec, Quarantine};
    use vasto_core::ids::{KeyspaceId, PlanId};
    use vasto_core::report::ReplicaReport;

    const MIB: u64 = 1 << 20;

    /// Returns a keyspace with its replicas on nodes 1, 2, ...; each holds 120 MiB.
    fn keyspace(shards: u32, replicas: u32) -> (Catalog, Reports) {
        let spec = KeyspaceSpec { shards, replicas, ..KeyspaceSpec::default() };
        let node = |shard: u32, copy: u32| NodeId(u64::from(shard * replicas + copy + 1));
        let nodes: Vec<Vec<NodeId>> = (0..shards)
            .map(|shard| (0..replicas).map(|copy| node(shard, copy)).collect())
            .collect();
        let catalog = Catalog::first(KeyspaceId(1), "ks1", spec, &nodes, 1_000, 1);
        let ids = (1..=u64::from(shards * replicas)).map(ReplicaId);
        let report = |id: ReplicaId| ReplicaReport { bytes: 120 * MIB, ..replica_report(id.0, 1) };
        (catalog, ids.map(|id| (id, report(id))).collect())
    }

    fn moves(forecast: &Forecast) -> Vec<u64> {
        forecast.sources.iter().map(|source| source.moves / MIB).collect()
    }

    #[test]
    fn a_shrink_moves_all_of_its_retiring_shards_to_every_replica_of_the_others() {
        let (catalog, reports) = keyspace(3, 2);
        let forecast = Forecast::of(&catalog, &reports, 2, None);
        assert_eq!(moves(&forecast), [120]);
        assert_eq!((forecast.sources[0].shard, forecast.sources[0].node), (ShardId(2), NodeId(5)));
        assert_eq!(forecast.bytes_moved(), 240 * MIB, "each of two replicas takes its half");
        assert_eq!(forecast.gets(), 4 * (1 + 8));
        assert_eq!(forecast.puts(), (1 + 1 + 15) + 2 * (1 + 8));
        assert_eq!(forecast.seconds(), 2.0 + 2.0 * 120.0 / 50.0);
        let needed: Vec<(u64, u64)> =
            forecast.disk_needed().into_iter().map(|(node, bytes)| (node.0, bytes / MIB)).collect();
        assert_eq!(needed, [(1, 120), (2, 120), (3, 120), (4, 120), (5, 120)]);
        assert_eq!(forecast.moving_fraction, 1.0 / 3.0);
    }

    #[test]
    fn a_grow_by_one_reads_files_and_one_by_several_exports() {
        let (catalog, reports) = keyspace(2, 1);
        let one = Forecast::of(&catalog, &reports, 3, None);
        assert_eq!((moves(&one), one.bytes_moved()), (vec![40, 40], 80 * MIB));
        assert_eq!((one.gets(), one.puts()), (2 * (1 + 5), 2 + (1 + 10)));
        assert!(one.disk_needed().is_empty(), "no node is chosen yet, and no source exports");
        let nodes = [vec![NodeId(8)], vec![NodeId(9)]];
        let next = vasto_core::reconcile::start_resize(&catalog, 4, &nodes, 9, 9).unwrap();
        let two = Forecast::of(&catalog, &reports, 4, next.plan.as_ref());
        assert_eq!((moves(&two), two.bytes_moved()), (vec![60, 60], 120 * MIB));
        let needed: Vec<(u64, u64)> =
            two.disk_needed().into_iter().map(|(node, bytes)| (node.0, bytes / MIB)).collect();
        assert_eq!(needed, [(1, 60), (2, 60), (8, 120), (9, 120)]);
    }

    #[test]
    fn bands_in_quarantine_do_not_move() {
        let (mut catalog, reports) = keyspace(3, 1);
        // Shards 0 and 1 keep what left them when there were two; shard 2 is new.
        catalog.quarantines.push(Quarantine {
            plan: PlanId(1),
            range: vasto_core::Band::leaving(2, 3).into(),
            replicas: vec![ReplicaId(1), ReplicaId(2)],
            targets: Vec::new(),
            others: Vec::new(),
            until_us: u64::MAX,
            dropping: false,
        });
        // A third of their 120 MiB is in quarantine; of the other 80 MiB a quarter moves.
        assert_eq!(moves(&Forecast::of(&catalog, &reports, 4, None)), [20, 20, 30]);
        assert_eq!(moves(&Forecast::of(&catalog, &reports, 2, None)), [120]);
    }
}
