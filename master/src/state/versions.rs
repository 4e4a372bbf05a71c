//! Catalog versions: how they come into the state, go out as topologies, and are forgotten.
//!
//! **Invariant:** a catalog is replaced only by a higher version, and the loads follow every
//! version.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::KeyspaceId;
use vasto_core::report::Reports;
use vasto_core::topology::{NodeAddress, Topology};
use vasto_proto::convert::topology_to_wire;
use vasto_proto::v1;

use super::ClusterState;
use super::change::ChangeRequest;
use super::keyspace::{Delivery, Keyspace};

impl ClusterState {
    /// Installs a catalog version; returns false when a higher one is known already. For a new
    /// keyspace also returns the receiver of its requests, which its driver must own.
    pub(crate) fn install(
        &mut self,
        catalog: Catalog,
        delivery: Delivery,
    ) -> (bool, Option<mpsc::Receiver<ChangeRequest>>) {
        let catalog = Arc::new(catalog);
        let id = catalog.keyspace;
        let topology = self.topology_of(&catalog);
        let mut receiver = None;
        match self.keyspaces.get_mut(&id) {
            Some(keyspace) if keyspace.catalog.version >= catalog.version => return (false, None),
            Some(keyspace) => {
                self.loads.count(&catalog, &keyspace.reports);
                keyspace.replace(catalog, delivery, topology);
            }
            None => {
                self.loads.count(&catalog, &Reports::new());
                let (keyspace, requests) = Keyspace::new(catalog, delivery, topology);
                self.keyspaces.insert(id, keyspace);
                receiver = Some(requests);
            }
        }
        self.revisions.touch(id);
        self.wake_sessions();
        (true, receiver)
    }

    /// Forgets a keyspace that was deleted `kept_us` ago and whose deletion was sent to the nodes
    /// for `sent_for`. Its catalog stays in the bucket: when a node names the keyspace, it is
    /// looked up and the deletion sent again.
    pub(crate) fn forget_deleted(
        &mut self,
        keyspace: KeyspaceId,
        now_us: u64,
        kept_us: u64,
        sent_for: Duration,
    ) -> bool {
        let over = self.keyspaces.get(&keyspace).is_some_and(|keyspace| {
            keyspace.catalog.state == KeyspaceState::Deleted
                && keyspace.installed.elapsed() >= sent_for
                && now_us >= keyspace.catalog.written_at_us.saturating_add(kept_us)
        });
        if over {
            self.keyspaces.remove(&keyspace);
            self.loads.forget(keyspace);
            self.revisions.forget(keyspace);
            self.lacking.remove(&keyspace);
        }
        over
    }

    fn topology_of(&self, catalog: &Catalog) -> v1::Topology {
        let address = |node| {
            let node = self.nodes.get(&node)?;
            Some(NodeAddress { address: node.address.clone(), zone: node.zone.clone() })
        };
        topology_to_wire(&Topology::derive(catalog, address))
    }

    /// Publishes the current addresses of nodes to nodes and clients.
    pub(super) fn publish_addresses(&self) {
        for keyspace in self.keyspaces.values() {
            let topology = self.topology_of(&keyspace.catalog);
            keyspace.topology.send_if_modified(|published| {
                let changed = *published != topology;
                *published = topology;
                changed
            });
        }
        self.wake_sessions();
    }
}
