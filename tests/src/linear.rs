//! Histories of single keys, and the check whether some order of their operations explains them: linearizability,
//! checked by `porcupine-rs`, one key at a time.
//!
//! The model:
//! - A key is absent, or holds a value and the event time of the write that put it there. A read must see the result
//!   of the last write before it, event time included; event times grow from write to write.
//! - An operation of unknown outcome took effect at some point in time after its call, or never.
//! - The client repeats puts and deletes whose reply was lost or late; an operation that took as long as a repetition
//!   takes may have taken effect once more, at any point in time after its call. An effect that a read saw with
//!   another event time than the acknowledged one is such an effect.
//! - While a node is away a read may see a write that is not acknowledged yet, is lost with the node and ends as
//!   unknown. Such reads are ignored ([`Judge::dirty`]).
//!
//! **Invariant:** a refused operation ("nothing was changed") is not part of a history: if it did take effect, a read
//! sees a value that no operation wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use porcupine_rs::{CheckResult, Model, Operation, check_operations_timeout};
use vasto_client::{Ack, ErrorKind, Keyspace, Outcome};

use crate::Numbers;

/// Duration from which a put or delete may have been sent twice: the client repeats the request to a silent node
/// after half of its patience.
const REPEATED_AFTER: Duration = Duration::from_millis(450);
/// Time limit of the check of one key.
const CHECK_MAX: Duration = Duration::from_secs(20);

/// The content of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Held {
    /// The value with this number; no two writes put the same value.
    Value(u64),
    /// A counter.
    Count(i64),
}

/// An operation with its outcome; no outcome means unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Did {
    /// A read: the content seen, with its event time.
    Get(Option<(Held, u64)>),
    /// A put, with its assigned event time.
    Put(u64, Option<u64>),
    /// A delete, with its assigned event time.
    Delete(Option<u64>),
    /// A put if the key is absent: whether it was applied, and its event time.
    IfAbsent(u64, Option<Option<u64>>),
    /// A put if the content read with this event time is still current.
    IfVersion((Held, u64), u64, Option<Option<u64>>),
    /// An increment, and the resulting sum.
    Add(i64, Option<i64>),
    /// An effect of a put that took effect more often than it was acknowledged.
    Effect(u64, u64),
}

impl Did {
    /// Returns the same operation with an unknown outcome.
    fn unanswered(self) -> Self {
        match self {
            Did::Put(value, _) => Did::Put(value, None),
            Did::Delete(_) => Did::Delete(None),
            Did::IfAbsent(value, _) => Did::IfAbsent(value, None),
            Did::IfVersion(seen, value, _) => Did::IfVersion(seen, value, None),
            Did::Add(by, _) => Did::Add(by, None),
            Did::Get(_) | Did::Effect(..) => self,
        }
    }
}

/// The state of a key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    held: Option<Held>,
    /// The event time of the current content, or a time that is certainly earlier.
    time: u64,
    exact: bool,
}

/// The model of one key.
#[derive(Debug, Clone)]
pub struct OneKey;

impl State {
    fn becomes(&self, held: Option<Held>, time: Option<u64>) -> (bool, Self) {
        match time {
            Some(time) => (time > self.time, Self { held, time, exact: true }),
            None => (true, Self { held, time: self.time, exact: false }),
        }
    }

    /// Returns whether this content is current; `None` when that is unknown.
    fn stands(&self, (held, time): (Held, u64)) -> Option<bool> {
        if self.held != Some(held) || time < self.time {
            Some(false)
        } else if self.exact {
            Some(time == self.time)
        } else {
            None
        }
    }
}

impl Model for OneKey {
    type State = State;
    type Op = Did;
    type Metadata = ();

    fn init() -> State {
        State { held: None, time: 0, exact: true }
    }

    fn step(state: &State, did: &Did) -> (bool, State) {
        let same = |legal| (legal, state.clone());
        match *did {
            Did::Get(None) => same(state.held.is_none()),
            // The reply to an increment does not carry its event time.
            Did::Get(Some(seen)) => match state.stands(seen) {
                Some(stands) => same(stands),
                None => (true, State { held: Some(seen.0), time: seen.1, exact: true }),
            },
            Did::Put(value, time) => state.becomes(Some(Held::Value(value)), time),
            Did::Effect(value, time) => state.becomes(Some(Held::Value(value)), Some(time)),
            Did::Delete(time) => state.becomes(None, time),
            Did::IfAbsent(value, outcome) => match outcome {
                Some(Some(time)) if state.held.is_none() => state.becomes(Some(Held::Value(value)), Some(time)),
                Some(Some(_)) => same(false),
                Some(None) => same(state.held.is_some()),
                None if state.held.is_none() => state.becomes(Some(Held::Value(value)), None),
                None => same(true),
            },
            Did::IfVersion(expected, value, outcome) => {
                let stands = state.stands(expected);
                match outcome {
                    Some(Some(_)) if stands == Some(false) => same(false),
                    Some(Some(time)) => state.becomes(Some(Held::Value(value)), Some(time)),
                    Some(None) => same(stands != Some(true)),
                    None if stands == Some(false) => same(true),
                    None => state.becomes(Some(Held::Value(value)), None),
                }
            }
            Did::Add(by, sum) => {
                let before = match state.held {
                    None => 0,
                    Some(Held::Count(count)) => count,
                    Some(Held::Value(_)) => return same(false),
                };
                let legal = sum.is_none_or(|sum| sum == before + by);
                (legal, State { held: Some(Held::Count(before + by)), time: state.time, exact: false })
            }
        }
    }
}

/// An operation of a history.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The client that called.
    pub client: u32,
    /// Time of the call, nanoseconds.
    pub call: i64,
    /// Time of the answer.
    pub answer: i64,
    /// The operation and its outcome.
    pub did: Did,
}

impl Entry {
    fn unknown(&self) -> bool {
        matches!(
            self.did,
            Did::Put(_, None)
                | Did::Delete(None)
                | Did::IfAbsent(_, None)
                | Did::IfVersion(_, _, None)
                | Did::Add(_, None)
                | Did::Effect(..)
        )
    }

    fn is_read(&self) -> bool {
        matches!(self.did, Did::Get(_))
    }
}

/// Recorder of all operations of a round, by key.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    entries: Mutex<BTreeMap<String, Vec<Entry>>>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { began: Instant::now(), entries: Mutex::default() }
    }
}

impl Recorder {
    /// Returns the nanoseconds since the start.
    pub fn now(&self) -> i64 {
        self.began.elapsed().as_nanos() as i64
    }

    /// Records an operation that answers now.
    pub fn add(&self, key: &str, client: u32, call: i64, did: Did) {
        let entry = Entry { client, call, answer: self.now(), did };
        self.entries.lock().entry(key.to_owned()).or_default().push(entry);
    }

    /// Takes the recorded operations.
    pub fn take(&self) -> BTreeMap<String, Vec<Entry>> {
        std::mem::take(&mut self.entries.lock())
    }
}

/// The check of the history of one key.
#[derive(Debug, Clone, Copy)]
pub struct Judge {
    /// A node was away: reads of writes that were never acknowledged are ignored.
    pub dirty: bool,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// Some order explains it.
    Explained,
    /// No order explains it; the text shows the shortest prefix that no order explains.
    Violated(String),
    /// The search took too long.
    TooLong,
}

impl Judge {
    /// Checks whether some order explains these operations on one key.
    pub fn judge(self, entries: &[Entry]) -> Judgement {
        let entries = self.prepared(entries);
        match check(&entries) {
            CheckResult::Ok => Judgement::Explained,
            CheckResult::Unknown => Judgement::TooLong,
            CheckResult::Illegal => Judgement::Violated(shortest(&entries)),
        }
    }

    /// Adds effects that were never acknowledged, and removes ignored reads.
    fn prepared(self, entries: &[Entry]) -> Vec<Entry> {
        // The acknowledged event times, and the call times of plain puts.
        let (mut acked, mut puts, mut sums) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
        for entry in entries {
            match entry.did {
                Did::Put(value, time) => {
                    puts.insert(value, entry.call);
                    acked.extend(time.map(|time| (value, time)));
                }
                Did::IfAbsent(value, Some(Some(time))) | Did::IfVersion(_, value, Some(Some(time))) => {
                    acked.insert((value, time));
                }
                Did::Add(_, Some(sum)) => {
                    sums.insert(sum);
                }
                _ => {}
            }
        }
        let says_something = |entry: &Entry| match entry.did {
            Did::Get(Some((Held::Value(value), time))) => !self.dirty || acked.contains(&(value, time)),
            Did::Get(Some((Held::Count(count), _))) => !self.dirty || sums.contains(&count),
            _ => true,
        };
        let mut kept: Vec<Entry> = entries.iter().copied().filter(says_something).collect();
        // Effects that were seen and not acknowledged.
        let mut effects: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        for entry in &kept {
            let seen = match entry.did {
                Did::Get(Some(seen)) | Did::IfVersion(seen, _, Some(Some(_))) => seen,
                _ => continue,
            };
            if let (Held::Value(value), time) = seen
                && !acked.contains(&(value, time))
            {
                effects.entry(value).or_default().insert(time);
            }
        }
        // A seen effect of a write of unknown outcome is its outcome.
        kept.retain(|entry| !matches!(entry.did, Did::Put(value, None) if effects.contains_key(&value)));
        for entry in &mut kept {
            if let Did::IfAbsent(value, outcome @ None) | Did::IfVersion(_, value, outcome @ None) = &mut entry.did
                && let Some(time) = effects.get(value).and_then(BTreeSet::first)
            {
                // A conditional write is never repeated elsewhere, so it took effect once, and only if its condition
                // held.
                *outcome = Some(Some(*time));
                entry.answer = i64::MAX;
            }
        }
        let again = |entry: &&Entry| entry.answer.saturating_sub(entry.call) as u128 >= REPEATED_AFTER.as_nanos();
        let repeated: Vec<Entry> = kept
            .iter()
            .filter(again)
            .filter_map(|entry| match entry.did {
                Did::Put(value, Some(_)) if !effects.contains_key(&value) => {
                    Some(Entry { did: Did::Put(value, None), ..*entry })
                }
                Did::Delete(Some(_)) => Some(Entry { did: Did::Delete(None), ..*entry }),
                _ => None,
            })
            .collect();
        kept.extend(repeated);
        for (value, call) in puts {
            let times = effects.remove(&value).unwrap_or_default();
            let effect = |time| Entry { client: 0, call, answer: i64::MAX, did: Did::Effect(value, time) };
            kept.extend(times.into_iter().map(effect));
        }
        for entry in &mut kept {
            if entry.unknown() {
                entry.answer = i64::MAX;
            }
        }
        kept
    }
}

fn check(entries: &[Entry]) -> CheckResult {
    let operations: Vec<Operation<OneKey>> = entries
        .iter()
        .map(|entry| Operation {
            client_id: Some(entry.client),
            call_time: entry.call,
            return_time: entry.answer,
            op: entry.did,
            metadata: None,
        })
        .collect();
    check_operations_timeout(&operations, CHECK_MAX)
}

/// Returns the history as known at this time: an unanswered write may take effect at any later time.
fn until_then(entries: &[Entry], time: i64) -> Vec<Entry> {
    let begun = entries.iter().filter(|entry| entry.call <= time);
    let known = begun.filter(|entry| entry.answer <= time || !entry.is_read());
    let seen = |entry: &Entry| match entry.answer <= time {
        true => *entry,
        false => Entry { answer: i64::MAX, did: entry.did.unanswered(), ..*entry },
    };
    known.map(seen).collect()
}

fn shortest(entries: &[Entry]) -> String {
    let mut answers: Vec<i64> = entries.iter().map(|entry| entry.answer).filter(|answer| *answer != i64::MAX).collect();
    answers.sort_unstable();
    let first = answers.partition_point(|time| check(&until_then(entries, *time)) != CheckResult::Illegal);
    let time = answers.get(first).copied().unwrap_or(i64::MAX);
    let mut shown: Vec<Entry> = until_then(entries, time);
    shown.sort_by_key(|entry| (entry.answer.min(time), entry.call));
    let skipped = shown.len().saturating_sub(24);
    let line = |entry: &Entry| {
        let ms = |nanos: i64| nanos as f64 / 1e6;
        let answer =
            if entry.answer == i64::MAX { "   open   ".to_owned() } else { format!("{:10.2}", ms(entry.answer)) };
        format!("  {:10.2} to {answer} ms, client {}: {:?}", ms(entry.call), entry.client, entry.did)
    };
    let lines: Vec<String> = shown.iter().skip(skipped).map(line).collect();
    format!("  ({skipped} operations before these)\n{}", lines.join("\n"))
}

/// Clients that read and write a few keys, and record the outcomes.
#[derive(Debug)]
pub struct Workload {
    /// The names of the keys; those that end in `c` are counters.
    pub keys: Vec<String>,
    /// The acknowledgement level of writes.
    pub ack: Ack,
    /// The recorder of all operations.
    pub recorder: Recorder,
    next: AtomicU64,
}

impl Workload {
    /// Creates a workload on keys that were never written.
    pub fn new(keys: Vec<String>, ack: Ack) -> Self {
        Self { keys, ack, recorder: Recorder::default(), next: AtomicU64::new(1) }
    }

    /// Executes one random operation.
    pub async fn act(&self, client: u32, keyspace: &Keyspace, numbers: &mut Numbers) {
        let key = self.keys[numbers.below(self.keys.len() as u64) as usize].as_str();
        let counter = key.ends_with('c');
        match (numbers.below(10), counter) {
            (0..4, _) => drop(self.get(client, keyspace, key).await),
            (4..6, true) | (4, false) => self.delete(client, keyspace, key).await,
            (_, true) => self.add(client, keyspace, key, 1 + numbers.below(1_000) as i64).await,
            (5..7, false) => self.put(client, keyspace, key).await,
            (7, false) => self.if_absent(client, keyspace, key).await,
            (_, false) => self.if_version(client, keyspace, key).await,
        }
    }

    /// Reads a key; returns its version too, for a conditional write.
    pub async fn get(&self, client: u32, keyspace: &Keyspace, key: &str) -> Option<((Held, u64), u64)> {
        let call = self.recorder.now();
        let read = keyspace.get(key).await.ok()?;
        let seen = read.as_ref().map(|value| {
            let held = match value.as_i64() {
                Some(count) => Held::Count(count),
                None => Held::Value(number(&value.bytes())),
            };
            (held, value.event_time)
        });
        self.recorder.add(key, client, call, Did::Get(seen));
        seen.zip(read.map(|value| value.version))
    }

    fn value(&self) -> (u64, String) {
        let value = self.next.fetch_add(1, Ordering::Relaxed);
        (value, format!("v{value}"))
    }

    async fn put(&self, client: u32, keyspace: &Keyspace, key: &str) {
        let (value, text) = self.value();
        let call = self.recorder.now();
        match keyspace.put(key, text).ack(self.ack).await {
            Ok(Outcome::Applied { event_time }) => {
                self.recorder.add(key, client, call, Did::Put(value, Some(event_time)));
            }
            // The key already held a write with a later time: this put took effect and was overwritten at once.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Unknown => {
                self.recorder.add(key, client, call, Did::Put(value, None));
            }
            Err(_) => {}
        }
    }

    async fn delete(&self, client: u32, keyspace: &Keyspace, key: &str) {
        let call = self.recorder.now();
        match keyspace.delete(key).ack(self.ack).await {
            Ok(Outcome::Applied { event_time }) => {
                self.recorder.add(key, client, call, Did::Delete(Some(event_time)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Unknown => {
                self.recorder.add(key, client, call, Did::Delete(None));
            }
            Err(_) => {}
        }
    }

    async fn if_absent(&self, client: u32, keyspace: &Keyspace, key: &str) {
        let (value, text) = self.value();
        let call = self.recorder.now();
        let outcome = keyspace.put(key, text).if_absent().ack(self.ack).await;
        if let Some(outcome) = conditional(outcome) {
            self.recorder.add(key, client, call, Did::IfAbsent(value, outcome));
        }
    }

    async fn if_version(&self, client: u32, keyspace: &Keyspace, key: &str) {
        let Some((seen, version)) = self.get(client, keyspace, key).await else { return };
        let (value, text) = self.value();
        let call = self.recorder.now();
        let outcome = keyspace.put(key, text).if_version(version).ack(self.ack).await;
        if let Some(outcome) = conditional(outcome) {
            self.recorder.add(key, client, call, Did::IfVersion(seen, value, outcome));
        }
    }

    async fn add(&self, client: u32, keyspace: &Keyspace, key: &str, by: i64) {
        let call = self.recorder.now();
        match keyspace.add_i64(key, by).ack(self.ack).await {
            Ok(sum) => self.recorder.add(key, client, call, Did::Add(by, Some(sum))),
            Err(error) if error.kind() == ErrorKind::Unknown => {
                self.recorder.add(key, client, call, Did::Add(by, None));
            }
            Err(_) => {}
        }
    }
}

/// Returns the outcome of a conditional write: `None` when it was refused, no outcome when it is unknown.
fn conditional(outcome: Result<Outcome, vasto_client::Error>) -> Option<Option<Option<u64>>> {
    match outcome {
        Ok(Outcome::Applied { event_time }) => Some(Some(Some(event_time))),
        Ok(_) => Some(Some(None)),
        Err(error) if error.kind() == ErrorKind::Unknown => Some(None),
        Err(_) => None,
    }
}

/// Parses the number of a value; 0 for a value that no operation put.
fn number(bytes: &[u8]) -> u64 {
    std::str::from_utf8(bytes).ok().and_then(|text| text.strip_prefix('v')?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: Judge = Judge { dirty: false };
    const AWAY: Judge = Judge { dirty: true };

    /// Builds sequential operations, each 1 ms long.
    fn in_order(dids: &[Did]) -> Vec<Entry> {
        let entry = |(n, did): (usize, &Did)| Entry {
            client: 0,
            call: 2_000_000 * n as i64,
            answer: 2_000_000 * n as i64 + 1_000_000,
            did: *did,
        };
        dids.iter().enumerate().map(entry).collect()
    }

    fn violated(judge: Judge, dids: &[Did]) -> bool {
        match judge.judge(&in_order(dids)) {
            Judgement::Violated(_) => true,
            Judgement::Explained => false,
            Judgement::TooLong => panic!("a short history takes too long"),
        }
    }

    fn saw(value: u64, time: u64) -> Did {
        Did::Get(Some((Held::Value(value), time)))
    }

    #[test]
    fn what_was_acknowledged_is_read() {
        assert!(!violated(STRICT, &[Did::Get(None), Did::Put(1, Some(10)), saw(1, 10)]));
        assert!(violated(STRICT, &[Did::Put(1, Some(10)), Did::Get(None)]), "not found");
        assert!(violated(STRICT, &[Did::Put(1, Some(10)), Did::Put(2, Some(20)), saw(1, 10)]), "the old value");
        assert!(violated(STRICT, &[Did::Put(1, Some(10)), Did::Delete(Some(20)), saw(1, 10)]), "a deleted one");
        assert!(violated(STRICT, &[Did::Put(1, Some(10)), Did::Put(2, Some(5))]), "stamped before what stands");
        assert!(violated(STRICT, &[saw(7, 10)]), "nobody put it");
    }

    #[test]
    fn conditions_and_counters_build_on_what_was_acknowledged() {
        let first = (Held::Value(1), 10);
        let on_first = Did::IfVersion(first, 3, Some(Some(30)));
        assert!(!violated(STRICT, &[Did::Put(1, Some(10)), on_first, saw(3, 30)]));
        assert!(violated(STRICT, &[Did::Put(1, Some(10)), Did::Put(2, Some(20)), on_first]));
        assert!(violated(STRICT, &[Did::Put(1, Some(10)), Did::IfVersion(first, 3, Some(None))]));
        assert!(violated(STRICT, &[Did::Put(1, Some(10)), Did::IfAbsent(2, Some(Some(20)))]));
        assert!(violated(STRICT, &[Did::IfAbsent(2, Some(None))]));
        assert!(!violated(
            STRICT,
            &[Did::Add(5, Some(5)), Did::Add(1, Some(6)), Did::Delete(Some(9)), Did::Add(1, Some(1))]
        ));
        assert!(violated(STRICT, &[Did::Add(5, Some(5)), Did::Delete(Some(9)), Did::Add(1, Some(6))]));
        assert!(violated(STRICT, &[Did::Add(5, Some(5)), Did::Add(1, Some(1))]));
    }

    #[test]
    fn what_is_unknown_happened_at_some_later_time_or_never() {
        assert!(!violated(STRICT, &[Did::Put(1, None), Did::Get(None), saw(1, 10)]));
        assert!(!violated(STRICT, &[Did::Put(1, None), Did::Get(None)]));
        assert!(violated(STRICT, &[saw(1, 10), Did::Put(1, None)]), "before its call");
        assert!(violated(STRICT, &[Did::Put(1, None), saw(1, 10), Did::Get(None)]), "once seen it stays");
        assert!(!violated(AWAY, &[Did::Put(1, None), saw(1, 10), Did::Get(None)]), "unless a node was away");
        let on_first = Did::IfVersion((Held::Value(1), 10), 3, None);
        assert!(!violated(STRICT, &[Did::Put(1, Some(10)), on_first, saw(1, 10), saw(3, 30)]));
        let second = Did::Put(2, Some(20));
        assert!(
            violated(STRICT, &[Did::Put(1, Some(10)), on_first, second, saw(2, 20), saw(3, 30)]),
            "not on the second"
        );
        assert!(!violated(STRICT, &[Did::Add(5, None), Did::Add(1, Some(6)), Did::Add(1, Some(7))]));
        assert!(violated(STRICT, &[Did::Add(5, None), Did::Add(1, Some(6)), Did::Add(1, Some(12))]));
    }

    #[test]
    fn a_put_that_was_sent_twice_may_take_effect_twice_but_no_read_is_older_for_that() {
        // Seen again with a later time: the second effect of the put.
        assert!(!violated(STRICT, &[Did::Put(1, Some(10)), Did::Put(2, Some(20)), saw(1, 30)]));
        assert!(violated(STRICT, &[Did::Put(1, Some(10)), Did::Put(2, Some(20)), saw(1, 30), saw(2, 20)]));
        let mut slow = in_order(&[Did::Put(1, Some(10)), Did::Put(2, Some(20)), saw(1, 10)]);
        slow[0].call -= 1_000_000_000;
        assert!(matches!(STRICT.judge(&slow), Judgement::Violated(_)), "the time tells the first effect");
        let mut slow = in_order(&[Did::Delete(Some(10)), Did::Put(2, Some(20)), Did::Get(None)]);
        assert!(matches!(STRICT.judge(&slow), Judgement::Violated(_)));
        slow[0].call -= 1_000_000_000;
        assert_eq!(STRICT.judge(&slow), Judgement::Explained);
    }

    #[test]
    fn the_shortest_beginning_that_nothing_explains_is_shown() {
        let history = in_order(&[Did::Put(1, Some(10)), Did::Get(None), saw(1, 10), saw(1, 10)]);
        let Judgement::Violated(shown) = STRICT.judge(&history) else { panic!("{history:?}") };
        assert!(shown.contains("Get(None)") && !shown.contains("4.00"), "{shown}");
    }
}
