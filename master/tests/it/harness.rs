//! Starts masters and waits for conditions; a wait that times out fails with its description.

use std::time::Duration;

use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use vasto_core::ErrorCode;
use vasto_master::{Master, MasterConfig, RunningMaster};
use vasto_proto::convert::error_of;
use vasto_proto::v1;
use vasto_proto::v1::master_client::MasterClient;
use vasto_shipping::BucketOptions;

pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn config(bucket_url: &str) -> MasterConfig {
    MasterConfig {
        bucket_url: bucket_url.to_owned(),
        bucket_options: BucketOptions::default(),
        listen: "127.0.0.1:0".parse().unwrap(),
        node_silence: Duration::from_secs(10),
        // The nodes of most tests do not listen.
        dial_back: false,
        replace_after: Duration::ZERO,
        retention: Default::default(),
        gc_interval: Duration::ZERO,
        prices: Default::default(),
        rebalance: false,
        moves_at_once: 4,
    }
}

pub(crate) struct TestMaster {
    pub running: RunningMaster,
    pub url: String,
    pub client: MasterClient<Channel>,
    shutdown: CancellationToken,
}

impl TestMaster {
    pub(crate) async fn start(bucket_url: &str) -> Self {
        Self::with(config(bucket_url)).await
    }

    pub(crate) async fn with(config: MasterConfig) -> Self {
        let shutdown = CancellationToken::new();
        let running = Master::start(config, shutdown.clone()).await.unwrap();
        let url = format!("http://{}", running.listen);
        let client = MasterClient::connect(url.clone()).await.unwrap();
        Self { running, url, client, shutdown }
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        within("the master to stop", self.running.stopped()).await;
    }

    /// Subscribes to the topologies of a keyspace.
    pub(crate) async fn watch(&self, keyspace: &str) -> tonic::Streaming<v1::Topology> {
        let request = v1::WatchRequest { keyspace: keyspace.into() };
        self.client.clone().watch(request).await.unwrap().into_inner()
    }

    pub(crate) async fn create(&self, name: &str, shards: u32) -> Result<Value, tonic::Status> {
        let request = v1::CreateKeyspaceRequest {
            name: name.into(),
            shards,
            replicas: 1,
            quarantine_ms: Some(0),
            ..v1::CreateKeyspaceRequest::default()
        };
        json(within("a create", self.client.clone().create_keyspace(request)).await)
    }

    pub(crate) async fn describe(&self, name: &str) -> Result<Value, tonic::Status> {
        json(self.client.clone().describe_keyspace(v1::KeyspaceRequest { name: name.into() }).await)
    }

    pub(crate) async fn resize(
        &self,
        name: &str,
        shards: u32,
        plan_only: bool,
    ) -> Result<Value, tonic::Status> {
        let request = v1::ResizeRequest { name: name.into(), shards, plan_only, max_rate: None };
        json(within("a resize", self.client.clone().resize_keyspace(request)).await)
    }

    pub(crate) async fn operation(&self, id: &str) -> Value {
        json(self.client.clone().show_operation(v1::OperationRequest { id: id.into() }).await)
            .unwrap()
    }

    pub(crate) async fn status(&self) -> Value {
        json(self.client.clone().cluster_status(v1::Empty {}).await).unwrap()
    }

    /// Waits for an operation to be in a state or step, and returns it.
    pub(crate) async fn operation_until(&self, id: &str, field: &str, want: &str) -> Value {
        eventually(&format!("operation {id} to be {field}={want}"), async || {
            let operation = self.operation(id).await;
            (operation[field] == want).then_some(operation)
        })
        .await
    }
}

pub(crate) fn json(
    reply: Result<tonic::Response<v1::JsonReply>, tonic::Status>,
) -> Result<Value, tonic::Status> {
    reply.map(|reply| serde_json::from_str(&reply.into_inner().json).unwrap())
}

pub(crate) fn code(result: Result<Value, tonic::Status>) -> (ErrorCode, String) {
    let error = error_of(&result.unwrap_err());
    (error.code, error.message)
}

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// Polls until there is an answer.
pub(crate) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    within(what, async {
        loop {
            if let Some(value) = ask().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
}
