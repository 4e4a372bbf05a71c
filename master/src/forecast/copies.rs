//! The forecast of a node's drain or replacement: each of its replicas is made anew on another node,
//! one of a keyspace at a time. All keyspaces share the bound of its rate.
//!
//! **Invariant:** targets are chosen as the driver chooses them, each with what those before it take.

use std::collections::BTreeMap;

use vasto_core::catalog::{Catalog, NodeDrain, Placed, ShardPlacement};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{KeyspaceId, NodeId, ShardId};
use vasto_core::reconcile::concerns;
use vasto_core::report::ReplicaReport;
use vasto_shipping::Weight;

use super::size::{database_list_bytes, gets, puts, unshipped};
use super::time::{COPY, LEAVE, Paces};
use super::{Forecast, Source};
use crate::placement::Shut;
use crate::state::{ClusterState, Keyspace};

/// What the bucket holds of shards that no replica can give, as the caller has weighed it.
pub(crate) type Weighed = BTreeMap<(KeyspaceId, ShardId), Weight>;

/// The drain of a node, keyspace by keyspace.
#[derive(Default)]
pub(crate) struct DrainForecast {
    pub(crate) parts: BTreeMap<KeyspaceId, Forecast>,
    /// Why it cannot begin: a shard for which no node has room.
    pub(crate) refused: Option<VastoError>,
}

/// One replica that is made anew.
struct Copying<'a> {
    keyspace: &'a Keyspace,
    shard: &'a ShardPlacement,
    /// The live replica that gives its checkpoint, if there is one.
    source: Option<(Placed, &'a ReplicaReport)>,
    weight: Option<&'a Weight>,
    to: Option<NodeId>,
    leaving: NodeId,
}

/// The size of a replica under construction.
struct Copied {
    bytes: f64,
    objects: u64,
    /// Bytes that the source has to ship first.
    unshipped: f64,
}

/// Returns the forecast of a drain.
pub(crate) fn drain(
    state: &ClusterState,
    drain: &NodeDrain,
    weighed: &Weighed,
    now_us: u64,
    paces: &Paces,
) -> DrainForecast {
    let mut all = DrainForecast::default();
    let mut taken = BTreeMap::new();
    let mut reads: BTreeMap<KeyspaceId, Read> = BTreeMap::new();
    for keyspace in state.active().filter(|keyspace| concerns(&keyspace.catalog, drain)) {
        let mut then = Catalog::clone(&keyspace.catalog);
        then.draining_nodes.push(drain.clone());
        let mut part = Forecast::default();
        for shard in &keyspace.catalog.placement {
            if !shard.replicas.iter().any(|placed| placed.node == drain.node) {
                continue;
            }
            part.seconds += paces.fixed(LEAVE);
            if !needs_copy(shard, drain.node, then.spec.replicas) {
                continue;
            }
            let to = state.copy_target(&then, shard.shard, &taken, now_us);
            if to.is_none() {
                all.refused.get_or_insert_with(|| no_room(state, &then, shard.shard));
            }
            let source = source_of(state, keyspace, shard);
            let weight = weighed.get(&(then.keyspace, shard.shard));
            let copy = Copying { keyspace, shard, source, weight, to, leaving: drain.node };
            copy.add_to(&mut part, reads.entry(then.keyspace).or_default(), paces);
            if let Some(to) = to {
                let of_node: &mut (usize, u64) = taken.entry(to).or_default();
                let bytes = part.sources.last().map_or(0, |source| source.moves);
                (of_node.0, of_node.1) = (of_node.0 + 1, of_node.1 + bytes);
            }
        }
        all.parts.insert(then.keyspace, part);
    }
    all.parts.iter_mut().for_each(|(id, part)| share(part, *id, &reads, paces.max_rate()));
    all
}

/// What the copies of a keyspace read from the bucket.
#[derive(Debug, Clone, Default)]
struct Read {
    bytes: f64,
    /// How long each node takes by itself.
    seconds: BTreeMap<NodeId, f64>,
}

/// Adds the time for which a keyspace is held back by the others: by those that read at the same
/// nodes, whose rates are those of all their work together, and by the rate that all of the drain
/// share. While it reads, each of the others reads as much, or all that it has to.
fn share(
    part: &mut Forecast,
    keyspace: KeyspaceId,
    reads: &BTreeMap<KeyspaceId, Read>,
    max_rate: Option<f64>,
) {
    let Some(own) = reads.get(&keyspace) else { return };
    let alone: f64 = own.seconds.values().sum();
    let with_others = |(node, seconds): (&NodeId, &f64)| {
        let all = reads.values().filter_map(|one| one.seconds.get(node));
        all.map(|theirs| theirs.min(*seconds)).sum::<f64>()
    };
    let at_nodes: f64 = own.seconds.iter().map(with_others).sum();
    let meanwhile: f64 = reads.values().map(|other| other.bytes.min(own.bytes)).sum();
    let within_rate = max_rate.map_or(0.0, |max_rate| meanwhile / max_rate);
    part.seconds += (at_nodes.max(within_rate) - alone).max(0.0);
}

/// Returns the shards of which no live replica can give a copy, so that only the bucket can.
pub(crate) fn from_the_bucket(
    state: &ClusterState,
    drain: &NodeDrain,
) -> Vec<(KeyspaceId, ShardId, Option<Placed>)> {
    let concerned = state.active().filter(|keyspace| concerns(&keyspace.catalog, drain));
    let shards = concerned
        .flat_map(|keyspace| keyspace.catalog.placement.iter().map(move |shard| (keyspace, shard)));
    shards
        .filter(|(_, shard)| shard.replicas.iter().any(|placed| placed.node == drain.node))
        .filter(|(keyspace, shard)| source_of(state, keyspace, shard).is_none())
        .map(|(keyspace, shard)| (keyspace.catalog.keyspace, shard.shard, shard.shipper()))
        .collect()
}

/// Returns true when too few replicas of a shard are left without those of a node.
fn needs_copy(shard: &ShardPlacement, node: NodeId, replicas: u32) -> bool {
    let staying = shard.replicas.iter().filter(|placed| placed.node != node).count();
    staying < shard.replicas.len() && staying < replicas as usize
}

/// Returns the replica that a copy is made of: the shipper while it is well, else the next one.
fn source_of<'a>(
    state: &ClusterState,
    keyspace: &'a Keyspace,
    shard: &ShardPlacement,
) -> Option<(Placed, &'a ReplicaReport)> {
    let well = |placed: Placed| {
        let report = keyspace.reports.get(&placed.replica)?;
        let is_well =
            state.is_live(placed.node) && report.replication.ready && !report.has_failed();
        is_well.then_some((placed, report))
    };
    shard.shipper().into_iter().chain(shard.primary_first()).find_map(well)
}

impl Copied {
    fn of(source: Option<(Placed, &ReplicaReport)>, weight: Option<&Weight>) -> Self {
        let Some((_, report)) = source else {
            let weight = weight.copied().unwrap_or_default();
            return Self {
                bytes: (weight.file_bytes + weight.chunk_bytes) as f64,
                objects: weight.files + weight.chunks,
                unshipped: 0.0,
            };
        };
        let (bytes, objects) = match &report.stored {
            Some(stored) => {
                let list = database_list_bytes(stored.checkpoint_files as f64);
                let objects = stored.checkpoint_files.max(gets(stored.checkpoint_bytes)) + 1;
                (stored.checkpoint_bytes as f64 + list, objects)
            }
            None => (report.bytes as f64, gets(report.bytes) + 1),
        };
        Self { bytes, objects, unshipped: unshipped(report, bytes) }
    }
}

impl Copying<'_> {
    /// Adds this replica to the part of its keyspace, and to what that reads.
    fn add_to(&self, part: &mut Forecast, read: &mut Read, paces: &Paces) {
        let Self { keyspace, shard, source, weight, to, leaving } = *self;
        let copied = Copied::of(source, weight);
        let bytes = copied.bytes.round() as u64;
        let (node, report) =
            (source.map(|(placed, _)| placed.node), source.map(|(_, report)| report));
        let moved = match (report, weight) {
            // The log that is replayed is no SST of the checkpoint.
            (None, Some(weight)) if weight.files > 0 => weight.file_bytes,
            _ => bytes,
        };
        part.sources.push(Source {
            keyspace: keyspace.catalog.name.clone(),
            shard: shard.shard,
            node,
            keys: report.map_or(0, |report| report.keys),
            bytes: report.map_or(bytes, |report| report.bytes),
            moves: bytes,
        });
        part.bytes_moved += moved;
        part.bytes_from_bucket += bytes;
        part.gets += copied.objects;
        // The manifest and the list of the source; and of the new replica, which uploads everything
        // when it is to ship.
        let ships = shard.shipper().is_some_and(|shipper| shipper.node == leaving);
        let by_target = if ships { 2 + puts(bytes) } else { 0 };
        part.puts += 2 + puts(copied.unshipped.round() as u64) + by_target;
        let (from, at) = (paces.at(node), paces.at(to));
        let seconds = paces.downloads(at, copied.bytes, copied.objects);
        part.seconds += paces.fixed(COPY) + copied.unshipped / from.upload + seconds;
        read.bytes += copied.bytes;
        if let Some(to) = to {
            *part.disk.entry(to).or_default() += bytes;
            *read.seconds.entry(to).or_default() += seconds;
        }
    }
}

/// Returns the error of a drain that no other node has room for.
fn no_room(state: &ClusterState, then: &Catalog, shard: ShardId) -> VastoError {
    let message = format!(
        "no other live node has room for shard {shard} of {}; start one with `vasto serve node`{}",
        then.name,
        Shut::of(&state.candidates(Some(then)))
    );
    VastoError::new(ErrorCode::FailedPrecondition, message)
}
