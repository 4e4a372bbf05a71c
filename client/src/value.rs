//! The results of reads and writes: values, rows and outcomes.

use std::cmp::Ordering;
use std::fmt;

use bytes::Bytes;
use vasto_core::hash::partition_hash;
use vasto_proto::v1;

use crate::error::{Error, ErrorKind};

/// The content of a value.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Payload {
    /// Bytes, as put.
    Bytes(Bytes),
    /// A counter.
    I64(i64),
    /// A number.
    F64(f64),
}

/// A stored value.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// Its content.
    pub payload: Payload,
    /// The event time in microseconds since 1970, assigned by the replica or given by the writer.
    pub event_time: u64,
    /// The expiry in microseconds since 1970.
    pub expires_at: Option<u64>,
    /// A hash of the stored entry: the same entry has the same version on every replica.
    pub version: u64,
}

impl Value {
    /// Returns the content as bytes; a number as its decimal text.
    pub fn bytes(&self) -> Bytes {
        match &self.payload {
            Payload::Bytes(bytes) => bytes.clone(),
            Payload::I64(number) => Bytes::from(number.to_string()),
            Payload::F64(number) => Bytes::from(number.to_string()),
        }
    }

    /// Returns the counter, if the value is one.
    pub fn as_i64(&self) -> Option<i64> {
        match self.payload {
            Payload::I64(number) => Some(number),
            Payload::Bytes(_) | Payload::F64(_) => None,
        }
    }

    /// Returns the number, if the value is one.
    pub fn as_f64(&self) -> Option<f64> {
        match self.payload {
            Payload::F64(number) => Some(number),
            Payload::Bytes(_) | Payload::I64(_) => None,
        }
    }

    pub(crate) fn from_wire(wire: v1::Value) -> Result<Self, Error> {
        let payload = match wire.payload {
            Some(v1::value::Payload::Data(bytes)) => Payload::Bytes(bytes),
            Some(v1::value::Payload::I64(number)) => Payload::I64(number),
            Some(v1::value::Payload::F64(number)) => Payload::F64(number),
            None => {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "the node sent a value of a type that this client does not know; use a newer client",
                ));
            }
        };
        Ok(Self {
            payload,
            event_time: wire.event_time,
            expires_at: wire.expires_at,
            version: wire.version,
        })
    }
}

impl fmt::Display for Value {
    /// Formats the content as text; bytes that are no text are replaced.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.payload {
            Payload::Bytes(bytes) => f.write_str(&String::from_utf8_lossy(bytes)),
            Payload::I64(number) => number.fmt(f),
            Payload::F64(number) => number.fmt(f),
        }
    }
}

/// A key and its value, from a scan.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The user key.
    pub key: Bytes,
    /// The hash of the partition key, when that is not the key itself. The same user key under two
    /// partition keys is two rows; [`Key::from`](crate::Key) makes the key that reads this row.
    pub partition_hash: Option<u64>,
    /// The value; `None` in a scan of keys only.
    pub value: Option<Value>,
}

impl Row {
    fn hash(&self) -> u64 {
        self.partition_hash.unwrap_or_else(|| partition_hash(&self.key))
    }

    /// Returns the place of the row, which distinguishes it from all other rows and orders them.
    pub(crate) fn place(&self) -> Place {
        (self.key.clone(), self.hash())
    }

    /// Compares the places of two rows; hashes only where the keys are equal.
    pub(crate) fn order(&self, other: &Row) -> Ordering {
        self.key.cmp(&other.key).then_with(|| self.hash().cmp(&other.hash()))
    }
}

/// The place of a row in a scan: its user key and the hash of its partition.
pub(crate) type Place = (Bytes, u64);

/// The outcome of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The write is stored.
    Applied {
        /// The event time of the write, microseconds since 1970.
        event_time: u64,
    },
    /// An entry with a later event time was stored already and remains.
    Superseded,
    /// The condition did not hold; nothing was changed.
    NotApplied,
}

impl Outcome {
    pub(crate) fn from_wire(wire: &v1::WriteOutcome) -> Result<Self, Error> {
        match wire.kind() {
            v1::write_outcome::Kind::Applied => {
                Ok(Outcome::Applied { event_time: wire.event_time })
            }
            v1::write_outcome::Kind::Superseded => Ok(Outcome::Superseded),
            v1::write_outcome::Kind::NotApplied => Ok(Outcome::NotApplied),
            v1::write_outcome::Kind::Unspecified => Err(Error::new(
                ErrorKind::Unknown,
                "the node named an outcome that this client does not know; use a newer client, and read the key back",
            )),
        }
    }
}
