//! A replica's persisted metadata: identity, head, range states.
//!
//! **Invariant:** these values are stored only inside a log record's batch, so that the database's
//! metadata and data always stand at the same LSN. Encodings are little-endian with a leading
//! version byte; total decoders.

use std::time::Duration;

use vasto_core::Band;
use vasto_core::band::BANDS;
use vasto_core::codec::{DecodeError, Reader};
use vasto_core::ids::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, Origin, OwnSeq, PlanId, ReplicaId,
    ShardId, Vector,
};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::stored_key::MetaKey;

use crate::clock::since_boot;

const FORMAT: u8 = 1;

fn check_format(reader: &mut Reader<'_>, what: &'static str) -> Result<(), DecodeError> {
    match reader.u8()? {
        FORMAT => Ok(()),
        other => Err(DecodeError::Unknown { what, value: other.into() }),
    }
}

/// Identity of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Incarnation that wrote this value.
    pub incarnation: Incarnation,
}

impl Identity {
    /// Returns the origin of the records that this incarnation writes.
    pub(crate) fn origin(&self) -> Origin {
        Origin { replica: self.replica, incarnation: self.incarnation }
    }

    /// Encodes the stored value.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        for field in [self.keyspace.0, u64::from(self.shard.0), self.replica.0, self.incarnation.0]
        {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out
    }

    /// Decodes the stored value.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "replica identity");
        check_format(&mut reader, "replica identity format")?;
        let keyspace = KeyspaceId(reader.u64_le()?);
        let shard = u32::try_from(reader.u64_le()?)
            .map_err(|_| DecodeError::Malformed { what: "replica identity" })?;
        Ok(Self {
            keyspace,
            shard: ShardId(shard),
            replica: ReplicaId(reader.u64_le()?),
            incarnation: Incarnation(reader.u64_le()?),
        })
    }
}

/// Head of a replica: LSN, times, floor, epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Head {
    /// The last applied record.
    pub applied_lsn: Lsn,
    /// Own sequence of this incarnation's last streamed record.
    pub own_seq: OwnSeq,
    /// The last commit time that this data directory assigned, microseconds.
    pub commit_time: u64,
    /// The greatest commit time of any record here, from any replica, microseconds.
    pub commit_time_max: u64,
    /// The greatest event time in the data, microseconds.
    pub event_time_max: u64,
    /// The gc floor, a commit time.
    pub floor: u64,
    /// The highest epoch applied.
    pub epoch: Epoch,
    /// The highest catalog version applied.
    pub version: CatalogVersion,
}

impl Head {
    /// Encodes the stored value.
    pub(crate) fn encode(&self) -> [u8; 65] {
        let mut out = [0u8; 65];
        out[0] = FORMAT;
        let fields = [
            self.applied_lsn.0,
            self.own_seq.0,
            self.commit_time,
            self.event_time_max,
            self.floor,
            self.epoch.0,
            self.version.0,
            self.commit_time_max,
        ];
        for (slot, field) in out[1..].chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        out
    }

    /// Decodes the stored value.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "replica head");
        check_format(&mut reader, "replica head format")?;
        let mut head = Self {
            applied_lsn: Lsn(reader.u64_le()?),
            own_seq: OwnSeq(reader.u64_le()?),
            commit_time: reader.u64_le()?,
            commit_time_max: 0,
            event_time_max: reader.u64_le()?,
            floor: reader.u64_le()?,
            epoch: Epoch(reader.u64_le()?),
            version: CatalogVersion(reader.u64_le()?),
        };
        // Heads of replicas that had no peers end here.
        head.commit_time_max =
            if reader.rest().is_empty() { head.commit_time } else { u64_at_end(bytes) };
        Ok(head)
    }
}

fn u64_at_end(bytes: &[u8]) -> u64 {
    bytes.last_chunk::<8>().map_or(0, |last| u64::from_le_bytes(*last))
}

/// A range that accepts no writes until its plan is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seal {
    /// Plan that requested the seal.
    pub plan: PlanId,
    /// Catalog version that seals.
    pub version: CatalogVersion,
    /// The bands.
    pub range: BandRange,
    /// LSN of the seal record.
    pub lsn: Lsn,
    /// Boot time of the seal; `None` when it was found at a restart. Not persisted.
    pub since: Option<Duration>,
}

/// Bit of the stored plan id of the last ingest: bands began to arrive after it.
const ARRIVES_ANEW: u64 = 1 << 63;

/// State of every band, and known changes under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ranges {
    states: [RangeState; BANDS + 1],
    /// The seal in force.
    pub seal: Option<Seal>,
    /// The plan of the last recorded ingest.
    pub ingested: Option<PlanId>,
    /// Bands began to arrive after that ingest: it has not filled them.
    pub arrives_anew: bool,
}

impl Ranges {
    /// Creates ranges with every band in one state.
    pub(crate) fn all(state: RangeState) -> Self {
        let mut states = [state; BANDS + 1];
        states[0] = RangeState::Empty; // no band has the number 0
        Self { states, seal: None, ingested: None, arrives_anew: false }
    }

    /// Returns the state of a band.
    pub(crate) fn state(&self, band: Band) -> RangeState {
        self.states.get(usize::from(band.0)).copied().unwrap_or(RangeState::Empty)
    }

    /// Sets the state of a range.
    pub(crate) fn set(&mut self, range: BandRange, state: RangeState) {
        for band in range.bands() {
            self.states[usize::from(band.0)] = state;
        }
    }

    /// Returns true when every band of the range has the state.
    pub(crate) fn all_are(&self, range: BandRange, state: RangeState) -> bool {
        range.bands().all(|band| self.state(band) == state)
    }

    /// Returns the bands that reads may see, in order.
    pub(crate) fn owned(&self) -> impl Iterator<Item = Band> + '_ {
        Band::all().filter(|band| self.state(*band) == RangeState::Owned)
    }

    /// Returns true while a plan fills a replica that owns nothing and has not recorded its ingest:
    /// the data may be thrown away and the fill begun again. A replica that serves and receives more
    /// bands is not being filled.
    pub(crate) fn is_being_filled(&self) -> bool {
        self.filled_by().is_none()
            && self.states.contains(&RangeState::Arriving)
            && self.owned().next().is_none()
    }

    /// Returns the plan whose ingest has filled the bands that arrive, or have arrived last.
    pub(crate) fn filled_by(&self) -> Option<PlanId> {
        self.ingested.filter(|_| !self.arrives_anew)
    }

    /// Returns true when every band is empty: nothing was ever given to the replica.
    pub(crate) fn is_blank(&self) -> bool {
        Band::all().all(|band| self.state(band) == RangeState::Empty)
    }

    /// Returns true when entries of other logs may be merged into the band. An arriving band takes
    /// none before the ingest that fills it: rows below an ingested file would be hidden by it.
    pub(crate) fn takes(&self, band: Band) -> bool {
        match self.state(band) {
            RangeState::Owned => true,
            RangeState::Arriving => self.filled_by().is_some(),
            RangeState::Empty | RangeState::Leaving | RangeState::Clearing => false,
        }
    }

    /// Returns true when a write to the band must wait for a plan's outcome.
    pub(crate) fn is_sealed(&self, band: Band) -> bool {
        self.seal.is_some_and(|seal| seal.range.contains(band))
    }

    /// Returns true when a read of the band must be refused: sealed for longer than `patience`
    /// without a known outcome, or sealed before a restart.
    pub(crate) fn is_stale(&self, band: Band, patience: Duration) -> bool {
        self.seal.is_some_and(|seal| {
            seal.range.contains(band)
                && seal.since.is_none_or(|since| since_boot().saturating_sub(since) > patience)
        })
    }

    /// Returns the range states as a list, for a manifest: runs of equal states.
    pub(crate) fn runs(&self) -> Vec<(BandRange, u8)> {
        let mut out: Vec<(BandRange, u8)> = Vec::new();
        for band in Band::all() {
            let state = self.state(band) as u8;
            match out.last_mut() {
                Some((range, last)) if *last == state => range.last = band,
                _ => out.push((BandRange { first: band, last: band }, state)),
            }
        }
        out
    }

    /// Encodes the stored value.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        out.extend(self.states[1..].iter().map(|state| *state as u8));
        match &self.seal {
            None => out.push(0),
            Some(seal) => {
                out.extend_from_slice(&[1, seal.range.first.0, seal.range.last.0]);
                for field in [seal.plan.0, seal.version.0, seal.lsn.0] {
                    out.extend_from_slice(&field.to_le_bytes());
                }
            }
        }
        let anew = if self.arrives_anew { ARRIVES_ANEW } else { 0 };
        let ingested = self.ingested.map_or(0, |plan| plan.0) | anew;
        out.extend_from_slice(&ingested.to_le_bytes());
        out
    }

    /// Decodes the stored value. A decoded seal has no age: its reads stay refused.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let what = "range states";
        let mut reader = Reader::new(bytes, what);
        check_format(&mut reader, "range states format")?;
        let mut ranges = Ranges::all(RangeState::Empty);
        for (slot, byte) in ranges.states[1..].iter_mut().zip(reader.take(BANDS)?) {
            *slot = RangeState::from_u8(*byte)?;
        }
        let range = |reader: &mut Reader<'_>| -> Result<BandRange, DecodeError> {
            let (first, last) = (Band(reader.u8()?), Band(reader.u8()?));
            if first < Band::FIRST || last > Band::LAST || first > last {
                return Err(DecodeError::Malformed { what });
            }
            Ok(BandRange { first, last })
        };
        if reader.u8()? == 1 {
            let range = range(&mut reader)?;
            ranges.seal = Some(Seal {
                range,
                plan: PlanId(reader.u64_le()?),
                version: CatalogVersion(reader.u64_le()?),
                lsn: Lsn(reader.u64_le()?),
                since: None,
            });
        }
        let ingested = reader.u64_le()?;
        ranges.ingested = Some(PlanId(ingested & !ARRIVES_ANEW)).filter(|plan| plan.0 > 0);
        ranges.arrives_anew = ingested & ARRIVES_ANEW != 0;
        Ok(ranges)
    }
}

/// Reads a vector out of stored metadata rows.
pub(crate) fn parse_vector(rows: &[(Vec<u8>, Vec<u8>)]) -> Vector {
    rows.iter()
        .filter_map(|(key, value)| {
            let MetaKey::Vector(origin) = MetaKey::decode(key).ok()? else { return None };
            Some((origin, OwnSeq(u64::from_le_bytes(value.as_slice().try_into().ok()?))))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_round_trip() {
        let identity = Identity {
            keyspace: KeyspaceId(1),
            shard: ShardId(2),
            replica: ReplicaId(3),
            incarnation: Incarnation(4),
        };
        assert_eq!(Identity::decode(&identity.encode()).unwrap(), identity);
        let head = Head {
            applied_lsn: Lsn(1),
            own_seq: OwnSeq(2),
            commit_time: 3,
            commit_time_max: 9,
            event_time_max: 4,
            floor: 5,
            epoch: Epoch(6),
            version: CatalogVersion(7),
        };
        assert_eq!(Head::decode(&head.encode()).unwrap(), head);
        let mut ranges = Ranges::all(RangeState::Owned);
        let moved = BandRange { first: Band(2), last: Band(5) };
        ranges.set(moved, RangeState::Leaving);
        ranges.seal = Some(Seal {
            plan: PlanId(1),
            version: CatalogVersion(2),
            range: moved,
            lsn: Lsn(3),
            since: None,
        });
        ranges.ingested = Some(PlanId(9));
        assert_eq!(Ranges::decode(&ranges.encode()).unwrap(), ranges);
        assert_eq!(ranges.filled_by(), Some(PlanId(9)));
        ranges.arrives_anew = true;
        assert_eq!(Ranges::decode(&ranges.encode()).unwrap(), ranges);
        assert_eq!(ranges.filled_by(), None);
        assert_eq!(ranges.runs().len(), 3);
        assert_eq!(ranges.owned().count(), BANDS - 4);
    }

    #[test]
    fn a_seal_found_at_a_restart_serves_no_read() {
        let mut ranges = Ranges::all(RangeState::Owned);
        let range = BandRange { first: Band(1), last: Band(1) };
        ranges.seal = Some(Seal {
            plan: PlanId(1),
            version: CatalogVersion(1),
            range,
            lsn: Lsn(1),
            since: Some(since_boot()),
        });
        assert!(!ranges.is_stale(Band(1), Duration::from_secs(2)));
        let restarted = Ranges::decode(&ranges.encode()).unwrap();
        assert!(restarted.is_stale(Band(1), Duration::from_secs(2)));
        assert!(!restarted.is_stale(Band(2), Duration::from_secs(2)));
    }

    proptest! {
        #[test]
        fn decoders_are_total(bytes in proptest::collection::vec(any::<u8>(), 0..160)) {
            let _ = (Identity::decode(&bytes), Head::decode(&bytes), Ranges::decode(&bytes));
        }
    }
}
