//! One task per keyspace: the only writer of its catalog in this master.
//!
//! Reports, requests, and a tick while a plan runs wake the task; it asks the pure state machine
//! (`vasto_core::reconcile::advance`) for the next version and writes it, create-only.
//!
//! **Invariant:** a version is installed, and with that shown to nodes and clients, only after its
//! write is known to have won. After a write with an unknown outcome the driver reads the tip
//! before anything else. A version that lost is discarded, the winner's tip is adopted, and
//! the decision is made again. A `sealing` version that was slow to write is never shown: it is
//! undone, so a slow bucket does not pause writers.

mod change;
mod entry;
#[cfg(test)]
mod tests;
mod write;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::KeyspaceId;
use vasto_core::reconcile::Advance;

pub(crate) use self::change::{changed, has_ended, pace_error, start};
pub(crate) use self::entry::{adopt, adopt_all, install, look_up};
use self::write::Written;
use crate::cluster::{Cluster, nonce, now_us};
use crate::state::{CatalogChange, ChangeRequest, ClusterState};
use crate::trace::Steps;

/// The interval at which a running plan or a due quarantine is checked when nothing is reported.
const TICK: Duration = Duration::from_millis(100);
/// The same while the only plans are those that make a replica: hundreds may run, and all that ends
/// their steps is reported, except time-outs of a minute.
const CHECK_COPIES: Duration = Duration::from_millis(500);
/// The interval at which a deleted keyspace is checked for whether it can be forgotten.
const CHECK_DELETED: Duration = Duration::from_secs(3_600);
/// The shortest time that a deleted keyspace is known: nodes that hold replicas of it must learn of
/// the deletion, and people must be able to undo it.
const DELETED_KEPT_MIN: Duration = Duration::from_secs(48 * 3_600);
/// How long the deletion of a keyspace is sent to nodes after this master learned of it.
const DELETED_SENT_FOR: Duration = Duration::from_secs(600);
/// The longest sleep until a quarantine ends, so that a stepped clock is noticed.
const CHECK_MAX: Duration = Duration::from_secs(60);
/// The shortest interval between reads of the tip that reports of nodes cause.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// The most lost races before a request is given up.
const ATTEMPTS_MAX: usize = 16;

/// The driver of one keyspace, which owns its catalog.
struct KeyspaceDriver {
    cluster: Arc<Cluster>,
    keyspace: KeyspaceId,
    wake: Arc<Notify>,
    requests: mpsc::Receiver<ChangeRequest>,
    refreshed: Option<Instant>,
    /// Since when the running plans are in their steps, for their traces.
    steps: Steps,
}

enum Event {
    Stop,
    Check,
    Change(ChangeRequest),
}

impl KeyspaceDriver {
    fn new(
        cluster: Arc<Cluster>,
        keyspace: KeyspaceId,
        wake: Arc<Notify>,
        requests: mpsc::Receiver<ChangeRequest>,
    ) -> Self {
        Self { cluster, keyspace, wake, requests, refreshed: None, steps: Steps::default() }
    }

    /// Runs until the master stops.
    async fn run(mut self) {
        loop {
            if self.refresh().await == Written::Stopping || self.drive().await == Written::Stopping
            {
                return;
            }
            if self.is_over() {
                return;
            }
            match self.select().await {
                Event::Stop => return,
                Event::Check => {}
                Event::Change(request) => self.change(request).await,
            }
        }
    }

    /// Returns true when a deleted keyspace was forgotten: there is nothing to drive any more.
    fn is_over(&self) -> bool {
        let kept = self.cluster.settings.retention.keep_for.max(DELETED_KEPT_MIN);
        let kept_us = kept.as_micros() as u64;
        self.cluster.state().forget_deleted(self.keyspace, now_us(), kept_us, DELETED_SENT_FOR)
    }

    async fn select(&mut self) -> Event {
        let look_in = {
            let (mut state, mono_us) = (self.cluster.state(), self.cluster.mono_us());
            let unsettled = state.is_unsettled(self.keyspace, mono_us);
            let look_again = state.look_again(self.keyspace, mono_us);
            state.keyspaces.get(&self.keyspace).and_then(|keyspace| match keyspace.behind {
                true => Some(REFRESH_INTERVAL),
                false if unsettled => Some(TICK),
                false => {
                    let checks = [next_check(&keyspace.catalog, now_us()), look_again];
                    checks.into_iter().flatten().min()
                }
            })
        };
        let check = async {
            match look_in {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.cluster.shutdown.cancelled() => Event::Stop,
            Some(request) = self.requests.recv() => Event::Change(request),
            () = self.wake.notified() => Event::Check,
            () = check => Event::Check,
        }
    }

    /// Reads the tip when a node has applied a version that this master does not know.
    async fn refresh(&mut self) -> Written {
        let hint = match self.cluster.state().keyspaces.get(&self.keyspace) {
            Some(keyspace) if keyspace.behind => keyspace.catalog.version,
            _ => return Written::Overtaken,
        };
        if self.refreshed.is_some_and(|at| at.elapsed() < REFRESH_INTERVAL) {
            return Written::Overtaken;
        }
        self.refreshed = Some(Instant::now());
        match self.tip(hint).await {
            None => return Written::Stopping,
            Some(Ok(Some(tip))) if tip.version > hint => self.adopt(tip),
            Some(Ok(_)) => {
                tracing::warn!(keyspace = %self.keyspace, version = %hint, "a node claims a catalog version that is not in the bucket");
            }
            Some(Err(error)) => {
                tracing::warn!(keyspace = %self.keyspace, %error, "cannot read the catalog that a node is ahead with");
                return Written::Overtaken;
            }
        }
        if let Some(keyspace) = self.cluster.state().keyspaces.get_mut(&self.keyspace) {
            keyspace.behind = false;
        }
        Written::Overtaken
    }

    /// Writes the next version until there is none.
    async fn drive(&mut self) -> Written {
        loop {
            let (next, hold, pauses) = {
                let mut state = self.cluster.state();
                match state.decide(self.keyspace, self.cluster.mono_us(), now_us(), nonce()) {
                    Advance::Write(next) => {
                        let hold = state.hold_places(&next);
                        let pauses = state.pauses_moves(&next);
                        (next, hold, pauses)
                    }
                    Advance::Idle => {
                        self.note_waiting(&mut state, None);
                        return Written::Won;
                    }
                    Advance::Wait(what) => {
                        self.note_waiting(&mut state, Some(what));
                        return Written::Won;
                    }
                }
            };
            let held = hold.map(|hold| self.cluster.hold_places(hold));
            // The newest settings decide which nodes may get a replica, and whether a rebalance is
            // paused: another master may have resumed it.
            if (held.is_some() || pauses) && self.cluster.refresh_settings().await {
                continue;
            }
            if self.write(*next).await == Written::Stopping {
                return Written::Stopping;
            }
        }
    }

    fn note_waiting(&self, state: &mut ClusterState, what: Option<String>) {
        let keyspace = state.keyspaces.get_mut(&self.keyspace);
        let Some(keyspace) = keyspace.filter(|keyspace| keyspace.waiting_for != what) else {
            return;
        };
        if let Some(what) = &what {
            tracing::debug!(keyspace = keyspace.catalog.name, what, "waiting for");
        }
        keyspace.waiting_for = what;
    }

    async fn change(&mut self, request: ChangeRequest) {
        for _ in 0..ATTEMPTS_MAX {
            if request.reply.is_closed() {
                return;
            }
            let of_rebalance = request.change.is_of_rebalance();
            if of_rebalance || matches!(request.change, CatalogChange::Resize { .. }) {
                self.cluster.refresh_settings().await;
            }
            let next = {
                let mut state = self.cluster.state();
                let Some(keyspace) = state.keyspaces.get(&self.keyspace) else { return };
                let next = changed(
                    &state,
                    keyspace,
                    &request.change,
                    self.cluster.mono_us(),
                    now_us(),
                    nonce(),
                );
                next.map(|mut next| {
                    state.follow_wholes(&mut next);
                    let hold = state.hold_places(&next);
                    let pauses = state.pauses_moves(&next);
                    (next, hold, pauses)
                })
            };
            let (next, hold, pauses) = match next {
                Ok(decided) => decided,
                Err(error) => {
                    let _ = request.reply.send(Err(error));
                    return;
                }
            };
            let _held = hold.map(|hold| self.cluster.hold_places(hold));
            // By old settings a rebalance may be paused that another master has resumed.
            if pauses && self.cluster.refresh_settings().await {
                continue;
            }
            match self.write(next.clone()).await {
                Written::Won => {
                    let _ = request.reply.send(Ok(Arc::new(next)));
                    return;
                }
                // Another master may have begun the same: the next look decides anew.
                Written::Overtaken if of_rebalance => break,
                Written::Overtaken => {}
                Written::Stopping => return,
            }
        }
        let busy = "other masters keep changing this keyspace; try again";
        let _ = request.reply.send(Err(VastoError::new(ErrorCode::Unavailable, busy)));
    }
}

/// Returns when the keyspace must be checked although nothing is reported.
fn next_check(catalog: &Catalog, now_us: u64) -> Option<Duration> {
    if catalog.state == KeyspaceState::Deleted {
        return Some(CHECK_DELETED);
    }
    let ticks = catalog.plans().map(|plan| if plan.adds_member() { CHECK_COPIES } else { TICK });
    if let Some(tick) = ticks.min() {
        return Some(tick);
    }
    let waits = catalog.quarantines.iter().map(|quarantine| match quarantine.dropping {
        true => TICK,
        false => {
            Duration::from_micros(quarantine.until_us.saturating_sub(now_us)).clamp(TICK, CHECK_MAX)
        }
    });
    waits.min()
}
