//! The binlog's record: the format in which data is written ahead, replayed, streamed and shipped.
//!
//! Record (little-endian; frozen by `testdata/v1/records.txt`):
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | length of the whole record |
//! | 4 | 4 | crc32c over every other byte |
//! | 8 | 8 | lsn |
//! | 16 | 8 | synced_lsn: the highest LSN known to be synced when the record was built |
//! | 24 | 8 | commit_time, microseconds since 1970 |
//! | 32 | 8 | floor: the origin's gc floor, a commit time |
//! | 40 | 8 | epoch |
//! | 48 | 16 | origin: replica, incarnation |
//! | 64 | 8 | own_seq (0 for local kinds) |
//! | 72 | 1 | kind |
//! | 73 | 3 | reserved, 0 |
//! | 76 | … | body |
//!
//! **Invariant:** a record holds at most one entry per key, and user keys, never bands. Decoders
//! are total, and a record whose bytes were altered never decodes.

use crate::band::Band;
use crate::codec::{DecodeError, Reader, put_bytes_le};
use crate::ids::{
    CatalogVersion, Epoch, Incarnation, Lsn, Origin, OwnSeq, PlanId, ReplicaId, ShardId,
};
use crate::limits::RECORD_BYTES_MAX;

pub use super::file_header::{FILE_FORMAT, FILE_HEADER_BYTES, FILE_MAGIC, FileHeader};
pub use super::range::{BandRange, RangeState};

/// Bytes before the body.
pub const RECORD_HEADER_BYTES: usize = 76;

/// A key and the entry that is now stored under it (see [`crate::entry`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyEntry {
    /// The user key.
    pub key: Vec<u8>,
    /// Its encoded entry.
    pub entry: Vec<u8>,
}

/// Stored result of a read-modify-write, so that a retry at the same replica gets it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpResult {
    /// The client that asked.
    pub client: u64,
    /// The client's own number for the operation.
    pub sequence: u64,
    /// The encoded result.
    pub outcome: Vec<u8>,
}

/// Durable progress of a feed into or out of this log. Persisted: never reuse a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedProgress {
    /// LSN up to which everything of the source replica's log that concerns this shard is applied.
    Tail(ReplicaId, Lsn),
    /// LSN up to which everything of this replica's log that belongs to the shard was forwarded.
    Forward(ShardId, Lsn),
}

/// An object from which an ingest took its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IngestedObject {
    /// Full object key.
    pub key: String,
    /// Size in bytes.
    pub bytes: u64,
    /// CRC-32C of the whole object.
    pub crc32c: u32,
}

/// Content of a record. `Data`, `GcFloor` and `Adopt` are streamed and counted by own sequence; the
/// other kinds concern this replica alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Writes, at most one per key; with stored results and progress that become durable with them.
    Data {
        /// The winning entries.
        entries: Vec<KeyEntry>,
        /// Results of read-modify-writes in the record.
        results: Vec<OpResult>,
        /// Cursors that advance with the record.
        progress: Vec<FeedProgress>,
    },
    /// The gc floor was agreed to be this commit time.
    GcFloor {
        /// Commit time, microseconds.
        floor: u64,
    },
    /// First record of every incarnation: ends the previous one at its head in this replica.
    Adopt {
        /// The incarnation before this one; 0 for the first.
        previous: Incarnation,
        /// The highest own sequence of it that this disk kept.
        head: OwnSeq,
    },
    /// The range accepts no writes until its plan is decided.
    Seal {
        /// The plan that asked for the seal.
        plan: PlanId,
        /// The catalog version that allows it.
        version: CatalogVersion,
        /// The sealed bands.
        range: BandRange,
    },
    /// The seal of an aborted plan is lifted.
    Unseal {
        /// The plan that was aborted.
        plan: PlanId,
        /// The catalog version of the abort.
        version: CatalogVersion,
    },
    /// The range was filled from these objects.
    Ingest {
        /// The plan that asked for the ingest.
        plan: PlanId,
        /// The filled bands.
        range: BandRange,
        /// Sources of the bytes.
        objects: Vec<IngestedObject>,
        /// Greatest event time in the objects.
        event_time_max: u64,
        /// Positions from which the tails of the sources start.
        progress: Vec<FeedProgress>,
    },
    /// The range has this state from now on.
    RangeState {
        /// The catalog version that sets the state.
        version: CatalogVersion,
        /// The bands.
        range: BandRange,
        /// Their state.
        state: RangeState,
    },
}

impl Body {
    /// Creates a `Data` body without results and progress.
    pub fn data(entries: Vec<KeyEntry>) -> Self {
        Body::Data { entries, results: Vec::new(), progress: Vec::new() }
    }

    /// Returns the persisted kind number: never reuse one.
    pub fn kind(&self) -> u8 {
        match self {
            Body::Data { .. } => 1,
            Body::GcFloor { .. } => 2,
            Body::Adopt { .. } => 3,
            Body::Seal { .. } => 4,
            Body::Unseal { .. } => 5,
            Body::Ingest { .. } => 6,
            Body::RangeState { .. } => 7,
        }
    }

    /// Returns true for the kinds that peers replicate.
    pub fn is_streamed(&self) -> bool {
        matches!(self, Body::Data { .. } | Body::GcFloor { .. } | Body::Adopt { .. })
    }
}

/// One record of a binlog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Position in this log.
    pub lsn: Lsn,
    /// Highest LSN known to be synced when the record was built.
    pub synced_lsn: Lsn,
    /// Commit time, microseconds; rises with every record to which this data directory assigns one.
    pub commit_time: u64,
    /// The origin's gc floor.
    pub floor: u64,
    /// The epoch under which the record was accepted.
    pub epoch: Epoch,
    /// The incarnation that first wrote the record.
    pub origin: Origin,
    /// Its own sequence there; 0 for local kinds.
    pub own_seq: OwnSeq,
    /// The content.
    pub body: Body,
}

fn put_progress(out: &mut Vec<u8>, progress: &[FeedProgress]) {
    out.extend_from_slice(&(progress.len() as u32).to_le_bytes());
    for feed in progress {
        let (kind, id, lsn) = match feed {
            FeedProgress::Tail(replica, lsn) => (1u8, replica.0, lsn),
            FeedProgress::Forward(shard, lsn) => (2u8, u64::from(shard.0), lsn),
        };
        out.push(kind);
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(&lsn.0.to_le_bytes());
    }
}

fn read_progress(reader: &mut Reader<'_>) -> Result<Vec<FeedProgress>, DecodeError> {
    let count = reader.u32_le()?;
    let mut out = Vec::new();
    for _ in 0..count {
        let kind = reader.u8()?;
        let id = reader.u64_le()?;
        let lsn = Lsn(reader.u64_le()?);
        out.push(match kind {
            1 => FeedProgress::Tail(ReplicaId(id), lsn),
            2 => {
                let shard = u32::try_from(id)
                    .map_err(|_| DecodeError::Malformed { what: "progress shard" })?;
                FeedProgress::Forward(ShardId(shard), lsn)
            }
            other => {
                return Err(DecodeError::Unknown { what: "progress kind", value: other.into() });
            }
        });
    }
    Ok(out)
}

fn put_range(out: &mut Vec<u8>, range: BandRange) {
    out.extend_from_slice(&[range.first.0, range.last.0]);
}

fn read_range(reader: &mut Reader<'_>) -> Result<BandRange, DecodeError> {
    let (first, last) = (Band(reader.u8()?), Band(reader.u8()?));
    if first < Band::FIRST || last > Band::LAST || first > last {
        return Err(DecodeError::Malformed { what: "band range" });
    }
    Ok(BandRange { first, last })
}

impl Record {
    /// Appends the encoding to `out`.
    ///
    /// # Panics
    /// When the record is longer than [`RECORD_BYTES_MAX`]: every caller keeps below it.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; 8]);
        for field in [
            self.lsn.0,
            self.synced_lsn.0,
            self.commit_time,
            self.floor,
            self.epoch.0,
            self.origin.replica.0,
            self.origin.incarnation.0,
            self.own_seq.0,
        ] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&[self.body.kind(), 0, 0, 0]);
        self.encode_body(out);
        let length = out.len() - start;
        assert!(length <= RECORD_BYTES_MAX, "a record of {length} bytes is over the limit");
        out[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
        let crc = record_crc(&out[start..]);
        out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    }

    /// Returns the encoding.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode_into(&mut out);
        out
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        match &self.body {
            Body::Data { entries, results, progress } => {
                out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
                for entry in entries {
                    put_bytes_le(out, &entry.key);
                    put_bytes_le(out, &entry.entry);
                }
                out.extend_from_slice(&(results.len() as u32).to_le_bytes());
                for result in results {
                    out.extend_from_slice(&result.client.to_le_bytes());
                    out.extend_from_slice(&result.sequence.to_le_bytes());
                    put_bytes_le(out, &result.outcome);
                }
                put_progress(out, progress);
            }
            Body::GcFloor { floor } => out.extend_from_slice(&floor.to_le_bytes()),
            Body::Adopt { previous, head } => {
                out.extend_from_slice(&previous.0.to_le_bytes());
                out.extend_from_slice(&head.0.to_le_bytes());
            }
            Body::Seal { plan, version, range } => {
                out.extend_from_slice(&plan.0.to_le_bytes());
                out.extend_from_slice(&version.0.to_le_bytes());
                put_range(out, *range);
            }
            Body::Unseal { plan, version } => {
                out.extend_from_slice(&plan.0.to_le_bytes());
                out.extend_from_slice(&version.0.to_le_bytes());
            }
            Body::Ingest { plan, range, objects, event_time_max, progress } => {
                out.extend_from_slice(&plan.0.to_le_bytes());
                put_range(out, *range);
                out.extend_from_slice(&(objects.len() as u32).to_le_bytes());
                for object in objects {
                    put_bytes_le(out, object.key.as_bytes());
                    out.extend_from_slice(&object.bytes.to_le_bytes());
                    out.extend_from_slice(&object.crc32c.to_le_bytes());
                }
                out.extend_from_slice(&event_time_max.to_le_bytes());
                put_progress(out, progress);
            }
            Body::RangeState { version, range, state } => {
                out.extend_from_slice(&version.0.to_le_bytes());
                put_range(out, *range);
                out.push(*state as u8);
            }
        }
    }

    /// Decodes one record from exactly its bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        match frame_at(bytes)? {
            length if length == bytes.len() => {}
            _ => return Err(DecodeError::Malformed { what: "record length" }),
        }
        let mut reader = Reader::new(&bytes[8..], "record");
        let lsn = Lsn(reader.u64_le()?);
        let synced_lsn = Lsn(reader.u64_le()?);
        let commit_time = reader.u64_le()?;
        let floor = reader.u64_le()?;
        let epoch = Epoch(reader.u64_le()?);
        let origin = Origin {
            replica: ReplicaId(reader.u64_le()?),
            incarnation: Incarnation(reader.u64_le()?),
        };
        let own_seq = OwnSeq(reader.u64_le()?);
        let kind = reader.u8()?;
        if reader.take(3)? != [0, 0, 0] {
            return Err(DecodeError::Malformed { what: "record reserved bytes" });
        }
        let body = Self::decode_body(kind, &mut reader)?;
        reader.finish()?;
        if body.is_streamed() != (own_seq.0 > 0) {
            return Err(DecodeError::Malformed { what: "record own_seq" });
        }
        Ok(Record { lsn, synced_lsn, commit_time, floor, epoch, origin, own_seq, body })
    }

    fn decode_body(kind: u8, reader: &mut Reader<'_>) -> Result<Body, DecodeError> {
        Ok(match kind {
            1 => {
                let count = reader.u32_le()?;
                let mut entries = Vec::new();
                for _ in 0..count {
                    entries.push(KeyEntry {
                        key: reader.bytes_le()?.to_vec(),
                        entry: reader.bytes_le()?.to_vec(),
                    });
                }
                let count = reader.u32_le()?;
                let mut results = Vec::new();
                for _ in 0..count {
                    results.push(OpResult {
                        client: reader.u64_le()?,
                        sequence: reader.u64_le()?,
                        outcome: reader.bytes_le()?.to_vec(),
                    });
                }
                Body::Data { entries, results, progress: read_progress(reader)? }
            }
            2 => Body::GcFloor { floor: reader.u64_le()? },
            3 => Body::Adopt {
                previous: Incarnation(reader.u64_le()?),
                head: OwnSeq(reader.u64_le()?),
            },
            4 => Body::Seal {
                plan: PlanId(reader.u64_le()?),
                version: CatalogVersion(reader.u64_le()?),
                range: read_range(reader)?,
            },
            5 => Body::Unseal {
                plan: PlanId(reader.u64_le()?),
                version: CatalogVersion(reader.u64_le()?),
            },
            6 => {
                let plan = PlanId(reader.u64_le()?);
                let range = read_range(reader)?;
                let count = reader.u32_le()?;
                let mut objects = Vec::new();
                for _ in 0..count {
                    let key = std::str::from_utf8(reader.bytes_le()?)
                        .map_err(|_| DecodeError::Malformed { what: "object key" })?
                        .to_owned();
                    objects.push(IngestedObject {
                        key,
                        bytes: reader.u64_le()?,
                        crc32c: reader.u32_le()?,
                    });
                }
                Body::Ingest {
                    plan,
                    range,
                    objects,
                    event_time_max: reader.u64_le()?,
                    progress: read_progress(reader)?,
                }
            }
            7 => Body::RangeState {
                version: CatalogVersion(reader.u64_le()?),
                range: read_range(reader)?,
                state: RangeState::from_u8(reader.u8()?)?,
            },
            other => return Err(DecodeError::Unknown { what: "record kind", value: other.into() }),
        })
    }
}

fn record_crc(record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&record[..4]), &record[8..])
}

/// Checks that a whole, unaltered record is at the front of `bytes` and returns its length. The
/// body is not decoded.
pub fn frame_at(bytes: &[u8]) -> Result<usize, DecodeError> {
    let mut reader = Reader::new(bytes, "record");
    let length = reader.u32_le()? as usize;
    let crc = reader.u32_le()?;
    if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&length) {
        return Err(DecodeError::Malformed { what: "record length" });
    }
    let record = bytes.get(..length).ok_or(DecodeError::Short { what: "record" })?;
    if record_crc(record) != crc {
        return Err(DecodeError::Checksum { what: "record" });
    }
    Ok(length)
}

/// Returns `(lsn, synced_lsn)` of the record at the front of `bytes`; only the length is checked.
pub fn positions_at(bytes: &[u8]) -> Option<(Lsn, Lsn)> {
    let mut reader = Reader::new(bytes.get(8..24)?, "record");
    Some((Lsn(reader.u64_le().ok()?), Lsn(reader.u64_le().ok()?)))
}

/// Fields of a record that are compared with a follower's state before the record is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peek {
    /// The incarnation that first wrote the record.
    pub origin: Origin,
    /// Its own sequence there; 0 for local kinds.
    pub own_seq: OwnSeq,
}

/// Returns the origin and own sequence of a whole record; only the length is checked.
pub fn peek(bytes: &[u8]) -> Option<Peek> {
    let mut reader = Reader::new(bytes.get(48..72)?, "record");
    let origin = Origin {
        replica: ReplicaId(reader.u64_le().ok()?),
        incarnation: Incarnation(reader.u64_le().ok()?),
    };
    Some(Peek { origin, own_seq: OwnSeq(reader.u64_le().ok()?) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn any_range() -> impl Strategy<Value = BandRange> {
        (1u8..=98, 1u8..=98)
            .prop_map(|(a, b)| BandRange { first: Band(a.min(b)), last: Band(a.max(b)) })
    }

    fn any_progress() -> impl Strategy<Value = Vec<FeedProgress>> {
        proptest::collection::vec(
            prop_oneof![
                (any::<u64>(), any::<u64>())
                    .prop_map(|(r, l)| FeedProgress::Tail(ReplicaId(r), Lsn(l))),
                (any::<u32>(), any::<u64>())
                    .prop_map(|(s, l)| FeedProgress::Forward(ShardId(s), Lsn(l))),
            ],
            0..3,
        )
    }

    fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..12)
    }

    fn any_body() -> impl Strategy<Value = Body> {
        prop_oneof![
            (
                proptest::collection::vec(
                    (any_bytes(), any_bytes()).prop_map(|(key, entry)| KeyEntry { key, entry }),
                    0..4
                ),
                proptest::collection::vec(
                    (any::<u64>(), any::<u64>(), any_bytes()).prop_map(
                        |(client, sequence, outcome)| OpResult { client, sequence, outcome }
                    ),
                    0..3
                ),
                any_progress()
            )
                .prop_map(|(entries, results, progress)| Body::Data {
                    entries,
                    results,
                    progress
                }),
            any::<u64>().prop_map(|floor| Body::GcFloor { floor }),
            (any::<u64>(), any::<u64>())
                .prop_map(|(p, h)| Body::Adopt { previous: Incarnation(p), head: OwnSeq(h) }),
            (any::<u64>(), any::<u64>(), any_range()).prop_map(|(p, v, range)| Body::Seal {
                plan: PlanId(p),
                version: CatalogVersion(v),
                range
            }),
            (any::<u64>(), any::<u64>())
                .prop_map(|(p, v)| Body::Unseal { plan: PlanId(p), version: CatalogVersion(v) }),
            (
                any::<u64>(),
                any_range(),
                proptest::collection::vec(("[a-z/]{0,9}", any::<u64>(), any::<u32>()), 0..3),
                any::<u64>(),
                any_progress()
            )
                .prop_map(|(plan, range, objects, event_time_max, progress)| {
                    Body::Ingest {
                        plan: PlanId(plan),
                        range,
                        objects: objects
                            .into_iter()
                            .map(|(key, bytes, crc32c)| IngestedObject { key, bytes, crc32c })
                            .collect(),
                        event_time_max,
                        progress,
                    }
                }),
            (any::<u64>(), any_range(), 0u8..5).prop_map(|(v, range, s)| Body::RangeState {
                version: CatalogVersion(v),
                range,
                state: RangeState::from_u8(s).unwrap()
            }),
        ]
    }

    fn any_record() -> impl Strategy<Value = Record> {
        (any::<[u64; 8]>(), any_body()).prop_map(|(n, body)| Record {
            lsn: Lsn(n[0]),
            synced_lsn: Lsn(n[1]),
            commit_time: n[2],
            floor: n[3],
            epoch: Epoch(n[4]),
            origin: Origin { replica: ReplicaId(n[5]), incarnation: Incarnation(n[6]) },
            own_seq: OwnSeq(if body.is_streamed() { n[7].max(1) } else { 0 }),
            body,
        })
    }

    proptest! {
        #[test]
        fn round_trip(record in any_record()) {
            let bytes = record.encode();
            prop_assert_eq!(frame_at(&bytes).unwrap(), bytes.len());
            prop_assert_eq!(positions_at(&bytes), Some((record.lsn, record.synced_lsn)));
            prop_assert_eq!(peek(&bytes), Some(Peek { origin: record.origin, own_seq: record.own_seq }));
            prop_assert_eq!(Record::decode(&bytes).unwrap(), record);
        }

        #[test]
        fn any_altered_bit_is_found(record in any_record(), position: usize, bit in 0u8..8) {
            let mut bytes = record.encode();
            let position = position % bytes.len();
            bytes[position] ^= 1 << bit;
            prop_assert!(Record::decode(&bytes).is_err());
        }

        #[test]
        fn decoders_are_total(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::decode(&bytes);
            let _ = FileHeader::decode(&bytes);
        }

        // The checksum hides the body decoder from random bytes, so this test decodes random bodies
        // directly.
        #[test]
        fn body_decoder_is_total(kind in 0u8..10, bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Record::decode_body(kind, &mut Reader::new(&bytes, "record"));
        }
    }
}
