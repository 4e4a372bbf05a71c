//! The header of a binlog file.
//!
//! **Invariant:** frozen by `testdata/v1/file_header.txt`.

use crate::codec::{DecodeError, Reader};
use crate::ids::{Incarnation, KeyspaceId, Lsn, ReplicaId, ShardId};

/// First bytes of every binlog file.
pub const FILE_MAGIC: &[u8; 8] = b"VASTOLOG";

/// Format number that this version writes, and the newest that it reads.
pub const FILE_FORMAT: u32 = 1;

/// Length of an encoded [`FileHeader`].
pub const FILE_HEADER_BYTES: usize = 64;

/// Header of a binlog file. Names its owner, so that a stray file can never be replayed into
/// another replica.
///
/// 64 bytes: magic, format u32, reserved u32, keyspace u64, shard u32, reserved u32, replica u64,
/// incarnation u64, first LSN u64, reserved u32, crc32c u32 over the bytes before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHeader {
    /// The keyspace it belongs to.
    pub keyspace: KeyspaceId,
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// The incarnation that created the file.
    pub incarnation: Incarnation,
    /// The LSN of the first record in it.
    pub first_lsn: Lsn,
}

impl FileHeader {
    /// Returns the encoding, [`FILE_HEADER_BYTES`] long.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FILE_HEADER_BYTES);
        out.extend_from_slice(FILE_MAGIC);
        out.extend_from_slice(&FILE_FORMAT.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.keyspace.0.to_le_bytes());
        out.extend_from_slice(&self.shard.0.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.replica.0.to_le_bytes());
        out.extend_from_slice(&self.incarnation.0.to_le_bytes());
        out.extend_from_slice(&self.first_lsn.0.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// Decodes a header from the front of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "binlog file header");
        if reader.take(8)? != FILE_MAGIC {
            return Err(DecodeError::Malformed { what: "binlog file magic" });
        }
        let format = reader.u32_le()?;
        if format != FILE_FORMAT {
            return Err(DecodeError::Unknown { what: "binlog file format", value: format.into() });
        }
        reader.take(4)?;
        let keyspace = KeyspaceId(reader.u64_le()?);
        let shard = ShardId(reader.u32_le()?);
        reader.take(4)?;
        let replica = ReplicaId(reader.u64_le()?);
        let incarnation = Incarnation(reader.u64_le()?);
        let first_lsn = Lsn(reader.u64_le()?);
        reader.take(4)?;
        let crc = reader.u32_le()?;
        if crc32c::crc32c(&bytes[..FILE_HEADER_BYTES - 4]) != crc {
            return Err(DecodeError::Checksum { what: "binlog file header" });
        }
        Ok(FileHeader { keyspace, shard, replica, incarnation, first_lsn })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn file_headers_round_trip_and_refuse_newer_formats() {
        let header = FileHeader {
            keyspace: KeyspaceId(1),
            shard: ShardId(2),
            replica: ReplicaId(3),
            incarnation: Incarnation(4),
            first_lsn: Lsn(5),
        };
        let bytes = header.encode();
        assert_eq!(bytes.len(), FILE_HEADER_BYTES);
        assert_eq!(FileHeader::decode(&bytes).unwrap(), header);
        let mut newer = bytes.clone();
        newer[8] = 2;
        assert_eq!(
            FileHeader::decode(&newer),
            Err(DecodeError::Unknown { what: "binlog file format", value: 2 })
        );
        for position in 0..FILE_HEADER_BYTES {
            let mut altered = bytes.clone();
            altered[position] ^= 1;
            assert!(FileHeader::decode(&altered).is_err(), "byte {position}");
        }
    }
}
