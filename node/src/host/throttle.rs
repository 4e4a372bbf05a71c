//! The throttle of a source: writers of moving keys are slowed down while the tails of the plan do
//! not catch up with them, and while the log that the plan needs fills its room faster than it is
//! shipped.
//!
//! **Invariant:** only the source of a resize decides to slow writers down, and only before its seal;
//! the other replicas of its shard do as it does.

use vasto_core::catalog::Catalog;
use vasto_core::plan::{Plan, Source, Step};
use vasto_core::report::ThrottleReport;

use super::hosted::Hosted;
use crate::clock::since_boot;
use crate::replica::throttle::Moving;
use crate::throttle::Sample;

impl Hosted {
    /// Decides anew to what rate writers of moving keys are slowed down.
    pub(super) fn slow_writers(&self, catalog: &Catalog) {
        let Self { shared, replica, throttle, .. } = self;
        let runs = |plan: &&Plan| matches!(plan.step, Step::Prepare | Step::Tail);
        let moving = catalog.plan.as_ref().filter(runs).and_then(|plan| {
            let of_shard = |source: &&Source| source.shard == replica.shard;
            let source = plan.sources.iter().find(of_shard)?.replica;
            Some((plan.id, plan.leaving()?, source, plan.paused))
        });
        let Some((plan, range, source, paused)) = moving else {
            throttle.lock().next(None);
            replica.tails().forget_late();
            replica.throttle().set(None);
            if let Some(source) = &mut shared.status.lock().source {
                source.throttle = None;
            }
            return;
        };
        let bytes_per_s = match source == replica.id {
            true => throttle.lock().next(self.sample(paused)),
            // What comes here comes to the log of the source, too.
            false => replica.throttle().rate_of(source),
        };
        let was_slow = replica.throttle().slows();
        replica.throttle().set(Some(Moving { range, bytes_per_s }));
        let held_back_ms = replica.throttle().held_back().as_millis() as u64;
        let mut status = shared.status.lock();
        let source = status.source_of(plan);
        source.throttle =
            bytes_per_s.map(|bytes_per_s| ThrottleReport { bytes_per_s, held_back_ms });
        drop(status);
        if was_slow != bytes_per_s.is_some() {
            match bytes_per_s {
                Some(bytes_per_s) => tracing::info!(
                    shard = replica.shard.0,
                    bytes_per_s,
                    "writers of moving keys are slowed down: the plan does not catch up with them"
                ),
                None => tracing::info!(shard = replica.shard.0, "writers are let go again"),
            }
            shared.notify();
        }
    }

    /// Returns how far the plan is behind; `None` when nothing is. Nobody is slowed down for the tails
    /// of a paused plan, which does not seal: only for its log.
    fn sample(&self, paused: bool) -> Option<Sample> {
        let Self { replica, ship, .. } = self;
        let log = replica.log();
        let slowest = replica.tails().slowest().filter(|_| !paused);
        let unread = slowest.map(|sent| log.synced_bytes_after(sent));
        // Half of the room is left for what cannot be slowed down.
        let room = self.shared.context.log_cap / 2;
        let unshipped = log.bytes_after(ship.plan_needs_after()).checked_sub(room);
        let backlog = unread.max(unshipped)?;
        let (written, taken) = (log.written(), replica.throttle().taken());
        Some(Sample { at: since_boot(), backlog, written, taken })
    }
}
