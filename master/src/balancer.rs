//! The task that rebalances the cluster: it begins the next moves while a rebalance runs, and ends
//! it when there are none left; with `master.rebalance = "on"` it also begins one by itself.
//!
//! **Invariant:** what runs is in the cluster settings and in the catalogs, so any master goes on
//! with it. Moves are decided by the pure balance and written by the drivers of the keyspaces; at
//! most `master.moves_at_once` replicas are on their way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vasto_core::balance::{Balance, Move, all_moves, is_balanced, next_moves};
use vasto_core::ids::KeyspaceId;
use vasto_core::reconcile::MoveOrder;
use vasto_shipping::Rebalance;

use crate::api;
use crate::api::rebalance::{begin, end};
use crate::cluster::{Cluster, now_us};
use crate::state::CatalogChange;

/// Interval at which a running rebalance is looked at.
const ROUND: Duration = Duration::from_millis(500);
/// Interval at which it is asked whether a rebalance is due.
const LOOK: Duration = Duration::from_secs(5);
/// Shortest interval at which the moves that are left are counted.
const COUNT: Duration = Duration::from_secs(3);
/// How many times longer than a count itself the pause before the next one is: counting the moves of
/// a large cluster takes seconds of a core.
const COUNT_PART: u32 = 20;
/// Interval at which a master asks the bucket whether another one has cancelled the rebalance.
const ASK_BUCKET: Duration = Duration::from_secs(10);
/// Time for which a rebalance that was cancelled is not begun again without a request,
/// microseconds.
const CANCELLED_FOR_US: u64 = 3_600_000_000;

/// What a rebalance waits for when moves are left and none may begin.
const LATER: &str = "changes of keyspaces to end, a node to have room, a new replica to know its load, or the pause \
     after a move that failed";

/// Rebalances whenever that is asked for, until the master stops.
pub(crate) async fn rebalance_always(cluster: Arc<Cluster>) {
    let mut balancer =
        Balancer { cluster: cluster.clone(), asked: None, count_at: None, uneven: false };
    let mut requests = cluster.rebalance_requests();
    loop {
        let pause = balancer.look().await;
        tokio::select! {
            () = cluster.shutdown.cancelled() => return,
            _ = requests.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

struct Balancer {
    cluster: Arc<Cluster>,
    /// When the bucket was asked for the settings.
    asked: Option<Instant>,
    /// When the moves that are left are counted again; at once when `None`.
    count_at: Option<Instant>,
    /// The cluster was out of balance at the last look too.
    uneven: bool,
}

impl Balancer {
    /// Does what is due; returns the time until the next look.
    async fn look(&mut self) -> Duration {
        let cluster = &self.cluster;
        if cluster.is_restricted() {
            return LOOK;
        }
        let running = cluster.state().settings.running_rebalance();
        match running {
            Some(running) => {
                self.round(running).await;
                ROUND
            }
            None if cluster.settings.rebalance => {
                self.begin_when_due().await;
                LOOK
            }
            None => LOOK,
        }
    }

    /// Begins a rebalance when the cluster has been out of balance for two looks.
    async fn begin_when_due(&mut self) {
        let cluster = self.cluster.clone();
        let picture = {
            let (state, mono_us, now_us) = (cluster.state(), cluster.mono_us(), now_us());
            let last = state.settings.rebalance.filter(|last| last.cancelled);
            let again_us = last.and_then(|last| last.ended_us).map(|at| at + CANCELLED_FOR_US);
            let may = again_us.is_none_or(|again_us| now_us >= again_us);
            let may = may && state.has_heard_of_all(mono_us) && state.moving(mono_us) == 0;
            may.then(|| state.balance(mono_us, now_us))
        };
        let uneven = picture.is_some_and(|picture| !is_balanced(&picture));
        let is_due = uneven && std::mem::replace(&mut self.uneven, uneven);
        self.uneven = uneven;
        if is_due {
            tracing::info!("the cluster is out of balance");
            if let Err(error) = begin(&cluster, None).await {
                tracing::warn!(
                    error = error.message,
                    "the rebalance has not begun; it is tried again"
                );
            }
        }
    }

    /// Begins the next moves of the running rebalance, or ends it.
    async fn round(&mut self, running: Rebalance) {
        let cluster = self.cluster.clone();
        let is_old = self.asked.is_none_or(|at| at.elapsed() >= ASK_BUCKET);
        if is_old && self.ask_bucket().await {
            return;
        }
        // Nothing begins, and it does not end: what is left is told once it goes on.
        if running.paused {
            return;
        }
        let Some((picture, waits)) = picture_of(&cluster) else { return };
        let moving = cluster.state().moving(cluster.mono_us());
        let free = cluster.settings.moves_at_once.saturating_sub(moving);
        let moves = next_moves(&picture, free);
        // Which nodes are cordoned is decided by the newest settings.
        if !moves.is_empty() && !is_old && self.ask_bucket().await {
            return;
        }
        let is_over = moves.is_empty() && waits.is_none() && is_balanced(&picture);
        let other = || (moves.is_empty() && !is_over).then(|| LATER.to_owned());
        self.note(&picture, waits.or_else(other)).await;
        for (keyspace, changes) in changes_of(&moves, running.since_us) {
            for change in changes {
                begin_moves(&cluster, keyspace, change).await;
            }
        }
        if is_over && let Err(error) = end(&cluster, running, false).await {
            tracing::info!(error = error.message, "the rebalance has not ended; it is tried again");
        }
    }

    /// Records how far the rebalance has come.
    async fn note(&mut self, picture: &Balance, waits: Option<String>) {
        self.cluster.state().rebalance.waiting_for = waits;
        let began = Instant::now();
        if self.count_at.is_some_and(|at| began < at) {
            return;
        }
        let picture = picture.clone();
        // Of a large cluster this takes a while.
        let counted = tokio::task::spawn_blocking(move || all_moves(&picture)).await;
        let took = began.elapsed();
        self.count_at = Some(Instant::now() + COUNT.max(took.saturating_mul(COUNT_PART)));
        let Ok(left) = counted else { return };
        let primaries = left.iter().filter(|one| matches!(one, Move::Primary { .. })).count();
        let mut state = self.cluster.state();
        let moving: usize = state.active().map(|keyspace| keyspace.catalog.moves.len()).sum();
        state.rebalance.replicas_left = left.len() - primaries + moving;
        state.rebalance.primaries_left = primaries;
    }

    /// Reads the newest settings; returns true when they are new.
    async fn ask_bucket(&mut self) -> bool {
        self.asked = Some(Instant::now());
        self.cluster.refresh_settings().await
    }
}

/// Returns the cluster as it is, and what is waited for; `None` while it cannot be told.
fn picture_of(cluster: &Cluster) -> Option<(Balance, Option<String>)> {
    let (state, mono_us) = (cluster.state(), cluster.mono_us());
    let heard = state.has_heard_of_all(mono_us);
    heard.then(|| (state.balance(mono_us, now_us()), state.rebalance_waits(mono_us)))
}

/// Returns the changes that begin these moves, by keyspace: one for the replicas of a keyspace, and
/// one for each primary.
fn changes_of(moves: &[Move], rebalance_us: u64) -> BTreeMap<KeyspaceId, Vec<CatalogChange>> {
    let mut orders: BTreeMap<KeyspaceId, Vec<MoveOrder>> = BTreeMap::new();
    let mut changes: BTreeMap<KeyspaceId, Vec<CatalogChange>> = BTreeMap::new();
    for made in moves {
        match *made {
            Move::Replica { keyspace, shard, replica, to, .. } => {
                orders.entry(keyspace).or_default().push(MoveOrder { shard, replica, to });
            }
            Move::Primary { keyspace, replica, .. } => {
                let change = CatalogChange::Prefer { replica, rebalance_us };
                changes.entry(keyspace).or_default().push(change);
            }
        }
    }
    for (keyspace, orders) in orders {
        changes.entry(keyspace).or_default().push(CatalogChange::Move { orders, rebalance_us });
    }
    changes
}

async fn begin_moves(cluster: &Arc<Cluster>, keyspace: KeyspaceId, change: CatalogChange) {
    let what = format!("{change:?}");
    match api::change(cluster, keyspace, change).await {
        Ok(_) => tracing::info!(%keyspace, what, "the rebalance goes on"),
        // The keyspace has changed meanwhile: the next look decides anew.
        Err(error) => tracing::info!(%keyspace, what, %error, "a move does not begin"),
    }
}

#[cfg(test)]
mod tests {
    use vasto_core::ids::{NodeId, ReplicaId, ShardId};

    use super::*;

    #[test]
    fn moves_of_one_keyspace_begin_with_one_version() {
        let (keyspace, from, to) = (KeyspaceId(1), NodeId(1), NodeId(2));
        let replica = |shard: u32| Move::Replica {
            keyspace,
            shard: ShardId(shard),
            replica: ReplicaId(u64::from(shard)),
            from,
            to,
            bytes: 1,
        };
        let primary = Move::Primary {
            keyspace: KeyspaceId(2),
            shard: ShardId(0),
            replica: ReplicaId(9),
            from,
            to,
            bytes: 1,
        };
        let changes = changes_of(&[replica(3), primary, replica(4)], 7);
        let order = |shard: u32| MoveOrder {
            shard: ShardId(shard),
            replica: ReplicaId(u64::from(shard)),
            to,
        };
        let orders = vec![order(3), order(4)];
        assert_eq!(changes[&keyspace], [CatalogChange::Move { orders, rebalance_us: 7 }]);
        let prefer = CatalogChange::Prefer { replica: ReplicaId(9), rebalance_us: 7 };
        assert_eq!(changes[&KeyspaceId(2)], [prefer]);
    }
}
