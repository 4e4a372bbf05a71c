//! Keys, and the types that convert into bytes.

use bytes::Bytes;
use vasto_core::hash::partition_hash;
use vasto_core::limits::{LimitError, check_key};
use vasto_proto::v1;

use crate::value::Row;

mod sealed {
    pub trait Sealed {}
}

/// Types that can be a key, a partition key, a prefix or a value: strings and bytes, owned or
/// borrowed. [`Bytes`] and owned buffers are taken without a copy.
pub trait IntoBytes: sealed::Sealed {
    /// Converts into bytes.
    fn into_bytes(self) -> Bytes;
}

macro_rules! into_bytes {
    ($($type:ty, $self:ident => $body:expr;)*) => {$(
        impl sealed::Sealed for $type {}
        impl IntoBytes for $type {
            fn into_bytes($self) -> Bytes {
                $body
            }
        }
    )*};
}

into_bytes! {
    &str, self => Bytes::copy_from_slice(self.as_bytes());
    &[u8], self => Bytes::copy_from_slice(self);
    &Vec<u8>, self => Bytes::copy_from_slice(self);
    &String, self => Bytes::copy_from_slice(self.as_bytes());
    &Bytes, self => self.clone();
    String, self => Bytes::from(self);
    Vec<u8>, self => Bytes::from(self);
    Bytes, self => self;
}

impl<const N: usize> sealed::Sealed for &[u8; N] {}
impl<const N: usize> IntoBytes for &[u8; N] {
    fn into_bytes(self) -> Bytes {
        Bytes::copy_from_slice(self)
    }
}

impl<const N: usize> sealed::Sealed for [u8; N] {}
impl<const N: usize> IntoBytes for [u8; N] {
    fn into_bytes(self) -> Bytes {
        Bytes::copy_from_slice(&self)
    }
}

/// A user key, with the partition key that decides its shard.
///
/// A string or bytes alone are a key whose partition key is the key itself. The partition key must
/// be a function of the key: the same key under two partition keys is two records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub(crate) key: Bytes,
    partition: Partition,
}

/// The partition of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Partition {
    /// The key itself.
    Own,
    /// Another partition key.
    Named(Bytes),
    /// Another partition key, of which only the hash is known.
    Hashed(u64),
}

impl Key {
    /// Makes a key of 1 to 65,536 bytes.
    pub fn new(key: impl IntoBytes) -> Self {
        Self { key: key.into_bytes(), partition: Partition::Own }
    }

    /// Sets the partition key: keys with the same partition key share a shard, can be scanned by
    /// one seek, and written atomically in one batch.
    pub fn partition(mut self, partition: impl IntoBytes) -> Self {
        self.partition = Partition::Named(partition.into_bytes());
        self
    }

    /// Sets the partition by the hash of its key alone, which a scan returns as
    /// [`Row::partition_hash`](crate::Row::partition_hash).
    pub fn partition_hash(mut self, hash: u64) -> Self {
        self.partition = Partition::Hashed(hash);
        self
    }

    /// Returns the user key.
    pub fn as_bytes(&self) -> &[u8] {
        &self.key
    }

    pub(crate) fn check(&self) -> Result<(), LimitError> {
        check_key(&self.key)?;
        match &self.partition {
            Partition::Own | Partition::Hashed(_) => Ok(()),
            Partition::Named(partition) => check_key(partition),
        }
    }

    /// Returns the hash that places the key.
    pub(crate) fn hash(&self) -> u64 {
        match &self.partition {
            Partition::Own => partition_hash(&self.key),
            Partition::Named(partition) => partition_hash(partition),
            Partition::Hashed(hash) => *hash,
        }
    }

    /// Returns the key on the wire: with a hash only where it is not the key's own.
    pub(crate) fn to_wire(&self) -> v1::KeyRef {
        let own = match &self.partition {
            Partition::Own => true,
            Partition::Named(partition) => *partition == self.key,
            Partition::Hashed(hash) => *hash == partition_hash(&self.key),
        };
        v1::KeyRef {
            key: self.key.clone(),
            partition_hash: if own { None } else { Some(self.hash()) },
        }
    }
}

impl<T: IntoBytes> From<T> for Key {
    fn from(key: T) -> Self {
        Key::new(key)
    }
}

/// The key of a scanned row: reads, writes and deletes with it address the row's own record.
impl From<&Row> for Key {
    fn from(row: &Row) -> Self {
        let key = Key::new(&row.key);
        match row.partition_hash {
            Some(hash) => key.partition_hash(hash),
            None => key,
        }
    }
}

impl From<&Key> for Key {
    fn from(key: &Key) -> Self {
        key.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_is_the_key_itself_is_left_out() {
        assert_eq!(Key::new("a").partition("a").to_wire().partition_hash, None);
        assert_eq!(Key::new("a").to_wire().partition_hash, None);
        let other = Key::new("a").partition("p");
        assert_eq!(other.to_wire().partition_hash, Some(partition_hash(b"p")));
        assert_eq!(other.hash(), Key::new("p").hash());
        let by_hash = Key::new("a").partition_hash(partition_hash(b"p"));
        assert_eq!((by_hash.to_wire(), by_hash.hash()), (other.to_wire(), other.hash()));
        assert_eq!(
            Key::new("a").partition_hash(partition_hash(b"a")).to_wire().partition_hash,
            None
        );
    }

    #[test]
    fn a_row_is_the_key_of_its_own_record() {
        let row =
            |partition_hash| Row { key: Bytes::from_static(b"a"), partition_hash, value: None };
        assert_eq!(Key::from(&row(None)), Key::new("a"));
        assert_eq!(Key::from(&row(Some(7))).to_wire().partition_hash, Some(7));
    }

    #[test]
    fn empty_and_oversized_keys_and_partitions_are_refused() {
        assert!(Key::new("").check().is_err());
        assert!(Key::new("a").partition("").check().is_err());
        assert!(Key::new("a").partition(vec![0; 65_537]).check().is_err());
        assert!(Key::new(vec![0; 65_536]).check().is_ok());
    }
}
