//! Looks that no report causes: after a node has been away for as long as a rule waits for, when it
//! is back, and while a keyspace lacks replicas.
//!
//! **Invariant:** a rule that waits for a node to have been away for some time has that time in
//! [`ClusterState::note_absences`]: nothing else wakes a keyspace whose replicas have nothing new to
//! report. However many keyspaces lack replicas, they are looked at so many times a second.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use vasto_core::catalog::KeyspaceState;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId};
use vasto_core::limits::{ACCEPTED_LOSS_AWAY, FAILOVER_AWAY, NODE_SILENCE};
use vasto_core::plan::NODE_AWAY_MAX_US;
use vasto_core::reconcile::is_incomplete;
use vasto_core::report::ReplicaReport;

use super::ClusterState;
use super::keyspace::Keyspace;

/// The shortest interval at which a keyspace that lacks replicas is looked at: all that ends this
/// state is reported, except the passing of time and the room on nodes.
const LOOK_MIN: Duration = Duration::from_millis(500);
/// The mean time between two of these looks, at whichever keyspaces: a node that has room again waits
/// about as long for its next replica.
const LOOKS_APART: Duration = Duration::from_millis(10);

impl ClusterState {
    /// Returns every node that has registered or has a part in a keyspace.
    pub(super) fn known_nodes(&self) -> BTreeSet<NodeId> {
        self.nodes.keys().copied().chain(self.loads.nodes()).collect()
    }

    /// Wakes the drivers of keyspaces with replicas on nodes that are back, or have been away for as
    /// long as a rule waits for.
    pub(crate) fn note_absences(&mut self, mono_us: u64) {
        let silence = self.node_silence.unwrap_or(NODE_SILENCE);
        let waits =
            [FAILOVER_AWAY, ACCEPTED_LOSS_AWAY, silence].map(|wait| wait.as_micros() as u64);
        let waits: Vec<u64> =
            waits.into_iter().chain([0, NODE_AWAY_MAX_US]).chain(self.replace_after_us).collect();
        let passed = |node: NodeId| {
            let away_us = self.away_us(node, mono_us);
            waits.iter().filter(|wait| away_us > **wait).count()
        };
        let now: BTreeMap<NodeId, usize> =
            self.known_nodes().into_iter().map(|node| (node, passed(node))).collect();
        let before = std::mem::replace(&mut self.absences, now);
        let changed = self
            .absences
            .iter()
            .filter(|(node, passed)| before.get(*node).copied().unwrap_or_default() != **passed);
        let changed: BTreeSet<NodeId> = changed.map(|(node, _)| *node).collect();
        if changed.is_empty() {
            return;
        }
        for keyspace in self.keyspaces.values() {
            let members = keyspace.catalog.members();
            if members.iter().any(|(_, member, _)| changed.contains(&member.node)) {
                keyspace.notify();
            }
        }
    }

    /// Returns when a keyspace that has not all its replicas, or is to replace one, is looked at again
    /// although nothing is reported; `None` for one that has them.
    pub(crate) fn look_again(&mut self, keyspace: KeyspaceId, mono_us: u64) -> Option<Duration> {
        let found = self.keyspaces.get(&keyspace);
        let lacks = found.is_some_and(|found| {
            is_incomplete(&found.catalog, |node| self.is_live(node))
                || self.waits_for_room(found, mono_us)
        });
        match lacks {
            true => self.lacking.insert(keyspace),
            false => self.lacking.remove(&keyspace),
        };
        let lacking = u32::try_from(self.lacking.len()).unwrap_or(u32::MAX);
        lacks.then(|| LOOK_MIN.max(LOOKS_APART.saturating_mul(lacking)))
    }

    /// Returns true when a placed replica has failed, or its node is not expected back: it is replaced
    /// as soon as there is room for another one, of which nothing is reported.
    fn waits_for_room(&self, keyspace: &Keyspace, mono_us: u64) -> bool {
        let Keyspace { catalog, reports, .. } = keyspace;
        let is_lost = |node: NodeId| {
            self.replace_after_us.is_some_and(|after_us| self.away_us(node, mono_us) > after_us)
        };
        let has_failed =
            |replica: ReplicaId| reports.get(&replica).is_some_and(ReplicaReport::has_failed);
        let mut placed = catalog.placement.iter().flat_map(|shard| &shard.replicas);
        catalog.state == KeyspaceState::Active
            && placed.any(|member| is_lost(member.node) || has_failed(member.replica))
    }
}
