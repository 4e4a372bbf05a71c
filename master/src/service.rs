//! The `Master` service: the wire around `admin`, and topologies for clients.
//!
//! **Invariant:** a subscriber gets the newest topology at once and then only the newest again; a
//! stuck one delays nobody. Every call ends when the master stops.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;
use vasto_proto::v1::{self, command::Kind, master_server};

use crate::admin;
use crate::cluster::Cluster;
use crate::{moves, upkeep};

/// Serves people and clients.
pub(crate) struct MasterService {
    pub(crate) cluster: Arc<Cluster>,
}

type Reply = Result<Response<v1::JsonReply>, Status>;

impl MasterService {
    /// Runs a call until it ends or the master stops; what it leaves undone is undone like after a
    /// crash.
    async fn run(&self, call: impl Future<Output = Result<String, VastoError>>) -> Reply {
        let stopping = || Err(VastoError::new(ErrorCode::Unavailable, "this master is stopping; try again"));
        // Boxed: some calls are large futures, and all of them are rare.
        let outcome = self.cluster.shutdown.run_until_cancelled(Box::pin(call)).await.unwrap_or_else(stopping);
        reply(outcome)
    }
}

fn reply(outcome: Result<String, VastoError>) -> Reply {
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
        let name = request.into_inner().keyspace;
        let mut topology = admin::find(&self.cluster.state(), &name).map_err(|error| status_of(&error))?.topology();
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
        self.run(admin::create(&self.cluster, request.into_inner())).await
    }

    async fn list_keyspaces(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(admin::list(&self.cluster)))
    }

    async fn describe_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        reply(admin::describe(&self.cluster, &request.into_inner().name))
    }

    async fn delete_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run(admin::delete(&self.cluster, &request.into_inner().name)).await
    }

    async fn checkpoint_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run(admin::command(&self.cluster, &request.into_inner().name, Kind::Checkpoint)).await
    }

    async fn compact_keyspace(&self, request: Request<v1::KeyspaceRequest>) -> Reply {
        self.run(admin::command(&self.cluster, &request.into_inner().name, Kind::Compact)).await
    }

    async fn resize_keyspace(&self, request: Request<v1::ResizeRequest>) -> Reply {
        self.run(admin::resize(&self.cluster, request.into_inner())).await
    }

    async fn evict_replica(&self, request: Request<v1::EvictRequest>) -> Reply {
        self.run(admin::evict(&self.cluster, request.into_inner())).await
    }

    async fn restore_keyspace(&self, request: Request<v1::RestoreRequest>) -> Reply {
        self.run(moves::restore(&self.cluster, request.into_inner())).await
    }

    async fn empty_node(&self, request: Request<v1::EmptyNodeRequest>) -> Reply {
        self.run(moves::empty(&self.cluster, request.into_inner())).await
    }

    async fn cordon_node(&self, request: Request<v1::CordonNodeRequest>) -> Reply {
        self.run(admin::cordon_node(&self.cluster, request.into_inner())).await
    }

    async fn check_bucket(&self, request: Request<v1::CheckBucketRequest>) -> Reply {
        self.run(upkeep::check(&self.cluster, request.into_inner().deep)).await
    }

    async fn collect_garbage(&self, request: Request<v1::CollectGarbageRequest>) -> Reply {
        self.run(upkeep::collect(&self.cluster, request.into_inner().dry_run)).await
    }

    async fn list_operations(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(admin::operations(&self.cluster)))
    }

    async fn show_operation(&self, request: Request<v1::OperationRequest>) -> Reply {
        reply(admin::operation(&self.cluster, &request.into_inner().id))
    }

    async fn cancel_operation(&self, request: Request<v1::OperationRequest>) -> Reply {
        self.run(admin::cancel(&self.cluster, &request.into_inner().id)).await
    }

    async fn list_nodes(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(admin::nodes(&self.cluster)))
    }

    async fn cluster_status(&self, _: Request<v1::Empty>) -> Reply {
        reply(Ok(admin::status(&self.cluster)))
    }
}
