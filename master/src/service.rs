//! The `Master` service: the gRPC layer over `api`, and topologies for clients.
//!
//! **Invariant:** a subscriber gets the newest topology at once and then always only the newest; a
//! slow subscriber delays no other. Every call ends when the master stops.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use tracing::Instrument;
use vasto_core::error::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;
use vasto_proto::v1::{self, command::Kind, master_server};

use crate::api::{
    self, Answer, bucket, drain, evict, keyspace, node, operation, rebalance, restore, ship,
};
use crate::cluster::Cluster;

/// The service for people and clients.
pub(crate) struct MasterService {
    pub(crate) cluster: Arc<Cluster>,
}

type Reply = Result<Response<v1::JsonReply>, Status>;

impl MasterService {
    /// Runs a call until it ends or the master stops; unfinished work is then cleaned up as after a
    /// crash.
    async fn run(&self, name: &'static str, call: impl Future<Output = Answer>) -> Reply {
        self.check_unrestricted()?;
        self.run_always(name, call).await
    }

    /// Refuses while the cluster that owns the bucket is not known.
    fn check_unrestricted(&self) -> Result<(), Status> {
        self.cluster.check_unrestricted().map_err(|error| status_of(&error))
    }

    /// Runs a call also while the cluster that owns the bucket is not known.
    async fn run_always(&self, name: &'static str, call: impl Future<Output = Answer>) -> Reply {
        // A span for traces; the call itself logs what it does.
        let call = call.instrument(tracing::info_span!("call of the master", call = name));
        let shutdown = &self.cluster.shutdown;
        if shutdown.is_cancelled() {
            return reply(Err(api::stopping()));
        }
        // What the call has written so far stays: a client must not take a call that was cut off
        // for one without effect.
        let cut_off = || Err(api::unsure(name, api::STOPPED_MEANWHILE));
        // Boxed: some calls are large futures, and all of them are rare.
        reply(shutdown.run_until_cancelled(Box::pin(call)).await.unwrap_or_else(cut_off))
    }
}

fn reply(outcome: Answer) -> Reply {
    match outcome {
        Ok(json) => Ok(Response::new(v1::JsonReply { json })),
        Err(error) => {
            tracing::debug!(code = ?error.code, %error, "answered an error");
            Err(status_of(&error))
        }
    }
}

#[tonic::async_trait]
impl master_server::Master for MasterService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::Topology, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        // The client keeps its topology until it receives a newer one.
        let retried =
            |error: VastoError| status_of(&VastoError { code: ErrorCode::Unavailable, ..error });
        self.cluster.check_unrestricted().map_err(retried)?;
        let name = request.into_inner().keyspace;
        let mut topology =
            api::find(&self.cluster.state(), &name).map_err(|error| status_of(&error))?.topology();
        topology.mark_changed();
        let topologies = futures::stream::unfold(Some(topology), |watched| async {
            let mut watched = watched?;
            watched.changed().await.ok()?;
            let topology = watched.borrow_and_update().clone();
            // The final topology of a deleted keyspace ends the stream.
            let rest = topology.active.then_some(watched);
            Some((topology, rest))
        });
        let until_stop =
            topologies.map(Ok).take_until(self.cluster.shutdown.clone().cancelled_owned());
        Ok(Response::new(Box::pin(until_stop)))
    }

    async fn create_keyspace(&self, request: Request<v1::CreateKeyspaceRequest>) -> Reply {
        self.run("create_keyspace", keyspace::create(&self.cluster, request.into_inner())).await
    }

    async fn list_keyspaces(&self, _: Request<v1::Empty>) -> Reply {
        self.check_unrestricted()?;
        reply(Ok(keyspace::list(&self.cluster)))
    }

    async fn describe_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.check_unrestricted()?;
        reply(keyspace::describe(&self.cluster, &request.into_inner().name))
    }

    async fn delete_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run("delete_keyspace", keyspace::delete(&self.cluster, &request.into_inner().name))
            .await
    }

    async fn checkpoint_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run("checkpoint_keyspace", ship::checkpoint(&self.cluster, &request.into_inner().name))
            .await
    }

    async fn compact_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run(
            "compact_keyspace",
            api::command(&self.cluster, &request.into_inner().name, Kind::Compact),
        )
        .await
    }

    async fn resize_keyspace(&self, request: Request<v1::ResizeRequest>) -> Reply {
        self.run("resize_keyspace", keyspace::resize(&self.cluster, request.into_inner())).await
    }

    async fn end_quarantine(&self, request: Request<v1::EndQuarantineRequest>) -> Reply {
        self.run("end_quarantine", keyspace::end_quarantine(&self.cluster, request.into_inner()))
            .await
    }

    async fn evict_replica(&self, request: Request<v1::EvictRequest>) -> Reply {
        self.run("evict_replica", evict::evict(&self.cluster, request.into_inner())).await
    }

    async fn restore_keyspace(&self, request: Request<v1::RestoreRequest>) -> Reply {
        self.run("restore_keyspace", restore::restore(&self.cluster, request.into_inner())).await
    }

    async fn empty_node(&self, request: Request<v1::EmptyNodeRequest>) -> Reply {
        self.run("empty_node", drain::drain(&self.cluster, request.into_inner())).await
    }

    async fn cordon_node(&self, request: Request<v1::CordonNodeRequest>) -> Reply {
        self.run("cordon_node", node::cordon_node(&self.cluster, request.into_inner())).await
    }

    async fn rebalance(&self, request: Request<v1::RebalanceRequest>) -> Reply {
        self.run("rebalance", rebalance::rebalance(&self.cluster, request.into_inner())).await
    }

    async fn check_bucket(&self, request: Request<v1::CheckBucketRequest>) -> Reply {
        self.run_always("check_bucket", bucket::check(&self.cluster, request.into_inner().deep))
            .await
    }

    async fn collect_garbage(&self, request: Request<v1::CollectGarbageRequest>) -> Reply {
        self.run("collect_garbage", bucket::collect(&self.cluster, request.into_inner().dry_run))
            .await
    }

    async fn repair_bucket(&self, request: Request<v1::RepairBucketRequest>) -> Reply {
        self.run_always(
            "repair_bucket",
            bucket::repair(&self.cluster, request.into_inner().accept_loss),
        )
        .await
    }

    async fn list_operations(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(operation::list(&self.cluster)))
    }

    async fn show_operation(&self, request: Request<v1::OperationRequest>) -> Reply {
        reply(operation::show(&self.cluster, &request.into_inner().id))
    }

    async fn cancel_operation(&self, request: Request<v1::OperationRequest>) -> Reply {
        self.run("cancel_operation", operation::cancel(&self.cluster, &request.into_inner().id))
            .await
    }

    async fn pace_operation(&self, request: Request<v1::PaceOperationRequest>) -> Reply {
        self.run("pace_operation", operation::pace(&self.cluster, request.into_inner())).await
    }

    async fn list_nodes(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(node::list(&self.cluster)))
    }

    async fn cluster_status(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(node::status(&self.cluster)))
    }

    async fn check_cluster(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(node::check(&self.cluster)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use tokio::sync::Notify;
    use tokio_util::sync::CancellationToken;
    use vasto_proto::convert::error_of;
    use vasto_testkit::faulty::Faulty;

    use super::*;
    use crate::cluster::Settings;

    #[tokio::test]
    async fn a_change_that_a_stopping_master_cuts_off_has_an_unknown_outcome() {
        let settings = Settings {
            dial_back: false,
            node_silence: Duration::from_secs(10),
            retention: Default::default(),
            prices: Default::default(),
            rebalance: false,
            moves_at_once: 4,
        };
        let bucket = vasto_shipping::Bucket::from_store("memory://b", Faulty::in_memory());
        let service = MasterService {
            cluster: Cluster::new("c-1".into(), bucket, settings, CancellationToken::new()),
        };
        let begun = Notify::new();
        let write = async {
            begun.notify_one();
            std::future::pending().await
        };
        let stop = async {
            begun.notified().await;
            service.cluster.shutdown.cancel();
        };
        let (cut_off, ()) = tokio::join!(service.run("resize_keyspace", write), stop);
        let cut_off = error_of(&cut_off.unwrap_err());
        assert_eq!(cut_off.code, ErrorCode::Unknown);
        assert!(cut_off.message.contains("vasto keyspace list"), "{cut_off}");
        let refused = service
            .run("resize_keyspace", async { unreachable!("a stopped master begins nothing") })
            .await;
        assert_eq!(error_of(&refused.unwrap_err()).code, ErrorCode::Unavailable);
    }
}
