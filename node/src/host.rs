//! One hosted replica: opens it, keeps it in line with the catalog, reports on it.
//!
//! **Invariants**
//! - Level-triggered: what is done depends on the newest catalog version and the replica's own
//!   durable state, never on which messages arrived. Doing it twice changes nothing.
//! - Nothing is done for a version lower than one already obeyed.
//! - Removal of data happens only under a version that names it (`dropping`), after the state says
//!   that the range was given away.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vasto_core::Band;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, PlanId, ReplicaId, ShardId};
use vasto_core::plan::{
    Plan, PlanKind, ReplicaPhase, ReplicaReport, ReplicationReport, Sealed, SourceProgress, Step, TargetProgress,
    TargetStage,
};
use vasto_core::record::{BandRange, RangeState};
use vasto_shipping::CatalogStore;
use vasto_shipping::bucket::Bucket;
use vasto_shipping::history;
use vasto_shipping::layout::Owner;

use crate::bootstrap::{Adoption, Bootstrap, BootstrapError, Log};
use crate::clock::{SharedClock, with_others};
use crate::core::NodeCore;
use crate::engine::EngineShared;
use crate::grow::{Build, fresh_progress};
use crate::old_copy;
use crate::past::{self, Candidate, Candidates, Without};
use crate::replica::authority::Standing;
use crate::replica::job::{Control, ReplicaError, Role};
use crate::replica::size::SizeVersion;
use crate::replica::{OpenOptions, Replica, database_dir};
use crate::replication::duties::Duties;
use crate::replication::peers::Peers;
use crate::ship::{self, Pace, ShipContext, ShipHandle, blocking};

/// Between attempts of work that may succeed later.
const RETRY: Duration = Duration::from_millis(500);
/// And between attempts that keep failing: each looks at what was downloaded before.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// Between two looks at what has no event of its own.
const HOUSEKEEPING: Duration = Duration::from_millis(100);
/// The same for one with which nothing is going on.
const HOUSEKEEPING_AT_REST: Duration = Duration::from_secs(4);

/// The reported size of a replica is at most this old.
const SIZE_AGE: Duration = Duration::from_millis(400);
/// And this old while nothing is written: then only compactions change it.
const IDLE_SIZE_AGE: Duration = Duration::from_secs(20);

/// A node that stops waits this long for the bucket to take the last chunks.
const LAST_CHUNK_PATIENCE: Duration = Duration::from_secs(5);

/// What every host of a node works with.
pub struct HostContext {
    /// Shared state.
    pub core: Arc<NodeCore>,
    /// Engine budget.
    pub engines: EngineShared,
    /// Where to ship.
    pub bucket: Bucket,
    /// Between two chunks.
    pub ship_interval: Duration,
    /// For stamps.
    pub clock: SharedClock,
    /// Connections to the other nodes.
    pub peers: Arc<Peers>,
    /// Bytes of log that a replica keeps for others, at most.
    pub log_cap: u64,
    /// What all uploads share.
    pub pace: Arc<Pace>,
}

/// Who is hosted, and where.
#[derive(Clone)]
pub struct Tenant {
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its directory.
    pub dir: PathBuf,
    /// Temporary files on the same file system.
    pub tmp: PathBuf,
}

/// What a host tells the reporter.
#[derive(Default)]
struct Told {
    phase: Option<ReplicaPhase>,
    source: Option<SourceProgress>,
    cleaned: BTreeSet<PlanId>,
    /// Replicas that left, of which it has taken over what they had shipped, as far as that is possible.
    took_from_bucket: BTreeSet<ReplicaId>,
}

impl Told {
    /// The progress of a plan as its source; that of an earlier plan is forgotten.
    fn source_of(&mut self, plan: PlanId) -> &mut SourceProgress {
        let known = self.source.take().filter(|source| source.plan == plan);
        self.source.insert(known.unwrap_or_else(|| fresh_source(plan)))
    }

    /// A seal is complete. When the plan has ended meanwhile nobody wants to know.
    fn seal(&mut self, plan: PlanId, sealed: Sealed) {
        if let Some(source) = self.source.as_mut().filter(|source| source.plan == plan) {
            source.sealed = Some(sealed);
        }
    }
}

/// The size of a replica at some moment.
#[derive(Clone, Copy)]
struct KnownSize {
    at: Instant,
    manifest: Lsn,
    /// What it depends on but for the background work of RocksDB.
    version: SizeVersion,
    keys_and_bytes: (u64, u64),
}

/// A running host.
pub struct Host {
    /// Who.
    pub tenant: Tenant,
    catalogs: watch::Sender<Arc<Catalog>>,
    told: Arc<Mutex<Told>>,
    target: Arc<Mutex<Option<Arc<Mutex<TargetProgress>>>>>,
    ship: Arc<Mutex<Option<ShipHandle>>>,
    duties: Arc<Mutex<Option<Arc<Duties>>>>,
    cancel: CancellationToken,
    discard: Arc<AtomicBool>,
    size: Mutex<Option<KnownSize>>,
    task: Option<JoinHandle<()>>,
}

impl Host {
    /// Starts hosting; the replica is opened (or created) in the background.
    pub fn start(context: Arc<HostContext>, tenant: Tenant, catalog: Arc<Catalog>) -> Self {
        let (catalogs, receiver) = watch::channel(catalog);
        let cancel = CancellationToken::new();
        let mut host = Self {
            tenant: tenant.clone(),
            catalogs,
            told: Arc::default(),
            target: Arc::default(),
            ship: Arc::default(),
            duties: Arc::default(),
            cancel: cancel.clone(),
            discard: Arc::default(),
            size: Mutex::default(),
            task: None,
        };
        let runner = Runner {
            context,
            tenant,
            told: host.told.clone(),
            target: host.target.clone(),
            ship: host.ship.clone(),
            duties: host.duties.clone(),
            cancel,
            discard: host.discard.clone(),
        };
        host.task = Some(tokio::spawn(runner.run(receiver)));
        host
    }

    /// A newer version of its keyspace's catalog.
    pub fn obey(&self, catalog: Arc<Catalog>) {
        self.catalogs.send_replace(catalog);
    }

    /// The replica is about to stop: another one of its shard serves in its place first.
    pub async fn hand_over(core: &NodeCore, keyspace: KeyspaceId, replica: ReplicaId) {
        if let (Some(leases), Some(replica)) = (core.leases.get(), core.replica(keyspace, replica)) {
            leases.hand_over(&replica).await;
        }
    }

    /// Stops the replica: ships what is due, flushes.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        if let Some(task) = self.task.take() {
            let _ = task.await;
        }
    }

    /// Stops a replica whose files are about to be removed: nothing more is shipped.
    pub async fn stop_to_discard(self) {
        self.discard.store(true, Ordering::Release);
        self.stop().await;
    }

    /// The shipper, once the replica is open and if it is the one of its shard that ships.
    pub fn shipper(&self) -> Option<ShipHandle> {
        self.any_shipper().filter(|ship| ship.positions.ships.load(Ordering::Acquire))
    }

    /// The shipper, whoever ships.
    pub fn any_shipper(&self) -> Option<ShipHandle> {
        self.ship.lock().clone()
    }

    /// Looking through all files is not for every report: a busy tail makes hundreds a second. A new
    /// checkpoint is always looked at, so that whoever sees it in a report sees its size too.
    fn size_of(&self, replica: &Replica, manifest: Lsn) -> (u64, u64) {
        let mut size = self.size.lock();
        match *size {
            Some(known) if known.manifest == manifest && known.at.elapsed() < SIZE_AGE => known.keys_and_bytes,
            Some(known)
                if known.manifest == manifest
                    && known.version == replica.size_version()
                    && known.at.elapsed() < IDLE_SIZE_AGE =>
            {
                known.keys_and_bytes
            }
            _ => {
                let version = replica.size_version();
                let keys_and_bytes = replica.size();
                *size = Some(KnownSize { at: Instant::now(), manifest, version, keys_and_bytes });
                keys_and_bytes
            }
        }
    }

    /// Why it does not serve, if it does not.
    pub fn failure(&self, core: &NodeCore) -> Option<String> {
        if let Some(ReplicaPhase::Failed(reason)) = &self.told.lock().phase {
            return Some(reason.clone());
        }
        self.hosted(core)?.closed()
    }

    /// The replica, while it is open.
    fn hosted(&self, core: &NodeCore) -> Option<Replica> {
        core.replica_of(self.tenant.keyspace, self.tenant.shard).filter(|one| one.id == self.tenant.replica)
    }

    /// What the master should know.
    pub fn report(&self, core: &NodeCore) -> ReplicaReport {
        let told = self.told.lock();
        let tenant = &self.tenant;
        let mut report = ReplicaReport {
            keyspace: tenant.keyspace,
            shard: tenant.shard,
            replica: tenant.replica,
            incarnation: Incarnation(0),
            version: CatalogVersion(0),
            phase: told.phase.clone().unwrap_or(ReplicaPhase::Opening),
            lsn: Lsn(0),
            shipped_lsn: Lsn(0),
            manifest_lsn: Lsn(0),
            keys: 0,
            bytes: 0,
            source: told.source.clone(),
            target: self.target.lock().as_ref().map(|progress| progress.lock().clone()),
            cleaned: told.cleaned.iter().copied().collect(),
            replication: self.duties.lock().as_ref().map(|duties| duties.report()).unwrap_or_default(),
        };
        report.replication.took_from_bucket = told.took_from_bucket.iter().copied().collect();
        if let Some(ship) = &*self.ship.lock() {
            report.shipped_lsn = Lsn(ship.positions.shipped.load(Ordering::Acquire));
            report.manifest_lsn = Lsn(ship.positions.manifest.load(Ordering::Acquire));
            if ship.positions.over_cap.load(Ordering::Acquire)
                && let Some(source) = &mut report.source
            {
                source.failed = Some("the log has reached its cap while the plan needed it".into());
            }
        }
        if let Some(target) = &mut report.target {
            // While it is being filled it has none.
            target.manifest_shipped |= report.manifest_lsn.0 > 0;
        }
        if let Some(replica) = self.hosted(core) {
            let (keys, bytes) = self.size_of(&replica, report.manifest_lsn);
            report.incarnation = replica.incarnation();
            report.version = replica.version();
            report.lsn = replica.settled_lsn();
            (report.keys, report.bytes) = (keys, bytes);
            if let Some(reason) = replica.closed() {
                report.phase = ReplicaPhase::Failed(reason);
            }
        }
        report
    }
}

struct Runner {
    context: Arc<HostContext>,
    tenant: Tenant,
    told: Arc<Mutex<Told>>,
    target: Arc<Mutex<Option<Arc<Mutex<TargetProgress>>>>>,
    ship: Arc<Mutex<Option<ShipHandle>>>,
    duties: Arc<Mutex<Option<Arc<Duties>>>>,
    cancel: CancellationToken,
    discard: Arc<AtomicBool>,
}

/// Work in the background of one host, at most one of each kind.
#[derive(Default)]
struct Background {
    build: Option<(PlanId, CancellationToken)>,
    checkpoint: Option<PlanId>,
    cleaning: BTreeSet<PlanId>,
    covering: Option<Lsn>,
    drained: BTreeSet<ReplicaId>,
    /// Whose loss was accepted: what they have shipped since they left is looked for once more.
    accepted: BTreeSet<ReplicaId>,
}

impl Runner {
    async fn run(self, mut catalogs: watch::Receiver<Arc<Catalog>>) {
        let (replica, first) = match self.open(&mut catalogs).await {
            Ok(Some(opened)) => opened,
            Ok(None) => return,
            Err(reason) => {
                tracing::error!(
                    keyspace = self.tenant.keyspace.0,
                    shard = self.tenant.shard.0,
                    reason,
                    "the replica does not open"
                );
                self.told.lock().phase = Some(ReplicaPhase::Failed(reason.clone()));
                let (core, tenant) = (&self.context.core, &self.tenant);
                core.set_not_open(tenant.keyspace, tenant.shard, Some(reason));
                core.report.notify_one();
                self.cancel.cancelled().await;
                core.set_not_open(tenant.keyspace, tenant.shard, None);
                return;
            }
        };
        let shipping = CancellationToken::new();
        let context = ShipContext {
            replica: replica.clone(),
            bucket: self.context.bucket.clone(),
            dir: self.tenant.dir.clone(),
            tmp: self.tenant.tmp.clone(),
            engines: self.context.engines.clone(),
            clock: self.context.clock.clone(),
            interval: self.context.ship_interval,
            log_cap: self.context.log_cap,
            pace: self.context.pace.clone(),
        };
        let (ship, shipper) = ship::start(context, shipping.clone());
        let shipper = tokio::spawn(shipper);
        *self.ship.lock() = Some(ship.clone());
        let replicating = self.cancel.child_token();
        let duties =
            Duties::new(self.context.core.clone(), self.context.peers.clone(), replica.clone(), replicating.clone());
        *self.duties.lock() = Some(duties.clone());
        let mut pauses = self.context.core.pause.pauses();
        duties.begin_to_catch_up(&first);
        // Not even for a moment is it primary when it is not; a writer that has ended refuses everything.
        let role = duties.role(&first);
        let _ = replica.control(Control::Obey { epoch: Epoch(0), version: CatalogVersion(0), role }).await;
        self.take_seat(&replica, &duties, &first).await;
        self.context.core.add_replica(replica.clone());
        let this = Arc::new(self);
        let (mut own, mut standing) = (replica.changes(), replica.authority().changes());
        let mut kept_house = tokio::time::Instant::now();
        // While there is one it is not at rest.
        let mut active = Some(this.context.core.activity());
        let mut seen = Lsn(0);
        let mut reported = ReplicationReport::default();
        let background = Arc::new(Mutex::new(Background::default()));
        let mut pause = RETRY;
        loop {
            let catalog = catalogs.borrow_and_update().clone();
            let again = match this.obey(&replica, &ship, &duties, &catalog, &background).await {
                Ok(()) => {
                    pause = RETRY;
                    false
                }
                Err(error) => {
                    tracing::error!(%error, keyspace = this.tenant.keyspace.0, shard = this.tenant.shard.0, "a version could not be obeyed");
                    pause = (pause * 2).min(RETRY_MAX);
                    true
                }
            };
            this.context.core.report.notify_one();
            let retry = tokio::time::sleep(pause);
            tokio::pin!(retry);
            active.get_or_insert_with(|| this.context.core.activity());
            loop {
                let rests = active.is_none();
                let due = match rests {
                    true => with_others(kept_house + HOUSEKEEPING_AT_REST),
                    false => kept_house + HOUSEKEEPING,
                };
                tokio::select! {
                    () = this.cancel.cancelled() => break,
                    _ = catalogs.changed() => break,
                    () = &mut retry, if again => break,
                    _ = pauses.changed() => duties.begin_to_catch_up(&catalog),
                    _ = own.changed(), if rests => active = Some(this.context.core.activity()),
                    _ = standing.changed(), if rests => active = Some(this.context.core.activity()),
                    () = tokio::time::sleep_until(due) => {
                        duties.collect(&catalog);
                        this.keep_house(&catalog, &replica, &ship, &duties, &mut reported);
                        let lsn = replica.applied_lsn();
                        let quiet = std::mem::replace(&mut seen, lsn) == lsn;
                        match quiet && is_at_rest(&catalog, &replica, &ship) {
                            true => active = None,
                            false => drop(active.get_or_insert_with(|| this.context.core.activity())),
                        }
                        kept_house = tokio::time::Instant::now();
                    }
                }
            }
            if this.cancel.is_cancelled() || catalogs.has_changed().is_err() {
                break;
            }
        }
        if !this.discard.load(Ordering::Acquire) {
            duties.hand_on().await;
        }
        if let Some(leases) = this.context.core.leases.get() {
            leases.leave(replica.keyspace, replica.shard, replica.id).await;
        }
        replicating.cancel();
        if let Some((_, build)) = background.lock().build.take() {
            build.cancel();
        }
        shipping.cancel();
        let patience = if this.discard.load(Ordering::Acquire) { Duration::ZERO } else { LAST_CHUNK_PATIENCE };
        let stopper = shipper.abort_handle();
        if tokio::time::timeout(patience, shipper).await.is_err() {
            stopper.abort();
        }
        this.context.core.remove_replica(replica.keyspace, replica.id);
        replica.stop().await;
    }

    /// Tells the leases where the replica is placed. One with peers serves nothing before they say so.
    async fn take_seat(&self, replica: &Replica, duties: &Arc<Duties>, catalog: &Catalog) {
        let Some(leases) = self.context.core.leases.get() else { return };
        if self.context.core.replica(replica.keyspace, replica.id).is_none() {
            replica.authority().publish(Standing::Out { elsewhere: false });
        }
        leases.seat(replica, duties, catalog).await;
    }

    /// The running plan, if it makes this replica one more member of its shard.
    fn copy_plan<'a>(&self, catalog: &'a Catalog) -> Option<&'a Plan> {
        let plan = catalog.plan.as_ref()?;
        let mine = plan.targets.iter().any(|target| target.replica == self.tenant.replica);
        (mine && plan.adds_member()).then_some(plan)
    }

    /// The running plan, if this replica begins with what the bucket holds.
    fn bucket_plan<'a>(&self, catalog: &'a Catalog) -> Option<&'a Plan> {
        let plan = catalog.plan.as_ref().filter(|plan| plan.step != Step::Committed)?;
        let mine = plan.targets.iter().any(|target| target.replica == self.tenant.replica);
        (mine && plan.growth().is_none()).then_some(plan)
    }

    /// Opens the replica, from the bucket if the plan says so; `None` when it is to end before.
    async fn open(
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
        let progress = Arc::new(Mutex::new(fresh_progress(plan)));
        *self.target.lock() = Some(progress.clone());
        let tenant = &self.tenant;
        let bootstrap = Bootstrap {
            bucket: self.context.bucket.clone(),
            engines: self.context.engines.clone(),
            dir: tenant.dir.clone(),
            side: tenant.dir.join("bootstrap"),
            progress: progress.clone(),
            core: self.context.core.clone(),
            cancel: self.cancel.clone(),
        };
        let mut opened = None;
        let mut pause = RETRY;
        loop {
            match self.take_from_bucket(&bootstrap, &catalog, plan, &mut opened).await {
                Ok(()) => return Ok(opened.map(|replica| (replica, catalog.clone()))),
                Err(_) if self.cancel.is_cancelled() => {
                    if let Some(replica) = opened {
                        replica.stop().await;
                    }
                    return Ok(None);
                }
                Err(error) if error.is_transient() => {
                    tracing::warn!(%error, plan = plan.id.0, "building from the bucket is interrupted; it goes on");
                    let _ = self.cancel.run_until_cancelled(tokio::time::sleep(pause)).await;
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
        bootstrap: &Bootstrap,
        catalog: &Catalog,
        plan: &Plan,
        opened: &mut Option<Replica>,
    ) -> Result<(), BootstrapError> {
        let sources = self.tenant.dir.join("sources.json");
        let found = past::chosen(&self.context.bucket, &sources, self.sources_in_bucket(catalog, plan)).await?;
        let log = match plan.kind {
            PlanKind::Restore { at_us, .. } => Log::Past { shards: catalog.spec.shards, until_us: at_us },
            _ => Log::Joined,
        };
        bootstrap.progress.lock().reached.clear();
        if opened.is_none() {
            let is_new = !database_dir(&self.tenant.dir).join("CURRENT").exists();
            match found.all.first().and_then(|first| first.base.as_ref()) {
                Some(base) if is_new => {
                    let adoption = Adoption {
                        keyspace: self.tenant.keyspace,
                        replica: self.tenant.replica,
                        owned: catalog.owned_bands(),
                        version: catalog.version,
                        epoch: catalog.epoch,
                    };
                    bootstrap.take(base, adoption, log).await?;
                }
                // The log of the others is longer than what this one has shipped at any moment.
                None if is_new => ship::begin_with_a_checkpoint(&self.tenant.dir)?,
                _ => {}
            }
            let replica = self.open_local(catalog).await;
            *opened = Some(replica.map_err(|reason| ReplicaError::Closed(reason.clone()))?);
        }
        let Some(replica) = opened.as_ref() else { return Err(BootstrapError::Cancelled) };
        match log {
            Log::Past { shards, until_us } => bootstrap.merge_all(replica, &found, shards, until_us).await?,
            Log::Joined => {
                let whose = plan.sources.first().map(|source| source.replica).unwrap_or_default();
                bootstrap.join_all(replica, &found, whose).await?;
            }
        }
        tracing::info!(
            keyspace = self.tenant.keyspace.0,
            shard = self.tenant.shard.0,
            reached = ?bootstrap.progress.lock().reached,
            "took over what the bucket holds"
        );
        bootstrap.progress.lock().stage = TargetStage::Tailing;
        Ok(())
    }

    /// Whose objects this replica begins with, the best first.
    async fn sources_in_bucket(&self, catalog: &Catalog, plan: &Plan) -> Result<Candidates, BootstrapError> {
        let (bucket, shard) = (&self.context.bucket, self.tenant.shard);
        match (plan.kind, plan.sources.first()) {
            (PlanKind::Restore { keyspace, version, at_us }, _) => {
                let tip = CatalogStore::new(bucket.clone()).tip(keyspace, version).await?;
                let without = tip.as_ref().map(without).unwrap_or_default();
                past::candidates(bucket, keyspace, shard, &[], without, at_us).await
            }
            (_, Some(source)) => match &source.manifest {
                Some(pinned) => {
                    let base = history::manifest_at(bucket, &pinned.key).await?;
                    let owner = Owner { keyspace: catalog.keyspace, shard, replica: source.replica };
                    // What is behind it comes from the source itself.
                    Ok(Candidates { all: vec![Candidate::of_base(owner, base)], ..Candidates::default() })
                }
                None => {
                    let preferred = [source.replica];
                    past::candidates(bucket, catalog.keyspace, shard, &preferred, without(catalog), None).await
                }
            },
            (_, None) => Ok(Candidates::default()),
        }
    }

    /// Opens the replica from its directory, unless the bucket knows that this is not its last one. Only
    /// what ships knows itself in the bucket; the others know each other.
    async fn open_what_is_here(&self, catalog: &Catalog) -> Result<Replica, String> {
        let tenant = &self.tenant;
        let shipper = catalog.shard(tenant.shard).and_then(|shard| shard.shipper());
        if shipper.is_none_or(|one| one.replica != tenant.replica) {
            return self.open_local(catalog).await;
        }
        let owner = Owner { keyspace: tenant.keyspace, shard: tenant.shard, replica: tenant.replica };
        let shipped = ship::shipped_by(&tenant.dir);
        let bucket = &self.context.bucket;
        if !database_dir(&tenant.dir).join("CURRENT").exists() {
            // Nothing is made anew that has been there.
            return match old_copy::held_beyond(bucket, owner, shipped, Lsn(0)).await {
                Some(held) => Err(old_copy::reason(held, Lsn(0))),
                None => self.open_local(catalog).await,
            };
        }
        let replica = self.open_local(catalog).await?;
        // The last record says that it was opened; those of openings that were refused before say no more.
        let opened = replica.settled_lsn();
        let end = old_copy::end_of(&tenant.dir, Lsn(opened.0.saturating_sub(1))).map_err(|error| error.to_string())?;
        let Some(held) = old_copy::held_beyond(bucket, owner, shipped, end).await else { return Ok(replica) };
        let written = old_copy::note(&tenant.dir, end, opened);
        replica.stop().await;
        written.map_err(|error| error.to_string())?;
        Err(old_copy::reason(held, end))
    }

    #[tracing::instrument(name = "open a replica", skip_all, fields(keyspace = self.tenant.keyspace.0, shard = self.tenant.shard.0))]
    async fn open_local(&self, catalog: &Catalog) -> Result<Replica, String> {
        let tenant = self.tenant.clone();
        let (engines, clock) = (self.context.engines.clone(), self.context.clock.clone());
        // What a replica owns at first: its bands once it is placed, nothing while it is a target.
        let placed =
            catalog.placement.iter().flat_map(|shard| &shard.replicas).any(|one| one.replica == tenant.replica);
        let growth = catalog.plan.as_ref().and_then(Plan::growth);
        let initial = match growth {
            Some((_, to)) if !placed => (catalog.version, BandRange::from(Band::owned(to)), RangeState::Arriving),
            _ => (catalog.version, catalog.owned_bands(), RangeState::Owned),
        };
        // It waits here rather than on a thread of its own.
        let turn = engines.opening.clone().acquire_owned().await.map_err(|error| error.to_string())?;
        let open = move || {
            let _turn = turn;
            open_or_begin_again(&tenant, &engines, &clock, initial)
        };
        tokio::task::spawn_blocking(open).await.map_err(|error| error.to_string())?
    }

    async fn obey(
        self: &Arc<Self>,
        replica: &Replica,
        ship: &ShipHandle,
        duties: &Arc<Duties>,
        catalog: &Arc<Catalog>,
        background: &Arc<Mutex<Background>>,
    ) -> Result<(), ReplicaError> {
        if catalog.version < replica.version() {
            return Ok(());
        }
        let placed = catalog.is_placed(replica.id);
        let plan = catalog.plan.as_ref();
        self.set_shipper(catalog, replica, ship);
        duties.follow(catalog);
        let role = duties.role(catalog);
        if placed {
            if replica.view().role == Role::Detached {
                // What a grow opens holds all that its sources had; a copy may be behind the others.
                if plan.is_none_or(|plan| plan.growth().is_none()) {
                    duties.begin_to_catch_up(catalog);
                }
                // From the moment on at which the range is its own, under the new epoch, it serves.
                replica.control(Control::Obey { epoch: Epoch(0), version: CatalogVersion(0), role }).await?;
            }
            self.own_what_is_placed(replica, duties, catalog, plan).await?;
        }
        let order = Control::Obey { epoch: catalog.epoch, version: catalog.version, role };
        replica.control(order).await?;
        self.take_seat(replica, duties, catalog).await;
        if catalog.unsealed.iter().any(|one| one.replica == replica.id) {
            duties.detach().await?;
        }
        duties.take_over(catalog);
        self.drain_from_the_bucket(replica, catalog, background);
        let building = plan.filter(|plan| plan.targets.iter().any(|target| target.replica == replica.id));
        self.tell_phase(placed);
        self.target_duties(replica, ship, catalog, building, placed, background);
        let giving = plan.filter(|plan| gives(plan, replica) && placed);
        self.source_duties(replica, ship, giving, background);
        self.quarantine_duties(replica, ship, catalog, background);
        Ok(())
    }

    /// What has no event of its own.
    fn keep_house(
        &self,
        catalog: &Catalog,
        replica: &Replica,
        ship: &ShipHandle,
        duties: &Duties,
        reported: &mut ReplicationReport,
    ) {
        if let Some(plan) = self.copy_plan(catalog)
            && let Some(progress) = &*self.target.lock()
            && let Some(lag) = copy_lag(plan, duties)
        {
            let mut progress = progress.lock();
            if progress.plan == plan.id && progress.lag_lsns != lag {
                progress.lag_lsns = lag;
                self.context.core.report.notify_one();
            }
        }
        replica.followers().expire();
        replica.bucket_acks().expire();
        duties.measure();
        let over_cap = ship.positions.held_back.load(Ordering::Acquire);
        duties.set_evict(replica.followers().last().filter(|_| over_cap).map(|(follower, _)| follower));
        let report = duties.report();
        // The lag changes all the time; it goes with the regular reports.
        let told = |report: &ReplicationReport| ReplicationReport { lag_lsns: 0, lag_ms: 0, ..report.clone() };
        if told(&report) != told(reported) {
            self.context.core.report.notify_one();
        }
        *reported = report;
    }

    /// Does this replica ship? Also the one that acts as primary: the home is away.
    fn set_shipper(&self, catalog: &Catalog, replica: &Replica, ship: &ShipHandle) {
        let home = ships(catalog, replica);
        let acts = catalog.shard(replica.shard).is_some_and(|shard| shard.primary == Some(replica.id));
        ship.positions.stands_in.store(acts && !home, Ordering::Release);
        let before = ship.positions.ships.swap(acts || home, Ordering::AcqRel);
        if before != (acts || home) {
            ship.look();
        }
    }

    fn tell_phase(&self, placed: bool) {
        self.told.lock().phase = Some(if placed { ReplicaPhase::Serving } else { ReplicaPhase::Building });
    }

    /// Brings the recorded range states in line with ownership and seals.
    async fn own_what_is_placed(
        self: &Arc<Self>,
        replica: &Replica,
        duties: &Arc<Duties>,
        catalog: &Arc<Catalog>,
        plan: Option<&Plan>,
    ) -> Result<(), ReplicaError> {
        let owned = catalog.owned_bands();
        let (epoch, version) = (catalog.epoch, catalog.version);
        let ranges = replica.ranges();
        // A target that is placed now opens.
        if ranges.all_are(owned, RangeState::Arriving) {
            replica.control(Control::SetRange { epoch, version, range: owned, state: RangeState::Owned }).await?;
            tracing::info!(keyspace = replica.keyspace.0, shard = replica.shard.0, version = version.0, "opened");
        }
        // What it owned and owns no more is given away.
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
                self.told.lock().source_of(plan.id);
                let is_source = plan.sources.iter().any(|source| source.replica == replica.id);
                if is_source && catalog.shard(replica.shard).is_some_and(|shard| shard.replicas.len() > 1) {
                    // The targets read this log: it counts once everything is in it that any replica
                    // of the shard accepted before its own seal.
                    let (this, duties, catalog, plan) = (self.clone(), duties.clone(), catalog.clone(), plan.id);
                    tokio::spawn(async move {
                        let Some(lsn) = duties.sealed_by_all(&catalog).await else { return };
                        this.told.lock().seal(plan, Sealed { version, lsn });
                        this.context.core.report.notify_one();
                    });
                } else {
                    self.told.lock().seal(plan.id, Sealed { version, lsn });
                }
            }
            None if replica.ranges().seal.is_some() => {
                replica.control(Control::Unseal { version }).await?;
                if let Some(source) = &mut self.told.lock().source {
                    source.sealed = None;
                }
            }
            None => {}
        }
        Ok(())
    }

    fn source_duties(
        self: &Arc<Self>,
        replica: &Replica,
        ship: &ShipHandle,
        plan: Option<&Plan>,
        background: &Arc<Mutex<Background>>,
    ) {
        let Some(plan) = plan else {
            self.told.lock().source = None;
            background.lock().checkpoint = None;
            ship.positions.needed_after.store(u64::MAX, Ordering::Release);
            ship.positions.needed_from_bucket.store(false, Ordering::Release);
            return;
        };
        {
            let mut told = self.told.lock();
            let source = told.source_of(plan.id);
            if plan.step == Step::Prepare {
                let _ = replica.take_pauses(); // those of an earlier plan
            }
            if plan.step == Step::Committed && !source.released {
                source.released = true;
                source.pauses_us = replica.take_pauses();
            }
        }
        let Some(source) = plan.sources.iter().find(|source| source.replica == replica.id) else { return };
        // The targets read the log from the pinned manifest on; before there is one, from anywhere.
        let pinned = source.manifest.as_ref();
        let needed = pinned.map_or(0, |manifest| manifest.lsn.0);
        ship.positions.needed_after.store(needed, Ordering::Release);
        // A copy follows its source like any other replica; the targets of a grow know the bucket.
        ship.positions.needed_from_bucket.store(plan.moving().is_some(), Ordering::Release);
        if plan.step == Step::Prepare && background.lock().checkpoint.replace(plan.id) != Some(plan.id) {
            let (this, ship, plan) = (self.clone(), ship.clone(), plan.clone());
            tokio::spawn(async move {
                let result = tokio::select! {
                    () = this.cancel.cancelled() => return,
                    result = ship.checkpoint(plan.moving()) => result,
                };
                if let Some(source) = this.told.lock().source.as_mut().filter(|source| source.plan == plan.id) {
                    match result {
                        Ok(manifest) => source.manifest = Some(manifest),
                        Err(error) => source.failed = Some(format!("the checkpoint failed: {error}")),
                    }
                }
                this.context.core.report.notify_one();
            });
        }
    }

    fn target_duties(
        self: &Arc<Self>,
        replica: &Replica,
        ship: &ShipHandle,
        catalog: &Arc<Catalog>,
        plan: Option<&Plan>,
        placed: bool,
        background: &Arc<Mutex<Background>>,
    ) {
        let mut work = background.lock();
        if (placed || plan.is_none())
            && let Some((_, cancel)) = work.build.take()
        {
            cancel.cancel();
        }
        let Some(plan) = plan else {
            *self.target.lock() = None;
            return;
        };
        let progress = {
            let mut target = self.target.lock();
            match &*target {
                Some(progress) if progress.lock().plan == plan.id => progress.clone(),
                _ => {
                    let progress = Arc::new(Mutex::new(fresh_progress(plan)));
                    *target = Some(progress.clone());
                    progress
                }
            }
        };
        if placed {
            progress.lock().stage = TargetStage::Open;
            if matches!(plan.kind, PlanKind::Restore { .. }) {
                drop(work);
                self.cover_by_a_manifest(ship, background, Lsn(1));
            }
            return;
        }
        if plan.adds_member() {
            // It pulls from its peers like any other; `keep_house` tells how far it is.
            progress.lock().stage = TargetStage::Tailing;
            progress.lock().lag_lsns = u64::MAX;
            return;
        }
        if plan.step == Step::Prepare || work.build.is_some() {
            return;
        }
        let cancel = self.cancel.child_token();
        work.build = Some((plan.id, cancel.clone()));
        let (this, replica, ship, catalog, plan) =
            (self.clone(), replica.clone(), ship.clone(), catalog.clone(), plan.clone());
        tokio::spawn(async move { this.build(replica, ship, catalog, plan, progress, cancel).await });
    }

    async fn build(
        &self,
        replica: Replica,
        ship: ShipHandle,
        catalog: Arc<Catalog>,
        plan: Plan,
        progress: Arc<Mutex<TargetProgress>>,
        cancel: CancellationToken,
    ) {
        while !cancel.is_cancelled() {
            let build = Build {
                replica: replica.clone(),
                ship: ship.clone(),
                bucket: self.context.bucket.clone(),
                core: self.context.core.clone(),
                tmp: self.tenant.tmp.clone(),
                progress: progress.clone(),
                cancel: cancel.clone(),
            };
            let Err(error) = build.run(catalog.clone(), plan.clone()).await else { return };
            if cancel.is_cancelled() {
                return;
            }
            if error.is_transient() {
                tracing::warn!(%error, plan = plan.id.0, "building the target is interrupted; it goes on");
                tokio::time::sleep(RETRY).await;
            } else {
                tracing::error!(%error, plan = plan.id.0, "the target cannot be built");
                progress.lock().failed = Some(error.to_string());
                self.context.core.report.notify_one();
                return;
            }
        }
    }

    fn quarantine_duties(
        self: &Arc<Self>,
        replica: &Replica,
        ship: &ShipHandle,
        catalog: &Arc<Catalog>,
        background: &Arc<Mutex<Background>>,
    ) {
        let mine: Vec<_> =
            catalog.quarantines.iter().filter(|one| one.replicas.contains(&replica.id)).cloned().collect();
        self.told.lock().cleaned.retain(|plan| mine.iter().any(|one| one.plan == *plan));
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
                this.told.lock().cleaned.insert(quarantine.plan);
                this.context.core.report.notify_one();
            });
        }
        // The old copies go only once a manifest of the new owner covers what it took over.
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
    fn cover_by_a_manifest(self: &Arc<Self>, ship: &ShipHandle, background: &Arc<Mutex<Background>>, lsn: Lsn) {
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
            this.context.core.report.notify_one();
        });
    }

    /// A replica left its placement, and perhaps for good: what it has shipped and nobody has pulled comes
    /// from the bucket. Once for each, by the primary; what the others have already is skipped.
    fn drain_from_the_bucket(
        self: &Arc<Self>,
        replica: &Replica,
        catalog: &Arc<Catalog>,
        background: &Arc<Mutex<Background>>,
    ) {
        let left = |id: &ReplicaId| catalog.unsealed.iter().any(|one| one.replica == *id);
        {
            let mut background = background.lock();
            background.drained.retain(left);
            background.accepted.retain(left);
            let accepted = |node| catalog.leaving.iter().any(|leaving| leaving.node == node && leaving.accept_loss);
            for one in catalog.unsealed.iter().filter(|one| accepted(one.node)) {
                if background.accepted.insert(one.replica) && background.drained.remove(&one.replica) {
                    self.told.lock().took_from_bucket.remove(&one.replica);
                }
            }
        }
        self.told.lock().took_from_bucket.retain(left);
        if !catalog.is_primary(replica.id) {
            return;
        }
        for one in catalog.unsealed.iter().filter(|one| one.shard == replica.shard) {
            if !background.lock().drained.insert(one.replica) {
                continue;
            }
            let (this, replica, left, shards) = (self.clone(), replica.clone(), one.replica, catalog.spec.shards);
            tokio::spawn(async move {
                let bootstrap = Bootstrap {
                    bucket: this.context.bucket.clone(),
                    engines: this.context.engines.clone(),
                    dir: this.tenant.dir.clone(),
                    side: this.tenant.tmp.clone(),
                    progress: Arc::new(Mutex::new(TargetProgress::new(PlanId(0)))),
                    core: this.context.core.clone(),
                    cancel: this.cancel.clone(),
                };
                loop {
                    let taken = bootstrap.join_what_was_shipped(&replica, left, shards).await;
                    // What is wrong on this node is no word about what the bucket holds.
                    if taken.as_ref().map_or_else(BootstrapError::is_about_objects, |_| true) {
                        this.told.lock().took_from_bucket.insert(left);
                        this.context.core.report.notify_one();
                    }
                    match taken {
                        Ok(lsn) => {
                            tracing::info!(
                                keyspace = replica.keyspace.0,
                                shard = replica.shard.0,
                                replica = left.0,
                                lsn = lsn.0,
                                "took over what a replica that left had shipped"
                            );
                            return;
                        }
                        Err(BootstrapError::Cancelled) => return,
                        Err(error) if !error.is_about_objects() => {
                            tracing::info!(%error, replica = left.0, "what a replica has shipped is read again");
                            let _ = this.cancel.run_until_cancelled(tokio::time::sleep(RETRY_MAX)).await;
                            if this.cancel.is_cancelled() {
                                return;
                            }
                        }
                        Err(error) => {
                            tracing::info!(%error, replica = left.0, "not everything that a replica shipped can be taken over");
                            return;
                        }
                    }
                }
            });
        }
    }
}

/// Whose objects a restore does not take as they are.
fn without(catalog: &Catalog) -> Without<'_> {
    Without { discarded: &catalog.discarded, given_up: &catalog.given_up }
}

/// True when the plan takes bands from the replica's shard, or a copy of the replica.
fn gives(plan: &Plan, replica: &Replica) -> bool {
    match plan.kind {
        PlanKind::Grow { .. } => plan.sources.iter().any(|source| source.shard == replica.shard),
        PlanKind::Replica { .. } => plan.sources.iter().any(|source| source.replica == replica.id),
        PlanKind::Takeover { .. } | PlanKind::Restore { .. } => false,
    }
}

/// Records that a copy does not have yet; `None` while that is not known.
fn copy_lag(plan: &Plan, duties: &Duties) -> Option<u64> {
    match plan.kind {
        // There is nobody to be behind: the bucket's log has been read.
        PlanKind::Takeover { .. } => Some(0),
        _ => plan.sources.first().and_then(|source| duties.lag_behind(source.replica)),
    }
}

/// True for the one replica of a shard that ships, and for the target that will.
fn ships(catalog: &Catalog, replica: &Replica) -> bool {
    match catalog.shard(replica.shard).and_then(|shard| shard.shipper()) {
        Some(shipper) => shipper.replica == replica.id,
        None => {
            let first = catalog.plan.iter().flat_map(|plan| &plan.targets).find(|one| one.shard == replica.shard);
            first.is_some_and(|one| one.replica == replica.id)
        }
    }
}

fn fresh_source(plan: PlanId) -> SourceProgress {
    SourceProgress { plan, manifest: None, sealed: None, released: false, pauses_us: Vec::new(), failed: None }
}

/// Opens a replica. One that was being filled and has no record of its ingest is thrown away first.
pub(crate) fn open_or_begin_again(
    tenant: &Tenant,
    engines: &EngineShared,
    clock: &SharedClock,
    initial: (CatalogVersion, BandRange, RangeState),
) -> Result<Replica, String> {
    let open = |initial| {
        Replica::open(OpenOptions {
            dir: tenant.dir.clone(),
            keyspace: tenant.keyspace,
            shard: tenant.shard,
            replica: tenant.replica,
            shared: engines.clone(),
            clock: clock.clone(),
            initial,
        })
        .map_err(|error| error.to_string())
    };
    let is_new = !tenant.dir.join("db").join("CURRENT").exists();
    let replica = open(is_new.then_some(initial))?;
    let ranges = replica.ranges();
    let arriving = Band::all().any(|band| ranges.state(band) == RangeState::Arriving);
    let untouched = ranges.owned().next().is_none() && !arriving;
    let interrupted = ranges.is_being_filled() && !is_new;
    if !interrupted && !untouched {
        return Ok(replica);
    }
    if untouched && initial.2 == RangeState::Owned {
        // Created before a crash, but its first range record did not get to the disk.
        drop_blocking(replica);
        return open(Some(initial));
    }
    drop_blocking(replica);
    std::fs::remove_dir_all(&tenant.dir).map_err(|error| format!("{}: {error}", tenant.dir.display()))?;
    open(Some(initial))
}

/// True when nothing is going on with a replica that its own news do not tell: nobody waits for others or for the
/// bucket, no plan runs, and nothing is to be caught up.
fn is_at_rest(catalog: &Catalog, replica: &Replica, ship: &ShipHandle) -> bool {
    catalog.plan.is_none()
        && catalog.unsealed.is_empty()
        && replica.is_ready()
        // How long it has been acting is news each moment.
        && replica.authority().acting_ms() == 0
        && !replica.followers().has_waiting()
        && replica.bucket_acks().last().is_none()
        && !ship.positions.held_back.load(Ordering::Acquire)
}

/// Ends a replica's writer and engine from a blocking thread.
fn drop_blocking(replica: Replica) {
    tokio::runtime::Handle::current().block_on(replica.stop());
}

/// Removes a range that was given away (DESIGN: clean-up).
///
/// Whole files first; then one record with the range delete and the state; then a flush and a
/// forced compaction; only then is the range empty. After the range delete whole files are never
/// dropped again, because that could uncover what the delete hides.
pub(crate) async fn clean_up(
    replica: &Replica,
    range: BandRange,
    version: CatalogVersion,
) -> Result<(), ship::ShipError> {
    let refused = |error: ReplicaError| ship::ShipError::Checkpoint(error.to_string());
    let (ranges, epoch) = (replica.ranges(), replica.epoch());
    if ranges.all_are(range, RangeState::Empty) {
        return Ok(());
    }
    if ranges.all_are(range, RangeState::Leaving) {
        let files = replica.clone();
        blocking(move || files.engine().delete_files_in(range)).await?;
        replica
            .control(Control::SetRange { epoch, version, range, state: RangeState::Clearing })
            .await
            .map_err(refused)?;
    } else if !ranges.all_are(range, RangeState::Clearing) {
        return Err(ship::ShipError::Checkpoint("the range to remove is not one that was given away".into()));
    }
    let compacted = replica.clone();
    blocking(move || {
        compacted.engine().flush()?;
        compacted.engine().compact_bands(range);
        // An interrupted compaction reports nothing: look.
        let (inside, _) = compacted.engine().band_bytes(range)?;
        if inside > 0 || compacted.engine().any_in(range)? || compacted.closed().is_some() {
            return Err(ship::ShipError::Checkpoint("something is left in the removed range".into()));
        }
        Ok(())
    })
    .await?;
    replica.control(Control::SetRange { epoch, version, range, state: RangeState::Empty }).await.map_err(refused)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_that_is_complete_after_its_plan_has_ended_changes_nothing() {
        let mut told = Told::default();
        let sealed = Sealed { version: CatalogVersion(3), lsn: Lsn(9) };
        told.source_of(PlanId(1));
        told.seal(PlanId(1), sealed);
        assert_eq!(told.source_of(PlanId(1)).sealed, Some(sealed));
        told.source_of(PlanId(2)).released = true;
        told.seal(PlanId(1), sealed);
        let source = told.source_of(PlanId(2));
        assert!(source.released && source.sealed.is_none());
    }
}
