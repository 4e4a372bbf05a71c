//! Shards that have more replicas than their keyspace asks for: one of them leaves.
//!
//! A replica too many is left where a drain was cancelled after its copy was placed, where a move
//! ended for the loss of another replica that then came back, and where a master of an earlier
//! version has written a catalog without its moves.
//!
//! **Invariant:** pure. Nothing leaves while a replica of the shard moves, is on a node that is
//! drained, or does not serve: who made the surplus, or evicts what is broken, ends it then. Neither
//! the primary nor the replica that ships leaves; the one that does is drained like any other, so
//! that what it alone holds is taken over before its files go.

use super::failover::QUIET_US;
use super::view::View;
use crate::catalog::{Catalog, Placed, ShardPlacement};

/// Returns the version in which a replica that its shard can do without leaves; `None` when there
/// is none, or the catalog has only just changed.
pub(super) fn trim(view: &View<'_>, now_us: u64, nonce: u64) -> Option<Catalog> {
    let catalog = view.catalog;
    if now_us.saturating_sub(catalog.written_at_us) < QUIET_US {
        return None;
    }
    let mut with_surplus = catalog.placement.iter().filter(|shard| has_surplus(catalog, shard));
    with_surplus.find_map(|shard| {
        let spare = spare(view, shard)?;
        view.take_out(shard, &spare, |other| view.serves(other), now_us, nonce)
    })
}

/// Returns true when a shard has too many replicas, and nothing else is about to end that.
fn has_surplus(catalog: &Catalog, shard: &ShardPlacement) -> bool {
    // Whether or not the drain is paused.
    let is_drained =
        |member: &Placed| catalog.draining_nodes.iter().any(|drain| drain.node == member.node);
    shard.replicas.len() > catalog.spec.replicas as usize
        && shard.transferring_to.is_none()
        && !catalog.is_moving(shard.shard)
        && !shard.replicas.iter().any(is_drained)
}

/// Returns the replica that a shard can do without while all of them serve: one on a cordoned node
/// first, then one whose zone has another, then that on the fullest node.
fn spare(view: &View<'_>, shard: &ShardPlacement) -> Option<Placed> {
    let is_well = |member: &Placed| view.serves(member) && !view.is_too_old(member.replica);
    if !shard.replicas.iter().all(is_well) {
        return None;
    }
    let zone = |member: &Placed| (view.around.site)(member.node).zone;
    let has_neighbour = |member: &Placed| {
        let mut others = shard.replicas.iter().filter(|other| other.replica != member.replica);
        others.any(|other| zone(other) == zone(member))
    };
    let stays = [shard.primary(), shard.shipper()];
    let candidates = shard.replicas.iter().enumerate();
    let candidates = candidates.filter(|(_, member)| !stays.contains(&Some(**member)));
    let chosen = candidates.max_by_key(|(at, member)| {
        let site = (view.around.site)(member.node);
        (site.cordoned, has_neighbour(member), site.used, *at)
    });
    chosen.map(|(_, member)| *member)
}
