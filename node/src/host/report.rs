//! The report of a host: phase, size, and its part in a plan.
//!
//! **Invariant:** a report is cheap; the size of a replica is read from its database at most every
//! few hundred milliseconds, and with each new checkpoint.

use std::time::{Duration, Instant};

use vasto_core::ids::Lsn;
use vasto_core::report::{ReplicaPhase, ReplicaReport, TargetStage};
use vasto_core::stored::Stored;

use super::Host;
use super::shared::Shared;
use crate::engine::Tables;
use crate::replica::Replica;
use crate::replica::size::SizeVersion;
use crate::ship::ShipHandle;

/// Maximum age of the reported size of a replica.
const SIZE_AGE: Duration = Duration::from_millis(400);

/// Maximum age of the size while nothing is written, compacted or counted.
const IDLE_SIZE_AGE: Duration = Duration::from_secs(20);

/// The size of a replica at a point in time.
#[derive(Clone)]
pub(super) struct KnownSize {
    pub(super) at: Instant,
    pub(super) manifest: Lsn,
    /// Inputs of the size.
    pub(super) version: SizeVersion,
    pub(super) keys_and_bytes: (u64, u64),
    pub(super) stored: Option<Stored>,
}

impl Host {
    /// Returns a cached size while it is fresh: a busy tail causes hundreds of reports a second,
    /// too many to scan all files. A new checkpoint always refreshes it, so that a report that
    /// shows the checkpoint shows its size too.
    fn size_of(&self, replica: &Replica, manifest: Lsn, named: Option<&Tables>) -> KnownSize {
        let mut size = self.size.lock();
        let is_fresh = |known: &&KnownSize| {
            let age = known.at.elapsed();
            known.manifest == manifest
                && (age < SIZE_AGE
                    || (age < IDLE_SIZE_AGE && known.version == replica.size_version()))
        };
        if let Some(known) = size.as_ref().filter(is_fresh) {
            return known.clone();
        }
        let version = replica.size_version();
        let (keys_and_bytes, stored) = (replica.size(), replica.stored_by_band(named));
        let known = KnownSize { at: Instant::now(), manifest, version, keys_and_bytes, stored };
        size.insert(known).clone()
    }

    /// Returns why the replica does not serve, if it does not.
    pub(crate) fn failure(&self) -> Option<String> {
        if let Some(ReplicaPhase::Failed(reason)) = &self.shared.status.lock().phase {
            return Some(reason.clone());
        }
        self.hosted()?.closed()
    }

    /// Returns the replica while it is open.
    fn hosted(&self) -> Option<Replica> {
        let Shared { context, spec, .. } = &*self.shared;
        context
            .registry
            .replica_of(spec.keyspace, spec.shard)
            .filter(|replica| replica.id == spec.replica)
    }

    /// Returns the report for the master.
    pub(crate) fn report(&self) -> ReplicaReport {
        let status = self.shared.status.lock();
        let spec = &self.shared.spec;
        let phase = status.phase.clone().unwrap_or(ReplicaPhase::Opening);
        let mut report = ReplicaReport {
            source: status.source.clone(),
            target: status.target.as_ref().map(|progress| progress.lock().clone()),
            cleaned: status.cleaned.iter().copied().collect(),
            replication: status
                .replicator
                .as_ref()
                .map(|replicator| replicator.report())
                .unwrap_or_default(),
            ..ReplicaReport::new(spec.keyspace, spec.shard, spec.replica, phase)
        };
        report.replication.took_from_bucket = status.took_from_bucket.iter().copied().collect();
        if let Some(ship) = &status.ship {
            let published = ship.status();
            (report.shipped_lsn, report.manifest_lsn) = (published.shipped, published.manifest);
            report.ships_behind = published.behind;
            if published.over_cap
                && let Some(source) = &mut report.source
            {
                source.failed = Some("the log has reached its cap while the plan needed it".into());
            }
        }
        if let Some(target) = &mut report.target
            && (report.phase == ReplicaPhase::Building || target.stage == TargetStage::Open)
        {
            // A replica that is being filled has no manifest; one that serves and receives more
            // bands has, of before.
            target.manifest_shipped |= report.manifest_lsn.0 > 0;
        }
        if let Some(replica) = self.hosted() {
            let named = status.ship.as_ref().and_then(ShipHandle::named);
            let KnownSize { keys_and_bytes, stored, .. } =
                self.size_of(&replica, report.manifest_lsn, named.as_deref());
            report.incarnation = replica.incarnation();
            report.version = replica.version();
            report.lsn = replica.settled_lsn();
            (report.keys, report.bytes) = keys_and_bytes;
            report.stored = stored;
            let done = replica.requests().saturating_add(report.lsn.0);
            let load = self.load.lock().at(Instant::now(), done);
            (report.load, report.load_unknown) = (load.unwrap_or_default(), load.is_none());
            if let Some(reason) = replica.closed() {
                report.phase = ReplicaPhase::Failed(reason);
            }
        }
        report
    }
}
