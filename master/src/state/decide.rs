//! The next catalog version of a keyspace: the pure rules of `vasto_core::reconcile`, asked in
//! their order of urgency.
//!
//! **Invariant:** nothing is written or sent here. Without any live node only a seal that was slow
//! to write is undone; everything else waits: a master without sessions has no reports, and another
//! master may be driving.

use std::cell::OnceCell;

use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_core::limits::{ACCEPTED_LOSS_AWAY, COPIES_PER_NODE_MAX};
use vasto_core::plan::{Plan, SEALS_UNDONE_MAX, Step};
use vasto_core::reconcile::{
    Advance, Around, Presence, abort, advance_members, advance_moves, advance_primaries,
    advance_shown, cancel_moves, give_up_moves_to, give_up_on, undo_seal, waits_for,
};

use super::ClusterState;
use super::change::CANCELLED;
use super::keyspace::{Delivery, Keyspace};

impl ClusterState {
    /// Returns the next action of a keyspace's driver. What is written has the pace of the drains and
    /// of the rebalance that it is a part of; when nothing else is, that is written alone.
    pub(crate) fn decide(
        &self,
        keyspace: KeyspaceId,
        mono_us: u64,
        now_us: u64,
        nonce: u64,
    ) -> Advance {
        match self.decide_alone(keyspace, mono_us, now_us, nonce) {
            Advance::Write(mut next) => {
                self.follow_wholes(&mut next);
                Advance::Write(next)
            }
            other => {
                let paced = self.with_pace_of_wholes(keyspace, now_us, nonce);
                paced.map_or(other, |next| Advance::Write(Box::new(next)))
            }
        }
    }

    /// Returns the next action of a keyspace by itself.
    fn decide_alone(&self, keyspace: KeyspaceId, mono_us: u64, now_us: u64, nonce: u64) -> Advance {
        let Some(keyspace) = self.keyspaces.get(&keyspace) else { return Advance::Idle };
        let (catalog, reports) = (&keyspace.catalog, &keyspace.reports);
        if catalog.state == KeyspaceState::Deleted {
            return Advance::Idle;
        }
        // A wall clock that was set back must not stretch a seal: from the version's own time on,
        // time passes at least as fast as it has passed here since.
        let in_force_us =
            u64::try_from(keyspace.installed.elapsed().as_micros()).unwrap_or(u64::MAX);
        let now_us = now_us.max(catalog.written_at_us.saturating_add(in_force_us));
        let shown_us = keyspace.shown_us(now_us, in_force_us);
        if let Some(next) = without_slow_seal(keyspace, now_us, nonce) {
            return Advance::Write(Box::new(next));
        }
        if self.live().next().is_none() {
            return match catalog.plans().next() {
                Some(_) => Advance::Wait("a node to report to this master".into()),
                None => Advance::Idle,
            };
        }
        let presence = |node| self.presence(node, mono_us);
        if let Some((next, _)) = advance_primaries(catalog, reports, presence, now_us, nonce) {
            return Advance::Write(Box::new(next));
        }
        if let Some(next) = self.without_disk(keyspace, now_us, nonce) {
            return Advance::Write(Box::new(next));
        }
        let candidates = OnceCell::new();
        let around = Around {
            presence: &presence,
            long_gone: &|node| self.away_us(node, mono_us) > ACCEPTED_LOSS_AWAY.as_micros() as u64,
            lost: &|node| {
                self.replace_after_us.is_some_and(|after| self.away_us(node, mono_us) > after)
            },
            room: &|catalog, shard| {
                let candidates = candidates.get_or_init(|| self.candidates(Some(catalog)));
                let not_busy =
                    candidates.iter().filter(|candidate| candidate.copying < COPIES_PER_NODE_MAX);
                self.best(not_busy, catalog, shard, now_us)
            },
            site: &|node| self.site(node),
        };
        if let Some(next) = advance_members(catalog, reports, &around, now_us, nonce) {
            return Advance::Write(Box::new(next));
        }
        if let Some(next) = self.without_cancelled_moves(keyspace, now_us, nonce) {
            return Advance::Write(Box::new(next));
        }
        let here_us = |node| match presence(node) {
            Presence::Here(since_us) => since_us,
            Presence::Away | Presence::Gone => 0,
        };
        let away_us = |node| self.away_us(node, mono_us);
        let moves = advance_moves(catalog, reports, &around, away_us, here_us, now_us, nonce);
        if let Advance::Write(next) = moves {
            return Advance::Write(next);
        }
        let advanced = advance_shown(catalog, shown_us, reports, away_us, here_us, now_us, nonce);
        match (advanced, moves) {
            (Advance::Write(next), _) => Advance::Write(next),
            (_, Advance::Wait(what)) | (Advance::Wait(what), _) => Advance::Wait(what),
            _ => waits_for(catalog, reports, &around, now_us).map_or(Advance::Idle, Advance::Wait),
        }
    }

    /// Returns the version that undoes the moves of a cancelled rebalance whose new replicas are not
    /// placed: they may have begun after the request to cancel, or with another master.
    fn without_cancelled_moves(
        &self,
        keyspace: &Keyspace,
        now_us: u64,
        nonce: u64,
    ) -> Option<Catalog> {
        let cancelled = self.settings.rebalance.filter(|rebalance| rebalance.cancelled)?;
        let catalog = &keyspace.catalog;
        let mut moves = catalog.moves.iter().filter(|moving| moving.plan.step != Step::Committed);
        moves.find(|moving| moving.rebalance_us == cancelled.since_us)?;
        cancel_moves(catalog, CANCELLED, &keyspace.reports, now_us, nonce)
    }

    /// Returns the version that aborts a plan for which a target has no disk left, or a source that
    /// exports. A restore from the bucket is not aborted for that: the keyspace that it makes would
    /// be lost.
    fn without_disk(&self, keyspace: &Keyspace, now_us: u64, nonce: u64) -> Option<Catalog> {
        let full =
            |node: NodeId| self.nodes.get(&node).is_some_and(|node| node.disk().is_exhausted());
        let reason =
            |node: NodeId| format!("{node} has no disk left for it; free some, or add a node");
        let catalog = &keyspace.catalog;
        let mut moving = catalog.moves.iter().filter(|one| one.plan.step != Step::Committed);
        if let Some(node) = moving.find_map(|one| one.to().filter(|to| full(*to))) {
            let reports = &keyspace.reports;
            return give_up_moves_to(catalog, &reason(node), node, reports, now_us, nonce);
        }
        let goes_on = |plan: &&Plan| {
            (plan.adds_member() || plan.resize().is_some())
                && matches!(plan.step, Step::Prepare | Step::Tail)
        };
        let plan = catalog.plan.as_ref().filter(goes_on)?;
        let exporting = plan.sources.iter().filter(|_| plan.exports()).map(|source| source.node);
        let mut nodes = plan.targets.iter().map(|target| target.node).chain(exporting);
        let node = nodes.find(|node| full(*node))?;
        give_up_on(catalog, &reason(node), node, &keyspace.reports, now_us, nonce)
    }
}

/// Returns the version that undoes a seal which took too long to write; it aborts the plan when
/// that was so too often.
fn without_slow_seal(keyspace: &Keyspace, now_us: u64, nonce: u64) -> Option<Catalog> {
    let catalog = &keyspace.catalog;
    let plan = catalog.plan.as_ref().filter(|plan| plan.step == Step::Sealing)?;
    if keyspace.delivery != Delivery::Undo {
        return None;
    }
    let reason = "the bucket was too slow to seal, too many times";
    let aborted = (plan.seals_undone >= SEALS_UNDONE_MAX)
        .then(|| abort(catalog, reason, &keyspace.reports, now_us, nonce))
        .flatten();
    Some(aborted.unwrap_or_else(|| undo_seal(catalog, plan, now_us, nonce)))
}
