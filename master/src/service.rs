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

use crate::api::{self, Answer, bucket, drain, evict, keyspace, node, operation, restore, ship};
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
        self.found()?;
        self.run_always(name, call).await
    }

    /// Refuses while the cluster that owns the bucket is not known.
    fn found(&self) -> Result<(), Status> {
        self.cluster.check_found().map_err(|error| status_of(&error))
    }

    /// Runs a call also while the cluster that owns the bucket is not known.
    async fn run_always(&self, name: &'static str, call: impl Future<Output = Answer>) -> Reply {
        // A span for traces; the call itself logs what it does.
        let call = call.instrument(tracing::info_span!("call of the master", call = name));
        let stopping = || Err(VastoError::new(ErrorCode::Unavailable, "this master is stopping; try again"));
        // Boxed: some calls are large futures, and all of them are rare.
        let outcome = self.cluster.shutdown.run_until_cancelled(Box::pin(call)).await.unwrap_or_else(stopping);
        reply(outcome)
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

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        // The client keeps its topology until it receives a newer one.
        let lost = |error: VastoError| status_of(&VastoError { code: ErrorCode::Unavailable, ..error });
        self.cluster.check_found().map_err(lost)?;
        let name = request.into_inner().keyspace;
        let mut topology = api::find(&self.cluster.state(), &name).map_err(|error| status_of(&error))?.topology();
        topology.mark_changed();
        let topologies = futures::stream::unfold(Some(topology), |watched| async {
            let mut watched = watched?;
            watched.changed().await.ok()?;
            let topology = watched.borrow_and_update().clone();
            // The final topology of a deleted keyspace ends the stream.
            let rest = topology.active.then_some(watched);
            Some((topology, rest))
        });
        let until_stop = topologies.map(Ok).take_until(self.cluster.shutdown.clone().cancelled_owned());
        Ok(Response::new(Box::pin(until_stop)))
    }

    async fn create_keyspace(&self, request: Request<v1::CreateKeyspaceRequest>) -> Reply {
        self.run("create_keyspace", keyspace::create(&self.cluster, request.into_inner())).await
    }

    async fn list_keyspaces(&self, _: Request<v1::Empty>) -> Reply {
        self.found()?;
        reply(Ok(keyspace::list(&self.cluster)))
    }

    async fn describe_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.found()?;
        reply(keyspace::describe(&self.cluster, &request.into_inner().name))
    }

    async fn delete_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run("delete_keyspace", keyspace::delete(&self.cluster, &request.into_inner().name)).await
    }

    async fn checkpoint_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run("checkpoint_keyspace", ship::checkpoint(&self.cluster, &request.into_inner().name)).await
    }

    async fn compact_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run("compact_keyspace", api::command(&self.cluster, &request.into_inner().name, Kind::Compact)).await
    }

    async fn resize_keyspace(&self, request: Request<v1::ResizeRequest>) -> Reply {
        self.run("resize_keyspace", keyspace::resize(&self.cluster, request.into_inner())).await
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

    async fn check_bucket(&self, request: Request<v1::CheckBucketRequest>) -> Reply {
        self.run_always("check_bucket", bucket::check(&self.cluster, request.into_inner().deep)).await
    }

    async fn collect_garbage(&self, request: Request<v1::CollectGarbageRequest>) -> Reply {
        self.run("collect_garbage", bucket::collect(&self.cluster, request.into_inner().dry_run)).await
    }

    async fn repair_bucket(&self, request: Request<v1::RepairBucketRequest>) -> Reply {
        self.run_always("repair_bucket", bucket::repair(&self.cluster, request.into_inner().accept_loss)).await
    }

    async fn list_operations(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(operation::list(&self.cluster)))
    }

    async fn show_operation(&self, request: Request<v1::OperationRequest>) -> Reply {
        reply(operation::show(&self.cluster, &request.into_inner().id))
    }

    async fn cancel_operation(&self, request: Request<v1::OperationRequest>) -> Reply {
        self.run("cancel_operation", operation::cancel(&self.cluster, &request.into_inner().id)).await
    }

    async fn list_nodes(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(node::list(&self.cluster)))
    }

    async fn cluster_status(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(node::status(&self.cluster)))
    }
}
