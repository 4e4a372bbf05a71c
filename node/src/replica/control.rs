//! Execution of the commands that change a replica itself: the seal of a range (its writes are held
//! until the plan that moves it has committed or is undone), states of ranges, ingests of SSTs,
//! fences of the commit time, the gc floor, the stop. A range is one of bands, which divide the
//! hash space.
//!
//! **Invariants**
//! - Every change is a record of its own, synced before it is answered; only the epoch, version and
//!   role of a catalog version are taken without one. A seal, an unseal, an ingest, a fence or a
//!   floor that is in force already writes no second record.
//! - Held writes are retried before the command that decides their outcome is answered.
//! - A range that is opened or given away is so at once, before the sync: the catalog version in the
//!   bucket has decided it. A crash that takes the record back leaves a range that serves nothing, and
//!   the version is applied again; whatever is acknowledged as durable afterwards is behind the
//!   record. Every other change is durable before anybody sees it, a seal above all.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vasto_core::PlanId;
use vasto_core::ids::{CatalogVersion, Epoch, Lsn};
use vasto_core::record::{BandRange, Body, FeedProgress, IngestedObject, RangeState};

use super::command::{Control, Position, ReplicaError, Role};
use super::group::Committer;
use super::store::Store;

impl Committer {
    /// Executes a control command; after a stop nothing is executed any more.
    pub(super) fn control(&mut self, command: Control) -> Result<Lsn, ReplicaError> {
        let store = &mut self.store;
        match command {
            Control::Seal { plan, version, range } => self.seal(plan, version, range),
            Control::Unseal { version } => self.unseal(version),
            Control::SetRange { epoch, version, range, state } => {
                let result = store.set_range(epoch, version, range, state);
                self.retry_held();
                let lsn = result?;
                self.store.sync_rest()?;
                Ok(lsn)
            }
            Control::Ingest { plan, range, files, objects, event_time_max, progress } => {
                store.ingest(plan, range, files, objects, event_time_max, progress)
            }
            Control::ApplyCatalog { epoch, version, role } => {
                store.apply_catalog(epoch, version, role);
                if role != Role::TransferringLeadership {
                    self.retry_held();
                }
                Ok(self.store.meta.head.applied_lsn)
            }
            Control::FenceCommitTime { commit_time } => store.fence_commit_time(commit_time),
            Control::GcFloor { floor } => store.raise_floor(floor),
            #[cfg(test)]
            Control::Sync => store.sync().map(|()| store.meta.head.applied_lsn),
            Control::Stop => {
                self.stop();
                Ok(self.store.meta.head.applied_lsn)
            }
        }
    }

    fn seal(
        &mut self,
        plan: PlanId,
        version: CatalogVersion,
        range: BandRange,
    ) -> Result<Lsn, ReplicaError> {
        if let Some(seal) = self.store.meta.ranges.seal
            && seal.plan == plan
            && seal.version == version
        {
            return Ok(seal.lsn); // asked again, for instance after a restart
        }
        let sealed_at = Instant::now();
        let lsn = self.store.log_control(Body::Seal { plan, version, range })?;
        self.store.note_sealed(version);
        self.held.sealed(sealed_at, Instant::now());
        self.hold_slowed();
        Ok(lsn)
    }

    fn unseal(&mut self, version: CatalogVersion) -> Result<Lsn, ReplicaError> {
        let Some(seal) = self.store.meta.ranges.seal else {
            return Ok(self.store.meta.head.applied_lsn);
        };
        let result = self.store.log_control(Body::Unseal { plan: seal.plan, version });
        self.retry_held();
        result
    }

    /// Ends the writer; queued commands are not executed any more.
    pub(super) fn stop(&mut self) {
        self.held.clear();
        self.slowed.clear();
        let shared = self.store.shared.clone();
        shared.abandon_acknowledgements();
        if !shared.is_closed() {
            let _ = self.store.sync();
            if let Err(error) = shared.engine.flush() {
                tracing::warn!(%error, "the memtable was not flushed at the stop; the log has it");
            }
        }
        shared.close("the node is stopping".into());
        shared.ended.store(true, Ordering::Release);
    }
}

impl Store {
    /// Begins this incarnation (the numbering of own records since the replica was built) with a
    /// record that says where the previous one ended.
    pub(super) fn adopt(&mut self) -> Result<Lsn, ReplicaError> {
        let body =
            Body::Adopt { previous: self.meta.identity.incarnation, head: self.meta.head.own_seq };
        self.log_control(body)
    }

    /// Notes what the replica holds at a seal that is durable: with its record everything is.
    fn note_sealed(&self, version: CatalogVersion) {
        let position = Position {
            lsn: self.meta.head.applied_lsn,
            vector: self.meta.vector.clone(),
            floor: self.meta.head.floor,
            incarnation: self.meta.identity.incarnation,
        };
        *self.shared.at_seal.lock() = Some((version, position));
    }

    /// Gives a range a state; the epoch is published with it. The caller makes it durable.
    pub(super) fn set_range(
        &mut self,
        epoch: Epoch,
        version: CatalogVersion,
        range: BandRange,
        state: RangeState,
    ) -> Result<Lsn, ReplicaError> {
        self.meta.head.epoch = self.meta.head.epoch.max(epoch);
        let body = Body::RangeState { version, range, state };
        match state {
            RangeState::Owned | RangeState::Leaving => self.log_control_visibly(body),
            RangeState::Empty | RangeState::Arriving | RangeState::Clearing => {
                self.log_control(body)
            }
        }
    }

    /// Takes the epoch, version and role of a catalog version. Epoch and version become durable
    /// with the next record; the role is not stored.
    fn apply_catalog(&mut self, epoch: Epoch, version: CatalogVersion, role: Role) {
        self.meta.head.epoch = self.meta.head.epoch.max(epoch);
        self.meta.head.version = self.meta.head.version.max(version);
        self.role = role;
        self.publish();
    }

    /// Advances the durable commit time beyond this one: every later record has a later one.
    fn fence_commit_time(&mut self, commit_time: u64) -> Result<Lsn, ReplicaError> {
        if self.meta.head.commit_time > commit_time {
            self.sync_rest()?;
            return Ok(self.meta.head.applied_lsn);
        }
        // An empty record carries the time.
        self.log_control_at(Body::data(Vec::new()), self.commit_time().max(commit_time + 1))
    }

    fn raise_floor(&mut self, floor: u64) -> Result<Lsn, ReplicaError> {
        if floor <= self.meta.head.floor {
            return Ok(self.meta.head.applied_lsn);
        }
        self.log_control(Body::GcFloor { floor })
    }

    /// Adds finished SSTs to an arriving range, once for each plan.
    fn ingest(
        &mut self,
        plan: PlanId,
        range: BandRange,
        files: Vec<PathBuf>,
        objects: Vec<IngestedObject>,
        event_time_max: u64,
        progress: Vec<FeedProgress>,
    ) -> Result<Lsn, ReplicaError> {
        if self.meta.ranges.filled_by() == Some(plan) {
            return Ok(self.meta.head.applied_lsn);
        }
        if !self.meta.ranges.all_are(range, RangeState::Arriving) {
            return Err(ReplicaError::Refused("only an arriving range can be filled".into()));
        }
        if self.shared.engine.any_in(range)? {
            let reason = "the range to fill is not empty; it must be cleared first";
            return Err(ReplicaError::Refused(reason.into()));
        }
        // Flushed first: an ingested file is durable at once, and no older write may become durable
        // after it.
        self.sync()?;
        self.shared.engine.flush()?;
        self.shared.engine.ingest(files)?;
        self.max_event_times.raise_all(event_time_max);
        self.log_control(Body::Ingest { plan, range, objects, event_time_max, progress })
    }
}
