//! Dedup table: results of read-modify-writes, kept so that a repetition gets the first result.
//!
//! **Invariant:** a result becomes durable with its change. A repetition gets that result or the
//! answer that the outcome is not known; no operation is done twice because its result was
//! forgotten.

use std::collections::{HashMap, VecDeque};

use vasto_core::codec::{DecodeError, Reader};
use vasto_core::ids::{Epoch, OwnSeq, ReplicaId};
use vasto_core::limits::{RESULTS_KEPT, RESULTS_MAX};
use vasto_core::stored_key::MetaKey;
use vasto_core::{ErrorCode, VastoError};

use super::command::{Number, OpId, OpOutcome};

const FORMAT: u8 = 2;
/// Format without the epoch.
const FIRST_FORMAT: u8 = 1;

/// A result, and the position of its change in this replica's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredResult {
    /// Outcome of each operation.
    pub outcomes: Vec<OpOutcome>,
    /// Epoch at which the operations were done.
    pub epoch: Epoch,
    /// Own sequence of the record, when it is of this incarnation.
    pub own_seq: Option<OwnSeq>,
}

/// Encodes a result: its commit time, its epoch, then each outcome.
pub(super) fn encode(commit_time: u64, epoch: Epoch, outcomes: &[OpOutcome]) -> Vec<u8> {
    let mut out = vec![FORMAT];
    out.extend_from_slice(&commit_time.to_le_bytes());
    out.extend_from_slice(&epoch.0.to_le_bytes());
    for outcome in outcomes {
        let (kind, event_time, version, number) = match *outcome {
            OpOutcome::Applied(event_time) => (1u8, event_time, 0, None),
            OpOutcome::Superseded(event_time) => (2, event_time, 0, None),
            OpOutcome::Modified { event_time, version, number } => (3, event_time, version, number),
            OpOutcome::NotApplied { event_time, version } => (4, event_time, version, None),
        };
        let (number_kind, bits) = match number {
            None => (0u8, 0),
            Some(Number::I64(number)) => (1, number as u64),
            Some(Number::F64(bits)) => (2, bits),
        };
        out.push(kind);
        out.extend_from_slice(&event_time.to_le_bytes());
        out.extend_from_slice(&version.to_le_bytes());
        out.push(number_kind);
        out.extend_from_slice(&bits.to_le_bytes());
    }
    out
}

/// Decodes the stored form.
pub(super) fn decode(bytes: &[u8]) -> Result<(u64, StoredResult), DecodeError> {
    let what = "result of a read-modify-write";
    let mut reader = Reader::new(bytes, what);
    let format = reader.u8()?;
    let commit_time = reader.u64_le()?;
    let epoch = match format {
        FORMAT => Epoch(reader.u64_le()?),
        FIRST_FORMAT => Epoch(0),
        other => return Err(DecodeError::Unknown { what, value: other.into() }),
    };
    let rest = reader.rest();
    let mut outcomes = Vec::new();
    for outcome in rest.chunks(26) {
        let mut reader = Reader::new(outcome, what);
        let (kind, event_time, version) = (reader.u8()?, reader.u64_le()?, reader.u64_le()?);
        let number = match (reader.u8()?, reader.u64_le()?) {
            (0, _) => None,
            (1, bits) => Some(Number::I64(bits as i64)),
            (2, bits) => Some(Number::F64(bits)),
            (other, _) => return Err(DecodeError::Unknown { what, value: other.into() }),
        };
        outcomes.push(match kind {
            1 => OpOutcome::Applied(event_time),
            2 => OpOutcome::Superseded(event_time),
            3 => OpOutcome::Modified { event_time, version, number },
            4 => OpOutcome::NotApplied { event_time, version },
            other => return Err(DecodeError::Unknown { what, value: other.into() }),
        });
    }
    Ok((commit_time, StoredResult { outcomes, epoch, own_seq: None }))
}

/// Returns the time from which on all results are known when one of this commit time was forgotten.
/// Commit times may run slightly ahead of the clock: a result that is not certain is unknown.
fn certain_after(forgotten: u64) -> u64 {
    forgotten.saturating_add(1_000_000)
}

/// Results that a replica keeps.
#[derive(Default)]
pub(super) struct DedupTable {
    by_id: HashMap<(u64, u64), StoredResult>,
    order: VecDeque<(u64, (u64, u64))>,
    /// Results from before this time may have been forgotten, microseconds.
    complete_from: u64,
    kept_max: usize,
}

impl DedupTable {
    /// Builds the table from the rows found at the opening.
    pub(super) fn load(rows: &[(Vec<u8>, Vec<u8>)]) -> Self {
        let mut all: Vec<(u64, (u64, u64), StoredResult)> = rows
            .iter()
            .filter_map(|(key, value)| {
                let MetaKey::Result(client, sequence) = MetaKey::decode(key).ok()? else {
                    return None;
                };
                let (at, kept) = decode(value).ok()?;
                Some((at, (client, sequence), kept))
            })
            .collect();
        all.sort_unstable_by_key(|(at, id, _)| (*at, *id));
        let mut results = Self { kept_max: RESULTS_MAX, ..Self::default() };
        // The table is full: there were more results, and they were forgotten.
        if all.len() >= RESULTS_MAX {
            results.complete_from = all.first().map_or(0, |(at, ..)| certain_after(*at));
        }
        for (at, id, kept) in all {
            results.order.push_back((at, id));
            results.by_id.insert(id, kept);
        }
        results
    }

    /// Returns the result of an operation that was requested before.
    ///
    /// # Errors
    /// `Unknown` when the operation may have been done elsewhere, or so long ago that its result is
    /// forgotten.
    pub(super) fn recall(
        &self,
        id: &OpId,
        here: ReplicaId,
        now_us: u64,
    ) -> Result<Option<&StoredResult>, VastoError> {
        if let Some(kept) = self.by_id.get(&(id.client, id.sequence)) {
            return Ok(Some(kept));
        }
        let unknown = |why: &str| {
            let message =
                format!("the operation may have taken effect already ({why}); read the value back");
            Err(VastoError::new(ErrorCode::Unknown, message))
        };
        match id.tried {
            None => Ok(None),
            Some(tried) if tried != here => unknown("another replica was asked first"),
            Some(_) => {
                let first = now_us.saturating_sub(id.age_ms.saturating_mul(1000));
                let kept_us = RESULTS_KEPT.as_micros() as u64;
                match first < self.complete_from || id.age_ms.saturating_mul(1000) >= kept_us {
                    true => unknown("that was too long ago"),
                    false => Ok(None),
                }
            }
        }
    }

    /// Returns the number of stored results.
    pub(super) fn len(&self) -> u64 {
        self.order.len() as u64
    }

    /// Stores a result.
    pub(super) fn keep(&mut self, id: (u64, u64), commit_time: u64, kept: StoredResult) {
        self.order.push_back((commit_time, id));
        self.by_id.insert(id, kept);
    }

    /// Forgets results that are too old or too many; returns those to remove from the database.
    pub(super) fn forget(&mut self, now_us: u64) -> Vec<(u64, u64)> {
        let oldest = now_us.saturating_sub(RESULTS_KEPT.as_micros() as u64);
        let mut gone = Vec::new();
        while let Some((at, id)) = self.order.front().copied()
            && (at < oldest || self.order.len() > self.kept_max)
        {
            self.order.pop_front();
            self.by_id.remove(&id);
            self.complete_from = self.complete_from.max(certain_after(at));
            gone.push(id);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn id(sequence: u64, tried: Option<u64>, age_ms: u64) -> OpId {
        OpId { client: 7, sequence, tried: tried.map(ReplicaId), age_ms }
    }

    fn kept(outcomes: Vec<OpOutcome>) -> StoredResult {
        StoredResult { outcomes, epoch: Epoch(1), own_seq: None }
    }

    const HERE: ReplicaId = ReplicaId(1);
    const NOW: u64 = 10_000_000_000;

    #[test]
    fn outcomes_round_trip() {
        let outcomes = [
            OpOutcome::Applied(1),
            OpOutcome::Superseded(2),
            OpOutcome::Modified { event_time: 3, version: 4, number: Some(Number::I64(-5)) },
            OpOutcome::Modified {
                event_time: 3,
                version: 4,
                number: Some(Number::F64(0.5f64.to_bits())),
            },
            OpOutcome::Modified { event_time: 3, version: 4, number: None },
            OpOutcome::NotApplied { event_time: 6, version: 7 },
        ];
        let encoded = encode(9, Epoch(3), &outcomes);
        let kept = |epoch| StoredResult {
            outcomes: outcomes.to_vec(),
            epoch: Epoch(epoch),
            own_seq: None,
        };
        assert_eq!(decode(&encoded).unwrap(), (9, kept(3)));
        let first_format = [&[FIRST_FORMAT][..], &encoded[1..9], &encoded[17..]].concat();
        assert_eq!(decode(&first_format).unwrap(), (9, kept(0)));
    }

    #[test]
    fn a_repetition_gets_the_first_result_or_unknown_never_a_second_effect() {
        let mut results = DedupTable { kept_max: 2, ..DedupTable::default() };
        results.keep((7, 1), NOW, kept(vec![OpOutcome::Applied(1)]));
        assert_eq!(
            results.recall(&id(1, Some(1), 5), HERE, NOW).unwrap(),
            Some(&kept(vec![OpOutcome::Applied(1)]))
        );
        assert_eq!(results.recall(&id(2, None, 0), HERE, NOW).unwrap(), None);
        assert_eq!(
            results.recall(&id(2, Some(1), 5), HERE, NOW).unwrap(),
            None,
            "no attempt came here"
        );
        assert_eq!(
            results.recall(&id(2, Some(9), 5), HERE, NOW).unwrap_err().code,
            ErrorCode::Unknown
        );
        assert_eq!(
            results.recall(&id(2, Some(1), 600_000), HERE, NOW).unwrap_err().code,
            ErrorCode::Unknown
        );
        // Forgotten because there were too many: the outcome is unknown.
        results.keep((7, 3), NOW + 1, kept(Vec::new()));
        results.keep((7, 4), NOW + 2, kept(Vec::new()));
        assert_eq!(results.forget(NOW + 3), [(7, 1)]);
        assert_eq!(
            results.recall(&id(1, Some(1), 100), HERE, NOW + 3).unwrap_err().code,
            ErrorCode::Unknown
        );
        assert_eq!(results.recall(&id(9, Some(1), 100), HERE, NOW + 5_000_000).unwrap(), None);
        // Forgotten because they are old.
        assert_eq!(results.forget(NOW + RESULTS_KEPT.as_micros() as u64 + 2), [(7, 3)]);
    }

    #[test]
    fn results_that_were_stored_before_the_opening_are_recalled() {
        let row = |sequence, at| {
            (MetaKey::Result(7, sequence).encode(), encode(at, Epoch(1), &[OpOutcome::Applied(at)]))
        };
        let mut results = DedupTable::load(&[row(2, NOW + 1), row(1, NOW)]);
        let stored = kept(vec![OpOutcome::Applied(NOW)]);
        assert_eq!(results.recall(&id(1, Some(1), 1), HERE, NOW).unwrap(), Some(&stored));
        assert_eq!(
            results.forget(NOW + 1 + RESULTS_KEPT.as_micros() as u64),
            [(7, 1)],
            "the oldest goes first"
        );
    }

    #[test]
    fn a_result_that_was_forgotten_before_the_opening_stays_unknown() {
        let row = |sequence, at| {
            (MetaKey::Result(7, sequence).encode(), encode(at, Epoch(1), &[OpOutcome::Applied(at)]))
        };
        let mut rows: Vec<_> = (0..RESULTS_MAX as u64).map(|n| row(n, NOW + n)).collect();
        let ask = |results: DedupTable| {
            results.recall(&id(1 << 40, Some(1), 100), HERE, NOW + 1).map(|stored| stored.cloned())
        };
        assert_eq!(
            ask(DedupTable::load(&rows)).unwrap_err().code,
            ErrorCode::Unknown,
            "the table was full: the result may have been forgotten"
        );
        rows.pop();
        assert_eq!(ask(DedupTable::load(&rows)).unwrap(), None, "none was forgotten");
    }

    proptest! {
        #[test]
        fn decoding_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = decode(&bytes);
        }
    }
}
