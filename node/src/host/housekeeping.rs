//! Housekeeping of a host: state that sends no event is polled.
//!
//! **Invariant:** an idle replica needs only the long interval: all other work wakes its runner, or
//! can wait for that long.

use vasto_core::catalog::Catalog;
use vasto_core::limits::TAIL_LAG_LSNS_MAX;
use vasto_core::plan::{Plan, PlanKind};
use vasto_core::report::ReplicationReport;

use super::hosted::Hosted;
use crate::replication::replicator::Replicator;

/// Returns the number of records that an added replica lacks; `None` while that is not known.
fn copy_lag(plan: &Plan, replicator: &Replicator) -> Option<u64> {
    match plan.kind {
        // There is no live source to be behind: the log in the bucket has been read.
        PlanKind::RecoverReplica { .. } => Some(0),
        _ => plan.sources.first().and_then(|source| replicator.lag_behind(source.replica)),
    }
}

impl Hosted {
    /// Polls the state that sends no event: expires waiting writes, reports changes to the master,
    /// and names the follower to evict.
    pub(super) fn housekeeping(&self, catalog: &Catalog, reported: &mut ReplicationReport) {
        let Hosted { shared, replica, ship, replicator, .. } = self;
        if let Some(plan) = self.copy_plan(catalog)
            && let Some(progress) = &shared.status.lock().target
            && let Some(lag) = copy_lag(plan, replicator)
        {
            let mut progress = progress.lock();
            if progress.plan == plan.id && progress.lag_lsns != lag {
                progress.lag_lsns = lag;
                shared.notify();
            }
        }
        self.note_caught_up(catalog);
        self.slow_writers(catalog);
        replica.followers().expire();
        replica.bucket_acks().expire();
        replicator.measure();
        // The log is over its cap because a follower does not read it: the follower that is
        // furthest behind is reported to the master for eviction.
        let over_cap = ship.status().held_back;
        replicator.set_evict(
            replica.followers().last().filter(|_| over_cap).map(|(follower, _)| follower),
        );
        let report = replicator.report();
        // A change of the lag alone triggers no report: it changes all the time, and the regular
        // reports carry it.
        let without_lag = |report: &ReplicationReport| ReplicationReport {
            lag_lsns: 0,
            lag_ms: 0,
            ..report.clone()
        };
        if without_lag(&report) != without_lag(reported) {
            shared.notify();
        }
        *reported = report;
    }

    /// Ends the span of an added replica that catches up, once it has.
    fn note_caught_up(&self, catalog: &Catalog) {
        let is_close = |plan: &&Plan| {
            copy_lag(plan, &self.replicator).is_some_and(|lag| lag <= TAIL_LAG_LSNS_MAX)
        };
        if let Some(plan) = self.copy_plan(catalog).filter(is_close)
            && let Some((id, span)) = &mut self.background.lock().catching_up
            && *id == plan.id
            && let Some(span) = span.take()
        {
            span.done();
        }
    }

    /// Returns the running plan, if it makes this replica one more member of its shard.
    fn copy_plan<'a>(&self, catalog: &'a Catalog) -> Option<&'a Plan> {
        let plan = catalog.plan_of(self.replica.id)?;
        let mine = plan.targets.iter().any(|target| target.replica == self.replica.id);
        (mine && plan.adds_member()).then_some(plan)
    }

    /// Returns true when the replica needs no short housekeeping interval: no plan runs, no replica
    /// drains, no write waits for peers or for the bucket, nothing is to be caught up, and no
    /// follower holds the log back. Events still wake the runner: changes of the replica (ranges,
    /// epoch, version, closure, readiness) and of its authority.
    pub(super) fn is_idle(&self, catalog: &Catalog) -> bool {
        let Hosted { replica, ship, .. } = self;
        catalog.plan_of(replica.id).is_none()
            && !catalog.is_moving(replica.shard)
            && catalog.draining.is_empty()
            && replica.is_ready()
            // An acting primary reports for how long it has acted, and only housekeeping reads
            // that.
            && replica.authority().acting_ms() == 0
            && !replica.followers().has_waiting()
            && replica.bucket_acks().last().is_none()
            && !ship.status().held_back
    }
}
