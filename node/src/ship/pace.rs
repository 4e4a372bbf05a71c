//! Limits that all uploads of a node share: their number, their memory and their rate; and the
//! faults that keep them from continuing.
//!
//! **Invariant:** the memory that uploads take is bounded, however many replicas ship at once: by
//! [`UPLOAD_MEMORY_MAX`] for checkpoints and [`LOG_MEMORY_MAX`] for the log. Neither waits for the
//! other.

use std::collections::BTreeMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;
use vasto_core::ids::{KeyspaceId, ShardId};
use vasto_core::limits::{LOG_MEMORY_MAX, UPLOAD_MEMORY_MAX};

/// Maximum number of concurrent file uploads of a node, and of concurrent chunk uploads.
pub(crate) const UPLOADS_MAX: usize = 4;

/// The limiter of uploads.
pub(crate) struct Pace {
    files: Lane,
    log: Lane,
    /// Bytes a second; `None` sets no limit.
    rate: Option<u64>,
    /// Earliest start of the next upload.
    next: Mutex<Instant>,
    trouble: Mutex<BTreeMap<(KeyspaceId, ShardId), String>>,
}

/// The limits of one kind of upload.
struct Lane {
    permits: Semaphore,
    /// In KiB.
    memory: Semaphore,
    memory_max: u64,
}

/// Permission for one upload; dropping it ends the turn.
pub(crate) struct Turn<'a> {
    _permit: SemaphorePermit<'a>,
    _memory: SemaphorePermit<'a>,
}

impl Lane {
    fn new(memory_max: u64) -> Self {
        let kib = usize::try_from(memory_max >> 10).expect("a few MiB are a small number");
        Self { permits: Semaphore::new(UPLOADS_MAX), memory: Semaphore::new(kib), memory_max }
    }

    /// Grants turns in order of arrival. An upload larger than the whole budget waits for all of
    /// it.
    async fn turn(&self, bytes: u64) -> Option<Turn<'_>> {
        let permit = self.permits.acquire().await.ok()?;
        let kib = u32::try_from(bytes.min(self.memory_max) >> 10).expect("at most a few MiB");
        let memory = self.memory.acquire_many(kib).await.ok()?;
        Some(Turn { _permit: permit, _memory: memory })
    }
}

impl Pace {
    /// Creates the limiter with a rate in bytes a second; 0 sets none.
    pub(crate) fn new(rate: u64) -> Self {
        Self {
            files: Lane::new(UPLOAD_MEMORY_MAX),
            log: Lane::new(LOG_MEMORY_MAX),
            rate: (rate > 0).then_some(rate),
            next: Mutex::new(Instant::now()),
            trouble: Mutex::default(),
        }
    }

    /// Waits for the turn of a file of so many bytes.
    pub(crate) async fn turn(&self, bytes: u64) -> Option<Turn<'_>> {
        let turn = self.files.turn(bytes).await?;
        if let Some(rate) = self.rate {
            let begin = {
                let mut next = self.next.lock();
                let begin = (*next).max(Instant::now());
                *next = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
                begin
            };
            tokio::time::sleep_until(begin).await;
        }
        Some(turn)
    }

    /// Waits for the turn of a chunk that takes so many bytes of memory.
    pub(super) async fn log_turn(&self, bytes: u64) -> Option<Turn<'_>> {
        self.log.turn(bytes).await
    }

    /// Records that a shard's shipping failed, or continues.
    pub(super) fn note(&self, shard: (KeyspaceId, ShardId), trouble: Option<String>) {
        let mut all = self.trouble.lock();
        match trouble {
            Some(text) => all.insert(shard, text),
            None => all.remove(&shard),
        };
    }

    /// Returns the fault that keeps shards of this node from being shipped: the first one, and how
    /// many there are.
    pub(crate) fn trouble(&self) -> Option<String> {
        let all = self.trouble.lock();
        let ((keyspace, shard), first) = all.first_key_value()?;
        let others = match all.len() {
            1 => String::new(),
            count => format!(" and of {} others", count - 1),
        };
        Some(format!("shipping of shard {shard} of keyspace {keyspace}{others} fails: {first}"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn uploads_begin_at_the_rate_and_never_more_than_some_at_once() {
        let pace = Pace::new(10_000);
        let began = Instant::now();
        for _ in 0..4 {
            drop(pace.turn(500).await.unwrap());
        }
        // The first begins at once, each of the others behind the bytes of those before it.
        assert!(began.elapsed() >= Duration::from_millis(150), "{:?}", began.elapsed());
        let pace = Pace::new(0);
        let mut held = Vec::new();
        for _ in 0..UPLOADS_MAX {
            held.push(pace.turn(1).await.unwrap());
        }
        let mut turn = std::pin::pin!(pace.turn(1));
        assert!(futures::poll!(&mut turn).is_pending());
        held.pop();
        assert!(turn.await.is_some());
    }

    #[tokio::test]
    async fn the_memory_of_all_uploads_is_bounded_and_the_log_does_not_wait_for_files() {
        let pace = Pace::new(0);
        let half = pace.turn(UPLOAD_MEMORY_MAX / 2).await.unwrap();
        let mut large = std::pin::pin!(pace.turn(u64::MAX));
        assert!(futures::poll!(&mut large).is_pending());
        // No smaller upload overtakes it.
        let mut small = std::pin::pin!(pace.turn(10 << 10));
        assert!(futures::poll!(&mut small).is_pending());
        let log = pace.log_turn(LOG_MEMORY_MAX).await.unwrap();
        let mut more = std::pin::pin!(pace.log_turn(1 << 10));
        assert!(futures::poll!(&mut more).is_pending());
        drop(half);
        let large = large.await.unwrap();
        assert!(futures::poll!(&mut small).is_pending());
        drop((large, log));
        assert!(small.await.is_some() && more.await.is_some());
    }

    #[test]
    fn trouble_is_told_until_it_is_over() {
        let pace = Pace::new(0);
        assert_eq!(pace.trouble(), None);
        for shard in 0..3 {
            pace.note((KeyspaceId(1), ShardId(shard)), Some("no bucket".into()));
        }
        let trouble = pace.trouble().unwrap();
        assert!(
            trouble.contains("shard 0 of keyspace 1 and of 2 others fails: no bucket"),
            "{trouble}"
        );
        for shard in 0..3 {
            pace.note((KeyspaceId(1), ShardId(shard)), None);
        }
        assert_eq!(pace.trouble(), None);
    }
}
