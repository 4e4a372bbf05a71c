//! The two values that a shipper shares with the rest of the node: the [`Duty`] that the host of
//! the replica sets, and the [`ShipStatus`] that the shipper and the truncation of the log publish.
//!
//! **Invariants**
//! - A published status never claims more than is durable in the bucket and recorded in
//!   `ship.json`.
//! - Each value is replaced as a whole: a reader never sees the LSNs of two different moments.

use vasto_core::ids::Lsn;
use vasto_core::report::ShipsBehind;

/// Whether a replica ships for its shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Assignment {
    /// Does not ship: another replica does, or no catalog version has been applied yet.
    #[default]
    Idle,
    /// Ships as the preferred primary.
    Preferred,
    /// Ships in place of the preferred primary, which is away.
    StandIn,
}

/// The part of the log that a running plan needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LogNeed {
    /// LSN after which the log is needed; `u64::MAX` when no plan needs it, 0 until that is known.
    pub(crate) after: Lsn,
    /// The plan can read log that is not here any more from the bucket.
    pub(crate) from_bucket: bool,
}

impl LogNeed {
    /// No plan needs the log.
    pub(crate) const NONE: Self = Self { after: Lsn(u64::MAX), from_bucket: false };

    /// Returns the LSN after which the plan needs the log and cannot get it elsewhere. At the cap
    /// (`full`), a plan that reads missing log from the bucket needs nothing that chunks without a
    /// gap cover. 0 is a plan whose checkpoint is still being made: it will hold everything that is
    /// shipped by now.
    pub(super) fn here(self, full: bool, chained_from: Lsn, shipped: Lsn) -> Lsn {
        let is_chained = self.after == Lsn(0) || chained_from <= self.after;
        if full && self.from_bucket && is_chained { self.after.max(shipped) } else { self.after }
    }
}

/// Duty that the host of a replica sets for its shipper.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Duty {
    pub(super) assignment: Assignment,
    pub(super) need: LogNeed,
}

impl Duty {
    pub(super) fn ships(&self) -> bool {
        self.assignment != Assignment::Idle
    }

    /// Returns true when this replica is not the one that ships while all are well.
    pub(super) fn stands_in(&self) -> bool {
        self.assignment != Assignment::Preferred
    }
}

/// Coverage of the log by the bucket, and what holds the log back, for reports and truncation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ShipStatus {
    /// LSN up to which chunks and manifests cover the log.
    pub(crate) shipped: Lsn,
    /// LSN up to which the last manifest covers the log.
    pub(crate) manifest: Lsn,
    /// What the bucket holds before this replica's own objects; `None` when that is not known.
    pub(crate) behind: Option<ShipsBehind>,
    /// LSN from which chunks cover the log without a gap, up to `shipped`.
    pub(super) chained_from: Lsn,
    /// A client has requested a bucket acknowledgement here: from then on this replica ships too.
    pub(super) for_acks: bool,
    /// The log is at its cap and only a running plan keeps it: the plan has to end.
    pub(crate) over_cap: bool,
    /// The log is at its cap and only a follower keeps it: the follower has to be evicted.
    pub(crate) held_back: bool,
}

impl ShipStatus {
    /// Returns true when the bucket has, or had, objects of this replica itself.
    pub(super) fn has_own_objects(&self) -> bool {
        let covered_by_others = match self.behind {
            Some(ShipsBehind::Others(continues)) => continues.lsn,
            Some(ShipsBehind::Nobody) | None => Lsn(0),
        };
        self.manifest > Lsn(0) || self.shipped > covered_by_others
    }
}
