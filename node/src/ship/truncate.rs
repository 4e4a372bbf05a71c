//! Truncates the front of a replica's log when it is not needed any more.
//!
//! **Invariant:** truncated log is persisted in the database, covered by the bucket (while this
//! replica ships; old enough for that while another one does), not needed by a running plan and
//! read by every follower. At the byte cap the bucket's cover is given up, but never log that a
//! plan needs: log that the plan can read from the bucket is truncated, and the rest stays. Any
//! other holder of the log is named, and the master removes it.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use vasto_core::ids::Lsn;
use vasto_core::limits::LOG_KEPT_FOR_SHIPPING;

use super::context::ShipContext;
use super::error::{ShipError, blocking};
use super::status::{Duty, ShipStatus};
use crate::clock::with_others;
use crate::replica::Replica;

/// Bytes of log that the database must lack before it is flushed at the cap.
const FLUSH_WORTH_BYTES: u64 = 16 << 20;

/// Truncates the log of one replica.
pub(super) struct Truncation {
    replica: Replica,
    duty: watch::Receiver<Duty>,
    status: watch::Sender<ShipStatus>,
    /// Upper bound of the log bytes that are kept.
    cap: u64,
    /// The bucket's cover was given up, and that was logged.
    given_up: bool,
    ends: LogEnds,
}

/// LSNs after which the log is kept, each for a reason of its own.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// The database needs it after a restart.
    persisted: Lsn,
    /// A plan needs it.
    needed: Lsn,
    /// A follower has not read it.
    followed: Lsn,
    /// The bucket does not cover it.
    covered: Lsn,
}

impl Bounds {
    /// Returns the LSN up to which the log may be truncated; at its cap the bucket's cover is given
    /// up.
    fn end(self, full: bool) -> Lsn {
        let kept_at_the_cap = self.persisted.min(self.needed).min(self.followed);
        if full { kept_at_the_cap } else { kept_at_the_cap.min(self.covered) }
    }
}

/// Ends of the log over time: younger log is kept although another replica ships.
struct LogEnds {
    kept_for: Duration,
    /// Ascending; at most one entry is older than `kept_for`.
    seen: VecDeque<(Instant, Lsn)>,
}

impl LogEnds {
    /// Returns the LSN up to which the log is so old that the shipping replica has shipped it, if
    /// it can.
    fn old(&mut self, now: Instant, end: Lsn) -> Lsn {
        if self.seen.back().is_none_or(|(at, lsn)| *lsn < end && now - *at >= self.kept_for / 16) {
            self.seen.push_back((now, end));
        }
        let is_old = |(at, _): &(Instant, Lsn)| now - *at >= self.kept_for;
        while self.seen.get(1).is_some_and(is_old) {
            self.seen.pop_front();
        }
        self.seen.front().filter(|first| is_old(first)).map_or(Lsn(0), |(_, lsn)| *lsn)
    }
}

impl Truncation {
    pub(super) fn new(
        context: &ShipContext,
        duty: watch::Receiver<Duty>,
        status: watch::Sender<ShipStatus>,
    ) -> Self {
        let kept_for = LOG_KEPT_FOR_SHIPPING.max(context.interval.saturating_mul(3));
        let ends = LogEnds { kept_for, seen: VecDeque::new() };
        Self {
            replica: context.replica.clone(),
            duty,
            status,
            cap: context.log_cap,
            given_up: false,
            ends,
        }
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
        // The status is read before the duty: the checkpoint that a plan still waits for then holds
        // everything that counts as shipped here.
        let published = *self.status.borrow();
        let duty = *self.duty.borrow();
        let (replica, cap) = (self.replica.clone(), self.cap);
        let old = self.ends.old(Instant::now(), replica.settled_lsn());
        if replica.log().files() <= 1 && replica.log().bytes() <= cap {
            publish_kept(&self.status, false, false);
            replica.set_shed(false);
            self.given_up = false;
            return Ok(true);
        }
        let status = self.status.clone();
        let given_up =
            blocking(move || truncate(&replica, cap, old, duty, published, &status)).await?;
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

/// Truncates the log up to its bounds, and publishes whether a plan or a follower keeps more of it
/// than the cap; returns true when the bucket's cover is given up. `old` is the LSN up to which
/// another replica has shipped.
fn truncate(
    replica: &Replica,
    cap: u64,
    old: Lsn,
    duty: Duty,
    published: ShipStatus,
    status: &watch::Sender<ShipStatus>,
) -> Result<bool, ShipError> {
    let log = replica.log();
    let full = log.bytes() > cap;
    let needed = duty.need.here(full, published.chained_from, published.shipped);
    let followed = replica.followers().covered_by_all().unwrap_or(Lsn(u64::MAX));
    if full && log.bytes_after(replica.persisted_lsn()?) > FLUSH_WORTH_BYTES.min(cap / 4) {
        replica.engine().flush()?;
    }
    let persisted = replica.persisted_lsn()?;
    // Log that is about to be shipped or truncated does not count.
    let kept = if full { log.bytes_after(needed) } else { 0 };
    // Not all bytes of the log: the file that is being written stays even when every follower has
    // read it.
    let unread = if full { log.bytes_after(followed) } else { 0 };
    publish_kept(status, kept > cap && needed < persisted, unread > cap);
    replica.set_shed(unread > cap.saturating_mul(2));
    let ships = duty.ships() || published.for_acks;
    let covered = if ships { published.shipped } else { published.shipped.max(old) };
    let bounds = Bounds { persisted, needed, followed, covered };
    log.truncate_to(bounds.end(full))?;
    Ok(full && ships && published.shipped < bounds.end(full))
}

fn publish_kept(status: &watch::Sender<ShipStatus>, over_cap: bool, held_back: bool) {
    status.send_modify(|status| (status.over_cap, status.held_back) = (over_cap, held_back));
}

#[cfg(test)]
mod tests {
    use super::super::status::LogNeed;
    use super::*;

    #[test]
    fn at_the_cap_a_plan_needs_only_what_the_bucket_does_not_hold() {
        let here = |needed, from_bucket, chained_from, shipped| {
            let need = LogNeed { after: Lsn(needed), from_bucket };
            need.here(true, Lsn(chained_from), Lsn(shipped)).0
        };
        assert_eq!(here(10, true, 0, 90), 90);
        assert_eq!(here(10, true, 10, 90), 90);
        assert_eq!(here(10, true, 11, 90), 10, "a record is in no chunk");
        assert_eq!(here(0, true, 11, 90), 90);
        assert_eq!(here(10, false, 0, 90), 10, "it is not read from there");
        let need = LogNeed { after: Lsn(10), from_bucket: true };
        assert_eq!(need.here(false, Lsn(0), Lsn(90)), Lsn(10), "the log is not at its cap");
        assert_eq!(here(10, true, 0, 5), 10);
        assert_eq!(here(u64::MAX, true, 0, 90), u64::MAX, "nobody needs it");
    }

    #[test]
    fn truncation_stops_at_each_bound_and_gives_up_the_cover_of_the_bucket_alone() {
        let bounds = |persisted, needed, followed, covered| Bounds {
            persisted: Lsn(persisted),
            needed: Lsn(needed),
            followed: Lsn(followed),
            covered: Lsn(covered),
        };
        let ends = |bounds: Bounds| (bounds.end(false).0, bounds.end(true).0);
        assert_eq!(ends(bounds(1, 9, 9, 9)), (1, 1));
        assert_eq!(ends(bounds(9, 1, 9, 9)), (1, 1));
        assert_eq!(ends(bounds(9, 9, 1, 9)), (1, 1));
        assert_eq!(ends(bounds(9, 8, 9, 1)), (1, 8));
    }

    #[test]
    fn what_another_replica_may_not_have_shipped_yet_is_kept() {
        let kept_for = Duration::from_secs(60);
        let mut ends = LogEnds { kept_for, seen: VecDeque::new() };
        let began = Instant::now();
        let mut old_at =
            |seconds: u64, end: u64| ends.old(began + Duration::from_secs(seconds), Lsn(end)).0;
        assert_eq!(old_at(0, 100), 0);
        for second in 1..60 {
            assert_eq!(old_at(second, 100 + second), 0, "{second}");
        }
        // A minute later the log of that time may be truncated, and not much more is kept.
        assert_eq!(old_at(60, 160), 100);
        assert_eq!(old_at(120, 220), 160);
        assert_eq!(old_at(1_000, 220), 220, "an idle log is old in the end");
        assert!(ends.seen.len() < 20, "{}", ends.seen.len());
    }
}
