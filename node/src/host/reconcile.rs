//! Application of a catalog version to a replica: the ranges it owns, its shipping, and its part as
//! a source.
//!
//! **Invariant:** each step can be repeated; nothing is derived from an older version than the one
//! applied.

use std::sync::Arc;
use std::time::Instant;

use vasto_core::Band;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, Epoch};
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::report::{ReplicaPhase, Sealed};
use vasto_failpoint::points;

use super::hosted::Hosted;
use crate::replica::Replica;
use crate::replica::command::{Control, ReplicaError, Role};
use crate::ship::Assignment;

/// Returns true when the plan takes bands from the replica's shard, or adds a replica from this
/// one.
pub(super) fn gives(plan: &Plan, replica: &Replica) -> bool {
    match plan.kind {
        PlanKind::Grow { .. } | PlanKind::Shrink { .. } => {
            plan.sources.iter().any(|source| source.shard == replica.shard)
        }
        PlanKind::AddReplica { .. } => {
            plan.sources.iter().any(|source| source.replica == replica.id)
        }
        PlanKind::RecoverReplica { .. } | PlanKind::Restore { .. } => false,
    }
}

/// Returns true for the one replica of a shard that ships while all are well: the preferred
/// primary, the plan's first target for the shard while the shard has no placement, or the source
/// that the plan has retired.
fn ships(catalog: &Catalog, replica: &Replica) -> bool {
    match catalog.shard(replica.shard).and_then(|shard| shard.shipper()) {
        Some(shipper) => shipper.replica == replica.id,
        None => {
            let Some(plan) = &catalog.plan else { return false };
            let first = plan.targets.iter().find(|target| target.shard == replica.shard);
            let was_source = plan.sources.iter().any(|source| source.replica == replica.id);
            first.is_some_and(|target| target.replica == replica.id)
                || (was_source && catalog.is_retired(replica.id))
        }
    }
}

/// Reason for closing a replica that is to serve bands which it has never received.
const NOT_FILLED: &str = "this replica is to serve bands that it has not received: its directory is an old copy; \
                          evict the replica (`vasto keyspace evict`), it is rebuilt from the others";

/// Returns the range from the first to the last of these bands.
pub(super) fn range_of(bands: impl Iterator<Item = Band>) -> Option<BandRange> {
    bands.fold(None, |range: Option<BandRange>, band| {
        Some(BandRange { first: range.map_or(band, |range| range.first), last: band })
    })
}

impl Hosted {
    pub(super) async fn apply_catalog(
        self: &Arc<Self>,
        catalog: &Arc<Catalog>,
    ) -> Result<(), ReplicaError> {
        let Hosted { replica, replicator, .. } = &**self;
        if catalog.version < replica.version() {
            return Ok(());
        }
        let placed = catalog.is_placed(replica.id);
        let retired = catalog.is_retired(replica.id);
        let plan = catalog.plan_of(replica.id);
        self.set_shipper(catalog);
        replicator.follow(catalog);
        let role = replicator.role(catalog);
        if placed {
            if replica.view().role == Role::Detached {
                // The target of a grow holds all that its sources had; an added replica may be
                // behind the others.
                if plan.is_none_or(|plan| plan.resize().is_none()) {
                    replicator.begin_to_catch_up(catalog);
                }
                // The replica serves from the point in time at which it owns the range, under the
                // new epoch.
                replica
                    .control(Control::ApplyCatalog {
                        epoch: Epoch(0),
                        version: CatalogVersion(0),
                        role,
                    })
                    .await?;
            }
            self.own_what_is_placed(catalog, plan).await?;
        } else if retired {
            self.give_away_what_moved(catalog).await?;
        }
        let order = Control::ApplyCatalog { epoch: catalog.epoch, version: catalog.version, role };
        replica.control(order).await?;
        self.tell_leases(catalog).await;
        if catalog.draining.iter().any(|member| member.replica == replica.id) {
            replicator.detach().await?;
        }
        replicator.take_over(catalog);
        self.drain_from_the_bucket(catalog);
        let building =
            plan.filter(|plan| plan.targets.iter().any(|target| target.replica == replica.id));
        let phase = if placed { ReplicaPhase::Serving } else { ReplicaPhase::Building };
        self.shared.status.lock().phase = Some(phase);
        self.reconcile_target(building, placed);
        if placed {
            self.reconcile_arrivals();
        }
        let giving = plan.filter(|plan| gives(plan, replica) && (placed || retired));
        self.reconcile_source(giving);
        self.reconcile_quarantines(catalog);
        Ok(())
    }

    /// Reconciles the recorded range states with ownership and seals.
    async fn own_what_is_placed(
        self: &Arc<Self>,
        catalog: &Arc<Catalog>,
        plan: Option<&Plan>,
    ) -> Result<(), ReplicaError> {
        let replica = &self.replica;
        let owned = catalog.owned_bands();
        let version = catalog.version;
        let ranges = replica.ranges();
        // Bands that have arrived here are opened.
        let arrived = owned.bands().filter(|band| ranges.state(*band) == RangeState::Arriving);
        if let Some(range) = range_of(arrived) {
            if ranges.filled_by().is_none() {
                replica.close(NOT_FILLED.into());
                return Err(ReplicaError::Closed(NOT_FILLED.into()));
            }
            self.passes(points::TARGET_OPEN_BEFORE).await?;
            let (asked, state) = (Instant::now(), RangeState::Owned);
            replica
                .control(Control::SetRange { epoch: catalog.epoch, version, range, state })
                .await?;
            if let Some(plan) = plan {
                let mut span = self.shared.trace(plan.id).began("target open", asked);
                span.count("vasto.version", version.0);
                span.done();
            }
            self.passes(points::TARGET_OPEN_AFTER).await?;
            tracing::info!(
                keyspace = replica.keyspace.0,
                shard = replica.shard.0,
                version = version.0,
                "opened"
            );
        }
        self.give_away_what_moved(catalog).await?;
        let sealing = plan.filter(|plan| plan.step == Step::Sealing && gives(plan, replica));
        match sealing.and_then(|plan| Some((plan, plan.leaving()?))) {
            Some((plan, range)) => self.seal(catalog, plan, range).await,
            None if replica.ranges().seal.is_some() => {
                self.passes(points::SOURCE_UNSEAL_BEFORE).await?;
                replica.control(Control::Unseal { version }).await?;
                if let Some(source) = &mut self.shared.status.lock().source {
                    source.sealed = None;
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Gives away the bands that the replica owns and that do not stay under the version: all, when
    /// its shard has retired; none, when it has no place at all.
    pub(super) async fn give_away_what_moved(&self, catalog: &Catalog) -> Result<(), ReplicaError> {
        let replica = &self.replica;
        let (placed, retired) = (catalog.is_placed(replica.id), catalog.is_retired(replica.id));
        if !placed && !retired {
            return Ok(());
        }
        let (ranges, owned) = (replica.ranges(), catalog.owned_bands());
        let leaves = |band: &Band| !(placed && owned.contains(*band));
        let Some(range) = range_of(ranges.owned().filter(leaves)) else { return Ok(()) };
        self.passes(points::SOURCE_RELEASE_BEFORE).await?;
        let (epoch, version, state) = (catalog.epoch, catalog.version, RangeState::Leaving);
        replica.control(Control::SetRange { epoch, version, range, state }).await?;
        self.passes(points::SOURCE_RELEASE_AFTER).await?;
        tracing::info!(
            keyspace = replica.keyspace.0,
            shard = replica.shard.0,
            version = version.0,
            "gave its leaving bands away"
        );
        Ok(())
    }

    /// Seals the moving bands. The seal of a source counts once its log holds everything that any
    /// replica of the shard accepted before its own seal: the targets read this log.
    async fn seal(
        self: &Arc<Self>,
        catalog: &Arc<Catalog>,
        plan: &Plan,
        range: BandRange,
    ) -> Result<(), ReplicaError> {
        let (replica, version, plan_id) = (&self.replica, catalog.version, plan.id);
        self.passes(points::SOURCE_SEAL_BEFORE).await?;
        let asked = Instant::now();
        let lsn = replica.control(Control::Seal { plan: plan_id, version, range }).await?;
        self.passes(points::SOURCE_SEAL_RECORDED).await?;
        let mut span = self.shared.trace(plan_id).began("source seal", asked);
        span.count("vasto.version", version.0);
        span.count("vasto.lsn", lsn.0);
        let is_source = plan.sources.iter().any(|source| source.replica == replica.id);
        let waits =
            is_source && catalog.shard(replica.shard).is_some_and(|shard| shard.replicas.len() > 1);
        {
            let mut status = self.shared.status.lock();
            status.source_of(plan_id);
            if !waits {
                status.seal(plan_id, Sealed { version, lsn });
                span.done();
                return Ok(());
            }
        }
        let (this, catalog) = (self.clone(), catalog.clone());
        tokio::spawn(async move {
            let Some(lsn) = this.replicator.sealed_by_all(&catalog).await else { return };
            this.shared.status.lock().seal(plan_id, Sealed { version, lsn });
            span.done();
            this.shared.notify();
        });
        Ok(())
    }

    /// Decides whether this replica ships: the preferred primary does (`home`), and a replica that
    /// the catalog names as primary (`acts`). An acting primary is not `home`: it ships as a
    /// substitute (`stands_in`) while the preferred primary is away. When the decision changes, the
    /// shipper checks its work at once.
    fn set_shipper(&self, catalog: &Catalog) {
        let Hosted { replica, ship, .. } = self;
        let home = ships(catalog, replica);
        let acts =
            catalog.shard(replica.shard).is_some_and(|shard| shard.primary == Some(replica.id));
        ship.assign(match (home, acts) {
            (true, _) => Assignment::Preferred,
            (false, true) => Assignment::StandIn,
            (false, false) => Assignment::Idle,
        });
    }
}
