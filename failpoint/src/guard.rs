//! Points that are armed inside one process, by a guard.
//!
//! **Invariant:** dropping the guard disarms its point and releases whoever waits there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::action::{Action, Order};
use crate::points::Point;
use crate::{ARMED, Passer};

static TABLE: Mutex<Vec<Arc<Entry>>> = Mutex::new(Vec::new());

struct Entry {
    point: Point,
    order: Order,
    fired: AtomicBool,
    /// Whether the point has fired.
    reached: watch::Sender<bool>,
    released: watch::Sender<bool>,
}

/// An armed point, until it is dropped.
#[must_use = "the point is disarmed when the guard is dropped"]
pub struct Armed(Arc<Entry>);

/// Arms a point for the servers of this process.
pub fn arm(point: Point, order: impl Into<Order>) -> Armed {
    let entry = Arc::new(Entry {
        point,
        order: order.into(),
        fired: AtomicBool::new(false),
        reached: watch::Sender::new(false),
        released: watch::Sender::new(false),
    });
    TABLE.lock().push(entry.clone());
    ARMED.fetch_add(1, Ordering::Relaxed);
    Armed(entry)
}

impl Armed {
    /// Waits until the point has fired.
    pub async fn reached(&self) {
        // The sender lives as long as this guard.
        let _ = self.0.reached.subscribe().wait_for(|reached| *reached).await;
    }

    /// Returns true when the point has fired.
    pub fn is_reached(&self) -> bool {
        *self.0.reached.borrow()
    }

    /// Lets whoever waits at the point go on.
    pub fn release(&self) {
        self.0.released.send_replace(true);
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        TABLE.lock().retain(|entry| !Arc::ptr_eq(entry, &self.0));
        ARMED.fetch_sub(1, Ordering::Relaxed);
        self.release();
    }
}

/// A point that has fired.
pub(crate) struct Hit(Arc<Entry>);

impl Hit {
    pub(crate) fn action(&self) -> Action {
        self.0.order.action
    }

    pub(crate) async fn released(self) {
        let _ = self.0.released.subscribe().wait_for(|released| *released).await;
    }
}

/// Returns what is armed for this one, which has then fired.
pub(crate) fn take(point: Point, passer: Passer) -> Option<Hit> {
    let table = TABLE.lock();
    let mut armed = table.iter().filter(|one| one.point == point && one.order.means(passer));
    let entry = armed.find(|one| !one.fired.swap(true, Ordering::Relaxed))?;
    entry.reached.send_replace(true);
    Some(Hit(entry.clone()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use vasto_core::ids::{KeyspaceId, ReplicaId};

    use super::*;
    use crate::{at, points};

    /// A keyspace that no other test uses: the table is one for the process.
    fn order(keyspace: u64, action: Action) -> Order {
        Order { keyspace: Some(KeyspaceId(keyspace)), ..Order::from(action) }
    }

    #[tokio::test]
    async fn an_error_comes_once_and_only_to_whom_it_is_meant() {
        let point = points::TARGET_INGEST_BEFORE;
        let pass = |keyspace| at(point, KeyspaceId(keyspace), ReplicaId(1));
        let armed = arm(point, order(901, Action::Error));
        assert_eq!(pass(902).await, Ok(()));
        assert_eq!(at(points::TARGET_INGEST_AFTER, KeyspaceId(901), ReplicaId(1)).await, Ok(()));
        assert!(!armed.is_reached());
        assert!(pass(901).await.unwrap_err().to_string().contains("target.ingest.before"));
        assert!(armed.is_reached());
        assert_eq!(pass(901).await, Ok(()));
        drop(armed);
        let again = arm(point, order(901, Action::Error));
        drop(again);
        assert_eq!(pass(901).await, Ok(()), "a dropped guard is disarmed");
    }

    #[tokio::test]
    async fn a_pause_lasts_until_it_is_released_or_its_guard_is_dropped() {
        let point = points::SOURCE_EXPORT_BEGUN;
        for drops in [false, true] {
            let armed = arm(point, order(903, Action::Pause));
            let passing = tokio::spawn(at(point, KeyspaceId(903), ReplicaId(1)));
            armed.reached().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(!passing.is_finished());
            if drops {
                drop(armed);
            } else {
                armed.release();
            }
            let passed = tokio::time::timeout(Duration::from_secs(10), passing).await;
            assert_eq!(passed.unwrap().unwrap(), Ok(()));
        }
    }

    #[tokio::test]
    async fn a_sleep_holds_up_for_its_time() {
        let _armed =
            arm(points::REMOVAL_BEFORE, order(904, Action::Sleep(Duration::from_millis(30))));
        let began = tokio::time::Instant::now();
        assert_eq!(at(points::REMOVAL_BEFORE, KeyspaceId(904), ReplicaId(1)).await, Ok(()));
        assert!(began.elapsed() >= Duration::from_millis(30));
    }
}
