//! Replication of a hosted replica: follows its peers, catches up before it serves, takes over as
//! primary, is drained, seals together with its peers.
//!
//! **Invariants**
//! - An opened replica serves nothing before it holds what the peers that answer held then; peers
//!   that are silent for [`CATCH_UP_PATIENCE`] are skipped and named in the log.
//! - A replica becomes primary by a leadership transfer only once it holds everything that the
//!   primary held when it had stopped accepting read-modify-writes.
//! - A seal of the shard is complete only once every placed replica has sealed and this one holds
//!   everything that they named.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::{Catalog, Placed};
use vasto_core::ids::{CatalogVersion, Lsn, ReplicaId, Vector, covers, join};
use vasto_core::limits::{CATCH_UP_PATIENCE, HANDOVER_TIMEOUT, SEAL_TIMEOUT};
use vasto_core::report::ReplicationReport;
use vasto_proto::convert::vector_from_wire;
use vasto_proto::v1;

use super::gc_floor::{FloorRound, interval};
use super::peers::Peers;
use super::pullers::Pullers;
use crate::registry::NodeRegistry;
use crate::replica::command::{ReplicaError, Role};
use crate::replica::{OLD_COPY, Replica};

/// Interval between two checks for records or versions that a peer or the pulls bring.
const POLL: Duration = Duration::from_millis(2);

/// Longest wait of a stopping replica for another one to hold its log.
const HAND_ON_PATIENCE: Duration = Duration::from_secs(1);

/// Granularity of the time that a replica which serves in place of the primary reports.
const ACTING_STEP_MS: u64 = 100;

/// The replication of one hosted replica.
pub(crate) struct Replicator {
    registry: Arc<NodeRegistry>,
    peers: Arc<Peers>,
    replica: Replica,
    pullers: Pullers,
    cancel: CancellationToken,
    state: Mutex<ReplicatorState>,
}

#[derive(Default)]
struct ReplicatorState {
    /// Version of the leadership transfer in progress.
    taking_over: Option<CatalogVersion>,
    took_over: Option<CatalogVersion>,
    /// End of the log when this replica stopped accepting writes for good.
    last_lsn: Option<Lsn>,
    evict: Option<ReplicaId>,
    /// Start of the last gc floor round, and whether it still runs.
    floor_round: Option<(Instant, bool)>,
    /// Counts the catch-ups: only the last one makes the replica ready.
    catching_up: u64,
}

impl Replicator {
    /// Creates the replicator of a replica that was just opened; its tasks end with `cancel`.
    pub(crate) fn new(
        registry: Arc<NodeRegistry>,
        peers: Arc<Peers>,
        replica: Replica,
        cancel: CancellationToken,
    ) -> Arc<Self> {
        let pullers =
            Pullers::new(registry.clone(), peers.clone(), replica.clone(), cancel.clone());
        Arc::new(Self { registry, peers, replica, pullers, cancel, state: Mutex::default() })
    }

    /// Returns the other replicas of the shard under this version.
    fn others(&self, catalog: &Catalog) -> Vec<Placed> {
        let placed = catalog
            .shard(self.replica.shard)
            .into_iter()
            .flat_map(|shard| shard.replicas.iter().copied());
        placed.filter(|member| member.replica != self.replica.id).collect()
    }

    /// Returns the role of the replica in its shard under this version.
    pub(crate) fn role(&self, catalog: &Catalog) -> Role {
        let Some(shard) =
            catalog.shard(self.replica.shard).filter(|_| catalog.is_placed(self.replica.id))
        else {
            return Role::Detached;
        };
        match shard.primary() {
            Some(primary) if primary.replica == self.replica.id => match shard.transferring_to {
                Some(_) => Role::TransferringLeadership,
                None => Role::Primary,
            },
            _ => Role::Secondary,
        }
    }

    /// Aligns pulls and followers with a version.
    pub(crate) fn follow(&self, catalog: &Catalog) {
        let (shard, id) = (self.replica.shard, self.replica.id);
        self.pullers.follow(&catalog.sources_of(shard, id));
        let placed = self.others(catalog).into_iter().map(|member| member.replica);
        self.replica.followers().expect(catalog.followers_of(shard, id), placed);
        if catalog.is_placed(id) {
            self.state.lock().last_lsn = None;
        }
    }

    /// Begins the catch-up: a replica with peers serves nothing until it has caught up.
    pub(crate) fn begin_to_catch_up(self: &Arc<Self>, catalog: &Catalog) {
        let others = self.others(catalog);
        let turn = {
            let mut state = self.state.lock();
            state.catching_up += 1;
            state.catching_up
        };
        if others.is_empty() || !catalog.is_placed(self.replica.id) {
            // An earlier call may have made the replica wait while it still had peers.
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
            this.registry.report.notify_one();
        });
    }

    async fn catch_up(&self, others: Vec<Placed>) {
        let began = Instant::now();
        let asked =
            join_all(others.iter().map(|peer| {
                self.ask(*peer, CatalogVersion(0), CatalogVersion(0), CATCH_UP_PATIENCE)
            }));
        let replies = asked.await;
        let mut needed: Vec<(ReplicaId, Vector)> = Vec::new();
        let mut version = 0;
        for (peer, reply) in others.iter().zip(replies) {
            let Some(reply) = reply else {
                tracing::info!(
                    keyspace = self.replica.keyspace.0,
                    shard = self.replica.shard.0,
                    peer = peer.replica.0,
                    node = %peer.node,
                    "a peer does not answer; this replica serves without knowing what it holds"
                );
                continue;
            };
            let vector = vector_from_wire(&reply.vector);
            if self.replica.is_behind_itself(&vector) {
                tracing::error!(
                    keyspace = self.replica.keyspace.0,
                    shard = self.replica.shard.0,
                    reason = OLD_COPY
                );
                self.replica.close(OLD_COPY.into());
                return std::future::pending().await;
            }
            version = version.max(reply.version);
            needed.push((peer.replica, vector));
        }
        // A primary that was replaced while it was away must learn of that first.
        self.replica.primary_from(CatalogVersion(version));
        // Records that a peer named come from that peer, or from another one that has them; a live
        // peer is waited for however slow it or this disk is. Records from other peers prove
        // nothing about a peer that is gone.
        let mut heard: Vec<Instant> = vec![Instant::now(); needed.len()];
        loop {
            let mut missing = false;
            for ((peer, vector), heard) in needed.iter().zip(&mut heard) {
                // A replica that is too old for this peer's log is rebuilt, unless a peer comes
                // back that can bring it up to date.
                if self.pullers.is_connected(*peer) || self.pullers.is_too_old() {
                    *heard = Instant::now();
                }
                missing |= heard.elapsed() <= CATCH_UP_PATIENCE * 2 && !self.replica.covers(vector);
            }
            if !missing {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        if needed.iter().any(|(_, vector)| !self.replica.covers(vector)) {
            tracing::info!(
                keyspace = self.replica.keyspace.0,
                shard = self.replica.shard.0,
                "the peers that named what is missing here are gone again; this replica serves without it"
            );
        }
        // A newer version comes from the master alone, which may be away: the version decides who
        // is primary, and `primary_from` keeps this replica from acting in its former role.
        let versions = Instant::now();
        while self.replica.version().0 < version && versions.elapsed() < CATCH_UP_PATIENCE {
            tokio::time::sleep(POLL).await;
        }
        tracing::info!(
            keyspace = self.replica.keyspace.0,
            shard = self.replica.shard.0,
            replica = self.replica.id.0,
            ms = began.elapsed().as_millis() as u64,
            "caught up with its peers"
        );
    }

    /// Returns the position of a peer under these versions; `None` when the peer does not answer in
    /// time.
    async fn ask(
        &self,
        peer: Placed,
        min_version: CatalogVersion,
        sealed: CatalogVersion,
        patience: Duration,
    ) -> Option<v1::PositionReply> {
        let keyspace = self.replica.keyspace;
        self.peers
            .position_under(&self.registry, keyspace, peer, min_version, sealed, patience)
            .await
    }

    async fn hold(&self, needed: &Vector, patience: Duration) -> bool {
        let mut changes = self.replica.vector_changes();
        // The sender of the changes is the replica's: it does not end before.
        let held = async {
            loop {
                changes.borrow_and_update();
                if self.replica.covers(needed) || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(patience, held).await.is_ok() && self.replica.covers(needed)
    }

    /// Works on a leadership transfer to this replica, if the version names one.
    pub(crate) fn take_over(self: &Arc<Self>, catalog: &Arc<Catalog>) {
        let shard = catalog.shard(self.replica.shard);
        let from = shard
            .filter(|shard| shard.transferring_to == Some(self.replica.id))
            .and_then(|shard| shard.primary());
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
                this.registry.report.notify_one();
            }
        });
    }

    /// Waits until every other placed replica has sealed under the version and this one holds all
    /// that they named; returns the LSN of its log that covers it: that of its own seal when it held
    /// all of it then, which takes no sync. `None` when that takes too long.
    pub(crate) async fn sealed_by_all(&self, catalog: &Catalog) -> Option<Lsn> {
        let others = self.others(catalog);
        let replies = join_all(
            others
                .iter()
                .map(|peer| self.ask(*peer, catalog.version, catalog.version, SEAL_TIMEOUT)),
        )
        .await;
        let mut needed = Vector::new();
        for reply in replies {
            needed = join(&needed, &vector_from_wire(&reply?.vector));
        }
        let at_seal = self.replica.position_at_seal(catalog.version);
        if let Some(held) = at_seal.filter(|held| covers(&held.vector, &needed)) {
            return Some(held.lsn);
        }
        if !self.hold(&needed, SEAL_TIMEOUT).await {
            return None;
        }
        Some(self.replica.position().await.ok()?.lsn)
    }

    /// Notes the end of the log of a replica that left the placement, once it accepts no more
    /// writes.
    pub(crate) async fn detach(&self) -> Result<(), ReplicaError> {
        if self.state.lock().last_lsn.is_none() {
            let lsn = self.replica.position().await?.lsn;
            self.state.lock().last_lsn = Some(lsn);
        }
        Ok(())
    }

    /// Stops the replica in order: it accepts nothing more, and records that it alone has go to
    /// another replica first.
    pub(crate) async fn hand_on(&self) {
        if !self.replica.followers().has_peers() {
            return;
        }
        {
            let mut state = self.state.lock();
            // No running catch-up makes the replica ready again.
            state.catching_up += 1;
            self.replica.set_ready(false);
        }
        let Ok(position) = self.replica.position().await else { return };
        let began = Instant::now();
        while !self.replica.followers().anybody_covers(position.lsn)
            && began.elapsed() < HAND_ON_PATIENCE
        {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Begins a gc floor round when one is due.
    pub(crate) fn collect(self: &Arc<Self>, catalog: &Arc<Catalog>) {
        let round = FloorRound {
            registry: self.registry.clone(),
            peers: self.peers.clone(),
            replica: self.replica.clone(),
        };
        {
            let state = self.state.lock();
            let pause = interval(catalog.spec.grace_ms());
            let pause = if FloorRound::floor_of_plan(catalog).is_some() { POLL } else { pause };
            if state.floor_round.is_some_and(|(began, runs)| runs || began.elapsed() < pause) {
                return;
            }
        }
        let Some(floor) = round.candidate(catalog) else { return };
        self.state.lock().floor_round = Some((Instant::now(), true));
        let (this, catalog) = (self.clone(), catalog.clone());
        tokio::spawn(async move {
            let outcome = this.cancel.run_until_cancelled(round.agree(&catalog, floor)).await;
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

    /// Sets the member that keeps this replica's log at its cap.
    pub(crate) fn set_evict(&self, evict: Option<ReplicaId>) {
        self.state.lock().evict = evict;
    }

    /// Returns the lag behind one peer, in records; `None` while that is unknown.
    pub(crate) fn lag_behind(&self, peer: ReplicaId) -> Option<u64> {
        self.pullers.lag_behind(peer)
    }

    /// Records the progress of the pulls in the metrics.
    pub(crate) fn measure(&self) {
        self.pullers.measure();
    }

    /// Returns the report for the master.
    pub(crate) fn report(&self) -> ReplicationReport {
        let lag = self.pullers.lag();
        let state = self.state.lock();
        let drained_by =
            state.last_lsn.map(|lsn| self.replica.followers().covered_by(lsn)).unwrap_or_default();
        ReplicationReport {
            ready: self.replica.is_ready()
                && self.replica.closed().is_none()
                && !self.replica.authority().is_stalled(),
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
            // The manager knows what a closed replica waits for.
            passing: false,
            floor: self.replica.floor(),
        }
    }
}
