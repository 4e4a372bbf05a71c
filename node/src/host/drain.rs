//! Draining from the bucket: what replicas that left the placement have shipped is taken over.
//!
//! **Invariant:** a draining replica is reported as taken over only when everything that it shipped, as far as the bucket
//! still has it, is here; a fault of this node never counts.

use std::sync::Arc;

use parking_lot::Mutex;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{PlanId, ReplicaId};
use vasto_core::report::TargetProgress;

use super::runner::{Background, RETRY_MAX, Runner};
use crate::bootstrap::{Bootstrap, BootstrapError};
use crate::replica::Replica;

impl Runner {
    /// Applies the unpulled part of the archive of a replica that left its placement, perhaps for good. Done once
    /// for each such replica, by the primary; records that are present already are skipped.
    pub(super) fn drain_from_the_bucket(
        self: &Arc<Self>,
        replica: &Replica,
        catalog: &Arc<Catalog>,
        background: &Arc<Mutex<Background>>,
    ) {
        let left = |id: &ReplicaId| catalog.draining.iter().any(|one| one.replica == *id);
        {
            let mut background = background.lock();
            background.drained.retain(left);
            background.accepted.retain(left);
            let accepted =
                |node| catalog.draining_nodes.iter().any(|leaving| leaving.node == node && leaving.accept_loss);
            for one in catalog.draining.iter().filter(|one| accepted(one.node)) {
                if background.accepted.insert(one.replica) && background.drained.remove(&one.replica) {
                    self.status.lock().took_from_bucket.remove(&one.replica);
                }
            }
        }
        self.status.lock().took_from_bucket.retain(left);
        if !catalog.is_primary(replica.id) {
            return;
        }
        for one in catalog.draining.iter().filter(|one| one.shard == replica.shard) {
            if !background.lock().drained.insert(one.replica) {
                continue;
            }
            let (this, replica, left, shards) = (self.clone(), replica.clone(), one.replica, catalog.spec.shards);
            tokio::spawn(async move {
                let bootstrap = Bootstrap {
                    bucket: this.context.bucket.clone(),
                    engines: this.context.engines.clone(),
                    dir: this.spec.dir.clone(),
                    side: this.spec.tmp.clone(),
                    progress: Arc::new(Mutex::new(TargetProgress::new(PlanId(0)))),
                    registry: this.context.registry.clone(),
                    cancel: this.cancel.clone(),
                };
                loop {
                    let taken = bootstrap.join_what_was_shipped(&replica, left, shards).await;
                    // A fault of this node says nothing about the contents of the bucket.
                    if taken.as_ref().map_or_else(BootstrapError::is_about_objects, |_| true) {
                        this.status.lock().took_from_bucket.insert(left);
                        this.context.registry.report.notify_one();
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
                        Err(BootstrapError::Cancelled) => return,
                        Err(error) if !error.is_about_objects() => {
                            tracing::info!(%error, replica = left.0, "what a replica has shipped is read again");
                            let _ = this.cancel.run_until_cancelled(tokio::time::sleep(RETRY_MAX)).await;
                            if this.cancel.is_cancelled() {
                                return;
                            }
                        }
                        Err(error) => {
                            tracing::info!(%error, replica = left.0, "not everything that a replica shipped can be taken over");
                            return;
                        }
                    }
                }
            });
        }
    }
}
