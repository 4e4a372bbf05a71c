//! A small cluster behind the real gRPC services, with injected faults: one master and nodes that
//! share a store, so that a change of the topology moves keys in an instant.

#![allow(clippy::unwrap_used, dead_code)]

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use vasto_client::{Keyspace, Vasto};
use vasto_core::catalog::Ack;
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::hash::partition_hash;
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, NodeId, ReplicaId, ShardId};
use vasto_core::limits::MESSAGE_BYTES_MAX;
use vasto_core::topology::{Route, Topology};
use vasto_proto::convert::{error_to_wire, status_of, topology_to_wire};
use vasto_proto::v1;
use vasto_proto::v1::data_server::{Data, DataServer};
use vasto_proto::v1::master_server::{Master, MasterServer};
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;

/// The reaction of a node to the next request.
#[derive(Clone)]
pub(crate) enum Fault {
    /// Answers with an error; nothing is done.
    Refuse(VastoError),
    /// Ends the stream; nothing is done.
    DropBefore,
    /// Executes the request, then ends the stream without an answer.
    DropAfter,
    /// Executes the request, and never answers.
    Silent,
    /// Changes the topology that nodes apply, then goes on with the request.
    Obey(Topology),
    /// Refuses every read of more keys than this with this code.
    KeysAtMost(usize, ErrorCode),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub value: Bytes,
    pub partition_hash: u64,
    pub event_time: u64,
    pub ttl_ms: Option<u64>,
}

#[derive(Default)]
pub(crate) struct NodeState {
    /// Consumed one by one, except the last if `sticky`.
    pub faults: VecDeque<Fault>,
    pub sticky: bool,
    pub requests: u64,
    pub frames: u64,
    pub bytes: u64,
    pub streams: u64,
    pub writes: Vec<v1::WriteRequest>,
}

pub(crate) struct FakeCluster {
    /// The topology that nodes apply.
    pub topology: Topology,
    /// Entries by user key and hash of the partition.
    pub store: BTreeMap<(Bytes, u64), Entry>,
    pub nodes: BTreeMap<NodeId, NodeState>,
    pub clock: u64,
    /// The only counter.
    pub sum: i64,
    pub page_rows: usize,
    /// Stored keys that a scan page examines.
    pub page_examined: usize,
    /// Answers of the master, by the name of the call.
    pub json: BTreeMap<&'static str, VecDeque<Result<String, Status>>>,
    pub calls: Vec<String>,
    pub scans: Vec<v1::ScanRequest>,
}

pub(crate) struct Cluster {
    pub state: Arc<Mutex<FakeCluster>>,
    /// The topology that the master publishes.
    pub published: watch::Sender<Topology>,
    pub changed: watch::Sender<u64>,
    pub master: Running,
    pub nodes: Vec<Running>,
}

/// A server in a runtime of its own, so that stopping it closes its connections as a kill does.
pub(crate) struct Running {
    pub address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Running {
    fn start<F: Future<Output = ()> + Send + 'static>(
        address: Option<SocketAddr>,
        serve: impl FnOnce(TcpListener) -> F + Send + 'static,
    ) -> Self {
        let socket =
            std::net::TcpListener::bind(address.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap()))
                .unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = socket.local_addr().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(async move { serve(TcpListener::from_std(socket).unwrap()).await });
        Self { address, runtime: Some(runtime) }
    }

    /// Closes the connections and the port.
    pub(crate) async fn stop(mut self) {
        let runtime = self.runtime.take().unwrap();
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(Duration::from_secs(10)))
            .await
            .unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone)]
struct Shared {
    state: Arc<Mutex<FakeCluster>>,
    published: watch::Sender<Topology>,
    changed: watch::Sender<u64>,
    me: NodeId,
}

pub(crate) fn topology(version: u64, nodes: &[(NodeId, Option<String>)]) -> Topology {
    Topology {
        keyspace: KeyspaceId(7),
        name: "ks1".into(),
        version: CatalogVersion(version),
        epoch: Epoch(version),
        active: true,
        ack: Ack::Fsync,
        ttl_ms: None,
        shards: nodes
            .iter()
            .enumerate()
            .map(|(shard, (node, address))| {
                vec![Route {
                    replica: ReplicaId(shard as u64 + 1),
                    node: *node,
                    address: address.clone(),
                    zone: String::new(),
                }]
            })
            .collect(),
    }
}

impl Cluster {
    /// Starts `nodes` nodes with one shard each.
    pub(crate) async fn start(nodes: usize) -> Self {
        let state = Arc::new(Mutex::new(FakeCluster {
            topology: topology(1, &[]),
            store: BTreeMap::new(),
            nodes: BTreeMap::new(),
            clock: 1_000,
            sum: 0,
            page_rows: 1_000,
            page_examined: usize::MAX,
            json: BTreeMap::new(),
            calls: Vec::new(),
            scans: Vec::new(),
        }));
        let (published, changed) = (watch::Sender::new(topology(0, &[])), watch::Sender::new(0));
        let master = start_master(&state, &published, &changed, None);
        let mut cluster = Self { state, published, changed, master, nodes: Vec::new() };
        for _ in 0..nodes {
            cluster.add_node();
        }
        let first = cluster.topology(1, nodes);
        cluster.set_topology(first.clone());
        cluster.tell(first);
        cluster
    }

    pub(crate) fn add_node(&mut self) -> NodeId {
        let id = NodeId(self.nodes.len() as u64 + 1);
        self.state.lock().nodes.insert(id, NodeState::default());
        let node = self.serve_node(id);
        self.nodes.push(node);
        id
    }

    /// Starts a node with this id on a new port.
    pub(crate) fn serve_node(&self, id: NodeId) -> Running {
        let shared = Shared {
            state: self.state.clone(),
            published: self.published.clone(),
            changed: self.changed.clone(),
            me: id,
        };
        let service = DataServer::new(shared.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Running::start(None, |listener| async move {
            let server = Server::builder()
                .initial_stream_window_size(4 << 20)
                .initial_connection_window_size(64 << 20);
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            { server }.add_service(service).serve_with_incoming(incoming).await.unwrap();
        })
    }

    /// Returns a topology with one shard on each of the first `nodes` nodes.
    pub(crate) fn topology(&self, version: u64, nodes: usize) -> Topology {
        let nodes: Vec<_> = self.nodes[..nodes]
            .iter()
            .enumerate()
            .map(|(at, node)| (NodeId(at as u64 + 1), Some(node.address.to_string())))
            .collect();
        topology(version, &nodes)
    }

    /// Returns a topology of one shard with a replica on each node, in this order of preference.
    pub(crate) fn replicated(&self, version: u64, order: &[u64]) -> Topology {
        let route = |id: &u64| Route {
            replica: ReplicaId(*id),
            node: NodeId(*id),
            address: Some(self.nodes[*id as usize - 1].address.to_string()),
            zone: format!("zone-{id}"),
        };
        Topology { shards: vec![order.iter().map(route).collect()], ..topology(version, &[]) }
    }

    /// Sets the topology that nodes apply and clients receive.
    pub(crate) fn publish(&self, topology: Topology) {
        self.set_topology(topology.clone());
        self.tell(topology);
    }

    pub(crate) fn set_topology(&self, topology: Topology) {
        self.state.lock().topology = topology;
    }

    pub(crate) fn tell(&self, topology: Topology) {
        self.published.send_replace(topology);
    }

    pub(crate) fn fault(&self, node: u64, fault: Fault) {
        self.state.lock().nodes.get_mut(&NodeId(node)).unwrap().faults.push_back(fault);
    }

    pub(crate) fn always(&self, node: u64, fault: Fault) {
        let mut state = self.state.lock();
        let node = state.nodes.get_mut(&NodeId(node)).unwrap();
        node.faults = VecDeque::from([fault]);
        node.sticky = true;
    }

    pub(crate) fn answer(&self, call: &'static str, answer: Result<&str, Status>) {
        self.state.lock().json.entry(call).or_default().push_back(answer.map(str::to_owned));
    }

    pub(crate) fn requests(&self) -> u64 {
        self.state.lock().nodes.values().map(|node| node.requests).sum()
    }

    /// Waits until the servers' state satisfies the condition.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&FakeCluster) -> bool) {
        let mut changed = self.changed.subscribe();
        let wait = async {
            while !condition(&self.state.lock()) {
                changed.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait)
            .await
            .unwrap_or_else(|_| panic!("never: {what}"));
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.master.address)
    }

    pub(crate) async fn vasto(&self) -> Vasto {
        Vasto::connect(&self.url()).await.unwrap()
    }

    pub(crate) async fn keyspace(&self) -> Keyspace {
        self.vasto().await.keyspace("ks1").await.unwrap()
    }

    /// Stops the master; [`Cluster::master_back`] starts it again at the same address.
    pub(crate) async fn stop_master(&mut self) -> SocketAddr {
        let address = self.master.address;
        let placeholder = start_master(&self.state, &self.published, &self.changed, None);
        std::mem::replace(&mut self.master, placeholder).stop().await;
        address
    }

    pub(crate) fn master_back(&mut self, address: SocketAddr) {
        self.master = start_master(&self.state, &self.published, &self.changed, Some(address));
    }
}

fn start_master(
    state: &Arc<Mutex<FakeCluster>>,
    published: &watch::Sender<Topology>,
    changed: &watch::Sender<u64>,
    address: Option<SocketAddr>,
) -> Running {
    let shared = Shared {
        state: state.clone(),
        published: published.clone(),
        changed: changed.clone(),
        me: NodeId(0),
    };
    Running::start(address, |listener| async move {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Server::builder()
            .add_service(MasterServer::new(shared))
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    })
}

enum Did {
    Answer(Reply),
    Nothing,
    End,
}

fn refuse(code: ErrorCode, message: &str, topology: Option<&Topology>) -> Reply {
    Reply::Error(error_to_wire(&VastoError::new(code, message), topology))
}

impl FakeCluster {
    fn owns(&self, node: NodeId, shard: u32, hash: u64) -> bool {
        let here = self.topology.shard_of(hash) == ShardId(shard);
        here && self.topology.routes(ShardId(shard)).iter().any(|route| route.node == node)
    }

    fn is_primary(&self, node: NodeId, shard: u32) -> bool {
        self.topology.routes(ShardId(shard)).first().is_some_and(|route| route.node == node)
    }

    fn serve(&mut self, node: NodeId, request: &v1::Request) -> Reply {
        let wrong =
            |state: &FakeCluster| refuse(ErrorCode::WrongEpoch, "not mine", Some(&state.topology));
        let hash_of =
            |key: &v1::KeyRef| key.partition_hash.unwrap_or_else(|| partition_hash(&key.key));
        match request.op.as_ref().unwrap() {
            Op::Get(get) => {
                if !get.keys.iter().all(|key| self.owns(node, request.shard, hash_of(key))) {
                    return wrong(self);
                }
                let values = get.keys.iter().map(|key| v1::MaybeValue {
                    value: self.store.get(&(key.key.clone(), hash_of(key))).map(to_wire),
                });
                Reply::Get(v1::GetReply { values: values.collect() })
            }
            Op::Write(write) => {
                self.nodes.get_mut(&node).unwrap().writes.push(write.clone());
                let keys = || write.ops.iter().map(|op| op.key.as_ref().unwrap());
                if !keys().all(|key| self.owns(node, request.shard, hash_of(key))) {
                    return wrong(self);
                }
                let modifies =
                    |op: &v1::WriteOp| matches!(op.op, Some(v1::write_op::Op::AddI64(_)));
                if write.ops.iter().any(modifies) && !self.is_primary(node, request.shard) {
                    return refuse(ErrorCode::NotPrimary, "not the primary", Some(&self.topology));
                }
                let outcomes = write
                    .ops
                    .iter()
                    .map(|op| self.apply(op, hash_of(op.key.as_ref().unwrap())))
                    .collect();
                Reply::Write(v1::WriteReply { outcomes })
            }
            Op::Scan(scan) => {
                self.scans.push(scan.clone());
                let mine = self
                    .topology
                    .routes(ShardId(request.shard))
                    .first()
                    .is_some_and(|route| route.node == node);
                if !mine || request.epoch < self.topology.epoch.0 {
                    return wrong(self);
                }
                let limit = self.page_rows.min(if scan.limit == 0 {
                    usize::MAX
                } else {
                    scan.limit as usize
                });
                let after = scan
                    .after
                    .clone()
                    .map(|key| (key, scan.after_partition_hash.unwrap_or(u64::MAX)));
                let mut behind = self.store.iter().filter(|(place, _)| {
                    place.0.starts_with(&scan.prefix)
                        && after.as_ref().is_none_or(|after| *place > after)
                });
                // A node examines keys that it does not return: here, those of other shards and
                // partitions.
                let examined: Vec<_> = behind.by_ref().take(self.page_examined).collect();
                let mut rows = examined.iter().filter(|(_, entry)| {
                    scan.partition_hash.is_none_or(|hash| hash == entry.partition_hash)
                        && self.topology.shard_of(entry.partition_hash) == ShardId(request.shard)
                });
                let page: Vec<v1::Row> = rows
                    .by_ref()
                    .take(limit)
                    .map(|((key, hash), entry)| v1::Row {
                        key: key.clone(),
                        partition_hash: (*hash != partition_hash(key)).then_some(*hash),
                        value: (!scan.keys_only).then(|| to_wire(entry)),
                    })
                    .collect();
                let full = rows.next().is_some();
                let cut = behind.next().is_some();
                let resume_after =
                    examined.last().filter(|_| cut && !full).map(|((key, _), _)| key.clone());
                Reply::Scan(v1::ScanReply { rows: page, more: full || cut, resume_after })
            }
        }
    }

    fn apply(&mut self, op: &v1::WriteOp, partition_hash: u64) -> v1::WriteOutcome {
        let key = &op.key.as_ref().unwrap().key;
        self.clock += 1;
        let event_time = op.event_time.unwrap_or(self.clock);
        let place = (key.clone(), partition_hash);
        if let Some(stands) = self.store.get(&place).filter(|entry| entry.event_time > event_time) {
            let kind = v1::write_outcome::Kind::Superseded as i32;
            return v1::WriteOutcome { kind, event_time: stands.event_time, value: None };
        }
        match op.op.as_ref().unwrap() {
            v1::write_op::Op::Put(put) => {
                let (value, ttl_ms) = (put.value.clone(), put.ttl_ms);
                self.store.insert(place, Entry { value, partition_hash, event_time, ttl_ms });
            }
            v1::write_op::Op::Delete(_) => {
                self.store.remove(&place);
            }
            v1::write_op::Op::AddI64(addend) => {
                self.sum += addend;
                let payload = Some(v1::value::Payload::I64(self.sum));
                let value = Some(v1::Value { payload, event_time, expires_at: None, version: 99 });
                return v1::WriteOutcome {
                    kind: v1::write_outcome::Kind::Applied as i32,
                    event_time,
                    value,
                };
            }
            other => panic!("this stand-in does not do {other:?}"),
        }
        v1::WriteOutcome { kind: v1::write_outcome::Kind::Applied as i32, event_time, value: None }
    }
}

fn to_wire(entry: &Entry) -> v1::Value {
    v1::Value {
        payload: Some(v1::value::Payload::Data(entry.value.clone())),
        event_time: entry.event_time,
        expires_at: entry.ttl_ms.map(|ms| entry.event_time + ms * 1_000),
        version: 99,
    }
}

impl Shared {
    fn handle(&self, request: v1::Request, bytes: u64) -> Did {
        let mut state = self.state.lock();
        let state = &mut *state;
        let did = {
            let node = state.nodes.get_mut(&self.me).unwrap();
            node.requests += 1;
            node.bytes += bytes;
            let fault = if node.sticky && node.faults.len() == 1 {
                node.faults.front().cloned()
            } else {
                node.faults.pop_front()
            };
            match fault {
                None => Did::Answer(state.serve(self.me, &request)),
                Some(Fault::Refuse(error)) => {
                    Did::Answer(Reply::Error(error_to_wire(&error, None)))
                }
                Some(Fault::DropBefore) => Did::End,
                Some(Fault::DropAfter) => {
                    state.serve(self.me, &request);
                    Did::End
                }
                Some(Fault::Silent) => {
                    state.serve(self.me, &request);
                    Did::Nothing
                }
                Some(Fault::Obey(topology)) => {
                    state.topology = topology;
                    Did::Answer(state.serve(self.me, &request))
                }
                Some(Fault::KeysAtMost(most, code)) => match &request.op {
                    Some(Op::Get(get)) if get.keys.len() > most => {
                        Did::Answer(refuse(code, "too many", None))
                    }
                    _ => Did::Answer(state.serve(self.me, &request)),
                },
            }
        };
        self.changed.send_modify(|count| *count += 1);
        did
    }
}

#[tonic::async_trait]
impl Data for Shared {
    type StreamStream = ReceiverStream<Result<v1::ReplyFrame, Status>>;

    async fn stream(
        &self,
        request: Request<Streaming<v1::RequestFrame>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let (replies, outgoing) = mpsc::channel(16);
        let mut frames = request.into_inner();
        let me = self.clone();
        me.state.lock().nodes.get_mut(&me.me).unwrap().streams += 1;
        tokio::spawn(async move {
            while let Some(Ok(frame)) = frames.next().await {
                me.state.lock().nodes.get_mut(&me.me).unwrap().frames += 1;
                let mut answers = Vec::new();
                for request in frame.requests {
                    let id = request.id;
                    let bytes = match &request.op {
                        Some(Op::Write(write)) => write.ops.iter().map(value_bytes).sum(),
                        _ => 0,
                    };
                    match me.handle(request, bytes) {
                        Did::Answer(reply) => answers.push(v1::Reply { id, result: Some(reply) }),
                        Did::Nothing => {}
                        Did::End => return,
                    }
                }
                if !answers.is_empty()
                    && replies.send(Ok(v1::ReplyFrame { replies: answers })).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn execute(&self, _: Request<v1::Request>) -> Result<Response<v1::Reply>, Status> {
        Err(Status::unimplemented("not used by the client"))
    }
}

fn value_bytes(op: &v1::WriteOp) -> u64 {
    match &op.op {
        Some(v1::write_op::Op::Put(put)) => put.value.len() as u64,
        _ => 0,
    }
}

impl Shared {
    fn json(&self, call: &'static str, about: String) -> Result<Response<v1::JsonReply>, Status> {
        let mut state = self.state.lock();
        state.calls.push(format!("{call} {about}"));
        let answer = state.json.get_mut(call).and_then(VecDeque::pop_front);
        answer.unwrap_or_else(|| Ok("{}".into())).map(|json| Response::new(v1::JsonReply { json }))
    }
}

macro_rules! json_calls {
    ($($call:ident($request:ty);)*) => {
        #[tonic::async_trait]
        impl Master for Shared {
            type WatchStream = std::pin::Pin<Box<dyn Stream<Item = Result<v1::Topology, Status>> + Send>>;

            async fn watch(
                &self,
                request: Request<v1::WatchRequest>,
            ) -> Result<Response<Self::WatchStream>, Status> {
                if request.into_inner().keyspace != "ks1" {
                    let unknown = VastoError::new(ErrorCode::NotFound, "no such keyspace; there is `ks1`");
                    return Err(status_of(&unknown));
                }
                let topologies = WatchStream::new(self.published.subscribe());
                let topologies = topologies.map(|topology| Ok(topology_to_wire(&topology)));
                Ok(Response::new(Box::pin(topologies)))
            }

            $(async fn $call(&self, request: Request<$request>) -> Result<Response<v1::JsonReply>, Status> {
                self.json(stringify!($call), format!("{:?}", request.into_inner()))
            })*
        }
    };
}

json_calls! {
    create_keyspace(v1::CreateKeyspaceRequest);
    evict_replica(v1::EvictRequest);
    restore_keyspace(v1::RestoreRequest);
    empty_node(v1::EmptyNodeRequest);
    cordon_node(v1::CordonNodeRequest);
    rebalance(v1::RebalanceRequest);
    check_bucket(v1::CheckBucketRequest);
    collect_garbage(v1::CollectGarbageRequest);
    repair_bucket(v1::RepairBucketRequest);
    list_keyspaces(v1::Empty);
    describe_keyspace(v1::KeyspaceRequest);
    delete_keyspace(v1::KeyspaceRequest);
    checkpoint_keyspace(v1::KeyspaceRequest);
    compact_keyspace(v1::KeyspaceRequest);
    resize_keyspace(v1::ResizeRequest);
    end_quarantine(v1::EndQuarantineRequest);
    list_operations(v1::Empty);
    show_operation(v1::OperationRequest);
    cancel_operation(v1::OperationRequest);
    pace_operation(v1::PaceOperationRequest);
    list_nodes(v1::Empty);
    cluster_status(v1::Empty);
    check_cluster(v1::Empty);
}
