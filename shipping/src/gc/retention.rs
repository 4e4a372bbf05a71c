//! Retention: which objects of the bucket are needed.
//!
//! **Invariant:** pure. In doubt an object is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{KeyspaceId, Lsn};
use vasto_core::limits::{UNNAMED_AGE_MIN, UPLOAD_STALL_MAX};
use vasto_core::plan::PlanKind;

use super::exports;
use super::survey::{Shipments, Survey};
use crate::layout::{self, Owner, Shipped};
use crate::manifest::Manifest;

/// Which objects stay although no replica serves from them any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Number of checkpoints of each replica that always stay.
    pub keep_checkpoints: usize,
    /// Period in which every point in time can be restored.
    pub keep_for: Duration,
    /// No younger object is deleted.
    pub min_age: Duration,
}

impl Retention {
    /// Returns the minimum age of an SST that no manifest names yet: the upload of its checkpoint
    /// may still run, which takes up to [`UPLOAD_STALL_MAX`]. A minimum age of zero protects
    /// nothing.
    pub(super) fn unnamed_age(&self) -> Duration {
        const { assert!(UNNAMED_AGE_MIN.as_secs() > UPLOAD_STALL_MAX.as_secs()) };
        if self.min_age.is_zero() { Duration::ZERO } else { self.min_age.max(UNNAMED_AGE_MIN) }
    }

    /// Returns the begin of the retained archive, microseconds since 1970.
    pub(super) fn keep_from(&self, now_us: u64) -> u64 {
        now_us.saturating_sub(self.keep_for.as_micros() as u64)
    }
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            keep_checkpoints: 2,
            keep_for: Duration::from_secs(7 * 24 * 3600),
            min_age: Duration::from_secs(24 * 3600),
        }
    }
}

/// Returns true when the replica is placed, draining, or kept after the retirement of its shard.
pub(super) fn is_member(catalog: &Catalog, owner: &Owner) -> bool {
    catalog.is_placed(owner.replica)
        || catalog.is_retired(owner.replica)
        || catalog.draining.iter().any(|lost| lost.replica == owner.replica)
}

/// Returns true while rows that the replica gave to another shard are in quarantine: should that
/// shard be lost before it has shipped them, it is made again with this replica's log.
fn gave(catalog: &Catalog, owner: &Owner) -> bool {
    catalog.quarantines.iter().any(|kept| kept.took_from(owner.replica))
}

/// Returns the keys that are not needed, whatever their age. `covered`: see
/// [`super::coverage::covered`].
pub(super) fn garbage<'a>(
    survey: &'a Survey,
    shipments: &'a Shipments<'a>,
    covered: &BTreeSet<Owner>,
    retention: Retention,
) -> BTreeSet<&'a str> {
    let needed = Needed::of(survey, shipments, covered, retention);
    let keys = survey.objects.iter().map(|object| object.key.as_str());
    keys.filter(|key| needed.is_garbage(key)).collect()
}

/// Grounds on which an object is needed.
struct Needed<'a> {
    survey: &'a Survey,
    shipments: &'a Shipments<'a>,
    keep_from: u64,
    /// Keyspaces with a plan that may need any of their objects.
    busy: BTreeSet<KeyspaceId>,
    /// Replicas whose whole archive goes.
    over: BTreeSet<Owner>,
    /// Checkpoints that stay.
    retained: BTreeMap<Owner, BTreeSet<Lsn>>,
    /// Keys that the retained manifests name.
    named: BTreeSet<&'a str>,
}

impl<'a> Needed<'a> {
    fn of(
        survey: &'a Survey,
        shipments: &'a Shipments<'a>,
        covered: &BTreeSet<Owner>,
        retention: Retention,
    ) -> Self {
        let mut needed = Self {
            survey,
            shipments,
            keep_from: retention.keep_from(survey.now_us),
            busy: busy(survey, shipments, retention),
            over: BTreeSet::new(),
            retained: BTreeMap::new(),
            named: BTreeSet::new(),
        };
        for owner in shipments.newest.keys() {
            let Some(catalog) = survey.catalogs.get(&owner.keyspace) else { continue };
            if needed.is_over(catalog, owner, covered) {
                needed.over.insert(*owner);
                continue;
            }
            let lsns = needed.retained_of(catalog, owner, retention);
            let manifests = survey.manifests.get(owner).into_iter().flatten();
            let manifests =
                manifests.filter(|(lsn, _)| lsns.contains(lsn)).map(|(_, manifest)| manifest);
            needed.named.extend(manifests.flat_map(Manifest::keys));
            needed.retained.insert(*owner, lsns);
        }
        needed
    }

    /// Returns true when the whole archive of a replica goes: its keyspace was deleted before the
    /// retained archive began, or the replica ships no more, and its successor can restore the
    /// whole retained archive and all that the replica has shipped. Of a shard that retired before
    /// the retained archive began, the surviving shards are the successors. What the replica gave to
    /// another shard has no successor while it is in quarantine.
    fn is_over(&self, catalog: &Catalog, owner: &Owner, covered: &BTreeSet<Owner>) -> bool {
        let tip = layout::catalog_version(catalog.keyspace, catalog.version);
        let written = self.shipments.written_us(&tip);
        if catalog.state == KeyspaceState::Deleted
            && written.is_some_and(|written| written <= self.keep_from)
        {
            return true;
        }
        !is_member(catalog, owner)
            && !gave(catalog, owner)
            && (covered.contains(owner)
                || catalog.discarded.contains(&owner.replica)
                || self.retired_before(catalog, owner))
            && self.shipments.newest.get(owner).is_none_or(|newest| *newest <= self.keep_from)
    }

    /// Returns true when the replica's shard retired before the retained archive began: no point in
    /// time that can be restored needs what it shipped. The last replicas of the shard are kept as
    /// retired until checkpoints of the survivors cover its rows, and with them what their logs
    /// continue.
    fn retired_before(&self, catalog: &Catalog, owner: &Owner) -> bool {
        let Some(retirement) = catalog.retirement_of(owner.shard, owner.replica) else {
            return false;
        };
        // A restore picks the version by the time in it. Of that time and the store's the later
        // counts, so that a clock that is behind makes the retirement no older.
        let key = layout::catalog_version(catalog.keyspace, retirement.version);
        let stored = self.shipments.written_us(&key);
        // A survivor whose checkpoints cannot all be read may not have one that covers the rows.
        let keyspace = layout::keyspace_prefix(catalog.keyspace);
        stored.is_some_and(|stored| stored.max(retirement.at_us) <= self.keep_from)
            && catalog.retired.iter().all(|kept| kept.shard != owner.shard)
            && !self.survey.corrupt.iter().any(|corrupt| corrupt.starts_with(&keyspace))
    }

    /// Returns the checkpoints of a replica that stay.
    fn retained_of(&self, catalog: &Catalog, owner: &Owner, retention: Retention) -> BTreeSet<Lsn> {
        let none = BTreeMap::new();
        let all = self.survey.manifests.get(owner).unwrap_or(&none);
        let last = all.keys().rev().take(retention.keep_checkpoints.max(1)).copied();
        let recent = all.keys().filter(|lsn| self.made_us(owner, **lsn) > self.keep_from).copied();
        // The checkpoint from which the oldest point in time is restored.
        let first =
            all.keys().rev().find(|lsn| self.made_us(owner, **lsn) <= self.keep_from).copied();
        let pinned =
            all.keys().filter(|lsn| catalog.pins.contains(&owner.manifest(**lsn))).copied();
        last.chain(recent).chain(first).chain(pinned).collect()
    }

    fn made_us(&self, owner: &Owner, lsn: Lsn) -> u64 {
        self.shipments.written_us(&owner.manifest(lsn)).unwrap_or(self.survey.now_us)
    }

    fn is_garbage(&self, key: &str) -> bool {
        if let Some((keyspace, plan)) = layout::parse_export(key) {
            return !exports::is_needed(self.survey, keyspace, plan);
        }
        let Some((owner, shipped)) = layout::parse_shipped(key) else {
            return key.starts_with("probe/");
        };
        // Objects of an unknown keyspace may belong to one that is being created.
        if !self.survey.catalogs.contains_key(&owner.keyspace)
            || self.busy.contains(&owner.keyspace)
        {
            return false;
        }
        // A manifest of this shard is unreadable: the objects that it names are unknown.
        let shard = layout::shard_prefix(owner.keyspace, owner.shard);
        if self.survey.corrupt.iter().any(|corrupt| corrupt.starts_with(&shard)) {
            return false;
        }
        match shipped {
            // Named also by manifests of other keyspaces, which were restored from this one.
            Shipped::Sst | Shipped::Database => {
                !self.named.contains(key) && self.survey.corrupt.is_empty()
            }
            _ if self.over.contains(&owner) => true,
            Shipped::Manifest(lsn) => {
                !self.retained.get(&owner).is_some_and(|lsns| lsns.contains(&lsn))
            }
            Shipped::Chunk(first) => {
                let gave = |catalog: &Catalog| gave(catalog, &owner);
                self.is_covered(&owner, first)
                    && !self.survey.catalogs.get(&owner.keyspace).is_some_and(gave)
            }
        }
    }

    /// Returns true when a whole chunk lies before the oldest retained checkpoint.
    fn is_covered(&self, owner: &Owner, first: Lsn) -> bool {
        // Without a checkpoint older than the retained archive, that archive begins with the log.
        let reaches_back = |lsns: &&BTreeSet<Lsn>| {
            lsns.iter().any(|lsn| self.made_us(owner, *lsn) <= self.keep_from)
        };
        let oldest = self.retained.get(owner).filter(reaches_back).and_then(|lsns| lsns.first());
        let next = self
            .shipments
            .chunks
            .get(owner)
            .and_then(|firsts| firsts.iter().find(|next| **next > first));
        oldest.zip(next).is_some_and(|(oldest, next)| next.0 <= oldest.0 + 1)
    }
}

/// Returns the keyspaces with a plan, and those that a plan restores from.
fn busy(survey: &Survey, shipments: &Shipments<'_>, retention: Retention) -> BTreeSet<KeyspaceId> {
    // No master continues a creation that was cut off: its plan, a restore, would keep the objects
    // of its source for ever.
    let old = survey.now_us.saturating_sub(retention.min_age.as_micros() as u64);
    let is_cut_off = |catalog: &Catalog| {
        let tip = layout::catalog_version(catalog.keyspace, catalog.version);
        survey.unbound.contains(&catalog.keyspace)
            && shipments.written_us(&tip).is_some_and(|written| written <= old)
    };
    let active = survey.catalogs.values().filter(|catalog| catalog.state == KeyspaceState::Active);
    let plans = active.filter(|catalog| !is_cut_off(catalog)).filter_map(|catalog| {
        let source = match catalog.plan.as_ref()?.kind {
            PlanKind::Restore { keyspace, .. } => Some(keyspace),
            _ => None,
        };
        Some(std::iter::once(catalog.keyspace).chain(source))
    });
    plans.flatten().collect()
}
