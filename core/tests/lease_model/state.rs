//! A state of the model: what each replica is, holds and knows, the requests of clients, and the
//! remaining faults.
//!
//! **Invariant:** two states have the same hash only when one becomes the other by renaming the
//! replicas (with collisions as unlikely as those of any 64 bits).

use std::fmt::{self, Debug};
use std::hash::{Hash, Hasher};

pub(crate) const NODES: usize = 3;
pub(crate) const OPS: usize = 3;
pub(crate) const NOBODY: u8 = 3;
/// Silence that excuses a peer: shorter than a promise, as in the real limits.
pub(crate) const SILENCE: u8 = 1;

pub(crate) type Node = usize;
/// A set of records or of nodes, one bit each.
pub(crate) type Set = u8;

/// Faults that may still happen, and how often in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Faults {
    pub pause: u8,
    pub isolate: u8,
    pub kill: u8,
    pub restart: u8,
    pub stop: u8,
    pub break_link: u8,
    /// A cut between the first two replicas, which clients and the master do not notice.
    pub cut_pair: u8,
    pub master_restart: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    Up,
    Paused,
    Dead,
    /// No such replica exists.
    Unused,
}

/// Authority, as the last decision left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Term {
    None,
    /// The authority rests on silence alone.
    Probing,
    Firm,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeState {
    pub run: Run,
    pub cut: bool,
    pub have: Set,
    pub promise: u8,
    pub left: u8,
    /// Records that the replica named with its promise.
    pub named: Set,
    /// Reported with the promise: the replica had authority since the one before.
    pub said_served: bool,
    /// The replica has asked the holder of its promise to release it.
    pub denying: bool,
    /// The holder of the promise has reported that it serves and covers what was named.
    pub taken: bool,
    pub young: u8,
    pub term: Term,
    /// The promises on which the last term rested are still valid.
    pub intact: bool,
    /// The replica had authority since its last promise, and the holder has not reported that it
    /// covers it.
    pub served: bool,
    /// Records that were acknowledged at the isolation: a request that came just before must see
    /// them.
    pub must: Set,
    /// Time for which the master has received nothing from the replica; NEVER after a restart of
    /// the master.
    pub missing: u8,
}

/// The master has no memory of a session.
pub(crate) const NEVER: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Back {
    Nothing,
    Grant { left: u8, named: Set, served: bool },
    Denied,
}

/// Result of the last attempt to connect, while nothing is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Something is received from the peer, or no attempt was made yet.
    Unknown,
    Refused,
    Reachable,
    Unreachable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Basis {
    Promise,
    Excuse,
    Silence,
}

/// State of a peer as one node knows it, and what is on the way from there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    pub belief: u8,
    pub named: Set,
    /// Reported by the peer with its promise.
    pub served: bool,
    /// The records that the peer named were here at a time when this node was promised to no other.
    pub covered: bool,
    pub back: Back,
    /// This node has stopped because it was denied, and reports so.
    pub released: bool,
    /// Time for which nothing was received.
    pub quiet: u8,
    pub reach: Reach,
    /// Remaining time for which attempts to connect that came through excuse the peer.
    pub found: u8,
    /// Remaining time for which the master's report is fresh that the peer has no session.
    pub word: u8,
    /// An attempt to connect has failed since that report.
    pub tried: bool,
    /// Basis of the last authority.
    pub basis: Basis,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Idle,
    /// The operation waits at a node for a probe of the silent peers.
    Waiting,
    /// Authority was checked.
    Checked,
    Written,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Op {
    pub phase: Phase,
    pub at: u8,
    /// Records that were acknowledged before the operation began.
    pub must: Set,
    /// Peers that were silent when the operation came.
    pub silent: Set,
    /// Peers to which a connect failed that began after the operation had come.
    pub probed: Set,
    /// The term in which the operation was checked is over.
    pub lapsed: bool,
    pub stamp: u8,
    /// Successor to which the term was transferred ...
    pub to: u8,
    /// ... and the successor has reported that it covers what was named.
    pub handed: bool,
}

/// Record of an append: its bit is that of the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub list: Set,
    pub stamp: u8,
    pub origin: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    StaleRead,
    LostWrite,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct State {
    pub nodes: [NodeState; NODES],
    pub peers: [[Peer; NODES]; NODES],
    pub ops: [Op; OPS],
    pub records: [Option<Record>; OPS],
    pub acked: Set,
    /// Records that are not promised: the only holder was away.
    pub forgiven: Set,
    pub clock: u8,
    pub faults: Faults,
    pub pair_cut: bool,
    /// A network has changed since the last tick.
    pub changed: bool,
    pub bad: Option<Bad>,
}

pub(crate) const IDLE: Op = Op {
    phase: Phase::Idle,
    at: NOBODY,
    must: 0,
    silent: 0,
    probed: 0,
    lapsed: false,
    stamp: 0,
    to: NOBODY,
    handed: false,
};

pub(crate) const FRESH: Peer = Peer {
    belief: 0,
    named: 0,
    served: false,
    covered: false,
    back: Back::Nothing,
    released: false,
    quiet: 0,
    reach: Reach::Unknown,
    found: 0,
    word: 0,
    tried: false,
    basis: Basis::Promise,
};

pub(crate) const NEW: NodeState = NodeState {
    run: Run::Up,
    cut: false,
    have: 0,
    promise: NOBODY,
    left: 0,
    named: 0,
    said_served: false,
    denying: false,
    taken: false,
    young: 0,
    term: Term::None,
    intact: false,
    served: false,
    must: 0,
    missing: 0,
};

pub(crate) const fn bit(n: usize) -> Set {
    1 << n
}

impl State {
    pub(crate) fn cut(&self, i: Node, j: Node) -> bool {
        self.nodes[i].cut || self.nodes[j].cut || (self.pair_cut && i + j == 1)
    }

    pub(crate) fn up(&self, i: Node) -> bool {
        self.nodes[i].run == Run::Up
    }

    /// Returns true when both run and can reach each other.
    pub(crate) fn linked(&self, i: Node, j: Node) -> bool {
        self.up(i) && self.up(j) && !self.cut(i, j)
    }

    pub(crate) fn away(&self) -> usize {
        self.nodes
            .iter()
            .filter(|node| node.run != Run::Unused && (node.run != Run::Up || node.cut))
            .count()
    }

    /// Returns the list that a node shows.
    pub(crate) fn list(&self, i: Node) -> Set {
        let have = self.nodes[i].have;
        let held = self
            .records
            .iter()
            .enumerate()
            .filter(|(id, _)| have & bit(*id) != 0)
            .filter_map(|(_, one)| *one);
        held.max_by_key(|one| one.stamp).map_or(0, |one| one.list)
    }

    pub(crate) fn holders(&self, record: usize) -> usize {
        self.nodes.iter().filter(|node| node.have & bit(record) != 0).count()
    }

    /// Returns true when the node's writer has begun something.
    pub(crate) fn is_busy(&self, i: Node) -> bool {
        self.ops.iter().any(|op| op.phase == Phase::Checked && usize::from(op.at) == i)
    }

    /// Returns true when the node is there and all nodes, but perhaps one, know it.
    pub(crate) fn is_back(&self, j: Node, but: Node) -> bool {
        let known = |i: Node| i == j || i == but || !self.up(i) || !self.peers[i][j].is_away();
        self.up(j) && !self.nodes[j].cut && self.nodes[j].young == 0 && (0..NODES).all(known)
    }

    /// Forgives records that only a node that goes away holds. Unless `late_copies` count, forgives
    /// also those that the others hold only since they have promised themselves: they named less.
    pub(crate) fn forgive(&mut self, i: Node, late_copies: bool) {
        for record in 0..self.records.len() {
            let holds = |node: &NodeState| node.have & bit(record) != 0;
            let counts = |node: &NodeState| {
                let holder = self.nodes.get(usize::from(node.promise));
                let is_named = node.named & bit(record) != 0 || holder.is_none_or(holds);
                holds(node) && (late_copies || is_named)
            };
            let mut others = (0..NODES).filter(|j| *j != i);
            let elsewhere = others.any(|j| self.is_back(j, i) && counts(&self.nodes[j]));
            if holds(&self.nodes[i]) && !elsewhere {
                self.forgiven |= bit(record);
            }
        }
    }

    pub(crate) fn end_promise(&mut self, i: Node) {
        let to = self.nodes[i].promise;
        if to != NOBODY {
            self.peers[usize::from(to)][i].released = false;
            self.nodes[usize::from(to)].intact = false;
        }
        for op in self.ops.iter_mut().filter(|op| usize::from(op.at) == i && !op.handed) {
            op.to = NOBODY;
        }
        let node = &mut self.nodes[i];
        (node.promise, node.left, node.named) = (NOBODY, 0, 0);
        (node.said_served, node.denying, node.taken) = (false, false, false);
    }

    /// Drops everything that a process forgets when it ends, and the messages on the way to and
    /// from it.
    pub(crate) fn forget(&mut self, i: Node) {
        self.end_promise(i);
        self.peers[i] = [FRESH; NODES];
        let node = &mut self.nodes[i];
        (node.term, node.intact, node.served) = (Term::None, false, false);
        for j in 0..NODES {
            self.peers[j][i].back = Back::Nothing;
        }
        for op in self.ops.iter_mut().filter(|op| usize::from(op.at) == i) {
            if op.phase != Phase::Idle {
                op.phase = Phase::Done;
            }
        }
    }

    /// Normalizes state that can make no difference any more.
    pub(crate) fn forget_what_is_done(&mut self) {
        for op in &mut self.ops {
            match op.phase {
                Phase::Done => *op = Op { phase: Phase::Done, ..IDLE },
                // A probe does not help the operation any more: one that comes later must see no
                // less.
                Phase::Waiting if op.silent == 0 => *op = IDLE,
                _ => {}
            }
        }
        for i in 0..NODES {
            // A pending operation there could be acknowledged in the term in which it was done.
            let pending =
                |op: &Op| matches!(op.phase, Phase::Checked | Phase::Written) && !op.lapsed;
            let pending = self.ops.iter().any(|op| pending(op) && usize::from(op.at) == i);
            let node = &mut self.nodes[i];
            node.intact &= pending;
            let term = node.term;
            for j in 0..NODES {
                let handed =
                    |op: &Op| usize::from(op.at) == j && usize::from(op.to) == i && !op.handed;
                let is_news =
                    self.nodes[j].served || self.faults.stop > 0 || self.ops.iter().any(handed);
                let peer = &mut self.peers[i][j];
                peer.covered &= is_news && usize::from(self.nodes[j].promise) == i;
                if term == Term::None {
                    peer.basis = FRESH.basis;
                }
                if peer.belief == 0 {
                    (peer.named, peer.served, peer.covered) = (0, false, false);
                }
                if peer.quiet == 0 {
                    // The master's report is old before a peer is silent again.
                    (peer.word, peer.tried) = (0, false);
                    if peer.reach != Reach::Refused {
                        peer.reach = Reach::Unknown;
                        if peer.basis != Basis::Excuse {
                            peer.found = 0;
                        }
                    }
                }
                if peer.reach != Reach::Unreachable || peer.word == 0 {
                    peer.tried = false;
                }
            }
        }
    }
}

/// Orders of the replicas: the old place of each new one.
const ORDERS: [[usize; NODES]; 6] =
    [[0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 0, 1], [1, 2, 0], [2, 1, 0]];

type Packed = [u32; 16];

/// Puts values of few bits behind one another.
struct Bits(u32);

impl Bits {
    fn put(mut self, value: u8, bits: u32) -> Self {
        debug_assert!(u32::from(value) < 1 << bits, "{value} does not fit {bits} bits");
        self.0 = (self.0 << bits) | u32::from(value);
        self
    }
}

impl NodeState {
    /// Packs all fields except the holder of the promise.
    fn bits(&self) -> u32 {
        let flags =
            [self.cut, self.said_served, self.denying, self.taken, self.intact, self.served];
        let bits = flags.into_iter().fold(Bits(0), |bits, flag| bits.put(u8::from(flag), 1));
        bits.put(self.run as u8, 2)
            .put(self.have, 3)
            .put(self.left, 2)
            .put(self.named, 3)
            .put(self.young, 2)
            .put(self.term as u8, 2)
            .put(self.must, 3)
            .put(self.missing, 2)
            .0
    }
}

impl Peer {
    /// Returns true when the peer is known to be dead, or silent for long enough.
    pub(crate) fn is_away(&self) -> bool {
        self.reach == Reach::Refused || (self.quiet >= SILENCE && self.reach != Reach::Unknown)
    }

    fn bits(&self) -> u32 {
        let (back, left, named, served) = match self.back {
            Back::Nothing => (0, 0, 0, false),
            Back::Grant { left, named, served } => (1, left, named, served),
            Back::Denied => (2, 0, 0, false),
        };
        let flags = [served, self.served, self.covered, self.released, self.tried];
        let bits = flags.into_iter().fold(Bits(0), |bits, flag| bits.put(u8::from(flag), 1));
        bits.put(back, 2)
            .put(left, 2)
            .put(named, 3)
            .put(self.belief, 2)
            .put(self.named, 3)
            .put(self.quiet, 1)
            .put(self.reach as u8, 2)
            .put(self.found, 2)
            .put(self.word, 2)
            .put(self.basis as u8, 2)
            .0
    }
}

impl State {
    fn packed(&self, order: &[usize; NODES]) -> Packed {
        // New place of each node; `NOBODY` stays `NOBODY`.
        let mut place = [NOBODY; NODES + 1];
        for (new, old) in order.iter().enumerate() {
            place[*old] = new as u8;
        }
        let of = |node: u8| place[usize::from(node)];
        let all = |set: Set| {
            order.iter().enumerate().fold(0, |to, (new, old)| to | ((set >> old) & 1) << new)
        };
        let mut words: Packed = [0; 16];
        for (new, old) in order.iter().enumerate() {
            let node = &self.nodes[*old];
            words[new] = node.bits() << 2 | u32::from(of(node.promise));
            for other in 0..NODES - 1 {
                let other_new = (new + 1 + other) % NODES;
                words[NODES + new * (NODES - 1) + other] =
                    self.peers[*old][order[other_new]].bits();
            }
        }
        for (n, op) in self.ops.iter().enumerate() {
            let bits = Bits(0)
                .put(op.phase as u8, 3)
                .put(of(op.at), 2)
                .put(op.must, 3)
                .put(all(op.silent), 3);
            let bits = bits
                .put(all(op.probed), 3)
                .put(u8::from(op.lapsed), 1)
                .put(op.stamp, 3)
                .put(of(op.to), 2);
            words[9 + n] = bits.put(u8::from(op.handed), 1).0;
        }
        for record in self.records {
            let bits = record.map_or(0, |one| {
                Bits(1).put(one.list, 3).put(one.stamp, 3).put(of(one.origin), 2).0
            });
            words[12] = words[12] << 9 | bits;
        }
        let faults = self.faults;
        words[13] = Bits(u32::from(self.acked))
            .put(self.forgiven, 3)
            .put(self.clock, 3)
            .put(u8::from(self.pair_cut), 1)
            .put(u8::from(self.changed), 1)
            .put(self.bad.map_or(0, |bad| 1 + bad as u8), 2)
            .0;
        words[14] = Bits(0)
            .put(faults.pause, 3)
            .put(faults.isolate, 3)
            .put(faults.kill, 3)
            .put(faults.restart, 3)
            .put(faults.stop, 3)
            .put(faults.break_link, 3)
            .put(faults.cut_pair, 3)
            .put(faults.master_restart, 3)
            .0;
        words
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let keys = self.nodes.each_ref().map(NodeState::bits);
        // A cut between the first two replicas distinguishes them from the third.
        let alike = !self.pair_cut && self.faults.cut_pair == 0;
        let fits = |order: &&[usize; NODES]| match alike {
            true => keys[order[0]] <= keys[order[1]] && keys[order[1]] <= keys[order[2]],
            false => order[2] == 2 && keys[order[0]] <= keys[order[1]],
        };
        let least = ORDERS.iter().filter(fits).map(|order| self.packed(order)).min();
        least.hash(state);
    }
}

impl Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.run != Run::Unused) {
            write!(
                f,
                "n{i}[{:?}{} have {:b}",
                node.run,
                if node.cut { " cut" } else { "" },
                node.have
            )?;
            if node.promise != NOBODY {
                write!(f, " promised {} {}", node.promise, node.left)?;
            }
            for (j, peer) in self.peers[i].iter().enumerate().filter(|(j, _)| *j != i) {
                if self.nodes[j].run != Run::Unused {
                    write!(f, " {j}:belief {} quiet {} {:?}", peer.belief, peer.quiet, peer.reach)?;
                }
            }
            write!(f, "] ")?;
        }
        write!(f, "acked {:b} forgiven {:b} {:?}", self.acked, self.forgiven, self.bad)
    }
}
