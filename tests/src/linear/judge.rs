//! The check of a history: whether some order of its operations explains what each of them saw.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use porcupine_rs::{CheckResult, Operation, check_operations_timeout};

use super::entry::Entry;
use super::model::{Did, Held, OneKey};

/// Duration from which a put or delete may have been sent twice: the client repeats the request to
/// a silent node after half of its patience.
const REPEATED_AFTER: Duration = Duration::from_millis(450);
/// Time limit of the check of one key.
const CHECK_MAX: Duration = Duration::from_secs(20);

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
                Did::IfAbsent(value, Some(Some(time)))
                | Did::IfVersion(_, value, Some(Some(time))) => {
                    acked.insert((value, time));
                }
                Did::Add(_, Some(sum)) => {
                    sums.insert(sum);
                }
                _ => {}
            }
        }
        let says_something = |entry: &Entry| match entry.did {
            Did::Get(Some((Held::Value(value), time))) => {
                !self.dirty || acked.contains(&(value, time))
            }
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
        kept.retain(
            |entry| !matches!(entry.did, Did::Put(value, None) if effects.contains_key(&value)),
        );
        for entry in &mut kept {
            if let Did::IfAbsent(value, outcome @ None) | Did::IfVersion(_, value, outcome @ None) =
                &mut entry.did
                && let Some(time) = effects.get(value).and_then(BTreeSet::first)
            {
                // A conditional write is never repeated elsewhere, so it took effect once, and only
                // if its condition held.
                *outcome = Some(Some(*time));
                entry.answer = i64::MAX;
            }
        }
        kept.extend(repetitions(&kept, &effects));
        for (value, call) in puts {
            let times = effects.remove(&value).unwrap_or_default();
            let effect =
                |time| Entry { client: 0, call, answer: i64::MAX, did: Did::Effect(value, time) };
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

/// Returns the puts and deletes that may have been sent twice, as operations of unknown outcome; a
/// put whose other effects were seen has those instead.
fn repetitions(entries: &[Entry], effects: &BTreeMap<u64, BTreeSet<u64>>) -> Vec<Entry> {
    let again = |entry: &&Entry| {
        entry.answer.saturating_sub(entry.call) as u128 >= REPEATED_AFTER.as_nanos()
    };
    let repeated = |entry: &Entry| match entry.did {
        Did::Put(value, Some(_)) if !effects.contains_key(&value) => {
            Some(Entry { did: Did::Put(value, None), ..*entry })
        }
        Did::Delete(Some(_)) => Some(Entry { did: Did::Delete(None), ..*entry }),
        _ => None,
    };
    entries.iter().filter(again).filter_map(repeated).collect()
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

/// Returns the history as known at this time: an unanswered write may take effect at any later
/// time.
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
    let mut answers: Vec<i64> =
        entries.iter().map(|entry| entry.answer).filter(|answer| *answer != i64::MAX).collect();
    answers.sort_unstable();
    let first =
        answers.partition_point(|time| check(&until_then(entries, *time)) != CheckResult::Illegal);
    let time = answers.get(first).copied().unwrap_or(i64::MAX);
    let mut shown: Vec<Entry> = until_then(entries, time);
    shown.sort_by_key(|entry| (entry.answer.min(time), entry.call));
    let skipped = shown.len().saturating_sub(24);
    let line = |entry: &Entry| {
        let ms = |nanos: i64| nanos as f64 / 1e6;
        let answer = if entry.answer == i64::MAX {
            "   open   ".to_owned()
        } else {
            format!("{:10.2}", ms(entry.answer))
        };
        format!(
            "  {:10.2} to {answer} ms, client {}: {:?}",
            ms(entry.call),
            entry.client,
            entry.did
        )
    };
    let lines: Vec<String> = shown.iter().skip(skipped).map(line).collect();
    format!("  ({skipped} operations before these)\n{}", lines.join("\n"))
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
        assert!(
            violated(STRICT, &[Did::Put(1, Some(10)), Did::Put(2, Some(20)), saw(1, 10)]),
            "the old value"
        );
        assert!(
            violated(STRICT, &[Did::Put(1, Some(10)), Did::Delete(Some(20)), saw(1, 10)]),
            "a deleted one"
        );
        assert!(
            violated(STRICT, &[Did::Put(1, Some(10)), Did::Put(2, Some(5))]),
            "stamped before what stands"
        );
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
            &[
                Did::Add(5, Some(5)),
                Did::Add(1, Some(6)),
                Did::Delete(Some(9)),
                Did::Add(1, Some(1))
            ]
        ));
        assert!(violated(
            STRICT,
            &[Did::Add(5, Some(5)), Did::Delete(Some(9)), Did::Add(1, Some(6))]
        ));
        assert!(violated(STRICT, &[Did::Add(5, Some(5)), Did::Add(1, Some(1))]));
    }

    #[test]
    fn what_is_unknown_happened_at_some_later_time_or_never() {
        assert!(!violated(STRICT, &[Did::Put(1, None), Did::Get(None), saw(1, 10)]));
        assert!(!violated(STRICT, &[Did::Put(1, None), Did::Get(None)]));
        assert!(violated(STRICT, &[saw(1, 10), Did::Put(1, None)]), "before its call");
        assert!(
            violated(STRICT, &[Did::Put(1, None), saw(1, 10), Did::Get(None)]),
            "once seen it stays"
        );
        assert!(
            !violated(AWAY, &[Did::Put(1, None), saw(1, 10), Did::Get(None)]),
            "unless a node was away"
        );
        let on_first = Did::IfVersion((Held::Value(1), 10), 3, None);
        assert!(!violated(STRICT, &[Did::Put(1, Some(10)), on_first, saw(1, 10), saw(3, 30)]));
        let second = Did::Put(2, Some(20));
        assert!(
            violated(STRICT, &[Did::Put(1, Some(10)), on_first, second, saw(2, 20), saw(3, 30)]),
            "not on the second"
        );
        assert!(!violated(
            STRICT,
            &[Did::Add(5, None), Did::Add(1, Some(6)), Did::Add(1, Some(7))]
        ));
        assert!(violated(
            STRICT,
            &[Did::Add(5, None), Did::Add(1, Some(6)), Did::Add(1, Some(12))]
        ));
    }

    #[test]
    fn a_put_that_was_sent_twice_may_take_effect_twice_but_no_read_is_older_for_that() {
        // Seen again with a later time: the second effect of the put.
        assert!(!violated(STRICT, &[Did::Put(1, Some(10)), Did::Put(2, Some(20)), saw(1, 30)]));
        assert!(violated(
            STRICT,
            &[Did::Put(1, Some(10)), Did::Put(2, Some(20)), saw(1, 30), saw(2, 20)]
        ));
        let mut slow = in_order(&[Did::Put(1, Some(10)), Did::Put(2, Some(20)), saw(1, 10)]);
        slow[0].call -= 1_000_000_000;
        assert!(
            matches!(STRICT.judge(&slow), Judgement::Violated(_)),
            "the time tells the first effect"
        );
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
