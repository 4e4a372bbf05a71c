//! The gate of bulk work: what plans read from the bucket and write to it on this node.
//!
//! Every plan has one entry for the whole process, however many of its replicas are here: its
//! pause, this node's part of its `max_rate`, and the bytes that it has moved. All plans together
//! share the budget of the process. A bound of the rate is a debt of bytes that time pays back
//! (`debt`), so that it holds for pieces of any size and a new bound counts at once.
//!
//! Beside that everything that is bulky yields to the foreground, checkpoints of replicas that serve
//! too: in two lanes (`lane`), the files that go to and from the bucket, and the work on the disk.
//! How much is left to them `crate::yielding` decides.
//!
//! Not here: the log, manifests and the catalog, which never wait.
//!
//! **Invariant:** a pause stops new pieces at once; what an ended plan still has under way passes,
//! so that nothing waits for a plan that nobody resumes any more. What moves no bytes waits for
//! nothing but a pause and the bounds of its plan: nobody who follows a log yields.

mod debt;
mod lane;
mod plan;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use async_trait::async_trait;
use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{KeyspaceId, PlanId, ReplicaId};
use vasto_shipping::Pacer;
use vasto_shipping::bucket::Bucket;

use debt::LOOK_AGAIN;
#[cfg(test)]
pub(crate) use lane::Lane;
pub(crate) use lane::{Activity, Bound};
use plan::{Pace, PlanGate, Shared, take_from};

/// The gate of one process.
pub(crate) struct BulkGate {
    shared: Arc<Shared>,
    plans: Mutex<BTreeMap<(KeyspaceId, PlanId), Arc<PlanGate>>>,
}

impl Default for BulkGate {
    fn default() -> Self {
        Self { shared: Arc::new(Shared::new(Instant::now())), plans: Mutex::default() }
    }
}

impl BulkGate {
    /// Bounds the bulk bytes of the process, bytes a second; 0 sets no bound.
    pub(crate) fn set_budget(&self, rate: u64) {
        self.shared.budget.lock().set_rate((rate > 0).then_some(rate), Instant::now());
    }

    /// Takes over the pace of the running plans of a keyspace, those of its moves included, and lets
    /// through what others have under way: they have ended.
    pub(crate) fn apply(&self, catalog: &Catalog) {
        let mut plans = self.plans.lock();
        plans.retain(|(keyspace, id), gate| {
            let stays = *keyspace != catalog.keyspace || catalog.plans().any(|plan| plan.id == *id);
            if !stays {
                gate.set(Pace::default());
                let moved = gate.moved.load(Ordering::Relaxed);
                tracing::debug!(keyspace = keyspace.0, plan = id.0, moved, "a plan has ended here");
            }
            stays
        });
        for plan in catalog.plans() {
            let gate = plans
                .entry((catalog.keyspace, plan.id))
                .or_insert_with(|| Arc::new(PlanGate::new(self.shared.clone())));
            gate.set(Pace::of(plan, catalog));
        }
    }

    /// Returns the entry of a plan; that of a plan that does not run holds nothing back.
    pub(crate) fn of(&self, keyspace: KeyspaceId, plan: PlanId) -> Arc<PlanGate> {
        let found = self.plans.lock().get(&(keyspace, plan)).cloned();
        found.unwrap_or_else(|| Arc::new(PlanGate::new(self.shared.clone())))
    }

    /// Returns what holds back the file uploads of a replica: the plan that makes it, while one
    /// does.
    pub(crate) fn uploads_of(
        self: &Arc<Self>,
        keyspace: KeyspaceId,
        replica: ReplicaId,
    ) -> Arc<dyn Pacer> {
        Arc::new(Uploads { gate: self.clone(), keyspace, replica })
    }

    /// Returns what bulk work has done since the last call.
    pub(crate) fn look(&self, now: Instant) -> Activity {
        let Shared { transfers, work, held_back, .. } = &*self.shared;
        let activity = transfers.lock().look(now);
        let activity = activity.and(work.lock().look(now));
        let is_bound = transfers.lock().rate_left().is_some();
        held_back.store(activity.moved && is_bound, Ordering::Relaxed);
        activity
    }

    /// Sets what the foreground leaves to bulk work.
    pub(crate) fn set_bound(&self, bound: Bound, now: Instant) {
        self.shared.transfers.lock().set_bound(bound, now);
        self.shared.work.lock().set_bound(bound, now);
    }

    /// Returns the bytes a second that files to and from the bucket may have, while bulk work yields
    /// to the foreground.
    pub(crate) fn held_back_to(&self) -> Option<u64> {
        let held_back = self.shared.held_back.load(Ordering::Relaxed);
        held_back.then(|| self.shared.transfers.lock().rate_left()).flatten()
    }

    /// Returns the bytes a second that the foreground leaves to the files, and to the work on the
    /// disk; `None`: all there is.
    pub(crate) fn rates_left(&self) -> [(&'static str, Option<u64>); 2] {
        let Shared { transfers, work, .. } = &*self.shared;
        [("files", transfers.lock().rate_left()), ("rows", work.lock().rate_left())]
    }

    /// Registers the bytes that have passed, `vasto_bulk_moved`, to be read at each export.
    pub(crate) fn observe(&self, labels: &[KeyValue]) {
        let (shared, labels) = (Arc::downgrade(&self.shared), labels.to_vec());
        opentelemetry::global::meter("vasto-node")
            .u64_observable_counter("vasto_bulk_moved")
            .with_unit("By")
            .with_description(
                "Bytes that structural changes have read from the bucket and written to it, but for logs and manifests",
            )
            .with_callback(move |observer| {
                let Some(shared) = shared.upgrade() else { return };
                observer.observe(shared.moved.load(Ordering::Relaxed), &labels);
            })
            .build();
    }

    fn maker_of(&self, keyspace: KeyspaceId, replica: ReplicaId) -> Option<Arc<PlanGate>> {
        let plans = self.plans.lock();
        let mut of_keyspace = plans.iter().filter(|((of, _), _)| *of == keyspace);
        of_keyspace
            .find(|(_, gate)| gate.pace.borrow().makes.contains(&replica))
            .map(|(_, gate)| gate.clone())
    }
}

/// Holds back the file uploads of a replica: while a plan makes it, with the plan.
struct Uploads {
    gate: Arc<BulkGate>,
    keyspace: KeyspaceId,
    replica: ReplicaId,
}

#[async_trait]
impl Pacer for Uploads {
    async fn pass(&self, bytes: u64) -> bool {
        if let Some(plan) = self.gate.maker_of(self.keyspace, self.replica) {
            return plan.pass(bytes).await;
        }
        if bytes == 0 {
            return false;
        }
        loop {
            let wait = take_from(&self.gate.shared.transfers, bytes);
            if wait.is_zero() {
                return false;
            }
            tokio::time::sleep(wait.min(LOOK_AGAIN)).await;
        }
    }

    async fn pass_without_yielding(&self, bytes: u64) {
        match self.gate.maker_of(self.keyspace, self.replica) {
            Some(plan) => plan.pass_without_yielding(bytes).await,
            None => {
                self.gate.shared.transfers.lock().add(bytes);
            }
        }
    }

    fn rate(&self) -> Option<u64> {
        self.gate.shared.transfers.lock().spread(Instant::now())
    }

    fn is_paused(&self) -> bool {
        self.gate.maker_of(self.keyspace, self.replica).is_some_and(|plan| plan.is_paused())
    }
}

/// Waits until the plan behind the bucket is not paused and the foreground leaves room for so many
/// bytes of rows, or the work is cancelled; for work on the disk, on a blocking thread of the
/// runtime.
pub(crate) fn wait_for_work(bucket: &Bucket, cancel: &CancellationToken, bytes: u64) {
    if !bucket.try_work(bytes) {
        let passes = cancel.run_until_cancelled(bucket.work(bytes));
        tokio::runtime::Handle::current().block_on(passes);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use vasto_core::catalog::KeyspaceSpec;
    use vasto_core::ids::{NodeId, ShardId};
    use vasto_core::reconcile::{MoveOrder, Pace as Asked, set_pace, start_moves, start_resize};

    use super::*;

    const KEYSPACE: KeyspaceId = KeyspaceId(1);
    const PLAN: PlanId = PlanId(1);

    fn growing() -> Catalog {
        let spec = KeyspaceSpec::default();
        let first = Catalog::first(KEYSPACE, "ks", spec, &[vec![NodeId(1)]], 1, 1);
        start_resize(&first, 2, &[vec![NodeId(2)]], 2, 2).unwrap()
    }

    fn paced(catalog: &Catalog, pace: Asked) -> Catalog {
        set_pace(catalog, PLAN, pace, 3, 3).unwrap()
    }

    #[tokio::test]
    async fn a_pause_holds_every_replica_of_the_plan_and_no_other_plan() {
        let gate = Arc::new(BulkGate::default());
        let running = growing();
        gate.apply(&running);
        let plan = gate.of(KEYSPACE, PLAN);
        assert!(!plan.pass(10).await);
        gate.apply(&paced(&running, Asked::Pause));
        assert!(plan.is_paused() && gate.of(KEYSPACE, PLAN).is_paused());
        let mut held = std::pin::pin!(plan.pass(10));
        assert!(futures::poll!(&mut held).is_pending());
        let made = running.plan.as_ref().unwrap().targets[0].replica;
        let uploads = gate.uploads_of(KEYSPACE, made);
        assert!(uploads.is_paused(), "the new replica uploads only for the plan");
        let others = gate.uploads_of(KEYSPACE, ReplicaId(1));
        assert!(!others.is_paused() && !others.pass(10).await, "a source ships on");
        assert!(!gate.of(KeyspaceId(2), PLAN).pass(10).await);
        let moved =
            || (plan.moved.load(Ordering::Relaxed), gate.shared.moved.load(Ordering::Relaxed));
        assert_eq!(moved(), (10, 20), "10 bytes were of another plan");
        gate.apply(&running);
        assert!(held.await, "it says that it waited for the end of a pause");
        assert_eq!(moved(), (20, 30));
    }

    #[tokio::test]
    async fn each_move_has_an_entry_of_its_own() {
        let spec = KeyspaceSpec { shards: 2, ..KeyspaceSpec::default() };
        let nodes = [vec![NodeId(1)], vec![NodeId(2)]];
        let first = Catalog::first(KEYSPACE, "ks", spec, &nodes, 1, 1);
        let order = |shard: u32| MoveOrder {
            shard: ShardId(shard),
            replica: ReplicaId(u64::from(shard) + 1),
            to: NodeId(3),
        };
        let moving = start_moves(&first, &[order(0), order(1)], 7, 2, 2).unwrap();
        let paused = paced(&moving, Asked::Pause);
        assert_eq!(paused.moves.iter().filter(|one| one.plan.paused).count(), 1);
        let gate = Arc::new(BulkGate::default());
        gate.apply(&paused);
        let one = gate.of(KEYSPACE, PLAN);
        let made = paused.moves[0].plan.targets[0].replica;
        assert!(one.is_paused() && gate.uploads_of(KEYSPACE, made).is_paused());
        let mut held = std::pin::pin!(one.pass(1));
        assert!(futures::poll!(&mut held).is_pending());
        let other = gate.of(KEYSPACE, moving.moves[1].id());
        assert!(!other.is_paused() && !other.pass(1).await);
        gate.apply(&moving);
        assert!(held.await);
        gate.apply(&first);
        assert!(gate.plans.lock().is_empty(), "they have ended");
    }

    #[tokio::test]
    async fn what_a_cancelled_plan_has_under_way_is_not_held_for_ever() {
        let gate = BulkGate::default();
        gate.apply(&paced(&growing(), Asked::Pause));
        let plan = gate.of(KEYSPACE, PLAN);
        let mut held = std::pin::pin!(plan.pass(1));
        assert!(futures::poll!(&mut held).is_pending());
        gate.apply(&Catalog { plan: None, ..growing() });
        assert!(held.await);
        assert!(gate.plans.lock().is_empty(), "it is forgotten");
    }

    #[tokio::test]
    async fn the_budget_bounds_all_plans_of_the_process_together() {
        let gate = BulkGate::default();
        gate.set_budget(100_000);
        let (one, two) = (gate.of(KEYSPACE, PLAN), gate.of(KeyspaceId(2), PLAN));
        let began = Instant::now();
        for _ in 0..5 {
            one.pass(5_000).await;
            two.pass(5_000).await;
        }
        let least = Duration::from_millis(300);
        assert!(began.elapsed() >= least, "{:?}", began.elapsed());
        gate.set_budget(0);
        let began = Instant::now();
        one.pass(1 << 40).await;
        one.pass(1 << 40).await;
        assert!(began.elapsed() < least);
    }

    #[tokio::test]
    async fn everything_bulky_yields_and_what_moves_no_bytes_does_not() {
        let gate = Arc::new(BulkGate::default());
        gate.apply(&growing());
        let plan = gate.of(KEYSPACE, PLAN);
        let serving = gate.uploads_of(KEYSPACE, ReplicaId(1));
        assert_eq!(gate.look(Instant::now()), Activity::default());
        gate.set_bound(Bound::Held, Instant::now());
        {
            let mut download = std::pin::pin!(plan.pass(1));
            let mut checkpoint = std::pin::pin!(serving.pass(1));
            let mut rewriting = std::pin::pin!(plan.work(1));
            assert!(futures::poll!(&mut download).is_pending());
            assert!(futures::poll!(&mut checkpoint).is_pending());
            assert!(futures::poll!(&mut rewriting).is_pending() && !plan.try_work(1));
            // Nobody who follows a log waits.
            assert!(!plan.pass(0).await && !serving.pass(0).await);
            let activity = gate.look(Instant::now());
            assert!(activity.moved && activity.held_back && gate.held_back_to().is_some());
            assert!(plan.rate().is_some() && serving.rate().is_some());
            gate.set_bound(Bound::Free, Instant::now());
            assert!(plan.rate().is_none() && serving.rate().is_none());
            tokio::join!(download, checkpoint, rewriting);
        }
        assert!(plan.try_work(1));
        let activity = gate.look(Instant::now());
        assert!(activity.moved && !activity.held_back && gate.held_back_to().is_none());
        let moved = gate.shared.moved.load(Ordering::Relaxed);
        assert_eq!(moved, 1, "rows, and checkpoints that no plan asks for, are no bytes of a plan");
    }

    #[tokio::test]
    async fn what_does_not_yield_counts_for_those_who_do_and_stands_still_in_a_pause() {
        let gate = Arc::new(BulkGate::default());
        let (running, mib) = (growing(), 1u64 << 20);
        gate.apply(&running);
        gate.look(Instant::now());
        gate.set_bound(Bound::Share(0.0), Instant::now());
        let serving = gate.uploads_of(KEYSPACE, ReplicaId(1));
        serving.pass_without_yielding(64 * mib).await;
        serving.pass_without_yielding(64 * mib).await;
        let activity = gate.look(Instant::now());
        assert!(activity.moved && !activity.held_back);
        assert_eq!(gate.shared.moved.load(Ordering::Relaxed), 0, "it is no plan's");
        let mut other = std::pin::pin!(serving.pass(1));
        assert!(futures::poll!(&mut other).is_pending());
        gate.apply(&paced(&running, Asked::Pause));
        let made = running.plan.as_ref().unwrap().targets[0].replica;
        let made = gate.uploads_of(KEYSPACE, made);
        let mut held = std::pin::pin!(made.pass_without_yielding(mib));
        assert!(futures::poll!(&mut held).is_pending());
        gate.apply(&running);
        held.await;
        assert_eq!(gate.shared.moved.load(Ordering::Relaxed), mib);
    }

    #[tokio::test]
    async fn work_on_rows_stands_still_in_a_pause() {
        let gate = BulkGate::default();
        gate.apply(&paced(&growing(), Asked::Pause));
        let plan = gate.of(KEYSPACE, PLAN);
        assert!(!plan.try_work(1));
        let mut work = std::pin::pin!(plan.work(1));
        assert!(futures::poll!(&mut work).is_pending());
        gate.apply(&growing());
        work.await;
        assert!(plan.try_work(1));
    }
}
