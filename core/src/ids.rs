//! Newtypes for everything that could be confused with another number.
//!
//! **Invariant:** ids are never reused. Keyspace ids are claimed by a create-only catalog object,
//! replica ids and plan ids are counted by the catalog of their keyspace, node ids are drawn once
//! per data directory.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

number! {
    /// A keyspace; never reused, also not after a delete.
    KeyspaceId(u64)
}
number! {
    /// One of the `n` jump-hash buckets of a keyspace, numbered `0..n`.
    ShardId(u32)
}
number! {
    /// One copy of a shard on one node; unique within its keyspace, never reused.
    ReplicaId(u64)
}
number! {
    /// Raised by one by each catalog version that changes ownership or placement.
    Epoch(u64)
}
number! {
    /// Number of a create-only catalog object of a keyspace, from 1; the greatest is in force.
    CatalogVersion(u64)
}
number! {
    /// Position in one replica's binlog, contiguous from 1; 0 is the position before the first
    /// record.
    Lsn(u64)
}
number! {
    /// One opening of a replica; every open is a new incarnation, from 1.
    Incarnation(u64)
}
number! {
    /// Contiguous count of the streamed records of an [`Origin`], from 1.
    OwnSeq(u64)
}
number! {
    /// A structural change; unique within its keyspace, never reused.
    PlanId(u64)
}

impl Lsn {
    /// Returns the position after this one.
    pub fn next(self) -> Lsn {
        Lsn(self.0 + 1)
    }
}

/// Id of a node: a serving process, identified by its data directory (never by its address).
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n-{:016x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Error for text that is not a node id of the form `n-0123456789abcdef`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a node id; node ids look like n-0123456789abcdef (see `vasto node list`)")]
pub struct NotANodeId(pub String);

impl std::str::FromStr for NodeId {
    type Err = NotANodeId;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix("n-")
            .filter(|hex| hex.len() == 16)
            .and_then(|hex| u64::from_str_radix(hex, 16).ok())
            .map(NodeId)
            .ok_or_else(|| NotANodeId(text.to_owned()))
    }
}

impl Serialize for NodeId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NodeId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Origin of a record: the incarnation of the replica that first wrote it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Origin {
    /// The accepting replica.
    pub replica: ReplicaId,
    /// Incarnation of that replica.
    pub incarnation: Incarnation,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.replica, self.incarnation)
    }
}

/// Per origin, the highest own sequence that a replica has applied.
pub type Vector = std::collections::BTreeMap<Origin, OwnSeq>;

/// Returns true when `a` holds at least everything that `b` names.
pub fn covers(a: &Vector, b: &Vector) -> bool {
    b.iter().all(|(origin, seq)| seq.0 == 0 || a.get(origin).is_some_and(|have| have >= seq))
}

/// Returns the least vector that covers both.
pub fn join(a: &Vector, b: &Vector) -> Vector {
    let mut out = a.clone();
    for (origin, seq) in b {
        let have = out.entry(*origin).or_default();
        *have = (*have).max(*seq);
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn node_ids_round_trip_and_reject_everything_else() {
        let id = NodeId(0xdead_beef);
        assert_eq!(id.to_string().parse::<NodeId>().unwrap(), id);
        for bad in ["", "n-", "n-1", "x-0000000000000001", "n-00000000000000zz"] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn vectors_join_and_cover() {
        let o = |r, i| Origin { replica: ReplicaId(r), incarnation: Incarnation(i) };
        let a = Vector::from([(o(1, 1), OwnSeq(5)), (o(2, 1), OwnSeq(3))]);
        let b = Vector::from([(o(1, 1), OwnSeq(4)), (o(3, 1), OwnSeq(1))]);
        let both = join(&a, &b);
        assert!(covers(&both, &a) && covers(&both, &b));
        assert!(!covers(&a, &b) && !covers(&b, &a));
    }
}
