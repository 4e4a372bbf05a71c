//! The gate of bulk work: what plans read from the bucket and write to it on this node.
//!
//! Every plan has one entry for the whole process, however many of its replicas are here: its
//! pause, this node's part of its `max_rate`, and the bytes that it has moved. All plans together
//! share the budget of the process. A bound of the rate is a debt of bytes that time pays back, so
//! that it holds for pieces of any size and a new bound counts at once.
//!
//! Not here: the log, manifests and the catalog, which never wait; checkpoints of replicas that
//! serve, which have limits of their own (`ship::Pace`).
//!
//! **Invariant:** a pause stops new pieces at once; what an ended plan still has under way passes,
//! so that nothing waits for a plan that nobody resumes any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{KeyspaceId, PlanId, ReplicaId};
use vasto_core::plan::Plan;
use vasto_shipping::Pacer;
use vasto_shipping::bucket::Bucket;

use crate::rates;

/// Part of a second for which bytes may pass ahead of the rate: pieces are smaller than a timer is
/// exact.
const AHEAD: f64 = 0.05;
/// Longest sleep of a waiting piece, after which it looks at the budget of the process again.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// The gate of one process.
pub(crate) struct BulkGate {
    shared: Arc<Shared>,
    plans: Mutex<BTreeMap<(KeyspaceId, PlanId), Arc<PlanGate>>>,
}

/// What all plans of the process share.
struct Shared {
    budget: Mutex<Debt>,
    /// Bytes that have passed, of all plans.
    moved: AtomicU64,
}

/// The entry of one plan.
pub(crate) struct PlanGate {
    pace: watch::Sender<Pace>,
    debt: Mutex<Debt>,
    /// Bytes that have passed for the plan.
    moved: AtomicU64,
    shared: Arc<Shared>,
}

/// What a plan asks of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Pace {
    paused: bool,
    /// This node's part of the rate of the plan, bytes a second.
    rate: Option<u64>,
    /// Replicas that the plan makes: nothing but the plan uploads their files.
    makes: BTreeSet<ReplicaId>,
}

impl Pace {
    fn of(plan: &Plan, catalog: &Catalog) -> Self {
        let made = plan.targets.iter().map(|target| target.replica);
        Self {
            paused: plan.paused,
            rate: plan.rate_of_each_node(),
            makes: made.filter(|replica| !catalog.is_placed(*replica)).collect(),
        }
    }
}

/// Bytes that have passed ahead of a rate.
#[derive(Debug)]
struct Debt {
    /// Bytes a second; `None` sets no bound.
    rate: Option<u64>,
    bytes: f64,
    at: Instant,
}

impl Debt {
    fn new(rate: Option<u64>, now: Instant) -> Self {
        Self { rate, bytes: 0.0, at: now }
    }

    /// Changes the rate; what was owed under the old one is paid at the new one.
    fn set_rate(&mut self, rate: Option<u64>, now: Instant) {
        self.pay(now);
        self.rate = rate;
    }

    fn pay(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.bytes = match self.rate {
            Some(rate) => (self.bytes - elapsed * rate as f64).max(0.0),
            None => 0.0,
        };
    }

    /// Returns how long the next piece waits, zero when it may pass.
    fn wait(&mut self, now: Instant) -> Duration {
        self.pay(now);
        let Some(rate) = self.rate else { return Duration::ZERO };
        let rate = rate.max(1) as f64;
        Duration::try_from_secs_f64((self.bytes / rate - AHEAD).max(0.0)).unwrap_or(LOOK_AGAIN)
    }

    fn add(&mut self, bytes: u64) {
        if self.rate.is_some() {
            self.bytes += bytes as f64;
        }
    }
}

impl Default for BulkGate {
    fn default() -> Self {
        let budget = Mutex::new(Debt::new(None, Instant::now()));
        let shared = Arc::new(Shared { budget, moved: AtomicU64::new(0) });
        Self { shared, plans: Mutex::default() }
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

impl PlanGate {
    fn new(shared: Arc<Shared>) -> Self {
        Self {
            pace: watch::Sender::default(),
            debt: Mutex::new(Debt::new(None, Instant::now())),
            moved: AtomicU64::new(0),
            shared,
        }
    }

    fn set(&self, pace: Pace) {
        self.debt.lock().set_rate(pace.rate, Instant::now());
        self.pace.send_if_modified(|held| {
            let changed = *held != pace;
            *held = pace;
            changed
        });
    }

    /// Takes the bytes when both bounds let them pass, else returns how long they wait.
    fn take(&self, bytes: u64) -> Duration {
        let (mut debt, mut budget) = (self.debt.lock(), self.shared.budget.lock());
        let now = Instant::now();
        let own = debt.wait(now);
        if !own.is_zero() {
            rates::held_up();
        }
        let wait = own.max(budget.wait(now));
        if wait.is_zero() {
            debt.add(bytes);
            budget.add(bytes);
            self.moved.fetch_add(bytes, Ordering::Relaxed);
            self.shared.moved.fetch_add(bytes, Ordering::Relaxed);
        }
        wait
    }
}

#[async_trait]
impl Pacer for PlanGate {
    async fn pass(&self, bytes: u64) -> bool {
        let mut pace = self.pace.subscribe();
        let mut was_paused = false;
        loop {
            if pace.borrow_and_update().paused {
                was_paused = true;
                rates::held_up();
                // An error would mean that the sender is dropped, and `self` owns it.
                let _ = pace.changed().await;
                continue;
            }
            let wait = self.take(bytes);
            if wait.is_zero() {
                return was_paused;
            }
            tokio::select! {
                _ = pace.changed() => {}
                () = tokio::time::sleep(wait.min(LOOK_AGAIN)) => {}
            }
        }
    }

    fn is_paused(&self) -> bool {
        self.pace.borrow().paused
    }
}

/// Holds back the file uploads of a replica while a plan makes it.
struct Uploads {
    gate: Arc<BulkGate>,
    keyspace: KeyspaceId,
    replica: ReplicaId,
}

#[async_trait]
impl Pacer for Uploads {
    async fn pass(&self, bytes: u64) -> bool {
        match self.gate.maker_of(self.keyspace, self.replica) {
            Some(plan) => plan.pass(bytes).await,
            None => false,
        }
    }

    fn is_paused(&self) -> bool {
        self.gate.maker_of(self.keyspace, self.replica).is_some_and(|plan| plan.is_paused())
    }
}

/// Waits until the plan behind the bucket is not paused, or the work is cancelled; for work on the
/// disk, on a blocking thread of the runtime.
pub(crate) fn wait_while_paused(bucket: &Bucket, cancel: &CancellationToken) {
    if bucket.is_paused() {
        let resumed = cancel.run_until_cancelled(bucket.pass(0));
        tokio::runtime::Handle::current().block_on(resumed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
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

    #[test]
    fn a_debt_holds_the_rate_for_pieces_of_any_size() {
        let start = Instant::now();
        for piece in [1_000, 50_000, 1_000_000] {
            let mut debt = Debt::new(Some(100_000), start);
            let (mut now, mut moved) = (start, 0);
            while now < start + Duration::from_secs(60) {
                let wait = debt.wait(now);
                now += wait;
                if wait.is_zero() {
                    debt.add(piece);
                    moved += piece;
                }
            }
            // The first piece passes at once.
            let most = 100_000 * 60 + piece + 10_000;
            assert!(moved <= most && moved >= 100_000 * 59, "{piece}: {moved}");
        }
    }

    #[test]
    fn a_new_rate_counts_at_once_for_what_is_owed() {
        let start = Instant::now();
        let mut debt = Debt::new(Some(1_000), start);
        debt.add(1_000_000);
        assert!(debt.wait(start) > Duration::from_secs(900));
        debt.set_rate(Some(1_000_000), start);
        assert!(debt.wait(start) <= Duration::from_secs(1));
        debt.set_rate(None, start);
        assert_eq!(debt.wait(start), Duration::ZERO);
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
}
