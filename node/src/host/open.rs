//! Opening a replica: from its directory, from the bucket, or as the target of a build.
//!
//! **Invariant:** a replica that was only being filled is begun again; one that has served and has
//! lost its files is never created anew (the manager checks that).

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::Instrument;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, Lsn};
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::report::{TargetProgress, TargetStage};
use vasto_failpoint::points;
use vasto_shipping::layout::Owner;
use vasto_shipping::{CatalogStore, archive};

use super::ReplicaSpec;
use super::shared::{RETRY, RETRY_MAX, Shared};
use crate::build::sources::{self, RestoreSource, RestoreSources, Without};
use crate::build::{Adoption, Bootstrap, BuildError, Log, Resized};
use crate::clock::SharedClock;
use crate::engine::EngineShared;
use crate::replica::command::ReplicaError;
use crate::replica::{OpenOptions, Replica, database_dir};
use crate::ship::{self, old_copy};
use crate::target_trace::TargetTrace;

/// Returns the replicas whose objects a restore does not use as they are.
fn without(catalog: &Catalog) -> Without<'_> {
    Without {
        discarded: &catalog.discarded,
        given_up: &catalog.given_up,
        retirements: &catalog.retirements,
    }
}

/// Opens a replica. A replica that was being filled and has no record of its ingest is deleted
/// first.
pub(crate) fn open_or_begin_again(
    spec: &ReplicaSpec,
    engines: &EngineShared,
    clock: &SharedClock,
    initial: (CatalogVersion, BandRange, RangeState),
) -> Result<Replica, String> {
    let open = |initial| {
        Replica::open(OpenOptions {
            dir: spec.dir.clone(),
            keyspace: spec.keyspace,
            shard: spec.shard,
            replica: spec.replica,
            shared: engines.clone(),
            clock: clock.clone(),
            initial,
        })
        .map_err(|error| error.to_string())
    };
    let is_new = !spec.dir.join("db").join("CURRENT").exists();
    let replica = open(is_new.then_some(initial))?;
    let ranges = replica.ranges();
    let untouched = ranges.is_blank();
    let interrupted = ranges.is_being_filled() && !is_new;
    if !interrupted && !untouched {
        return Ok(replica);
    }
    if untouched && initial.2 == RangeState::Owned {
        // Created before a crash, but its first range record did not reach the disk.
        drop_blocking(replica);
        return open(Some(initial));
    }
    drop_blocking(replica);
    std::fs::remove_dir_all(&spec.dir)
        .map_err(|error| format!("{}: {error}", spec.dir.display()))?;
    open(Some(initial))
}

/// Stops a replica's writer and engine from a blocking thread.
fn drop_blocking(replica: Replica) {
    tokio::runtime::Handle::current().block_on(replica.stop());
}

impl Shared {
    /// Returns the running plan, if this replica begins with objects of the bucket.
    fn bucket_plan<'a>(&self, catalog: &'a Catalog) -> Option<&'a Plan> {
        let plan = catalog.plan_of(self.spec.replica);
        let plan = plan.filter(|plan| plan.step != Step::Committed)?;
        let mine = plan.targets.iter().any(|target| target.replica == self.spec.replica);
        (mine && plan.resize().is_none()).then_some(plan)
    }

    /// Opens the replica, from the bucket if the plan says so; `None` when the host is cancelled
    /// before.
    pub(super) async fn open(
        &self,
        catalogs: &mut watch::Receiver<Arc<Catalog>>,
    ) -> Result<Option<(Replica, Arc<Catalog>)>, String> {
        let catalog = loop {
            let catalog = catalogs.borrow_and_update().clone();
            // The source's checkpoint comes first.
            if self.bucket_plan(&catalog).is_none_or(|plan| plan.step != Step::Prepare) {
                break catalog;
            }
            match self.cancel.run_until_cancelled(catalogs.changed()).await {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return Ok(None),
            }
        };
        let Some(plan) = self.bucket_plan(&catalog) else {
            return Ok(Some((self.open_what_is_here(&catalog).await?, catalog)));
        };
        let progress = Arc::new(Mutex::new(TargetProgress::new(plan.id)));
        self.status.lock().target = Some(progress.clone());
        let spec = &self.spec;
        let bulk = self.context.registry.bulk.of(spec.keyspace, plan.id);
        let mut bootstrap = Bootstrap {
            bucket: self.context.bucket.with_pacer(bulk),
            engines: self.context.engines.clone(),
            dir: spec.dir.clone(),
            side: spec.dir.join("bootstrap"),
            progress: progress.clone(),
            registry: self.context.registry.clone(),
            cancel: self.cancel.clone(),
            trace: TargetTrace::new(self.trace(plan.id), progress.clone()),
            resized: Vec::new(),
        };
        let mut opened = None;
        let mut pause = RETRY;
        loop {
            let span = bootstrap.trace.log_span();
            let taking = self.take_from_bucket(&mut bootstrap, &catalog, plan, &mut opened);
            match taking.instrument(span).await {
                Ok(()) => {
                    progress.lock().last_error = None;
                    return Ok(opened.map(|replica| (replica, catalog.clone())));
                }
                Err(_) if self.cancel.is_cancelled() => {
                    if let Some(replica) = opened {
                        replica.stop().await;
                    }
                    return Ok(None);
                }
                Err(error) if error.is_transient() => {
                    tracing::warn!(%error, plan = plan.id.0, "building from the bucket is interrupted; it goes on");
                    progress.lock().failed_for_now(&error);
                    self.notify();
                    self.pause(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
                Err(error) => {
                    progress.lock().failed = Some(error.to_string());
                    return Err(error.to_string());
                }
            }
        }
    }

    async fn take_from_bucket(
        &self,
        bootstrap: &mut Bootstrap,
        catalog: &Catalog,
        plan: &Plan,
        opened: &mut Option<Replica>,
    ) -> Result<(), BuildError> {
        bootstrap.resized = self.resized(catalog, plan).await?;
        let bootstrap = &*bootstrap;
        let choice = self.spec.dir.join("sources.json");
        let mut span = bootstrap.trace.begin("bucket get");
        span.set("vasto.what", "choice of archives");
        let chosen =
            sources::chosen(&self.context.bucket, &choice, self.sources_in_bucket(catalog, plan))
                .await;
        span.end(&chosen);
        let chosen = chosen?;
        let log = match plan.kind {
            PlanKind::Restore { at_us, .. } => {
                Log::Fork { shards: catalog.spec.shards, until_us: at_us }
            }
            _ => Log::Replicate,
        };
        bootstrap.progress.lock().reached.clear();
        if opened.is_none() {
            let is_new = !database_dir(&self.spec.dir).join("CURRENT").exists();
            match chosen.all.first().and_then(|source| source.base.as_ref()) {
                Some(base) if is_new => {
                    let adoption = Adoption {
                        keyspace: self.spec.keyspace,
                        replica: self.spec.replica,
                        owned: catalog.owned_bands(),
                        version: catalog.version,
                        epoch: catalog.epoch,
                    };
                    bootstrap.take(base, adoption, log).await?;
                    self.passes(points::COPY_ADOPTED).await?;
                }
                // The log of the other replicas is at any time longer than what this replica has
                // shipped.
                None if is_new => ship::begin_with_a_checkpoint(&self.spec.dir)?,
                _ => {}
            }
            let replica = self.open_local(catalog).await;
            *opened = Some(replica.map_err(|reason| ReplicaError::Closed(reason.clone()))?);
        }
        let Some(replica) = opened.as_ref() else { return Err(BuildError::Cancelled) };
        let mut span = bootstrap.trace.begin("target log");
        let taken = match log {
            Log::Fork { shards, until_us } => {
                bootstrap.merge_all(replica, &chosen, shards, until_us).await
            }
            Log::Replicate => {
                let source = plan.sources.first().map(|source| source.replica).unwrap_or_default();
                bootstrap.join_all(replica, &chosen, source, catalog.spec.shards).await
            }
        };
        let taken = match taken {
            Ok(()) => {
                let shards = catalog.spec.shards;
                bootstrap.take_from_sources(replica, &chosen, shards, log).await
            }
            Err(error) => Err(error),
        };
        span.count("vasto.logs", bootstrap.progress.lock().reached.len() as u64);
        span.end(&taken);
        taken?;
        tracing::info!(
            keyspace = self.spec.keyspace.0,
            shard = self.spec.shard.0,
            reached = ?bootstrap.progress.lock().reached,
            "took over what the bucket holds"
        );
        self.passes(points::COPY_JOINED).await?;
        bootstrap.progress.lock().stage = TargetStage::Tailing;
        Ok(())
    }

    /// Returns the resizes whose sources may have shipped what the archives of the shard lack, of a
    /// replica that is made of the bucket alone. Of a time that is past it is not known how far the
    /// shard had followed them then.
    async fn resized(&self, catalog: &Catalog, plan: &Plan) -> Result<Vec<Resized>, BuildError> {
        match plan.kind {
            PlanKind::RecoverReplica { .. } => Ok(Resized::all(catalog, self.spec.shard)),
            PlanKind::Restore { keyspace, version, at_us: None } => {
                let store = CatalogStore::new(self.context.bucket.clone());
                let then = store.version(keyspace, version).await?;
                Ok(then.map(|then| Resized::all(&then, self.spec.shard)).unwrap_or_default())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Returns the archives that this replica begins with, the best first.
    async fn sources_in_bucket(
        &self,
        catalog: &Catalog,
        plan: &Plan,
    ) -> Result<RestoreSources, BuildError> {
        let (bucket, shard) = (&self.context.bucket, self.spec.shard);
        match (plan.kind, plan.sources.first()) {
            (PlanKind::Restore { keyspace, version, at_us }, _) => {
                let store = CatalogStore::new(bucket.clone());
                let tip = store.tip(keyspace, version).await?;
                // A shard that has retired since is restored from what its replicas shipped.
                let then = store.version(keyspace, version).await?;
                let retirements = then.as_ref().map_or(&[][..], |then| &then.retirements);
                let without =
                    Without { retirements, ..tip.as_ref().map(without).unwrap_or_default() };
                sources::candidates(bucket, keyspace, shard, &[], without, at_us).await
            }
            (_, Some(source)) => match &source.manifest {
                Some(pinned) => {
                    let base = archive::manifest_at(bucket, &pinned.key).await?;
                    let owner =
                        Owner { keyspace: catalog.keyspace, shard, replica: source.replica };
                    // The log after it comes from the source itself.
                    Ok(RestoreSources {
                        all: vec![RestoreSource::of_base(owner, base)],
                        ..RestoreSources::default()
                    })
                }
                None => {
                    let preferred = [source.replica];
                    sources::candidates(
                        bucket,
                        catalog.keyspace,
                        shard,
                        &preferred,
                        without(catalog),
                        None,
                    )
                    .await
                }
            },
            (_, None) => Ok(RestoreSources::default()),
        }
    }

    /// Opens the replica from its directory, unless the bucket proves that the directory is an old
    /// copy. Only the shipping replica finds itself in the bucket; the others know each other.
    async fn open_what_is_here(&self, catalog: &Catalog) -> Result<Replica, String> {
        let spec = &self.spec;
        let shipper = catalog.shard(spec.shard).and_then(|shard| shard.shipper());
        if shipper.is_none_or(|shipper| shipper.replica != spec.replica) {
            return self.open_local(catalog).await;
        }
        let owner = Owner { keyspace: spec.keyspace, shard: spec.shard, replica: spec.replica };
        let shipped = ship::shipped_by(&spec.dir);
        let bucket = &self.context.bucket;
        if !database_dir(&spec.dir).join("CURRENT").exists() {
            // A replica that existed before is never created anew.
            return match old_copy::held_beyond(bucket, owner, shipped, Lsn(0)).await {
                Some(held) => Err(old_copy::reason(held, Lsn(0))),
                None => self.open_local(catalog).await,
            };
        }
        let replica = self.open_local(catalog).await?;
        // The last record marks this opening; the records of openings that were refused before
        // carry nothing else.
        let opened = replica.settled_lsn();
        let end = old_copy::end_of(&spec.dir, Lsn(opened.0.saturating_sub(1)))
            .map_err(|error| error.to_string())?;
        let Some(held) = old_copy::held_beyond(bucket, owner, shipped, end).await else {
            return Ok(replica);
        };
        let written = old_copy::note(&spec.dir, end, opened);
        replica.stop().await;
        written.map_err(|error| error.to_string())?;
        Err(old_copy::reason(held, end))
    }

    #[tracing::instrument(name = "open a replica", skip_all, fields(keyspace = self.spec.keyspace.0, shard = self.spec.shard.0))]
    async fn open_local(&self, catalog: &Catalog) -> Result<Replica, String> {
        let spec = self.spec.clone();
        let (engines, clock) = (self.context.engines.clone(), self.context.clock.clone());
        // Initial ownership: the bands of a placed replica, nothing for a target.
        let placed = catalog
            .placement
            .iter()
            .flat_map(|shard| &shard.replicas)
            .any(|member| member.replica == spec.replica);
        let grows = |plan: &&Plan| matches!(plan.kind, PlanKind::Grow { .. });
        let arriving = catalog.plan.as_ref().filter(grows).and_then(Plan::arriving);
        let initial = match arriving {
            Some(range) if !placed => (catalog.version, range, RangeState::Arriving),
            _ => (catalog.version, catalog.owned_bands(), RangeState::Owned),
        };
        // The wait happens here rather than on a blocking thread.
        let turn =
            engines.opening.clone().acquire_owned().await.map_err(|error| error.to_string())?;
        let open = move || {
            let _turn = turn;
            open_or_begin_again(&spec, &engines, &clock, initial)
        };
        tokio::task::spawn_blocking(open).await.map_err(|error| error.to_string())?
    }
}
