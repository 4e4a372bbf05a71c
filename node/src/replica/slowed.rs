//! Writes of moving keys that are held back for a moment, so that the tails of a plan catch up.
//!
//! **Invariants**
//! - A write that is held back has changed nothing; it is checked anew when its time comes.
//! - No write is held back twice, longer than [`THROTTLED_WRITE_MAX`], or for more than half of the
//!   time that its sender still waits; none fails for it.
//! - Writes of other keys are never held back.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vasto_core::limits::THROTTLED_WRITE_MAX;

use super::apply::band_of;
use super::command::{WriteCommand, WriteOp};
use super::metrics;
use super::store::Store;
use super::throttle::{Moving, WriteThrottle};
use crate::clock::since_boot;

/// Writes whose time comes within this are taken together.
const TOGETHER: Duration = Duration::from_millis(1);

struct Slowed {
    command: WriteCommand,
    since: Instant,
    due: Instant,
}

/// The writes that are held back, in the order in which they are due.
#[derive(Default)]
pub(super) struct SlowedWrites {
    slowed: VecDeque<Slowed>,
    /// When the next byte may be taken.
    free_at: Option<Instant>,
}

impl SlowedWrites {
    pub(super) fn is_empty(&self) -> bool {
        self.slowed.is_empty()
    }

    /// Returns the time until the first write is to be taken.
    pub(super) fn first_due_in(&self) -> Option<Duration> {
        let first = self.slowed.front()?;
        Some(first.due.saturating_duration_since(Instant::now()))
    }

    /// Returns the write when it may be taken now; else it is held back.
    pub(super) fn pass(
        &mut self,
        mut command: WriteCommand,
        store: &Store,
    ) -> Option<WriteCommand> {
        let throttle = &store.shared.throttle;
        let Some(moving) = throttle.moving() else { return Some(command) };
        let bytes = moving_bytes(&command, moving, store);
        if bytes == 0 {
            return Some(command);
        }
        let now = Instant::now();
        if !command.was_slowed
            && let Some(due) = moving.bytes_per_s.and_then(|rate| self.due(bytes, rate, now))
        {
            (command.was_slowed, command.begun) = (true, None);
            let due = due.min(now + patience(&command));
            // A sender with little time overtakes others.
            let place = self.slowed.partition_point(|other| other.due <= due);
            self.slowed.insert(place, Slowed { command, since: now, due });
            return None;
        }
        throttle.note_taken(bytes);
        Some(command)
    }

    /// Returns when a write of so many bytes may be taken; `None`: now.
    fn due(&mut self, bytes: u64, bytes_per_s: u64, now: Instant) -> Option<Instant> {
        let at = self.free_at.map_or(now, |free_at| free_at.max(now));
        let latest = now + THROTTLED_WRITE_MAX;
        let takes = Duration::from_secs_f64(bytes as f64 / bytes_per_s.max(1) as f64);
        self.free_at = Some((at + takes).min(latest));
        (at > now + TOGETHER || !self.slowed.is_empty()).then_some(at.min(latest))
    }

    /// Returns the writes whose time has come: all, when nothing is slowed down any more.
    pub(super) fn take_due(&mut self, throttle: &WriteThrottle) -> Vec<WriteCommand> {
        if !throttle.slows() {
            return self.take_all(throttle);
        }
        let due = Instant::now() + TOGETHER;
        let count = self.slowed.iter().take_while(|slowed| slowed.due <= due).count();
        release(self.slowed.drain(..count), throttle)
    }

    /// Returns all writes.
    pub(super) fn take_all(&mut self, throttle: &WriteThrottle) -> Vec<WriteCommand> {
        self.free_at = None;
        release(self.slowed.drain(..), throttle)
    }

    /// Drops all writes, which answers that the replica is stopped.
    pub(super) fn clear(&mut self) {
        self.slowed.clear();
    }
}

fn release(slowed: impl Iterator<Item = Slowed>, throttle: &WriteThrottle) -> Vec<WriteCommand> {
    let mut waited = Duration::ZERO;
    let released = slowed.map(|slowed| {
        waited += slowed.since.elapsed();
        slowed.command
    });
    let released: Vec<WriteCommand> = released.collect();
    if !released.is_empty() {
        throttle.note_held_back(waited);
        metrics::throttled(waited);
    }
    released
}

/// Returns for how long a write may be held back at most.
fn patience(command: &WriteCommand) -> Duration {
    let left = command.until.map(|until| until.saturating_sub(since_boot()) / 2);
    left.map_or(THROTTLED_WRITE_MAX, |left| left.min(THROTTLED_WRITE_MAX))
}

/// Returns the bytes of a write that touches a moving key; 0 for any other.
fn moving_bytes(command: &WriteCommand, moving: Moving, store: &Store) -> u64 {
    let shard = store.meta.identity.shard;
    let moves = |op: &WriteOp| {
        band_of(shard, &op.key, op.partition_hash).is_some_and(|band| moving.range.contains(band))
    };
    match command.ops.iter().any(moves) {
        true => command.ops.iter().map(WriteOp::bytes).sum::<usize>() as u64,
        false => 0,
    }
}
