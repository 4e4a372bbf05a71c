//! What a host reports: phase, size, and its part in a plan.
//!
//! **Invariant:** a report is cheap; the size of a replica is read from its database at most every few hundred
//! milliseconds, and with each new checkpoint.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vasto_core::ids::{CatalogVersion, Incarnation, Lsn, PlanId, ReplicaId};
use vasto_core::report::{ReplicaPhase, ReplicaReport, Sealed, SourceProgress};

use super::Host;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::size::SizeVersion;

/// Maximum age of the reported size of a replica.
pub(super) const SIZE_AGE: Duration = Duration::from_millis(400);

/// Maximum age of the size while there are no writes: then only compactions change it.
pub(super) const IDLE_SIZE_AGE: Duration = Duration::from_secs(20);

/// State that a host publishes for reports.
#[derive(Default)]
pub(super) struct HostStatus {
    pub(super) phase: Option<ReplicaPhase>,
    pub(super) source: Option<SourceProgress>,
    pub(super) cleaned: BTreeSet<PlanId>,
    /// Replicas that left, whose archive has been applied as far as that is possible.
    pub(super) took_from_bucket: BTreeSet<ReplicaId>,
}

impl HostStatus {
    /// Returns the progress of a plan as its source; progress of an earlier plan is dropped.
    pub(super) fn source_of(&mut self, plan: PlanId) -> &mut SourceProgress {
        let known = self.source.take().filter(|source| source.plan == plan);
        self.source.insert(known.unwrap_or_else(|| fresh_source(plan)))
    }

    /// Records a complete seal. A seal of a plan that has ended meanwhile is ignored.
    pub(super) fn seal(&mut self, plan: PlanId, sealed: Sealed) {
        if let Some(source) = self.source.as_mut().filter(|source| source.plan == plan) {
            source.sealed = Some(sealed);
        }
    }
}

/// The size of a replica at a point in time.
#[derive(Clone, Copy)]
pub(super) struct KnownSize {
    pub(super) at: Instant,
    pub(super) manifest: Lsn,
    /// What the size depends on, apart from the background work of RocksDB.
    pub(super) version: SizeVersion,
    pub(super) keys_and_bytes: (u64, u64),
}

pub(super) fn fresh_source(plan: PlanId) -> SourceProgress {
    SourceProgress { plan, manifest: None, sealed: None, released: false, pauses_us: Vec::new(), failed: None }
}

impl Host {
    /// Returns a cached size while it is fresh: a busy tail causes hundreds of reports a second, too many to scan all
    /// files. A new checkpoint always refreshes it, so that a report that shows the checkpoint shows its size too.
    pub(super) fn size_of(&self, replica: &Replica, manifest: Lsn) -> (u64, u64) {
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

    /// Returns why the replica does not serve, if it does not.
    pub fn failure(&self, registry: &NodeRegistry) -> Option<String> {
        if let Some(ReplicaPhase::Failed(reason)) = &self.status.lock().phase {
            return Some(reason.clone());
        }
        self.hosted(registry)?.closed()
    }

    /// Returns the replica while it is open.
    pub(super) fn hosted(&self, registry: &NodeRegistry) -> Option<Replica> {
        registry.replica_of(self.spec.keyspace, self.spec.shard).filter(|one| one.id == self.spec.replica)
    }

    /// Returns the report for the master.
    pub fn report(&self, registry: &NodeRegistry) -> ReplicaReport {
        let status = self.status.lock();
        let spec = &self.spec;
        let mut report = ReplicaReport {
            keyspace: spec.keyspace,
            shard: spec.shard,
            replica: spec.replica,
            incarnation: Incarnation(0),
            version: CatalogVersion(0),
            phase: status.phase.clone().unwrap_or(ReplicaPhase::Opening),
            lsn: Lsn(0),
            shipped_lsn: Lsn(0),
            manifest_lsn: Lsn(0),
            keys: 0,
            bytes: 0,
            source: status.source.clone(),
            target: self.target.lock().as_ref().map(|progress| progress.lock().clone()),
            cleaned: status.cleaned.iter().copied().collect(),
            replication: self.replicator.lock().as_ref().map(|replicator| replicator.report()).unwrap_or_default(),
        };
        report.replication.took_from_bucket = status.took_from_bucket.iter().copied().collect();
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
            // A replica that is being filled has no manifest.
            target.manifest_shipped |= report.manifest_lsn.0 > 0;
        }
        if let Some(replica) = self.hosted(registry) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_that_is_complete_after_its_plan_has_ended_changes_nothing() {
        let mut status = HostStatus::default();
        let sealed = Sealed { version: CatalogVersion(3), lsn: Lsn(9) };
        status.source_of(PlanId(1));
        status.seal(PlanId(1), sealed);
        assert_eq!(status.source_of(PlanId(1)).sealed, Some(sealed));
        status.source_of(PlanId(2)).released = true;
        status.seal(PlanId(1), sealed);
        let source = status.source_of(PlanId(2));
        assert!(source.released && source.sealed.is_none());
    }
}
