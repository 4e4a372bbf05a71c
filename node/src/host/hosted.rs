//! An open replica with its shipping, its replication, and the work that runs for it in the
//! background.
//!
//! **Invariant:** work that [`Background`] names is not begun again, for the same plan, replica or
//! LSN, while it runs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{Lsn, PlanId, ReplicaId};
use vasto_failpoint::{Injected, Point};
use vasto_trace::OpenSpan;

use super::HostContext;
use super::shared::{RETRY, RETRY_MAX, Shared};
use crate::replica::Replica;
use crate::replica::authority::Standing;
use crate::replication::replicator::Replicator;
use crate::ship::{ShipError, ShipHandle};
use crate::throttle::Throttle;

/// An open replica under its host.
pub(super) struct Hosted {
    pub(super) shared: Arc<Shared>,
    pub(super) replica: Replica,
    pub(super) ship: ShipHandle,
    pub(super) replicator: Arc<Replicator>,
    pub(super) background: Mutex<Background>,
    /// Decides how far the writers of moving keys are slowed down.
    pub(super) throttle: Mutex<Throttle>,
    /// Held while bands that arrive are cleared, or begin to be filled.
    pub(super) filling: tokio::sync::Mutex<()>,
}

/// The preparation of a source that has begun: its checkpoint and its export.
pub(super) struct Preparation {
    pub(super) plan: PlanId,
    /// The floor of the plan under which it was begun.
    pub(super) floor: Option<u64>,
    pub(super) cancel: CancellationToken,
}

/// Background work of one host that has begun.
#[derive(Default)]
pub(super) struct Background {
    /// Plan whose target this replica is, and the token that cancels its build.
    pub(super) build: Option<(PlanId, CancellationToken)>,
    /// Plan that adds this replica, and the span of its catching up until it has.
    pub(super) catching_up: Option<(PlanId, Option<OpenSpan>)>,
    /// The preparation of this replica as a source.
    pub(super) preparing: Option<Preparation>,
    /// Plan whose commit this replica has heard of before its node remembered it, and when.
    pub(super) told: Option<(PlanId, Instant)>,
    /// Plan for which this replica, as a retired source, ships its log to the end.
    pub(super) shipping_end: Option<PlanId>,
    /// Bands that arrived for a plan that was undone are being cleared.
    pub(super) clearing: bool,
    /// Plans whose quarantined bands are being removed here, or have been.
    pub(super) cleaning: BTreeSet<PlanId>,
    /// LSN for which a running checkpoint is to make a manifest that covers it.
    pub(super) covering: Option<Lsn>,
    /// Draining replicas whose archive is being applied from the bucket, or has been.
    pub(super) drained: BTreeSet<ReplicaId>,
    /// Draining replicas whose loss the operator has accepted: each one's archive is applied once
    /// more.
    pub(super) accepted: BTreeSet<ReplicaId>,
}

impl Background {
    /// Notes that unwanted bands are being cleared; false when they are already.
    pub(super) fn begin_to_clear(&mut self) -> bool {
        !std::mem::replace(&mut self.clearing, true)
    }
}

impl Hosted {
    /// Passes a failpoint.
    pub(super) async fn passes(&self, point: Point) -> Result<(), Injected> {
        self.shared.passes(point).await
    }

    /// Passes the placement of the replica to the leases. A replica that is not registered yet is
    /// published as not serving first: with peers, it serves nothing before the leases grant it
    /// authority.
    pub(super) async fn tell_leases(&self, catalog: &Catalog) {
        let HostContext { leases: Some(leases), registry, .. } = &*self.shared.context else {
            return;
        };
        let replica = &self.replica;
        if registry.replica(replica.keyspace, replica.id).is_none() {
            replica.authority().publish(Standing::Out { elsewhere: false });
        }
        leases.seat(replica, &self.replicator, catalog).await;
    }

    /// Repeats a request to the shipper until it succeeds, with `failed` as the warning; false when
    /// the host is cancelled before.
    pub(super) async fn until_shipped<T, F>(
        &self,
        failed: &'static str,
        request: impl Fn() -> F,
    ) -> bool
    where
        F: Future<Output = Result<T, ShipError>>,
    {
        let mut pause = RETRY;
        loop {
            match self.shared.cancel.run_until_cancelled(request()).await {
                None => return false,
                Some(Ok(_)) => return true,
                // The node stops, and ends this too: nothing has failed.
                Some(Err(ShipError::Stopped)) => {}
                Some(Err(error)) => tracing::warn!(%error, "{failed}"),
            }
            self.shared.pause(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Makes checkpoints until a manifest covers the LSN.
    pub(super) fn cover_by_a_manifest(self: &Arc<Self>, lsn: Lsn) {
        if self.ship.status().manifest >= lsn
            || self.background.lock().covering.replace(lsn) == Some(lsn)
        {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            let failed = "a checkpoint that is waited for failed; it is tried again";
            if !this.until_shipped(failed, || this.ship.checkpoint(None)).await {
                return;
            }
            // A later version may have asked for a higher LSN meanwhile: that checkpoint is still
            // under way.
            this.background.lock().covering.take_if(|covering| *covering == lsn);
            this.shared.notify();
        });
    }
}
