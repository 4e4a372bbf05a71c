//! How long work takes: at the rates that the nodes have measured, side by side on all of them, and
//! within the bound that is asked for.
//!
//! **Invariant:** a rate that a node has not measured is that of the others; one that none has
//! measured is assumed. A bound holds for what passes the gates of the nodes: downloads, exports, and
//! the files that new replicas ship; not for the disk, nor for checkpoints of replicas that serve.
//! Requests that wait for each other count with the time that the bucket takes.

use std::collections::BTreeMap;

use vasto_core::ids::NodeId;

use crate::state::ClusterState;

/// Rates of one node, bytes a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rates {
    pub(super) download: f64,
    pub(super) rewrite: f64,
    pub(super) export: f64,
    pub(super) upload: f64,
}

/// What is assumed before anything was measured: what two cores reach that do nothing else, with a
/// bucket nearby.
const ASSUMED: Rates = Rates {
    download: (200 << 20) as f64,
    rewrite: (80 << 20) as f64,
    export: (100 << 20) as f64,
    upload: (200 << 20) as f64,
};

/// What a change takes however little it moves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fixed {
    /// Rounds among nodes, and the times at which they look and report.
    seconds: f64,
    /// Requests to the bucket that wait for each other: versions of the catalog, manifests and lists.
    requests: f64,
}

/// Of a grow, from its first version to its last.
pub(super) const GROW: Fixed = Fixed { seconds: 0.6, requests: 12.0 };
/// Of a shrink, which agrees on a floor first.
pub(super) const SHRINK: Fixed = Fixed { seconds: 0.6, requests: 14.0 };
/// Of one more replica, and of a replica that leaves then.
pub(super) const COPY: Fixed = Fixed { seconds: 1.0, requests: 8.0 };
pub(super) const LEAVE: Fixed = Fixed { seconds: 1.0, requests: 3.0 };
/// Of a replica that moves in a rebalance: its checkpoint, the log behind it, the hand-over.
pub(super) const MOVE: Fixed = Fixed { seconds: 3.0, requests: 12.0 };
/// Of a restore.
pub(super) const RESTORE: Fixed = Fixed { seconds: 1.0, requests: 8.0 };

/// Requests of a download that a node has under way together.
const GETS_AT_ONCE: f64 = 8.0;

/// The rates of all nodes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Paces {
    nodes: BTreeMap<NodeId, [Option<f64>; 4]>,
    /// The most bytes a second that all nodes together read and write at the bucket.
    max_rate: Option<f64>,
    /// Seconds of a write to the bucket, as the master has measured them.
    request: f64,
}

impl Paces {
    /// Returns the rates that nodes have reported.
    pub(crate) fn of(state: &ClusterState) -> Self {
        let measured = |rate: u64| (rate > 0).then_some(rate as f64);
        let nodes = state.nodes.iter().map(|(id, node)| {
            let rates = node.rates;
            (*id, [rates.download, rates.rewrite, rates.export, rates.upload].map(measured))
        });
        let request = state.write_seconds().unwrap_or_default();
        Self { nodes: nodes.collect(), max_rate: None, request }
    }

    /// Returns the same rates within a bound of what all nodes together read and write at the
    /// bucket, bytes a second.
    pub(crate) fn at_most(self, max_rate: Option<u64>) -> Self {
        Self { max_rate: max_rate.map(|rate| rate.max(1) as f64), ..self }
    }

    /// Returns the bound of the rate, bytes a second.
    pub(super) fn max_rate(&self) -> Option<f64> {
        self.max_rate
    }

    /// Returns the rates at which a node does bulk work that so many nodes share in equal parts.
    pub(super) fn shared_at(&self, node: Option<NodeId>, nodes: usize) -> Rates {
        let rates = self.at(node);
        let Some(max_rate) = self.max_rate else { return rates };
        let part = max_rate / nodes.max(1) as f64;
        Rates {
            download: rates.download.min(part),
            export: rates.export.min(part),
            upload: rates.upload.min(part),
            ..rates
        }
    }

    /// Returns the rates of a node; of one that is not chosen yet, those of the others.
    pub(super) fn at(&self, node: Option<NodeId>) -> Rates {
        let own = node.and_then(|node| self.nodes.get(&node)).copied().unwrap_or_default();
        let of =
            |kind: usize, assumed: f64| own[kind].or_else(|| self.mean(kind)).unwrap_or(assumed);
        Rates {
            download: of(0, ASSUMED.download),
            rewrite: of(1, ASSUMED.rewrite),
            export: of(2, ASSUMED.export),
            upload: of(3, ASSUMED.upload),
        }
    }

    /// Returns the seconds of what a change takes however little it moves.
    pub(super) fn fixed(&self, fixed: Fixed) -> f64 {
        fixed.seconds + fixed.requests * self.request
    }

    /// Returns the seconds in which a node of these rates reads so many bytes with so many requests:
    /// many small ones wait for the bucket more than for its bytes.
    pub(super) fn downloads(&self, rates: Rates, bytes: f64, requests: u64) -> f64 {
        let waits = requests as f64 * self.request / GETS_AT_ONCE;
        (bytes / rates.download).max(waits)
    }

    fn mean(&self, kind: usize) -> Option<f64> {
        let measured: Vec<f64> = self.nodes.values().filter_map(|rates| rates[kind]).collect();
        (!measured.is_empty()).then(|| measured.iter().sum::<f64>() / measured.len() as f64)
    }
}

/// Work that nodes do side by side; that of one node comes one after the other.
#[derive(Debug, Clone, Default)]
pub(super) struct SideBySide {
    nodes: BTreeMap<NodeId, f64>,
    /// The longest work of a node that is not chosen yet.
    elsewhere: f64,
}

impl SideBySide {
    pub(super) fn add(&mut self, node: Option<NodeId>, seconds: f64) {
        match node {
            Some(node) => *self.nodes.entry(node).or_default() += seconds,
            None => self.elsewhere = self.elsewhere.max(seconds),
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.nodes.values().copied().fold(self.elsewhere, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_measured_by_the_node_or_by_others_or_assumed() {
        let mut paces = Paces::default();
        assert_eq!(paces.at(Some(NodeId(1))), ASSUMED);
        paces.nodes.insert(NodeId(1), [Some(10.0), None, None, None]);
        paces.nodes.insert(NodeId(2), [Some(30.0), Some(5.0), None, None]);
        assert_eq!(paces.at(Some(NodeId(1))), Rates { download: 10.0, rewrite: 5.0, ..ASSUMED });
        assert_eq!(paces.at(None).download, 20.0);
    }

    #[test]
    fn a_bound_is_shared_and_holds_back_neither_the_disk_nor_what_is_slower() {
        let mut paces = Paces::default();
        paces.nodes.insert(NodeId(1), [Some(10.0), Some(1_000.0), Some(90.0), None]);
        let free = paces.at(Some(NodeId(1)));
        let bounded = paces.at_most(Some(100));
        assert_eq!((bounded.at(Some(NodeId(1))), bounded.max_rate()), (free, Some(100.0)));
        let shared = Rates { download: 10.0, rewrite: 1_000.0, export: 50.0, upload: 50.0 };
        assert_eq!(bounded.shared_at(Some(NodeId(1)), 2), shared);
        let lifted = bounded.at_most(None);
        assert_eq!((lifted.shared_at(Some(NodeId(1)), 2), lifted.max_rate()), (free, None));
    }

    #[test]
    fn a_slow_bucket_makes_every_step_longer() {
        let slow = Paces { request: 0.2, ..Paces::default() };
        assert_eq!(Paces::default().fixed(GROW), 0.6);
        assert!((slow.fixed(GROW) - 3.0).abs() < 1e-9, "{}", slow.fixed(GROW));
        let second = ASSUMED.download;
        assert!((slow.downloads(ASSUMED, second, 10) - 1.0).abs() < 1e-9, "the bytes take longer");
        assert!(
            (slow.downloads(ASSUMED, second, 80) - 2.0).abs() < 1e-9,
            "the requests take longer"
        );
    }

    #[test]
    fn nodes_work_side_by_side() {
        let mut work = SideBySide::default();
        for (node, seconds) in [(1, 2.0), (2, 2.5), (1, 1.0)] {
            work.add(Some(NodeId(node)), seconds);
        }
        assert_eq!(work.seconds(), 3.0);
        work.add(None, 4.0);
        work.add(None, 3.5);
        assert_eq!(work.seconds(), 4.0);
    }
}
