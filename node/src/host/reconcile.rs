//! What a catalog version asks of a replica: the ranges it owns, its part as a source, and its quarantines.
//!
//! **Invariant:** each step can be repeated; nothing is derived from an older version than the one applied.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use vasto_core::Band;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, Epoch, Lsn};
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::report::Sealed;

use super::cleanup::clean_up;
use super::runner::{Background, RETRY, RETRY_MAX, Runner};
use crate::replica::Replica;
use crate::replica::command::{Control, ReplicaError, Role};
use crate::replication::replicator::Replicator;
use crate::ship::ShipHandle;

/// Returns true when the plan takes bands from the replica's shard, or adds a replica from this one.
pub(super) fn gives(plan: &Plan, replica: &Replica) -> bool {
    match plan.kind {
        PlanKind::Grow { .. } => plan.sources.iter().any(|source| source.shard == replica.shard),
        PlanKind::AddReplica { .. } => plan.sources.iter().any(|source| source.replica == replica.id),
        PlanKind::RecoverReplica { .. } | PlanKind::Restore { .. } => false,
    }
}

impl Runner {
    pub(super) async fn apply_catalog(
        self: &Arc<Self>,
        replica: &Replica,
        ship: &ShipHandle,
        replicator: &Arc<Replicator>,
        catalog: &Arc<Catalog>,
        background: &Arc<Mutex<Background>>,
    ) -> Result<(), ReplicaError> {
        if catalog.version < replica.version() {
            return Ok(());
        }
        let placed = catalog.is_placed(replica.id);
        let plan = catalog.plan.as_ref();
        self.set_shipper(catalog, replica, ship);
        replicator.follow(catalog);
        let role = replicator.role(catalog);
        if placed {
            if replica.view().role == Role::Detached {
                // The target of a grow holds all that its sources had; an added replica may be behind the others.
                if plan.is_none_or(|plan| plan.growth().is_none()) {
                    replicator.begin_to_catch_up(catalog);
                }
                // The replica serves from the point in time at which it owns the range, under the new epoch.
                replica.control(Control::ApplyCatalog { epoch: Epoch(0), version: CatalogVersion(0), role }).await?;
            }
            self.own_what_is_placed(replica, replicator, catalog, plan).await?;
        }
        let order = Control::ApplyCatalog { epoch: catalog.epoch, version: catalog.version, role };
        replica.control(order).await?;
        self.take_seat(replica, replicator, catalog).await;
        if catalog.draining.iter().any(|one| one.replica == replica.id) {
            replicator.detach().await?;
        }
        replicator.take_over(catalog);
        self.drain_from_the_bucket(replica, catalog, background);
        let building = plan.filter(|plan| plan.targets.iter().any(|target| target.replica == replica.id));
        self.set_phase(placed);
        self.reconcile_target(replica, ship, catalog, building, placed, background);
        let giving = plan.filter(|plan| gives(plan, replica) && placed);
        self.reconcile_source(replica, ship, giving, background);
        self.reconcile_quarantines(replica, ship, catalog, background);
        Ok(())
    }

    /// Reconciles the recorded range states with ownership and seals.
    pub(super) async fn own_what_is_placed(
        self: &Arc<Self>,
        replica: &Replica,
        replicator: &Arc<Replicator>,
        catalog: &Arc<Catalog>,
        plan: Option<&Plan>,
    ) -> Result<(), ReplicaError> {
        let owned = catalog.owned_bands();
        let (epoch, version) = (catalog.epoch, catalog.version);
        let ranges = replica.ranges();
        // A target that is now placed opens.
        if ranges.all_are(owned, RangeState::Arriving) {
            replica.control(Control::SetRange { epoch, version, range: owned, state: RangeState::Owned }).await?;
            tracing::info!(keyspace = replica.keyspace.0, shard = replica.shard.0, version = version.0, "opened");
        }
        // Bands that the replica owned and no longer owns are given away.
        let lost: Vec<Band> = ranges.owned().filter(|band| !owned.contains(*band)).collect();
        if let (Some(first), Some(last)) = (lost.first(), lost.last()) {
            let range = BandRange { first: *first, last: *last };
            replica.control(Control::SetRange { epoch, version, range, state: RangeState::Leaving }).await?;
            tracing::info!(
                keyspace = replica.keyspace.0,
                shard = replica.shard.0,
                version = version.0,
                "gave its leaving bands away"
            );
        }
        let sealing = plan.filter(|plan| plan.step == Step::Sealing && gives(plan, replica));
        match sealing.and_then(|plan| Some((plan, plan.moving()?))) {
            Some((plan, range)) => {
                let lsn = replica.control(Control::Seal { plan: plan.id, version, range }).await?;
                self.status.lock().source_of(plan.id);
                let is_source = plan.sources.iter().any(|source| source.replica == replica.id);
                if is_source && catalog.shard(replica.shard).is_some_and(|shard| shard.replicas.len() > 1) {
                    // The targets read this log: the seal counts once the log holds everything that any replica
                    // of the shard accepted before its own seal.
                    let (this, replicator, catalog, plan) =
                        (self.clone(), replicator.clone(), catalog.clone(), plan.id);
                    tokio::spawn(async move {
                        let Some(lsn) = replicator.sealed_by_all(&catalog).await else { return };
                        this.status.lock().seal(plan, Sealed { version, lsn });
                        this.context.registry.report.notify_one();
                    });
                } else {
                    self.status.lock().seal(plan.id, Sealed { version, lsn });
                }
            }
            None if replica.ranges().seal.is_some() => {
                replica.control(Control::Unseal { version }).await?;
                if let Some(source) = &mut self.status.lock().source {
                    source.sealed = None;
                }
            }
            None => {}
        }
        Ok(())
    }

    pub(super) fn reconcile_source(
        self: &Arc<Self>,
        replica: &Replica,
        ship: &ShipHandle,
        plan: Option<&Plan>,
        background: &Arc<Mutex<Background>>,
    ) {
        let Some(plan) = plan else {
            self.status.lock().source = None;
            background.lock().checkpoint = None;
            ship.positions.needed_after.store(u64::MAX, Ordering::Release);
            ship.positions.needed_from_bucket.store(false, Ordering::Release);
            return;
        };
        {
            let mut status = self.status.lock();
            let source = status.source_of(plan.id);
            if plan.step == Step::Prepare {
                let _ = replica.take_pauses(); // those of an earlier plan
            }
            if plan.step == Step::Committed && !source.released {
                source.released = true;
                source.pauses_us = replica.take_pauses();
            }
        }
        let Some(source) = plan.sources.iter().find(|source| source.replica == replica.id) else { return };
        // The targets read the log from the pinned manifest on; before that exists, from anywhere.
        let pinned = source.manifest.as_ref();
        let needed = pinned.map_or(0, |manifest| manifest.lsn.0);
        ship.positions.needed_after.store(needed, Ordering::Release);
        // An added replica follows its source like any other replica; the targets of a grow read the bucket.
        ship.positions.needed_from_bucket.store(plan.moving().is_some(), Ordering::Release);
        if plan.step == Step::Prepare && background.lock().checkpoint.replace(plan.id) != Some(plan.id) {
            let (this, ship, plan) = (self.clone(), ship.clone(), plan.clone());
            tokio::spawn(async move {
                let result = tokio::select! {
                    () = this.cancel.cancelled() => return,
                    result = ship.checkpoint(plan.moving()) => result,
                };
                if let Some(source) = this.status.lock().source.as_mut().filter(|source| source.plan == plan.id) {
                    match result {
                        Ok(manifest) => source.manifest = Some(manifest),
                        Err(error) => source.failed = Some(format!("the checkpoint failed: {error}")),
                    }
                }
                this.context.registry.report.notify_one();
            });
        }
    }

    pub(super) fn reconcile_quarantines(
        self: &Arc<Self>,
        replica: &Replica,
        ship: &ShipHandle,
        catalog: &Arc<Catalog>,
        background: &Arc<Mutex<Background>>,
    ) {
        let mine: Vec<_> =
            catalog.quarantines.iter().filter(|one| one.replicas.contains(&replica.id)).cloned().collect();
        self.status.lock().cleaned.retain(|plan| mine.iter().any(|one| one.plan == *plan));
        for quarantine in mine.into_iter().filter(|one| one.dropping) {
            if !background.lock().cleaning.insert(quarantine.plan) {
                continue;
            }
            let (this, replica, background, version) =
                (self.clone(), replica.clone(), background.clone(), catalog.version);
            tokio::spawn(async move {
                while let Err(error) = clean_up(&replica, quarantine.range, version).await {
                    if this.cancel.is_cancelled() || replica.closed().is_some() {
                        background.lock().cleaning.remove(&quarantine.plan);
                        return;
                    }
                    tracing::warn!(%error, "removing moved bands failed; it is tried again");
                    tokio::time::sleep(RETRY).await;
                }
                tracing::info!(
                    keyspace = replica.keyspace.0,
                    shard = replica.shard.0,
                    "removed the bands that it gave away"
                );
                this.status.lock().cleaned.insert(quarantine.plan);
                this.context.registry.report.notify_one();
            });
        }
        // The moved bands are removed only once a manifest of the new owner covers what it took over.
        let wanted = catalog
            .quarantines
            .iter()
            .flat_map(|one| &one.targets)
            .filter(|(id, _)| *id == replica.id)
            .map(|(_, lsn)| *lsn)
            .max();
        if let Some(lsn) = wanted {
            self.cover_by_a_manifest(ship, background, lsn);
        }
    }

    /// Makes checkpoints until a manifest covers the LSN.
    pub(super) fn cover_by_a_manifest(
        self: &Arc<Self>,
        ship: &ShipHandle,
        background: &Arc<Mutex<Background>>,
        lsn: Lsn,
    ) {
        if Lsn(ship.positions.manifest.load(Ordering::Acquire)) >= lsn
            || background.lock().covering.replace(lsn) == Some(lsn)
        {
            return;
        }
        let (this, ship, background) = (self.clone(), ship.clone(), background.clone());
        let mut pause = RETRY;
        tokio::spawn(async move {
            loop {
                let result = tokio::select! {
                    () = this.cancel.cancelled() => return,
                    result = ship.checkpoint(None) => result,
                };
                match result {
                    Ok(_) => break,
                    Err(error) => tracing::warn!(%error, "a checkpoint that is waited for failed; it is tried again"),
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
            background.lock().covering = None;
            this.context.registry.report.notify_one();
        });
    }
}
