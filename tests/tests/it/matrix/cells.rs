//! The cells of the matrix as data: every change, step, victim and fault, and the rule that says
//! which of them cannot be.
//!
//! **Invariant:** a combination is a cell, or [`Cell::impossible`] says why it is none.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use vasto_failpoint::{Point, points};

/// A structural change. A new one gets a variant here, its points in [`Change::point`], and its start
/// in `change.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Change {
    /// One more shard: the targets take files of checkpoints.
    GrowOne,
    /// Several more shards: the sources export.
    GrowMany,
    /// Half of the shards retire.
    Shrink,
    /// A replica is evicted, and another node gets a copy.
    Replace,
    /// All replicas leave a node that lives.
    Drain,
    /// Another keyspace is made of what the bucket holds.
    Restore,
    /// Several replicas move to a node that is empty, side by side.
    Rebalance,
}

/// What a change is doing when the fault begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Prepare,
    Export,
    Load,
    Tail,
    Seal,
    Commit,
    CleanUp,
}

/// Who has the fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Victim {
    Master,
    /// The node of a source.
    Source,
    /// The node of a target.
    Target,
    /// The node of another replica of a source's shard; in a copy and a move, of the replica that
    /// leaves.
    Follower,
    /// A process that writes.
    Client,
    Bucket,
}

/// What happens to the victim for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Fault {
    /// `kill -9`, and a new start.
    Kill,
    /// SIGSTOP, and SIGCONT.
    Stop,
    /// Its host reaches nobody, until the cut heals.
    Cut,
    /// Every answer comes late.
    Slow,
    /// Every answer is 503.
    Throttled,
    /// Every connection is reset.
    Gone,
}

pub(super) const CHANGES: [Change; 7] = [
    Change::GrowOne,
    Change::GrowMany,
    Change::Shrink,
    Change::Replace,
    Change::Drain,
    Change::Restore,
    Change::Rebalance,
];
const STEPS: [Step; 7] =
    [Step::Prepare, Step::Export, Step::Load, Step::Tail, Step::Seal, Step::Commit, Step::CleanUp];
const VICTIMS: [Victim; 6] = [
    Victim::Master,
    Victim::Source,
    Victim::Target,
    Victim::Follower,
    Victim::Client,
    Victim::Bucket,
];
const FAULTS: [Fault; 6] =
    [Fault::Kill, Fault::Stop, Fault::Cut, Fault::Slow, Fault::Throttled, Fault::Gone];

impl Change {
    pub(super) fn is_resize(self) -> bool {
        matches!(self, Self::GrowOne | Self::GrowMany | Self::Shrink)
    }

    /// Returns the failpoint at which the change is held while the fault begins; `None` when it
    /// has no such step.
    pub(super) fn point(self, step: Step) -> Option<Point> {
        use Change::{Drain, GrowMany, GrowOne, Rebalance, Replace, Restore, Shrink};
        let point = match (self, step) {
            (Restore, Step::Load) => points::COPY_ADOPTED,
            (Restore, Step::Tail) => points::COPY_JOINED,
            (Restore, _) => return None,
            (_, Step::Prepare) => points::SOURCE_CHECKPOINT_MADE,
            (GrowMany | Shrink, Step::Export) => points::SOURCE_EXPORT_HALF,
            (GrowOne | Replace | Drain | Rebalance, Step::Export) => return None,
            (Replace | Drain | Rebalance, Step::Load) => points::COPY_ADOPTED,
            (Replace | Drain | Rebalance, Step::Tail) => points::COPY_JOINED,
            (Replace | Drain | Rebalance, Step::Seal) => return None,
            (Replace | Drain | Rebalance, Step::Commit) => points::MASTER_COMMITTED_BEFORE,
            (GrowOne | GrowMany | Shrink, Step::Load) => points::TARGET_INGEST_BEFORE,
            (GrowOne | GrowMany | Shrink, Step::Tail) => points::TARGET_CAUGHT_UP,
            (GrowOne | GrowMany | Shrink, Step::Seal) => points::SOURCE_SEAL_RECORDED,
            (GrowOne | GrowMany | Shrink, Step::Commit) => points::TARGET_OPEN_BEFORE,
            (GrowOne | GrowMany, Step::CleanUp) => points::CLEANUP_CLEARING,
            (Shrink | Replace | Drain | Rebalance, Step::CleanUp) => points::REMOVAL_BEFORE,
        };
        Some(point)
    }
}

impl Fault {
    /// Returns true for what happens to a process and its host.
    pub(super) fn is_of_process(self) -> bool {
        matches!(self, Self::Kill | Self::Stop | Self::Cut)
    }
}

/// One fault for one victim at one step of one change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Cell {
    pub(super) change: Change,
    pub(super) step: Step,
    pub(super) victim: Victim,
    pub(super) fault: Fault,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { change, step, victim, fault } = self;
        write!(f, "{change:?}/{step:?}/{victim:?}/{fault:?}")
    }
}

impl Cell {
    /// Returns why the combination is no cell, if it is none.
    pub(super) fn impossible(&self) -> Option<&'static str> {
        if self.change.point(self.step).is_none() {
            return Some("the change has no such step");
        }
        match (self.victim, self.fault.is_of_process()) {
            (Victim::Bucket, true) => return Some("the bucket is no process of the cluster"),
            (Victim::Bucket, false) => {}
            (_, false) => return Some("only the bucket has the faults of a bucket"),
            (_, true) => {}
        }
        match (self.change, self.victim) {
            (Change::Restore, Victim::Source | Victim::Follower) => {
                Some("a restore has no source but the bucket")
            }
            _ => None,
        }
    }
}

/// Returns every combination, possible or not.
pub(super) fn combinations() -> impl Iterator<Item = Cell> {
    CHANGES.into_iter().flat_map(|change| {
        STEPS.into_iter().flat_map(move |step| {
            VICTIMS.into_iter().flat_map(move |victim| {
                FAULTS.into_iter().map(move |fault| Cell { change, step, victim, fault })
            })
        })
    })
}

/// Returns whether a cell has this name.
pub(super) fn is_name_of_a_cell(name: &str) -> bool {
    combinations().any(|cell| cell.impossible().is_none() && cell.to_string() == name)
}

/// Which cells a run takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Choice {
    All,
    /// About as many, of all changes together.
    Count(usize),
    /// The one of this name.
    One(String),
}

/// Returns the chosen cells of a change. Runs whose seeds follow each other take cells that follow
/// each other, so that all have their turn; the order is shuffled once and for all.
pub(super) fn chosen(change: Change, choice: &Choice, seed: u64) -> Vec<Cell> {
    let is_cell = |cell: &Cell| cell.change == change && cell.impossible().is_none();
    let mut cells: Vec<Cell> = combinations().filter(is_cell).collect();
    cells.sort_by_key(|cell| {
        let mut hasher = DefaultHasher::new();
        cell.hash(&mut hasher);
        hasher.finish()
    });
    match choice {
        Choice::All => {}
        Choice::One(name) => cells.retain(|cell| cell.to_string() == *name),
        Choice::Count(count) => {
            let share = count.div_ceil(CHANGES.len()).min(cells.len());
            let first = (seed % cells.len() as u64) as usize * share % cells.len();
            cells.rotate_left(first);
            cells.truncate(share);
        }
    }
    cells
}

#[test]
fn each_combination_is_a_cell_or_has_a_reason_and_all_have_their_turn() {
    use std::collections::{BTreeMap, BTreeSet};
    let mut left_out: BTreeMap<&str, usize> = BTreeMap::new();
    let mut names = BTreeSet::new();
    for cell in combinations() {
        match cell.impossible() {
            Some(reason) => *left_out.entry(reason).or_default() += 1,
            None => assert!(names.insert(cell.to_string()), "{cell}"),
        }
    }
    println!("{} cells; left out: {left_out:?}", names.len());
    assert_eq!(names.len(), 654);
    let mut taken = BTreeSet::new();
    for change in CHANGES {
        let all = chosen(change, &Choice::All, 0);
        assert!(all.iter().all(|cell| names.contains(&cell.to_string())));
        let first = chosen(change, &Choice::Count(12), 7);
        assert_eq!(first.len(), 2);
        assert_ne!(first, chosen(change, &Choice::Count(12), 8));
        for seed in 0..all.len() as u64 {
            taken.extend(chosen(change, &Choice::Count(12), seed).iter().map(Cell::to_string));
        }
        let name = all[0].to_string();
        assert!(is_name_of_a_cell(&name));
        assert_eq!(chosen(change, &Choice::One(name), 0), all[..1]);
    }
    assert_eq!(taken, names);
    for name in ["Restore/Seal/Master/Kill", "GrowOne/Seal/Bucket/Kill", "grow"] {
        assert!(!is_name_of_a_cell(name), "{name}");
    }
}
