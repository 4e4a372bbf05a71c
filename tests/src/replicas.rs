//! Reads and writes a replica directly, bypassing the routing of the client.
//!
//! **Invariant:** two replicas are the same when each key has the same version on both: the hash of
//! the stored entry with its event time, kind and bytes.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tonic::transport::Channel;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{NodeId, ShardId};
use vasto_proto::v1;
use vasto_proto::v1::data_client::DataClient;
use vasto_proto::v1::replication_client::ReplicationClient;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;
use vasto_testkit::{DEADLINE, until};

use crate::catalog::CatalogDir;
use crate::cluster::Cluster;

/// Key to version.
pub type Contents = BTreeMap<Vec<u8>, u64>;

/// A connection to one replica, independent of the routing of clients.
pub struct Direct {
    client: DataClient<Channel>,
    request: v1::Request,
}

impl Direct {
    /// Connects to the node at an address.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn connect(address: &str, catalog: &Catalog, shard: ShardId) -> Result<Self> {
        let client = DataClient::connect(format!("http://{address}"));
        let client = client.await.with_context(|| format!("cannot reach {address}"))?;
        let request = v1::Request {
            id: 1,
            keyspace_id: catalog.keyspace.0,
            epoch: catalog.epoch.0,
            shard: shard.0,
            deadline_ms: 0,
            strict: false,
            op: None,
        };
        Ok(Self { client: client.max_decoding_message_size(64 << 20), request })
    }

    /// Sends one request and returns the reply.
    ///
    /// # Errors
    /// When the node is gone.
    pub async fn ask(&mut self, op: Op) -> Result<Reply> {
        let request = v1::Request { op: Some(op), ..self.request.clone() };
        self.client.execute(request).await?.into_inner().result.context("an empty reply")
    }

    /// Sends one write of a value under a key and returns the reply.
    ///
    /// # Errors
    /// When the node is gone.
    pub async fn put(&mut self, key: &str, value: &'static str) -> Result<Reply> {
        let put = v1::Put { value: value.into(), ..v1::Put::default() };
        let op = v1::WriteOp {
            key: Some(v1::KeyRef { key: key.to_owned().into(), partition_hash: None }),
            event_time: None,
            op: Some(v1::write_op::Op::Put(put)),
        };
        self.ask(Op::Write(v1::WriteRequest { ops: vec![op], ..v1::WriteRequest::default() })).await
    }

    /// Sends a write that arrives `late` after it was sent, over a stream as clients use it.
    ///
    /// # Errors
    /// When the node is gone.
    pub async fn write_late(&mut self, write: v1::WriteRequest, late: Duration) -> Result<Reply> {
        let (frames, outgoing) = tokio::sync::mpsc::channel(1);
        let stream = futures::stream::unfold(outgoing, async |mut outgoing| {
            Some((outgoing.recv().await?, outgoing))
        });
        let mut replies = self.client.stream(stream).await?.into_inner();
        tokio::time::sleep(late).await;
        let request = v1::Request { op: Some(Op::Write(write)), ..self.request.clone() };
        frames.send(v1::RequestFrame { requests: vec![request], sent_us: 1 }).await?;
        let frame = replies.message().await?.context("the stream ended")?;
        frame.replies.into_iter().next().and_then(|reply| reply.result).context("an empty reply")
    }
}

/// Returns all live rows of one shard as stored on one node.
///
/// # Errors
/// When the node cannot be reached or refuses the request.
pub async fn contents(address: &str, catalog: &Catalog, shard: ShardId) -> Result<Contents> {
    let mut direct = Direct::connect(address, catalog, shard).await?;
    let mut rows = Contents::new();
    let mut after = None;
    loop {
        match direct.ask(Op::Scan(v1::ScanRequest { after, ..v1::ScanRequest::default() })).await? {
            Reply::Scan(page) => {
                after = page.resume_after.or_else(|| page.rows.last().map(|row| row.key.clone()));
                for row in page.rows {
                    rows.insert(
                        row.key.to_vec(),
                        row.value.context("a row without a value")?.version,
                    );
                }
                if !page.more {
                    return Ok(rows);
                }
            }
            other => bail!("{address} answered a scan with {other:?}"),
        }
    }
}

/// Returns the gc floors of the replicas on these nodes.
///
/// # Errors
/// When a replica does not answer.
pub async fn floors_on(cluster: &Cluster, keyspace: &str, nodes: &[usize]) -> Result<Vec<u64>> {
    let tip = cluster.catalog(keyspace).await?.tip()?;
    let mut floors = Vec::new();
    for one in tip.placement.iter().flat_map(|shard| &shard.replicas) {
        let node = cluster.node_of(&one.node.to_string())?;
        if !nodes.contains(&node) {
            continue;
        }
        let port = cluster.port(node);
        let mut client = ReplicationClient::connect(format!("http://127.0.0.1:{port}")).await?;
        let request = v1::PositionRequest {
            keyspace_id: tip.keyspace.0,
            replica_id: one.replica.0,
            ..v1::PositionRequest::default()
        };
        floors.push(client.position(request).await?.into_inner().floor);
    }
    Ok(floors)
}

/// Waits until every replica has forgotten the deletes up to a commit time.
///
/// # Errors
/// When that takes too long.
pub async fn floors_above(cluster: &Cluster, keyspace: &str, commit_time: u64) -> Result<()> {
    let nodes: Vec<usize> = (0..cluster.nodes()).collect();
    let mut last = Vec::new();
    let risen = until("the gc floor to rise everywhere", DEADLINE, async || {
        last = floors_on(cluster, keyspace, &nodes).await.ok()?;
        last.iter().all(|floor| *floor > commit_time).then_some(())
    });
    risen.await.with_context(|| format!("{keyspace}: {last:?}, wanted above {commit_time}"))
}

/// Waits until all replicas of every shard hold the same; returns the number of keys.
///
/// # Errors
/// When replicas still differ at the deadline; the text says where.
pub async fn converged(cluster: &Cluster, keyspace: &str) -> Result<usize> {
    let catalog = cluster.catalog(keyspace).await?;
    converged_by(&catalog, async || cluster.json(&["cluster", "status"]).await).await
}

/// Waits as [`converged`] does, for a cluster that is described by its catalog and its
/// `cluster status`.
///
/// # Errors
/// As for [`converged`].
pub async fn converged_by(
    catalog: &CatalogDir,
    status: impl AsyncFn() -> Result<Value>,
) -> Result<usize> {
    let mut last = String::new();
    let look = async || differences(&status().await?, &catalog.tip()?).await;
    let outcome = until("all replicas to hold the same", DEADLINE, async || match look().await {
        Ok(Ok(keys)) => Some(keys),
        Ok(Err(difference)) => {
            last = difference;
            None
        }
        Err(error) => {
            last = format!("{error:#}");
            None
        }
    })
    .await;
    outcome.with_context(|| last)
}

async fn differences(status: &Value, catalog: &Catalog) -> Result<Result<usize, String>> {
    let address_of = |node: NodeId| -> Result<String> {
        let nodes = status["nodes"].as_array().context("no nodes")?;
        let found = nodes.iter().find(|one| one["node_id"] == node.to_string().as_str());
        Ok(found
            .and_then(|one| one["address"].as_str())
            .context("the node has no address")?
            .to_owned())
    };
    let mut keys = 0;
    for shard in &catalog.placement {
        ensure!(!shard.replicas.is_empty(), "shard {} has no replica", shard.shard);
        let mut first: Option<(NodeId, Contents)> = None;
        for one in &shard.replicas {
            let rows = contents(&address_of(one.node)?, catalog, shard.shard).await?;
            let Some((node, expected)) = &first else {
                keys += rows.len();
                first = Some((one.node, rows));
                continue;
            };
            if rows != *expected {
                let differs =
                    expected.iter().find(|(key, version)| rows.get(*key) != Some(version));
                let differs =
                    differs.or_else(|| rows.iter().find(|(key, _)| !expected.contains_key(*key)));
                let key = differs
                    .map(|(key, _)| String::from_utf8_lossy(key).into_owned())
                    .unwrap_or_default();
                return Ok(Err(format!(
                    "shard {}: {} has {} rows, {} has {}; for instance {key} differs",
                    shard.shard,
                    node,
                    expected.len(),
                    one.node,
                    rows.len()
                )));
            }
        }
    }
    Ok(Ok(keys))
}
