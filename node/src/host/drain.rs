//! Draining from the bucket: the primary applies the records that draining replicas have shipped.
//!
//! **Invariant:** a draining replica is reported as taken over only when this replica holds every
//! record that the draining one shipped and the bucket still has; a fault of this node never counts
//! as a loss in the bucket.

use std::sync::Arc;

use parking_lot::Mutex;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{PlanId, ReplicaId};
use vasto_core::report::TargetProgress;

use super::hosted::Hosted;
use super::shared::RETRY_MAX;
use crate::build::{Bootstrap, BuildError};
use crate::target_trace::TargetTrace;

impl Hosted {
    /// Applies the unpulled part of the archive of a replica that left its placement, perhaps for
    /// good. Done once for each such replica, by the primary; records that are present already are
    /// skipped.
    pub(super) fn drain_from_the_bucket(self: &Arc<Self>, catalog: &Catalog) {
        let Hosted { shared, replica, .. } = &**self;
        let is_draining =
            |id: &ReplicaId| catalog.draining.iter().any(|member| member.replica == *id);
        {
            let mut background = self.background.lock();
            background.drained.retain(is_draining);
            background.accepted.retain(is_draining);
            let accepted = |node| {
                catalog
                    .draining_nodes
                    .iter()
                    .any(|leaving| leaving.node == node && leaving.accept_loss)
            };
            for member in catalog.draining.iter().filter(|member| accepted(member.node)) {
                if background.accepted.insert(member.replica)
                    && background.drained.remove(&member.replica)
                {
                    shared.status.lock().took_from_bucket.remove(&member.replica);
                }
            }
        }
        shared.status.lock().took_from_bucket.retain(is_draining);
        if !catalog.is_primary(replica.id) {
            return;
        }
        for member in catalog.draining.iter().filter(|member| member.shard == replica.shard) {
            if self.background.lock().drained.insert(member.replica) {
                tokio::spawn(
                    self.clone().take_what_was_shipped(member.replica, catalog.spec.shards),
                );
            }
        }
    }

    /// Applies what the replica that left has shipped, until nothing more can be taken over.
    async fn take_what_was_shipped(self: Arc<Self>, left: ReplicaId, shards: u32) {
        let Hosted { shared, replica, .. } = &*self;
        let bootstrap = Bootstrap {
            bucket: shared.context.bucket.clone(),
            engines: shared.context.engines.clone(),
            dir: shared.spec.dir.clone(),
            side: shared.spec.tmp.clone(),
            progress: Arc::new(Mutex::new(TargetProgress::new(PlanId(0)))),
            registry: shared.context.registry.clone(),
            cancel: shared.cancel.clone(),
            // The drain of a replica is part of no plan.
            trace: TargetTrace::silent(),
            resized: Vec::new(),
        };
        while !shared.cancel.is_cancelled() {
            let taken = bootstrap.join_what_was_shipped(replica, left, shards).await;
            // A fault of this node says nothing about the contents of the bucket.
            if taken.as_ref().map_or_else(BuildError::is_about_objects, |_| true) {
                shared.status.lock().took_from_bucket.insert(left);
                shared.notify();
            }
            match taken {
                Ok(lsn) => {
                    tracing::info!(
                        keyspace = replica.keyspace.0,
                        shard = replica.shard.0,
                        replica = left.0,
                        lsn = lsn.0,
                        "took over what a replica that left had shipped"
                    );
                    return;
                }
                Err(BuildError::Cancelled) => return,
                Err(error) if !error.is_about_objects() => {
                    tracing::info!(%error, replica = left.0, "what a replica has shipped is read again");
                    shared.pause(RETRY_MAX).await;
                }
                Err(error) => {
                    tracing::info!(%error, replica = left.0, "not everything that a replica shipped can be taken over");
                    return;
                }
            }
        }
    }
}
