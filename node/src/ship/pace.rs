//! What all uploads of a node share: how many there are at once, and how fast they may be.
//!
//! **Invariant:** the memory that uploads take is bounded by [`UPLOADS_MAX`] files, however many replicas
//! ship at once.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Files that a node uploads at once; each takes up to 64 MiB of memory.
pub const UPLOADS_MAX: usize = 4;

/// The right to upload.
pub struct Pace {
    permits: Semaphore,
    /// Bytes a second; `None` is as fast as the bucket takes them.
    rate: Option<u64>,
    /// When the next upload may begin.
    next: Mutex<Instant>,
}

impl Pace {
    /// With a rate in bytes a second; 0 sets none.
    pub fn new(rate: u64) -> Self {
        let rate = (rate > 0).then_some(rate);
        Self { permits: Semaphore::new(UPLOADS_MAX), rate, next: Mutex::new(Instant::now()) }
    }

    /// Waits for the turn of an upload of so many bytes.
    pub async fn turn(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        let permit = self.permits.acquire().await.ok()?;
        if let Some(rate) = self.rate {
            let begin = {
                let mut next = self.next.lock();
                let begin = (*next).max(Instant::now());
                *next = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
                begin
            };
            tokio::time::sleep_until(begin).await;
        }
        Some(permit)
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
            held.push(pace.turn(u64::MAX).await.unwrap());
        }
        let mut turn = std::pin::pin!(pace.turn(1));
        assert!(futures::poll!(&mut turn).is_pending());
        held.pop();
        assert!(turn.await.is_some());
    }
}
