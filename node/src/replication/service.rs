//! Serves `vasto.v1.Replication`: requests of other nodes to the replicas here.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use tonic::{Request, Response, Status, Streaming};
use vasto_proto::v1;
use vasto_proto::v1::replication_server::Replication;

use super::{position, pull};
use crate::build::resize::tail::{self, TailStream};
use crate::lease::Leases;
use crate::registry::NodeRegistry;

/// The service over the node's replicas.
#[derive(Clone)]
pub(crate) struct ReplicationService {
    registry: Arc<NodeRegistry>,
    leases: Option<Leases>,
}

impl ReplicationService {
    /// Creates the service over the node's replicas; without leases it refuses lease links.
    pub(crate) fn new(registry: Arc<NodeRegistry>, leases: Option<Leases>) -> Self {
        Self { registry, leases }
    }
}

type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Replication for ReplicationService {
    type TailStream = TailStream;
    type PullStream = Frames<v1::PullFrame>;
    type LeaseStream = Frames<v1::LeaseReply>;

    async fn tail(
        &self,
        request: Request<v1::TailRequest>,
    ) -> Result<Response<TailStream>, Status> {
        tail::serve(&self.registry, &request.into_inner()).map(Response::new)
    }

    async fn pull(
        &self,
        request: Request<Streaming<v1::PullMessage>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let frames = pull::serve(&self.registry, request.into_inner()).await?;
        Ok(Response::new(Box::pin(frames)))
    }

    async fn lease(
        &self,
        request: Request<Streaming<v1::LeaseRequest>>,
    ) -> Result<Response<Self::LeaseStream>, Status> {
        let Some(leases) = &self.leases else {
            return Err(Status::unavailable("this node has only just started; try again"));
        };
        Ok(Response::new(Box::pin(leases.serve(request.into_inner()).await)))
    }

    async fn position(
        &self,
        request: Request<v1::PositionRequest>,
    ) -> Result<Response<v1::PositionReply>, Status> {
        position::serve(&self.registry, request.into_inner()).await.map(Response::new)
    }

    async fn promise(
        &self,
        request: Request<v1::PromiseRequest>,
    ) -> Result<Response<v1::PositionReply>, Status> {
        position::promise(&self.registry, request.into_inner()).await.map(Response::new)
    }
}
