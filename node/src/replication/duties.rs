//! What a hosted replica does for its shard: follows its peers, catches up before it serves, takes
//! over as primary, is drained, seals together with the others.
//!
//! **Invariants**
//! - A replica that was opened serves nothing before it holds what the peers that answer held then;
//!   peers that are silent for [`CATCH_UP_PATIENCE`] are skipped and named in the log.
//! - It becomes primary by a hand-over only once it holds everything that the primary held when it
//!   had stopped to take read-modify-writes.
//! - A seal of the shard is complete only once every placed replica has sealed and this one holds
//!   everything that they named.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::{Catalog, Placed};
use vasto_core::ids::{CatalogVersion, Lsn, ReplicaId, Vector, join};
use vasto_core::limits::{CATCH_UP_PATIENCE, HANDOVER_TIMEOUT, SEAL_TIMEOUT};
use vasto_core::plan::ReplicationReport;
use vasto_proto::convert::vector_from_wire;
use vasto_proto::v1;

use super::floor::{Council, interval};
use super::peers::Peers;
use super::puller::Pullers;
use crate::core::NodeCore;
use crate::replica::job::{ReplicaError, Role};
use crate::replica::{OLD_COPY, Replica};

/// Between two looks at something that a peer or the pulls have to bring.
const LOOK: Duration = Duration::from_millis(2);
/// Between two questions to a peer that did not answer.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A replica that stops waits this long for another one to have its log.
const HAND_ON_PATIENCE: Duration = Duration::from_secs(1);

/// A replica that serves in the place of the primary reports for how long in steps of this.
const ACTING_STEP_MS: u64 = 100;

/// The replication of one hosted replica.
pub struct Duties {
    core: Arc<NodeCore>,
    peers: Arc<Peers>,
    replica: Replica,
    pullers: Pullers,
    cancel: CancellationToken,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The hand-over that is being worked on.
    taking_over: Option<CatalogVersion>,
    took_over: Option<CatalogVersion>,
    /// The log's end when this replica stopped to take writes for good.
    last_lsn: Option<Lsn>,
    evict: Option<ReplicaId>,
    /// When the last round about the collection floor began, and whether it still runs.
    floor_round: Option<(Instant, bool)>,
    /// Counts the times it had to catch up: only the last one makes it ready.
    catching_up: u64,
}

impl Duties {
    /// The duties of a replica that was just opened; they end with `cancel`.
    pub fn new(core: Arc<NodeCore>, peers: Arc<Peers>, replica: Replica, cancel: CancellationToken) -> Arc<Self> {
        let pullers = Pullers::new(core.clone(), peers.clone(), replica.clone(), cancel.clone());
        Arc::new(Self { core, peers, replica, pullers, cancel, state: Mutex::default() })
    }

    /// The others of the shard under this version.
    fn others(&self, catalog: &Catalog) -> Vec<Placed> {
        let placed = catalog.shard(self.replica.shard).into_iter().flat_map(|shard| shard.replicas.iter().copied());
        placed.filter(|one| one.replica != self.replica.id).collect()
    }

    /// What the replica is to its shard under this version.
    pub fn role(&self, catalog: &Catalog) -> Role {
        let Some(shard) = catalog.shard(self.replica.shard).filter(|_| catalog.is_placed(self.replica.id)) else {
            return Role::Detached;
        };
        match shard.primary() {
            Some(primary) if primary.replica == self.replica.id => match shard.handing_to {
                Some(_) => Role::HandingOver,
                None => Role::Primary,
            },
            _ => Role::Secondary,
        }
    }

    /// Brings pulls and followers in line with a version.
    pub fn follow(&self, catalog: &Catalog) {
        let (shard, id) = (self.replica.shard, self.replica.id);
        self.pullers.follow(&catalog.sources_of(shard, id));
        let placed = self.others(catalog).into_iter().map(|one| one.replica);
        self.replica.followers().expect(catalog.followers_of(shard, id), placed);
        if catalog.is_placed(id) {
            self.state.lock().last_lsn = None;
        }
    }

    /// A replica with peers serves nothing until it has caught up; begins that.
    pub fn begin_to_catch_up(self: &Arc<Self>, catalog: &Catalog) {
        let others = self.others(catalog);
        let turn = {
            let mut state = self.state.lock();
            state.catching_up += 1;
            state.catching_up
        };
        if others.is_empty() || !catalog.is_placed(self.replica.id) {
            // It may have been told to wait while it still had somebody to wait for.
            self.replica.set_ready(true);
            return;
        }
        self.replica.set_ready(false);
        let this = self.clone();
        tokio::spawn(async move {
            let caught_up = this.catch_up(others);
            let Some(()) = this.cancel.run_until_cancelled(caught_up).await else { return };
            let state = this.state.lock();
            if state.catching_up == turn {
                this.replica.set_ready(true);
            }
            drop(state);
            this.core.report.notify_one();
        });
    }

    async fn catch_up(&self, others: Vec<Placed>) {
        let began = Instant::now();
        let asked =
            join_all(others.iter().map(|one| self.ask(*one, CatalogVersion(0), CatalogVersion(0), CATCH_UP_PATIENCE)));
        let replies = asked.await;
        let mut needed: Vec<(ReplicaId, Vector)> = Vec::new();
        let mut version = 0;
        for (one, reply) in others.iter().zip(replies) {
            let Some(reply) = reply else {
                tracing::info!(
                    keyspace = self.replica.keyspace.0,
                    shard = self.replica.shard.0,
                    peer = one.replica.0,
                    node = %one.node,
                    "a peer does not answer; this replica serves without knowing what it holds"
                );
                continue;
            };
            let vector = vector_from_wire(&reply.vector);
            if self.replica.is_behind_itself(&vector) {
                tracing::error!(keyspace = self.replica.keyspace.0, shard = self.replica.shard.0, reason = OLD_COPY);
                self.replica.close(OLD_COPY.into());
                return std::future::pending().await;
            }
            version = version.max(reply.version);
            needed.push((one.replica, vector));
        }
        // A primary that was replaced while it was away must hear of that first.
        self.replica.primary_from(CatalogVersion(version));
        // What a peer named comes from it, or from another one that has it; a live one is waited for however slow
        // it or this disk is. What others bring meanwhile says nothing of one that is gone.
        let mut heard: Vec<Instant> = vec![Instant::now(); needed.len()];
        loop {
            let mut missing = false;
            for ((peer, vector), heard) in needed.iter().zip(&mut heard) {
                // Too old for this peer: this replica is rebuilt, unless one comes back that can bring it up to date.
                if self.pullers.is_connected(*peer) || self.pullers.is_too_old() {
                    *heard = Instant::now();
                }
                missing |= heard.elapsed() <= CATCH_UP_PATIENCE * 2 && !self.replica.covers(vector);
            }
            if !missing {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        if needed.iter().any(|(_, vector)| !self.replica.covers(vector)) {
            tracing::info!(
                keyspace = self.replica.keyspace.0,
                shard = self.replica.shard.0,
                "the peers that named what is missing here are gone again; this replica serves without it"
            );
        }
        // A newer version comes from the master alone, which may be away: it decides who is primary, and
        // `primary_from` keeps this one from acting as what it was.
        let versions = Instant::now();
        while self.replica.version().0 < version && versions.elapsed() < CATCH_UP_PATIENCE {
            tokio::time::sleep(LOOK).await;
        }
        tracing::info!(
            keyspace = self.replica.keyspace.0,
            shard = self.replica.shard.0,
            replica = self.replica.id.0,
            ms = began.elapsed().as_millis() as u64,
            "caught up with its peers"
        );
    }

    /// Where a peer stands; `None` when it does not say in time.
    async fn ask(
        &self,
        peer: Placed,
        min_version: CatalogVersion,
        sealed: CatalogVersion,
        patience: Duration,
    ) -> Option<v1::PositionReply> {
        let began = Instant::now();
        loop {
            let left = patience.checked_sub(began.elapsed())?;
            let request = v1::PositionRequest {
                keyspace_id: self.replica.keyspace.0,
                replica_id: peer.replica.0,
                min_version: min_version.0,
                sealed_version: sealed.0,
                wait_ms: left.as_millis() as u32,
            };
            let asked = tokio::time::timeout(left, self.peers.position(&self.core, peer.node, request)).await;
            match asked {
                Ok(Ok(reply))
                    if reply.version >= min_version.0 && (sealed.0 == 0 || reply.sealed_version == sealed.0) =>
                {
                    return Some(reply);
                }
                Ok(_) => tokio::time::sleep(ASK_AGAIN.min(left)).await,
                Err(_) => return None,
            }
        }
    }

    async fn hold(&self, needed: &Vector, patience: Duration) -> bool {
        let began = Instant::now();
        while !self.replica.covers(needed) {
            if began.elapsed() > patience {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    /// Works on a hand-over to this replica, if the version says so.
    pub fn take_over(self: &Arc<Self>, catalog: &Arc<Catalog>) {
        let shard = catalog.shard(self.replica.shard);
        let from = shard.filter(|shard| shard.handing_to == Some(self.replica.id)).and_then(|shard| shard.primary());
        let Some(from) = from else {
            let mut state = self.state.lock();
            state.taking_over = None;
            state.took_over = None;
            return;
        };
        if self.state.lock().taking_over.replace(catalog.version) == Some(catalog.version) {
            return;
        }
        let (this, version) = (self.clone(), catalog.version);
        tokio::spawn(async move {
            let work = async {
                let reply = this.ask(from, version, CatalogVersion(0), HANDOVER_TIMEOUT).await?;
                this.hold(&vector_from_wire(&reply.vector), HANDOVER_TIMEOUT).await.then_some(())
            };
            let done = this.cancel.run_until_cancelled(work).await.flatten();
            let mut state = this.state.lock();
            if done.is_some() && state.taking_over == Some(version) {
                state.took_over = Some(version);
                drop(state);
                this.core.report.notify_one();
            }
        });
    }

    /// Waits until every other placed replica has sealed under the version and this one holds all
    /// that they named; answers the end of its log then. `None` when that takes too long.
    pub async fn sealed_by_all(&self, catalog: &Catalog) -> Option<Lsn> {
        let others = self.others(catalog);
        let replies =
            join_all(others.iter().map(|one| self.ask(*one, catalog.version, catalog.version, SEAL_TIMEOUT))).await;
        let mut needed = Vector::new();
        for reply in replies {
            needed = join(&needed, &vector_from_wire(&reply?.vector));
        }
        if !self.hold(&needed, SEAL_TIMEOUT).await {
            return None;
        }
        Some(self.replica.position().await.ok()?.lsn)
    }

    /// A replica that left the placement: notes where its log ends, once it takes no more writes.
    pub async fn detach(&self) -> Result<(), ReplicaError> {
        if self.state.lock().last_lsn.is_none() {
            let lsn = self.replica.position().await?.lsn;
            self.state.lock().last_lsn = Some(lsn);
        }
        Ok(())
    }

    /// The replica stops in order: it takes nothing more, and what it alone has goes to another first.
    pub async fn hand_on(&self) {
        if !self.replica.followers().has_peers() {
            return;
        }
        {
            let mut state = self.state.lock();
            // No catch-up makes it ready again.
            state.catching_up += 1;
            self.replica.set_ready(false);
        }
        let Ok(position) = self.replica.position().await else { return };
        let began = Instant::now();
        while !self.replica.followers().anybody_covers(position.lsn) && began.elapsed() < HAND_ON_PATIENCE {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Begins a round about the collection floor when one is due.
    pub fn collect(self: &Arc<Self>, catalog: &Arc<Catalog>) {
        let council = Council { core: self.core.clone(), peers: self.peers.clone(), replica: self.replica.clone() };
        {
            let state = self.state.lock();
            let pause = interval(catalog.spec.grace_ms());
            if state.floor_round.is_some_and(|(began, runs)| runs || began.elapsed() < pause) {
                return;
            }
        }
        let Some(floor) = council.candidate(catalog) else { return };
        self.state.lock().floor_round = Some((Instant::now(), true));
        let (this, catalog) = (self.clone(), catalog.clone());
        tokio::spawn(async move {
            let outcome = this.cancel.run_until_cancelled(council.agree(&catalog, floor)).await;
            if let Some(Err(status)) = outcome {
                tracing::debug!(
                    keyspace = catalog.keyspace.0,
                    shard = this.replica.shard.0,
                    reason = status.message(),
                    "deletes are remembered longer: a round about the collection floor was given up"
                );
            }
            if let Some((_, runs)) = &mut this.state.lock().floor_round {
                *runs = false;
            }
        });
    }

    /// The member that keeps this replica's log at its cap.
    pub fn set_evict(&self, evict: Option<vasto_core::ids::ReplicaId>) {
        self.state.lock().evict = evict;
    }

    /// The lag behind one peer; `None` while nothing is known of it.
    pub fn lag_behind(&self, peer: vasto_core::ids::ReplicaId) -> Option<u64> {
        self.pullers.lag_behind(peer)
    }

    /// Tells the meter how far the pulls are.
    pub fn measure(&self) {
        self.pullers.measure();
    }

    /// What the master should know.
    pub fn report(&self) -> ReplicationReport {
        let lag = self.pullers.lag();
        let state = self.state.lock();
        let drained_by = state.last_lsn.map(|lsn| self.replica.followers().covered_by(lsn)).unwrap_or_default();
        ReplicationReport {
            ready: self.replica.is_ready() && self.replica.closed().is_none() && !self.replica.authority().is_stalled(),
            serving: Some(self.replica.authority().is_serving()),
            stalled: self.replica.authority().is_stalled(),
            acting_ms: self.replica.authority().acting_ms() / ACTING_STEP_MS * ACTING_STEP_MS,
            lag_lsns: lag.lsns,
            lag_ms: lag.ms,
            took_over: state.took_over,
            drained: !drained_by.is_empty(),
            drained_by,
            took_from_bucket: Vec::new(),
            too_old: self.pullers.is_too_old(),
            evict: state.evict,
            // The manager knows what a closed one waits for.
            passing: false,
        }
    }
}
