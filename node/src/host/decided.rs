//! What a replica does under a version that seals, or decides a seal, before its node remembers the
//! version: writers wait meanwhile, and remembering takes two syncs of the disk.
//!
//! **Invariants**
//! - The version is in the bucket: whoever gives a range away by it takes nothing that anybody could
//!   decide otherwise.
//! - Only a replica that is sealed for the plan, under a version that its node remembers, gives its
//!   range away early. A crash leaves it sealed or without the range, never as its owner, and the
//!   node looks in the bucket for what follows the version that it remembers (`crate::undecided`).
//! - Nothing is opened early, and no seal is recorded early: these the node has to know after a crash.

use std::sync::Arc;
use std::time::Instant;

use tracing::Instrument;
use vasto_core::catalog::Catalog;
use vasto_core::plan::{Plan, Step};

use super::hosted::Hosted;
use super::reconcile::gives;

impl Hosted {
    /// Hears of a version that the node does not remember yet. What fails is done when the version is
    /// applied.
    pub(super) async fn hear(&self, catalog: &Arc<Catalog>) {
        let replica = &self.replica;
        let plan = catalog.plan.as_ref().filter(|plan| plan.resize().is_some());
        let Some(plan) = plan.filter(|plan| gives(plan, replica)) else { return };
        if catalog.version < replica.version() || replica.is_closed() {
            return;
        }
        match plan.step {
            Step::Sealing => self.sync_beside_the_writer(),
            Step::Committed if self.is_sealed_for(plan) => {
                self.background.lock().told = Some((plan.id, Instant::now()));
                let log = self.shared.trace(plan.id).log_span();
                if let Err(error) = self.give_away_what_moved(catalog).instrument(log).await {
                    tracing::warn!(%error, plan = plan.id.0, "a range could not be given away at once; it is tried again");
                }
            }
            Step::Committed | Step::Prepare | Step::Tail => {}
        }
    }

    /// Makes the log durable while the writer goes on: what is not is synced and sent to the targets
    /// while writers wait at the seal, which comes in a moment.
    fn sync_beside_the_writer(&self) {
        let log = self.replica.log().clone();
        // A failure closes the replica when its writer meets it.
        tokio::task::spawn_blocking(move || drop(log.sync_appended()));
    }

    fn is_sealed_for(&self, plan: &Plan) -> bool {
        self.replica.ranges().seal.is_some_and(|seal| seal.plan == plan.id)
    }
}
