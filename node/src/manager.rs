//! The replicas that this node hosts: reconciles them with the catalog versions that it receives.
//!
//! **Invariants**
//! - A version is remembered durably before it is applied; lower ones are refused. Only what a sealed
//!   replica gives away it gives away at once (`host::decided`).
//! - A replica is registered durably before it serves. A registered member that has lost its files
//!   is never created anew.
//! - A replica that a passing shortage has closed is reopened once the shortage is over; any other
//!   failure stays.
//! - A replica's files are removed only when the catalog says that the keyspace was deleted, when
//!   it names the replica as removed, or when it was the target of a plan that is over and was
//!   never placed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{KeyspaceId, ReplicaId, ShardId};
use vasto_core::plan::Step;
use vasto_core::report::{ReplicaPhase, ReplicaReport};
use vasto_failpoint::{Injected, points};

use crate::host::{Host, HostContext, ReplicaSpec};
use crate::node_dir::{DirError, NodeDir, Registered};
use crate::reopen::{ReopenSchedule, ReplicaKey};
use crate::replica::Replica;
use crate::ship::ShipHandle;
use crate::shortage::{self, Shortage};

/// First and longest pause between attempts to apply a version that could not be remembered.
const OBEY_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Interval between two polls of opening replicas.
const POLL: Duration = Duration::from_millis(10);

/// The hosts of a node.
pub(crate) struct Manager {
    context: Arc<HostContext>,
    dir: Arc<Mutex<NodeDir>>,
    hosts: Mutex<HashMap<ReplicaKey, Host>>,
    failed: Mutex<HashMap<ReplicaKey, (ShardId, String)>>,
    replicas_max: usize,
    /// The reopening schedule of replicas that a shortage has closed.
    reopening: Mutex<ReopenSchedule>,
    stopping: CancellationToken,
    turns: Mutex<HashMap<KeyspaceId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Manager {
    /// Creates a manager of the directory's replicas.
    pub(crate) fn new(
        context: Arc<HostContext>,
        dir: Arc<Mutex<NodeDir>>,
        replicas_max: usize,
    ) -> Self {
        Self {
            context,
            dir,
            hosts: Mutex::default(),
            failed: Mutex::default(),
            replicas_max,
            reopening: Mutex::default(),
            stopping: CancellationToken::new(),
            turns: Mutex::default(),
        }
    }

    /// Applies a version that the master sends only once, retrying until it is applied, a newer
    /// version is known, or the node stops.
    pub(crate) async fn apply_catalog_at_last(&self, catalog: Arc<Catalog>) {
        let (mut pause, longest) = OBEY_AGAIN;
        while let Err(error) = self.apply_catalog(catalog.clone(), false).await {
            if self.stopping.is_cancelled() {
                // The end of the process cancels work on the disk; the version is applied after the
                // next start.
                return;
            }
            tracing::error!(
                %error,
                keyspace = catalog.keyspace.0,
                version = catalog.version.0,
                "a catalog version could not be applied; trying again"
            );
            if self.stopping.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            pause = (pause * 2).min(longest);
        }
    }

    /// Applies a catalog version. `remembered` says that it was read from this directory.
    pub(crate) async fn apply_catalog(
        &self,
        catalog: Arc<Catalog>,
        remembered: bool,
    ) -> Result<(), DirError> {
        // One version of a keyspace at a time; keyspaces do not wait for each other.
        let turn = self.turns.lock().entry(catalog.keyspace).or_default().clone();
        let _turn = turn.lock().await;
        let registry = &self.context.registry;
        if registry
            .catalog(catalog.keyspace)
            .is_some_and(|current| current.version > catalog.version)
        {
            // Versions travel in parallel: an overtaken one is normal, and so is one of an old
            // master.
            tracing::debug!(
                keyspace = catalog.keyspace.0,
                version = catalog.version.0,
                "a lower version is refused"
            );
            return Ok(());
        }
        let members = catalog.members_on(registry.node_id);
        let concerned = !members.is_empty()
            || self
                .dir
                .lock()
                .replicas()
                .iter()
                .any(|registered| registered.keyspace == catalog.keyspace);
        if !remembered && concerned {
            self.announce(&catalog);
            let (dir, noted) = (self.dir.clone(), catalog.clone());
            on_disk(move || dir.lock().remember_catalog(&noted)).await?;
        }
        registry.set_catalog(catalog.clone());
        // Removals first: a new target of a shard takes the place of an aborted one.
        self.retire(&catalog, &members).await?;
        self.stop_retired(&catalog, &members).await;
        for (shard, replica, placed) in &members {
            self.host(&catalog, *shard, *replica, *placed)?;
        }
        Ok(())
    }

    /// Tells open replicas of a version that seals or decides a seal before it is remembered: writers
    /// wait.
    fn announce(&self, catalog: &Arc<Catalog>) {
        let step =
            catalog.plan.as_ref().filter(|plan| plan.resize().is_some()).map(|plan| plan.step);
        match step {
            Some(Step::Sealing) => {}
            // Those who wait are told where to go.
            Some(Step::Committed) => {
                self.context.registry.set_catalog(catalog.clone());
            }
            Some(Step::Prepare | Step::Tail) | None => return,
        }
        let hosts = self.hosts.lock();
        let of_keyspace = hosts.iter().filter(|((keyspace, _), _)| *keyspace == catalog.keyspace);
        of_keyspace.for_each(|(_, host)| host.announce(catalog.clone()));
    }

    fn host(
        &self,
        catalog: &Arc<Catalog>,
        shard: ShardId,
        replica: ReplicaId,
        placed: bool,
    ) -> Result<(), DirError> {
        let key = (catalog.keyspace, replica);
        let mut dir = self.dir.lock();
        let registered = dir.registered(catalog.keyspace, replica);
        let path = dir.replica_dir(catalog.keyspace, replica);
        let mut hosts = self.hosts.lock();
        if self.stopping.is_cancelled() {
            return Ok(()); // a version that arrives while the node stops opens nothing
        }
        if registered.is_none() && hosts.len() >= self.replicas_max {
            self.fail(
                key,
                shard,
                format!(
                    "this node holds {} replicas, its limit (node.max_replicas)",
                    self.replicas_max
                ),
            );
            return Ok(());
        }
        // A member that the keyspace's first version created empty may be recreated until it has
        // been open; a member that a plan has filled may not once it is placed.
        let has_served = registered
            .is_some_and(|registered| !registered.building || (placed && registered.target));
        if has_served && !path.join("db").join("CURRENT").exists() && !hosts.contains_key(&key) {
            self.fail(
                key,
                shard,
                format!(
                    "{} has lost its files; put them back, or replace the node",
                    path.display()
                ),
            );
            return Ok(());
        }
        let version = registered.map_or(catalog.version, |registered| registered.version);
        if let Some(host) = hosts.get(&key) {
            host.apply_catalog(catalog.clone());
            return Ok(());
        }
        if registered.is_none() {
            // Until it has been open it may be recreated empty.
            dir.register(Registered {
                keyspace: catalog.keyspace,
                shard,
                replica,
                version,
                building: true,
                target: !placed,
            })?;
        }
        let spec =
            ReplicaSpec { keyspace: catalog.keyspace, shard, replica, dir: path, tmp: dir.tmp() };
        hosts.insert(key, Host::start(self.context.clone(), spec, catalog.clone()));
        Ok(())
    }

    fn fail(&self, key: ReplicaKey, shard: ShardId, reason: String) {
        if self.failed.lock().insert(key, (shard, reason.clone())).is_none() {
            tracing::error!(
                keyspace = key.0.0,
                replica = key.1.0,
                reason,
                "the replica cannot be hosted"
            );
        }
    }

    /// Stops the replicas of shards that have retired; their files stay until the version that
    /// removes them.
    async fn stop_retired(&self, catalog: &Catalog, members: &[(ShardId, ReplicaId, bool)]) {
        let stays = |id: ReplicaId| members.iter().any(|(_, member, _)| *member == id);
        let retired = catalog.retired.iter().map(|retired| retired.replica);
        let stopping: Vec<(ReplicaKey, Host)> = {
            let mut hosts = self.hosts.lock();
            if self.stopping.is_cancelled() {
                return;
            }
            let keys = retired.filter(|id| !stays(*id)).map(|id| (catalog.keyspace, id));
            keys.filter_map(|key| Some((key, hosts.remove(&key)?))).collect()
        };
        futures::future::join_all(stopping.into_iter().map(|(key, host)| async move {
            host.stop().await;
            self.failed.lock().remove(&key);
        }))
        .await;
    }

    /// Removes the replicas that this version takes away.
    async fn retire(
        &self,
        catalog: &Arc<Catalog>,
        members: &[(ShardId, ReplicaId, bool)],
    ) -> Result<(), DirError> {
        let gone: Vec<Registered> = {
            let dir = self.dir.lock();
            dir.replicas()
                .into_iter()
                .filter(|registered| {
                    registered.keyspace == catalog.keyspace && catalog.version >= registered.version
                })
                .filter(|registered| {
                    !members.iter().any(|(_, replica, _)| *replica == registered.replica)
                })
                .filter(|registered| {
                    registered.building
                        || catalog.state == KeyspaceState::Deleted
                        || catalog.is_removed(registered.replica)
                })
                .collect()
        };
        for registered in gone {
            let host = {
                let mut hosts = self.hosts.lock();
                if self.stopping.is_cancelled() {
                    return Ok(()); // its files may still be open; the next start removes them
                }
                hosts.remove(&(registered.keyspace, registered.replica))
            };
            if let Some(host) = host {
                host.stop_to_discard().await;
            }
            tracing::info!(
                keyspace = registered.keyspace.0,
                replica = registered.replica.0,
                version = catalog.version.0,
                "removing a replica"
            );
            let passes =
                |point| vasto_failpoint::at(point, registered.keyspace, registered.replica);
            let cut_off = |error: Injected| DirError::CutOff(error.to_string());
            passes(points::REMOVAL_BEFORE).await.map_err(cut_off)?;
            let dir = self.dir.clone();
            on_disk(move || dir.lock().discard(registered.keyspace, registered.replica)).await?;
            passes(points::REMOVAL_AFTER).await.map_err(cut_off)?;
            self.failed.lock().remove(&(registered.keyspace, registered.replica));
        }
        Ok(())
    }

    /// Returns the replicas of this node that do not serve, with the reasons.
    pub(crate) fn failures(&self) -> Vec<(ReplicaSpec, String)> {
        let hosts = self.hosts.lock();
        hosts.values().filter_map(|host| Some((host.spec().clone(), host.failure()?))).collect()
    }

    /// Reopens those of the failed replicas that were closed by a shortage that is over. Nothing is
    /// damaged: the state is as after a restart of the node.
    pub(crate) async fn reopen(&self, failures: Vec<(ReplicaSpec, String)>) {
        let keys: HashSet<ReplicaKey> =
            failures.iter().map(|(spec, _)| (spec.keyspace, spec.replica)).collect();
        let now = Instant::now();
        self.reopening.lock().keep(&keys, now);
        let mut due = Vec::new();
        let mut over: HashMap<Shortage, bool> = HashMap::new();
        for (spec, reason) in failures {
            let Some(shortage) = shortage::shortage_of(&reason) else { continue };
            let key = (spec.keyspace, spec.replica);
            if !self.reopening.lock().is_due(key, &reason, now) {
                continue;
            }
            let is_over = match over.get(&shortage) {
                Some(is_over) => *is_over,
                None => {
                    let place = spec.dir.parent().unwrap_or(&spec.dir).to_owned();
                    let is_over = tokio::task::spawn_blocking(move || shortage.is_over(&place))
                        .await
                        .unwrap_or(false);
                    over.insert(shortage, is_over);
                    is_over
                }
            };
            if is_over {
                self.reopening.lock().attempt(key, Instant::now());
                due.push(key);
            }
        }
        // In parallel: a node may have hundreds.
        futures::future::join_all(due.into_iter().map(|key| self.open_again(key))).await;
    }

    async fn open_again(&self, key: ReplicaKey) {
        let turn = self.turns.lock().entry(key.0).or_default().clone();
        let _turn = turn.lock().await;
        let registry = &self.context.registry;
        let Some(catalog) = registry.catalog(key.0) else { return };
        // The plan detects that its target has failed, and begins anew itself.
        if catalog.plans().flat_map(|plan| &plan.targets).any(|target| target.replica == key.1) {
            return;
        }
        let Some(host) = self.hosts.lock().remove(&key) else { return };
        let spec = host.spec().clone();
        host.stop().await;
        let mut hosts = self.hosts.lock();
        if !self.stopping.is_cancelled() {
            tracing::info!(keyspace = key.0.0, replica = key.1.0, "opening a replica again");
            hosts.insert(key, Host::start(self.context.clone(), spec, catalog));
        }
    }

    /// Marks open members as settled: from now on the loss of their files is reported, never
    /// repaired silently.
    pub(crate) fn settle(&self) {
        let hosted: HashSet<ReplicaKey> = self.hosts.lock().keys().copied().collect();
        // When the directory is busy, the next report settles them.
        let Some(mut dir) = self.dir.try_lock() else { return };
        for registered in dir.replicas().into_iter().filter(|registered| registered.building) {
            let open =
                self.context.registry.replica(registered.keyspace, registered.replica).is_some();
            let placed =
                self.context.registry.catalog(registered.keyspace).is_some_and(|catalog| {
                    catalog
                        .placement
                        .iter()
                        .flat_map(|shard| &shard.replicas)
                        .any(|member| member.replica == registered.replica)
                });
            if open
                && placed
                && hosted.contains(&(registered.keyspace, registered.replica))
                && let Err(error) = dir.register(Registered { building: false, ..registered })
            {
                tracing::error!(%error, "the register of replicas could not be written");
            }
        }
    }

    /// Returns the reports of all replicas.
    pub(crate) fn reports(&self) -> Vec<ReplicaReport> {
        self.settle();
        let hosts = self.hosts.lock();
        let mut reports: Vec<ReplicaReport> = hosts.values().map(Host::report).collect();
        for report in &mut reports {
            report.replication.passing = match &report.phase {
                ReplicaPhase::Failed(reason) if shortage::shortage_of(reason).is_some() => {
                    self.reopening.lock().is_passing((report.keyspace, report.replica))
                }
                _ => false,
            };
        }
        for ((keyspace, replica), (shard, reason)) in &*self.failed.lock() {
            if !hosts.contains_key(&(*keyspace, *replica)) {
                let phase = ReplicaPhase::Failed(reason.clone());
                reports.push(ReplicaReport::new(*keyspace, *shard, *replica, phase));
            }
        }
        reports
    }

    /// Returns the shippers of a keyspace's replicas on this node.
    pub(crate) fn shippers(&self, keyspace: KeyspaceId) -> Vec<ShipHandle> {
        self.hosts
            .lock()
            .iter()
            .filter(|((ks, _), _)| *ks == keyspace)
            .filter_map(|(_, host)| host.shipper())
            .collect()
    }

    /// Returns those of all replicas of a keyspace on this node, whether they ship or not.
    pub(crate) fn all_shippers(&self, keyspace: KeyspaceId) -> Vec<ShipHandle> {
        let hosts = self.hosts.lock();
        let of_keyspace = hosts.iter().filter(|((ks, _), _)| *ks == keyspace);
        of_keyspace.filter_map(|(_, host)| host.any_shipper()).collect()
    }

    /// Returns the shipper of a replica, whether the replica ships or not.
    pub(crate) fn any_shipper(
        &self,
        keyspace: KeyspaceId,
        replica: ReplicaId,
    ) -> Option<ShipHandle> {
        self.hosts.lock().get(&(keyspace, replica)).and_then(Host::any_shipper)
    }

    /// Returns the context that all hosts share.
    pub(crate) fn context(&self) -> &HostContext {
        &self.context
    }

    /// Returns the fault that keeps this node's shards from being shipped, as text.
    pub(crate) fn shipping_trouble(&self) -> Option<String> {
        self.context.pace.trouble()
    }

    /// Returns the newest catalog versions that this directory remembers or this node has received.
    pub(crate) async fn known_catalogs(&self) -> Result<Vec<Arc<Catalog>>, DirError> {
        let dir = self.dir.clone();
        let remembered = tokio::task::spawn_blocking(move || dir.lock().catalogs()).await;
        let (remembered, damaged) =
            remembered.unwrap_or_else(|error| Err(DirError::CutOff(error.to_string())))?;
        // An unreadable catalog may be the only trace of a keyspace: the caller must not take the
        // rest for all.
        if let Some(error) = damaged.into_iter().next() {
            return Err(error);
        }
        let mut newest = self.context.registry.catalogs();
        for catalog in remembered {
            if newest.get(&catalog.keyspace).is_none_or(|current| current.version < catalog.version)
            {
                newest.insert(catalog.keyspace, Arc::new(catalog));
            }
        }
        Ok(newest.into_values().collect())
    }

    /// Waits until each replica that the known catalogs place here is open or has failed. Targets
    /// of a running plan are not waited for.
    pub(crate) async fn opened(&self) {
        while self.is_opening() {
            tokio::time::sleep(POLL).await;
        }
    }

    fn is_opening(&self) -> bool {
        let registry = &self.context.registry;
        self.hosts.lock().values().any(|host| {
            let ReplicaSpec { keyspace, replica, .. } = *host.spec();
            registry.catalog(keyspace).is_some_and(|catalog| {
                let is_target = catalog
                    .plans()
                    .flat_map(|plan| &plan.targets)
                    .any(|target| target.replica == replica);
                catalog.is_placed(replica) && !is_target
            }) && registry.replica(keyspace, replica).is_none()
                && host.failure().is_none()
        })
    }

    /// Hands authority of every hosted replica over to another one, because the node is about to
    /// stop. Ends within seconds.
    pub(crate) async fn hand_over_authority(&self) {
        let HostContext { leases: Some(leases), registry, .. } = &*self.context else { return };
        let keys: Vec<ReplicaKey> = self.hosts.lock().keys().copied().collect();
        let replicas: Vec<Replica> =
            keys.into_iter().filter_map(|(keyspace, id)| registry.replica(keyspace, id)).collect();
        futures::future::join_all(
            replicas.iter().map(|replica| leases.hand_over_authority(replica)),
        )
        .await;
    }

    /// Stops all hosts, in parallel.
    pub(crate) async fn stop(&self) {
        let hosts: Vec<Host> = {
            let mut hosts = self.hosts.lock();
            self.stopping.cancel();
            hosts.drain().map(|(_, host)| host).collect()
        };
        futures::future::join_all(hosts.into_iter().map(Host::stop)).await;
    }
}

/// Runs work on a blocking thread. An interruption, by a panic or the end of the process, is an
/// error.
async fn on_disk(
    work: impl FnOnce() -> Result<(), DirError> + Send + 'static,
) -> Result<(), DirError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(DirError::CutOff(error.to_string())))
}
