//! Truncates the front of a replica's log when it is not needed any more.
//!
//! **Invariant:** truncated log is persisted in the database, covered by the bucket (while this replica ships; old
//! enough for that while another one does), not needed by a running plan and read by every follower. At the byte cap
//! the bucket's cover is given up, but never log that a plan needs: log that the plan can read from the bucket is
//! truncated, and the rest stays. Any other holder of the log is named, and the master removes it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;
use vasto_core::ids::Lsn;
use vasto_core::limits::LOG_KEPT_FOR_SHIPPING;

use super::{Positions, ShipError, blocking};
use crate::clock::with_others;
use crate::replica::Replica;

/// Bytes of log that the database must lack before it is flushed at the cap.
const FLUSH_WORTH_BYTES: u64 = 16 << 20;

/// Truncates the log of one replica.
pub(super) struct Cut {
    replica: Replica,
    positions: Arc<Positions>,
    /// Upper bound of the log bytes that are kept.
    cap: u64,
    /// The bucket's cover was given up, and that was logged.
    given_up: bool,
    ends: Ends,
}

/// Ends of the log over time: younger log is kept although another replica ships.
struct Ends {
    kept_for: Duration,
    /// Ascending; at most one entry is older than `kept_for`.
    known: VecDeque<(Instant, Lsn)>,
}

impl Ends {
    /// Returns the LSN up to which the log is so old that the shipping replica has shipped it, if it can.
    fn old(&mut self, now: Instant, end: Lsn) -> Lsn {
        if self.known.back().is_none_or(|(at, lsn)| *lsn < end && now - *at >= self.kept_for / 16) {
            self.known.push_back((now, end));
        }
        let is_old = |(at, _): &(Instant, Lsn)| now - *at >= self.kept_for;
        while self.known.get(1).is_some_and(is_old) {
            self.known.pop_front();
        }
        self.known.front().filter(|first| is_old(first)).map_or(Lsn(0), |(_, lsn)| *lsn)
    }
}

impl Cut {
    pub(super) fn new(replica: Replica, positions: Arc<Positions>, cap: u64, interval: Duration) -> Self {
        let kept_for = LOG_KEPT_FOR_SHIPPING.max(interval.saturating_mul(3));
        let ends = Ends { kept_for, known: VecDeque::new() };
        Self { replica, positions, cap, given_up: false, ends }
    }

    /// Truncates repeatedly; ends when it is dropped.
    pub(super) async fn run(mut self, every: Duration) {
        let mut grown = self.replica.log().subscribe();
        loop {
            grown.mark_unchanged();
            match self.once().await {
                Ok(true) => {
                    let latest = with_others(Instant::now() + every * 10);
                    let _ = tokio::time::timeout_at(latest, grown.changed()).await;
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(
                        %error,
                        keyspace = self.replica.keyspace.0,
                        shard = self.replica.shard.0,
                        "the log cannot be cut"
                    );
                    tokio::time::sleep(every * 10).await;
                }
            }
            tokio::time::sleep(every).await;
        }
    }

    /// Truncates once; returns true when nothing more can be truncated before the log grows.
    async fn once(&mut self) -> Result<bool, ShipError> {
        let (replica, positions, cap) = (self.replica.clone(), self.positions.clone(), self.cap);
        let shipped = Lsn(positions.shipped.load(Ordering::Acquire));
        let needed = Lsn(positions.needed_after.load(Ordering::Acquire));
        let from_bucket = positions.needed_from_bucket.load(Ordering::Acquire);
        let chained_from = Lsn(positions.chained_from.load(Ordering::Acquire));
        let ships = positions.does_ship();
        let old = self.ends.old(Instant::now(), self.replica.settled_lsn());
        if replica.log().files() <= 1 && replica.log().bytes() <= cap {
            positions.over_cap.store(false, Ordering::Release);
            positions.held_back.store(false, Ordering::Release);
            replica.set_shed(false);
            self.given_up = false;
            return Ok(true);
        }
        let given_up = blocking(move || {
            let log = replica.log();
            let full = log.bytes() > cap;
            let needed = needed_here(needed, full && from_bucket, chained_from, shipped);
            let followed = replica.followers().covered_by_all().unwrap_or(Lsn(u64::MAX));
            if full && log.bytes_after(replica.persisted_lsn()?) > FLUSH_WORTH_BYTES.min(cap / 4) {
                replica.engine().flush()?;
            }
            let persisted = replica.persisted_lsn()?;
            // Log that is about to be shipped or truncated does not count.
            let kept = if full { log.bytes_after(needed) } else { 0 };
            positions.over_cap.store(kept > cap && needed < persisted, Ordering::Release);
            // Not all bytes of the log: the file that is being written stays even when every follower has read it.
            let unread = if full { log.bytes_after(followed) } else { 0 };
            positions.held_back.store(unread > cap, Ordering::Release);
            replica.set_shed(unread > cap.saturating_mul(2));
            let limit = persisted.min(needed).min(followed);
            let given_up = full && ships && shipped < limit;
            let covered = if ships { shipped } else { shipped.max(old) };
            log.truncate_to(if full { limit } else { limit.min(covered) })?;
            Ok::<_, ShipError>(given_up)
        })
        .await?;
        if given_up && !self.given_up {
            tracing::warn!(
                keyspace = self.replica.keyspace.0,
                shard = self.replica.shard.0,
                cap,
                "the log is at its cap: what the bucket does not cover is given up; the next checkpoint supersedes it"
            );
        }
        self.given_up = given_up;
        Ok(false)
    }
}

/// Returns the LSN behind which a plan needs the log and cannot get it elsewhere. A plan that reads missing log from
/// the bucket needs nothing that chunks without a gap cover. 0 is a plan whose checkpoint is still being made: it
/// will hold everything that is shipped by now.
fn needed_here(needed: Lsn, from_bucket: bool, chained_from: Lsn, shipped: Lsn) -> Lsn {
    match from_bucket && (needed == Lsn(0) || chained_from <= needed) && needed != Lsn(u64::MAX) {
        true => needed.max(shipped),
        false => needed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_the_cap_a_plan_needs_only_what_the_bucket_does_not_hold() {
        let here = |needed, from_bucket, chained_from, shipped| {
            needed_here(Lsn(needed), from_bucket, Lsn(chained_from), Lsn(shipped)).0
        };
        assert_eq!(here(10, true, 0, 90), 90);
        assert_eq!(here(10, true, 10, 90), 90);
        assert_eq!(here(10, true, 11, 90), 10, "a record is in no chunk");
        assert_eq!(here(0, true, 11, 90), 90);
        assert_eq!(here(10, false, 0, 90), 10, "it is not read from there, or the log is not at its cap");
        assert_eq!(here(10, true, 0, 5), 10);
        assert_eq!(here(u64::MAX, true, 0, 90), u64::MAX, "nobody needs it");
    }

    #[test]
    fn what_another_replica_may_not_have_shipped_yet_is_kept() {
        let kept_for = Duration::from_secs(60);
        let mut ends = Ends { kept_for, known: VecDeque::new() };
        let began = Instant::now();
        let mut old_at = |seconds: u64, end: u64| ends.old(began + Duration::from_secs(seconds), Lsn(end)).0;
        assert_eq!(old_at(0, 100), 0);
        for second in 1..60 {
            assert_eq!(old_at(second, 100 + second), 0, "{second}");
        }
        // A minute later the log of that time may be truncated, and not much more is kept.
        assert_eq!(old_at(60, 160), 100);
        assert_eq!(old_at(120, 220), 160);
        assert_eq!(old_at(1_000, 220), 220, "an idle log is old in the end");
        assert!(ends.known.len() < 20, "{}", ends.known.len());
    }
}
