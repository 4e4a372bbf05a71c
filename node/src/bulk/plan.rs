//! The entry of one plan at the gate of bulk work, and what it shares with all others.
//!
//! **Invariant:** the bytes of a piece are taken from all bounds at once, or from none; a pause stops
//! new pieces at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::watch;
use vasto_core::catalog::Catalog;
use vasto_core::ids::ReplicaId;
use vasto_core::plan::Plan;
use vasto_shipping::Pacer;

use super::debt::{Debt, LOOK_AGAIN};
use super::lane::Lane;
use crate::rates;

/// What all bulk work of the process shares.
pub(super) struct Shared {
    pub(super) budget: Mutex<Debt>,
    /// Bytes that have passed, of all plans.
    pub(super) moved: AtomicU64,
    /// Files to and from the bucket.
    pub(super) transfers: Mutex<Lane>,
    /// Reading and writing of rows on the disk.
    pub(super) work: Mutex<Lane>,
    /// There is bulk work, and it yields to the foreground now.
    pub(super) held_back: AtomicBool,
}

/// The entry of one plan.
pub(crate) struct PlanGate {
    pub(super) pace: watch::Sender<Pace>,
    debt: Mutex<Debt>,
    /// Bytes that have passed for the plan.
    pub(super) moved: AtomicU64,
    shared: Arc<Shared>,
}

/// What a plan asks of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pace {
    paused: bool,
    /// This node's part of the rate of the plan, bytes a second.
    rate: Option<u64>,
    /// Replicas that the plan makes: nothing but the plan uploads their files.
    pub(super) makes: BTreeSet<ReplicaId>,
}

impl Pace {
    pub(super) fn of(plan: &Plan, catalog: &Catalog) -> Self {
        let made = plan.targets.iter().map(|target| target.replica);
        Self {
            paused: plan.paused,
            rate: plan.rate_of_each_node(),
            makes: made.filter(|replica| !catalog.is_placed(*replica)).collect(),
        }
    }
}

impl Shared {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            budget: Mutex::new(Debt::new(None, now)),
            moved: AtomicU64::new(0),
            transfers: Mutex::new(Lane::new(now)),
            work: Mutex::new(Lane::new(now)),
            held_back: AtomicBool::new(false),
        }
    }
}

/// Takes the bytes when the foreground leaves a lane so much, else returns how long they wait.
pub(super) fn take_from(lane: &Mutex<Lane>, bytes: u64) -> Duration {
    let mut lane = lane.lock();
    let wait = lane.wait(Instant::now());
    if wait.is_zero() {
        lane.add(bytes);
    }
    wait
}

impl PlanGate {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            pace: watch::Sender::default(),
            debt: Mutex::new(Debt::new(None, Instant::now())),
            moved: AtomicU64::new(0),
            shared,
        }
    }

    pub(super) fn set(&self, pace: Pace) {
        self.debt.lock().set_rate(pace.rate, Instant::now());
        self.pace.send_if_modified(|held| {
            let changed = *held != pace;
            *held = pace;
            changed
        });
    }

    /// Takes the bytes when all bounds let them pass, that of the foreground only if they yield; else
    /// returns how long they wait.
    fn take(&self, bytes: u64, yields: bool) -> Duration {
        let (mut debt, mut budget) = (self.debt.lock(), self.shared.budget.lock());
        let mut lane = self.shared.transfers.lock();
        let now = Instant::now();
        let own = debt.wait(now);
        if !own.is_zero() {
            rates::held_up();
        }
        let mut wait = own.max(budget.wait(now));
        if wait.is_zero() && yields {
            wait = lane.wait(now);
        }
        if wait.is_zero() {
            debt.add(bytes);
            budget.add(bytes);
            lane.add(bytes);
            self.moved.fetch_add(bytes, Ordering::Relaxed);
            self.shared.moved.fetch_add(bytes, Ordering::Relaxed);
        }
        wait
    }

    /// Waits until the plan is not paused and `take`, which says how long else, has taken its bytes;
    /// returns true when it has waited for the end of a pause.
    async fn until(&self, take: impl Fn() -> Duration + Send) -> bool {
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
            let wait = take();
            if wait.is_zero() {
                return was_paused;
            }
            tokio::select! {
                _ = pace.changed() => {}
                () = tokio::time::sleep(wait.min(LOOK_AGAIN)) => {}
            }
        }
    }
}

#[async_trait]
impl Pacer for PlanGate {
    async fn pass(&self, bytes: u64) -> bool {
        self.until(|| self.take(bytes, bytes > 0)).await
    }

    async fn pass_without_yielding(&self, bytes: u64) {
        self.until(|| self.take(bytes, false)).await;
    }

    fn is_paused(&self) -> bool {
        self.pace.borrow().paused
    }

    fn rate(&self) -> Option<u64> {
        self.shared.transfers.lock().spread(Instant::now())
    }

    fn try_work(&self, bytes: u64) -> bool {
        !self.is_paused() && take_from(&self.shared.work, bytes).is_zero()
    }

    async fn work(&self, bytes: u64) {
        self.until(|| take_from(&self.shared.work, bytes)).await;
    }
}
