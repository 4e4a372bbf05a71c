//! A resize from its tail on, in the orders that chance finds: two masters that may stand still
//! between decision and write and never learn what they wrote, nodes that are told late or never,
//! look for themselves and undo the seal. The rules are the real ones; the bucket creates each
//! version once.
//!
//! **Invariant:** no write is accepted by a source once the commit is written, the target opens with
//! everything that the sources have accepted, and without any master no key waits for ever.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use vasto_core::catalog::{Catalog, KeyspaceSpec};
use vasto_core::ids::{CatalogVersion, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::plan::Step;
use vasto_core::reconcile::{
    Advance, Look, Undecided, advance, is_decided, look, start_resize, undo_undecided,
};
use vasto_core::report::{
    ReplicaPhase, ReplicaReport, Reports, Sealed, SourceProgress, TargetProgress, TargetStage,
};

/// Different runs.
const RUNS: u64 = 5_000;
/// Things that happen in a run before all masters are gone for good.
const MOMENTS: u64 = 200;
const PLAN: PlanId = PlanId(1);
/// The target among the nodes; the sources come before it.
const TARGET: usize = 2;

/// What happened over all runs.
#[derive(Debug, Default)]
struct Seen {
    commits: u64,
    undone_by_masters: u64,
    undone_by_nodes: u64,
    masters_lost: u64,
    nodes_lost: u64,
    found: u64,
}

struct Draw(u64);

impl Draw {
    /// Returns a number below `bound` (xorshift).
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

struct Master {
    view: Catalog,
    reports: Reports,
    /// Decided, and not in the bucket yet.
    next: Option<Catalog>,
}

struct Node {
    known: Catalog,
    since_ms: u64,
    /// Decided, and not in the bucket yet.
    undo: Option<Catalog>,
}

struct World {
    bucket: Vec<Catalog>,
    masters: [Master; 2],
    nodes: [Node; 3],
    /// Writes to the moving keys that each source has accepted.
    accepted: [u64; 2],
    sealed: [Option<Sealed>; 2],
    /// Of these, those that the target holds.
    followed: [u64; 2],
    is_open: bool,
    now_ms: u64,
}

fn step(catalog: &Catalog) -> Option<Step> {
    catalog.plan.as_ref().map(|plan| plan.step)
}

impl World {
    fn new() -> Self {
        let spec = KeyspaceSpec { shards: 2, ..KeyspaceSpec::default() };
        let nodes = [vec![NodeId(1)], vec![NodeId(2)]];
        let first = Catalog::first(KeyspaceId(7), "ks1", spec, &nodes, 1_000, 1);
        let mut tail = start_resize(&first, 3, &[vec![NodeId(3)]], 2_000, 2).unwrap();
        tail.plan.as_mut().unwrap().step = Step::Tail;
        let master = || Master { view: tail.clone(), reports: Reports::new(), next: None };
        let node = || Node { known: tail.clone(), since_ms: 0, undo: None };
        Self {
            bucket: vec![tail.clone()],
            masters: [master(), master()],
            nodes: [node(), node(), node()],
            accepted: [0; 2],
            sealed: [None; 2],
            followed: [0; 2],
            is_open: false,
            now_ms: 10,
        }
    }

    fn tip(&self) -> &Catalog {
        self.bucket.last().unwrap()
    }

    fn is_committed(&self) -> bool {
        step(self.tip()) == Some(Step::Committed)
    }

    /// Creates a version; false when there is one of its number.
    fn create(&mut self, next: &Catalog) -> bool {
        let free = self.tip().version.0 + 1;
        assert!(next.version.0 <= free, "a number was left out");
        let created = next.version.0 == free;
        if created {
            self.bucket.push(next.clone());
        }
        created
    }

    fn reports(&self) -> Reports {
        let of = |node: usize| {
            let shard = ShardId(node as u32);
            let id = ReplicaId(node as u64 + 1);
            let mut report = ReplicaReport::new(KeyspaceId(7), shard, id, ReplicaPhase::Serving);
            report.version = self.nodes[node].known.version;
            if node == TARGET {
                let cursors = (0..TARGET).map(|n| (ReplicaId(n as u64 + 1), Lsn(self.followed[n])));
                report.target = Some(TargetProgress {
                    stage: TargetStage::Tailing,
                    cursors: cursors.collect(),
                    manifest_shipped: true,
                    ..TargetProgress::new(PLAN)
                });
            } else {
                report.source =
                    Some(SourceProgress { sealed: self.sealed[node], ..SourceProgress::new(PLAN) });
            }
            (id, report)
        };
        (0..=TARGET).map(of).collect()
    }

    fn apply(&mut self, node: usize, catalog: &Catalog) {
        if catalog.version <= self.nodes[node].known.version {
            return;
        }
        self.nodes[node].known = catalog.clone();
        self.nodes[node].since_ms = self.now_ms;
        if node == TARGET {
            if step(catalog) == Some(Step::Committed) {
                assert_eq!(self.followed, self.accepted, "it opens without a write");
                self.is_open = true;
            }
            return;
        }
        let seals = step(catalog) == Some(Step::Sealing);
        let seal = Sealed { version: catalog.version, lsn: Lsn(self.accepted[node]) };
        self.sealed[node] = seals.then_some(seal);
    }

    /// A client writes a moving key at a source.
    fn write(&mut self, source: usize) {
        let owns = step(&self.nodes[source].known) != Some(Step::Committed);
        if owns && self.sealed[source].is_none() {
            assert!(!self.is_committed(), "accepted where nobody looks for it any more");
            self.accepted[source] += 1;
        }
    }

    fn decide(&mut self, master: usize, nonce: u64) {
        let Master { view, reports, next } = &mut self.masters[master];
        let now_us = (self.now_ms * 1_000).max(view.written_at_us);
        if let Advance::Write(version) = advance(view, reports, |_| 0, |_| 0, now_us, nonce) {
            *next = Some(*version);
        }
    }

    /// What a master has decided arrives; perhaps it never learns that.
    fn send(&mut self, master: usize, is_told: bool, seen: &mut Seen) {
        let Some(next) = self.masters[master].next.take() else { return };
        let created = self.create(&next);
        seen.masters_lost += u64::from(!created);
        seen.commits += u64::from(created && step(&next) == Some(Step::Committed));
        seen.undone_by_masters += u64::from(created && step(&next) == Some(Step::Tail));
        if is_told {
            self.masters[master].view = self.tip().clone();
        }
    }

    fn look(&mut self, node: usize, nonce: u64, seen: &mut Seen) {
        let Node { known, since_ms, .. } = &self.nodes[node];
        let sealed = node < TARGET
            && self.sealed[node].is_some_and(|sealed| sealed.version == known.version);
        let waited = Duration::from_millis(self.now_ms - since_ms);
        let state = Undecided { known: waited, alone: Some(waited), sealed };
        let undoes = match look(known, NodeId(node as u64 + 1), state) {
            None | Some(Look::After(_)) => return,
            Some(Look::Read) => false,
            Some(Look::Undo) => true,
        };
        let (known, tip) = (known.clone(), self.tip().clone());
        if tip.version > known.version {
            if is_decided(&known, &tip) {
                seen.found += 1;
                self.apply(node, &tip);
            }
        } else if undoes {
            self.nodes[node].undo = undo_undecided(&tip, (PLAN, known.version), waited, nonce);
        }
    }

    fn send_undo(&mut self, node: usize, seen: &mut Seen) {
        let Some(undo) = self.nodes[node].undo.take() else { return };
        let created = self.create(&undo);
        *(if created { &mut seen.undone_by_nodes } else { &mut seen.nodes_lost }) += 1;
        let tip = self.tip().clone();
        self.apply(node, &tip);
    }

    fn happens(&mut self, draw: &mut Draw, seen: &mut Seen) {
        self.now_ms += draw.below(200);
        let (master, node, source) =
            (draw.below(2) as usize, draw.below(3) as usize, draw.below(2) as usize);
        match draw.below(10) {
            0 => self.write(source),
            1 if !self.is_open => self.followed[source] = self.accepted[source],
            2 => self.masters[master].reports = self.reports(),
            3 => self.decide(master, draw.0),
            4 => self.send(master, draw.below(4) > 0, seen),
            5 => self.masters[master].view = self.tip().clone(),
            6 | 7 => {
                let view = self.masters[master].view.clone();
                self.apply(node, &view);
            }
            8 => self.look(node, draw.0, seen),
            _ => self.send_undo(node, seen),
        }
    }

    /// No master is there any more; what masters and nodes had under way arrives late or not at all.
    fn without_masters(&mut self, draw: &mut Draw, seen: &mut Seen) {
        for round in 0..4 {
            self.now_ms += 10_000;
            for node in 0..=TARGET {
                self.look(node, draw.0, seen);
                if round > 0 || draw.below(2) == 0 {
                    self.send_undo(node, seen);
                }
            }
            if round == 1 && draw.below(2) == 0 {
                self.send(0, false, seen);
                self.send(1, false, seen);
            }
        }
        assert_eq!(self.sealed, [None; 2], "keys wait for a master: {:?}", step(self.tip()));
        for source in 0..TARGET {
            self.write(source);
        }
        if self.is_committed() {
            let knows = |node: &Node| step(&node.known) == Some(Step::Committed);
            assert!(self.nodes.iter().all(knows) && self.is_open, "nobody serves the keys");
        }
    }

    /// Checks the bucket itself: each version follows the one before.
    fn check(&self) {
        for pair in self.bucket.windows(2) {
            let [before, after] = pair else { unreachable!() };
            assert_eq!(after.version, CatalogVersion(before.version.0 + 1));
            assert!(after.written_at_us >= before.written_at_us, "time goes back");
            let commits = step(after) == Some(Step::Committed);
            assert_eq!(after.epoch.0, before.epoch.0 + u64::from(commits));
            assert!(!commits || step(before) == Some(Step::Sealing));
            assert!(step(before) != Some(Step::Committed), "a commit is undone");
        }
    }
}

#[test]
fn in_whatever_order_masters_and_nodes_decide_a_seal_nothing_is_lost_and_nobody_waits() {
    let mut seen = Seen::default();
    for run in 1..=RUNS {
        let mut draw = Draw(run.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut world = World::new();
        for _ in 0..MOMENTS {
            world.happens(&mut draw, &mut seen);
        }
        world.without_masters(&mut draw, &mut seen);
        world.check();
    }
    println!("{RUNS} runs: {seen:?}");
    let Seen { commits, undone_by_masters, undone_by_nodes, masters_lost, nodes_lost, found } =
        seen;
    for count in [commits, undone_by_masters, undone_by_nodes, masters_lost, nodes_lost, found] {
        assert!(count > 0, "something never happened: {seen:?}");
    }
}
