//! A chunk: a contiguous range of one replica's binlog, as one object.
//!
//! Little-endian; frozen by `testdata/v1/chunk.bin`:
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic `VASTOCHK` |
//! | 4 | format |
//! | 8, 4, 8 | keyspace, shard, replica |
//! | 8, 8 | first and last LSN |
//! | 4 | number of records |
//! | 4 + n | key of the object before this one (empty: none) |
//! | 4 + n | the records, as [`vasto_core::record`] encodes them |
//! | 4 | crc32c over everything before it |
//!
//! **Invariant:** a decoded chunk holds every record from `first_lsn` to `last_lsn`, each whole.

use bytes::Bytes;
use vasto_core::codec::{DecodeError, Reader, put_bytes_le};
use vasto_core::ids::Vector;
use vasto_core::record::{Record, frame_at};
use vasto_core::{KeyspaceId, Lsn, ReplicaId, ShardId};

use crate::layout::{self, Owner};

const MAGIC: &[u8; 8] = b"VASTOCHK";

/// The format that this version writes, and the newest it reads.
pub const FORMAT: u32 = 1;

/// One chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The shard.
    pub shard: ShardId,
    /// The replica whose log it is.
    pub replica: ReplicaId,
    /// LSN of the first record.
    pub first_lsn: Lsn,
    /// LSN of the last record.
    pub last_lsn: Lsn,
    /// Key of the chunk or manifest that a restore reads before this one.
    pub previous: Option<String>,
    /// The encoded records, one after the other.
    pub records: Vec<u8>,
}

/// Why bytes are not a chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Damaged, or not a chunk.
    #[error("the chunk is damaged: {0}")]
    Damaged(#[from] DecodeError),
    /// Written by a newer version.
    #[error(
        "the chunk has format {0}, newer than {FORMAT}, the newest that this version reads; upgrade this server"
    )]
    Newer(u32),
    /// A record is missing or out of order.
    #[error("the chunk should hold the record with LSN {expected} next, but has {found}")]
    Gap {
        /// The LSN that was due.
        expected: Lsn,
        /// The LSN that is there (0: the records end).
        found: Lsn,
    },
}

/// Length of a chunk's beginning that holds what [`peek`] reads: its fields and the key of the
/// object before it.
pub const BEGINNING_BYTES: u64 = 1 << 10;
/// Size of a chunk without its records and the key of the object before it.
const FRAMING_BYTES: u64 = 8 + 4 + 8 + 4 + 8 + 8 + 8 + 4 + 4 + 4 + 4;

/// The header fields of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Says {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The shard.
    pub shard: ShardId,
    /// The replica whose log it is.
    pub replica: ReplicaId,
    /// LSN of the first record.
    pub first_lsn: Lsn,
    /// LSN of the last record.
    pub last_lsn: Lsn,
    /// Bytes of the whole object.
    pub bytes: u64,
    /// The other replica of the shard whose archive the log continues here: the log before it need
    /// not be in the same folder.
    pub behind: Option<ReplicaId>,
    /// The key of the object before is none of a replica: which archive the log continues is not
    /// known.
    pub unclear: bool,
}

/// Returns `behind` and `unclear` for a chunk of the owner after the object with this key.
fn predecessor(key: &[u8], owner: Owner) -> (Option<ReplicaId>, bool) {
    let before = std::str::from_utf8(key).ok().and_then(layout::parse_shipped);
    let other = before.map(|(before, _)| before).filter(|before| {
        (before.keyspace, before.shard) == (owner.keyspace, owner.shard) && *before != owner
    });
    (other.map(|other| other.replica), !key.is_empty() && before.is_none())
}

/// Reads the header fields of a chunk from its first [`BEGINNING_BYTES`]; checks nothing else of
/// it.
///
/// # Errors
/// When it is no chunk, or of a newer format.
pub fn peek(beginning: &[u8]) -> Result<Says, ChunkError> {
    let mut reader = Reader::new(beginning, "chunk");
    if reader.take(8)? != MAGIC {
        return Err(DecodeError::Malformed { what: "chunk magic" }.into());
    }
    match reader.u32_le()? {
        FORMAT => {}
        0 => return Err(DecodeError::Malformed { what: "chunk format" }.into()),
        newer => return Err(ChunkError::Newer(newer)),
    }
    let (keyspace, shard) = (KeyspaceId(reader.u64_le()?), ShardId(reader.u32_le()?));
    let (replica, first_lsn, last_lsn) =
        (ReplicaId(reader.u64_le()?), Lsn(reader.u64_le()?), Lsn(reader.u64_le()?));
    let count = reader.u32_le()?;
    let previous = reader.bytes_le()?;
    let (behind, unclear) = predecessor(previous, Owner { keyspace, shard, replica });
    let previous = previous.len() as u64;
    let records = u64::from(reader.u32_le()?);
    if first_lsn.0 == 0
        || last_lsn < first_lsn
        || last_lsn.0 - first_lsn.0 != u64::from(count).wrapping_sub(1)
    {
        return Err(DecodeError::Malformed { what: "chunk range" }.into());
    }
    let bytes = FRAMING_BYTES + previous + records;
    Ok(Says { keyspace, shard, replica, first_lsn, last_lsn, bytes, behind, unclear })
}

impl Chunk {
    /// Returns the header fields.
    pub fn says(&self) -> Says {
        let (keyspace, shard, replica) = (self.keyspace, self.shard, self.replica);
        let previous = self.previous.as_deref().unwrap_or_default().as_bytes();
        let (behind, unclear) = predecessor(previous, Owner { keyspace, shard, replica });
        Says {
            keyspace,
            shard,
            replica,
            first_lsn: self.first_lsn,
            last_lsn: self.last_lsn,
            bytes: FRAMING_BYTES + previous.len() as u64 + self.records.len() as u64,
            behind,
            unclear,
        }
    }

    /// Returns, per origin, the last numbered record in this chunk.
    pub fn vector(&self) -> Vector {
        let mut vector = Vector::new();
        // A decoded chunk holds whole records only.
        for record in self.records().map_while(Result::ok).filter(|record| record.own_seq.0 > 0) {
            let seq = vector.entry(record.origin).or_default();
            *seq = record.own_seq.max(*seq);
        }
        vector
    }

    /// Encodes the object's bytes.
    ///
    /// # Panics
    /// When `first_lsn..=last_lsn` is empty or has more than `u32::MAX` records: the shipper cuts
    /// the log into small chunks.
    pub fn encode(&self) -> Bytes {
        assert!(self.first_lsn <= self.last_lsn, "a chunk holds at least one record");
        let count = u32::try_from(self.last_lsn.0 - self.first_lsn.0 + 1)
            .expect("chunks are cut by their size");
        let mut out = Vec::with_capacity(self.records.len() + 256);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        out.extend_from_slice(&self.keyspace.0.to_le_bytes());
        out.extend_from_slice(&self.shard.0.to_le_bytes());
        out.extend_from_slice(&self.replica.0.to_le_bytes());
        out.extend_from_slice(&self.first_lsn.0.to_le_bytes());
        out.extend_from_slice(&self.last_lsn.0.to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        put_bytes_le(&mut out, self.previous.as_deref().unwrap_or_default().as_bytes());
        put_bytes_le(&mut out, &self.records);
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        Bytes::from(out)
    }

    /// Reads a chunk and checks it and every record in it.
    ///
    /// # Errors
    /// Damage, a newer format, or records that are not contiguous.
    pub fn decode(bytes: &[u8]) -> Result<Self, ChunkError> {
        let mut reader = Reader::new(bytes, "chunk");
        if reader.take(8)? != MAGIC {
            return Err(DecodeError::Malformed { what: "chunk magic" }.into());
        }
        match reader.u32_le()? {
            FORMAT => {}
            0 => return Err(DecodeError::Malformed { what: "chunk format" }.into()),
            newer => return Err(ChunkError::Newer(newer)),
        }
        let (body, crc) =
            bytes.split_last_chunk::<4>().ok_or(DecodeError::Short { what: "chunk" })?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(DecodeError::Checksum { what: "chunk" }.into());
        }
        let chunk = Self::decode_fields(reader)?;
        for record in chunk.records() {
            record?;
        }
        Ok(chunk)
    }

    fn decode_fields(mut reader: Reader<'_>) -> Result<Self, DecodeError> {
        let keyspace = KeyspaceId(reader.u64_le()?);
        let shard = ShardId(reader.u32_le()?);
        let replica = ReplicaId(reader.u64_le()?);
        let first_lsn = Lsn(reader.u64_le()?);
        let last_lsn = Lsn(reader.u64_le()?);
        let count = reader.u32_le()?;
        if first_lsn.0 == 0
            || last_lsn < first_lsn
            || last_lsn.0 - first_lsn.0 != u64::from(count).wrapping_sub(1)
        {
            return Err(DecodeError::Malformed { what: "chunk range" });
        }
        let previous = std::str::from_utf8(reader.bytes_le()?)
            .map_err(|_| DecodeError::Malformed { what: "chunk's previous key" })?;
        let previous = (!previous.is_empty()).then(|| previous.to_owned());
        let records = reader.bytes_le()?.to_vec();
        reader.take(4)?;
        reader.finish()?;
        Ok(Chunk { keyspace, shard, replica, first_lsn, last_lsn, previous, records })
    }

    /// Returns the records, in order. A decoded chunk yields no error.
    pub fn records(&self) -> Records<'_> {
        Records { rest: &self.records, next: self.first_lsn, last: self.last_lsn, failed: false }
    }
}

/// Decodes the records of a chunk one by one, checking that none is missing.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    rest: &'a [u8],
    next: Lsn,
    last: Lsn,
    failed: bool,
}

impl Records<'_> {
    fn read(&mut self) -> Result<Record, ChunkError> {
        if self.rest.is_empty() {
            return Err(ChunkError::Gap { expected: self.next, found: Lsn(0) });
        }
        let (record, rest) = self.rest.split_at(frame_at(self.rest)?);
        let record = Record::decode(record)?;
        if record.lsn != self.next || self.next > self.last {
            return Err(ChunkError::Gap { expected: self.next, found: record.lsn });
        }
        self.rest = rest;
        // The LSN must not wrap, although the last LSN of all is never reached in practice.
        self.next = Lsn(self.next.0.saturating_add(1));
        Ok(record)
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Record, ChunkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || (self.rest.is_empty() && self.next > self.last) {
            return None;
        }
        let record = self.read();
        self.failed = record.is_err();
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use vasto_core::record::{Body, KeyEntry};
    use vasto_core::{Epoch, Incarnation, Origin, OwnSeq};

    fn record(lsn: u64, key: &[u8]) -> Record {
        Record {
            lsn: Lsn(lsn),
            synced_lsn: Lsn(lsn - 1),
            commit_time: 1_000 + lsn,
            floor: 0,
            epoch: Epoch(1),
            origin: Origin { replica: ReplicaId(3), incarnation: Incarnation(1) },
            own_seq: OwnSeq(lsn),
            body: Body::data(vec![KeyEntry { key: key.to_vec(), entry: vec![1, 2] }]),
        }
    }

    fn chunk_of(first: u64, keys: &[Vec<u8>], previous: Option<String>) -> Chunk {
        let records =
            keys.iter().zip(first..).flat_map(|(key, lsn)| record(lsn, key).encode()).collect();
        Chunk {
            keyspace: KeyspaceId(1),
            shard: ShardId(2),
            replica: ReplicaId(3),
            first_lsn: Lsn(first),
            last_lsn: Lsn(first + keys.len() as u64 - 1),
            previous,
            records,
        }
    }

    fn any_chunk() -> impl Strategy<Value = Chunk> {
        (
            1u64..1_000_000,
            proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..9), 1..6),
            proptest::option::of("[a-z0-9/.]{1,20}"),
        )
            .prop_map(|(first, keys, previous)| chunk_of(first, &keys, previous))
    }

    fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let end = bytes.len() - 4;
        let crc = crc32c::crc32c(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn round_trip(chunk in any_chunk()) {
            let bytes = chunk.encode();
            let back = Chunk::decode(&bytes).unwrap();
            prop_assert_eq!(&back, &chunk);
            let seen = peek(&bytes[..bytes.len().min(BEGINNING_BYTES as usize)]).unwrap();
            prop_assert_eq!((seen, seen.bytes), (chunk.says(), bytes.len() as u64));
            let lsns: Vec<u64> = back.records().map(|record| record.unwrap().lsn.0).collect();
            prop_assert_eq!(lsns, (chunk.first_lsn.0..=chunk.last_lsn.0).collect::<Vec<_>>());
        }

        #[test]
        fn any_altered_bit_is_found(chunk in any_chunk(), position: usize, bit in 0u8..8) {
            let mut bytes = chunk.encode().to_vec();
            let position = position % bytes.len();
            bytes[position] ^= 1 << bit;
            prop_assert!(Chunk::decode(&bytes).is_err());
        }

        #[test]
        fn decoding_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Chunk::decode(&bytes).is_err());
        }

        // With a matching checksum, so that the fields after it are reached.
        #[test]
        fn fields_are_decoded_totally(chunk in any_chunk(), at: usize, value: u8, cut in 0usize..40) {
            let mut bytes = chunk.encode().to_vec();
            let at = at % bytes.len();
            bytes[at] = value;
            bytes.truncate(bytes.len() - cut.min(bytes.len() - 16));
            if let Ok(back) = Chunk::decode(&resealed(bytes)) {
                prop_assert!(back.records().all(|record| record.is_ok()));
            }
        }
    }

    #[test]
    fn missing_surplus_and_swapped_records_are_found() {
        let keys = [b"a".to_vec(), b"b".to_vec(), b"c".to_vec()];
        let whole = chunk_of(5, &keys, None);
        let gap =
            |expected, found| Err(ChunkError::Gap { expected: Lsn(expected), found: Lsn(found) });
        let with = |records: Vec<Record>| Chunk {
            records: records.iter().flat_map(Record::encode).collect(),
            ..whole.clone()
        };
        let cut = with(vec![record(5, b"a"), record(6, b"b")]);
        assert_eq!(Chunk::decode(&cut.encode()), gap(7, 0));
        let hole = with(vec![record(5, b"a"), record(7, b"c")]);
        assert_eq!(Chunk::decode(&hole.encode()), gap(6, 7));
        let surplus =
            with(vec![record(5, b"a"), record(6, b"b"), record(7, b"c"), record(8, b"d")]);
        assert_eq!(Chunk::decode(&surplus.encode()), gap(8, 8));
        let swapped = with(vec![record(6, b"b"), record(5, b"a"), record(7, b"c")]);
        assert_eq!(Chunk::decode(&swapped.encode()), gap(5, 6));
    }

    #[test]
    fn newer_formats_say_upgrade() {
        let mut bytes = chunk_of(1, &[b"a".to_vec()], None).encode().to_vec();
        bytes[8] = 2;
        let error = Chunk::decode(&bytes).unwrap_err();
        assert_eq!(error, ChunkError::Newer(2));
        assert!(error.to_string().contains("upgrade"));
    }
}
