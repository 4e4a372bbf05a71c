//! The `Membership` service: one session per node, from its `Hello` to its end or silence.
//!
//! **Invariant:** level-triggered. A session sends everything that it has not sent yet (addresses,
//! catalog versions, commands), each time something changes, and everything again after a
//! reconnect; a slow node delays only itself and skips versions that are superseded anyway.
//! A node id belongs to one live session.

mod dial;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use vasto_core::address::check_address;
use vasto_core::error::ErrorCode;
use vasto_core::ids::NodeId;
use vasto_core::limits::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use vasto_core::report::ReplicaReport;
use vasto_proto::PROTOCOL;
use vasto_proto::v1::{self, master_message, membership_server::Membership, node_message};

use self::dial::{dial_back, dial_until_reached, is_member};
use crate::cluster::Cluster;
use crate::driver::look_up;
use crate::state::{Odd, Registration, Sent};

/// Messages that may wait for the transport.
const OUTBOUND_MAX: usize = 8;
/// The interval at which the old session is checked while a node id is disputed.
const DISPUTE_POLL: Duration = Duration::from_millis(20);
/// The silence after which an old session loses a disputed node id.
const DISPUTE_MAX: Duration = KEEPALIVE_INTERVAL.saturating_add(KEEPALIVE_TIMEOUT);

/// The service for nodes.
pub(crate) struct MembershipService {
    pub(crate) cluster: Arc<Cluster>,
}

#[tonic::async_trait]
impl Membership for MembershipService {
    type SessionStream = ReceiverStream<Result<v1::MasterMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::NodeMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (outbound, replies) = mpsc::channel(OUTBOUND_MAX);
        let cluster = self.cluster.clone();
        let inbound = request.into_inner();
        self.cluster.tasks.spawn(async move {
            let shutdown = cluster.shutdown.clone();
            let closed = outbound.clone();
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = closed.closed() => {}
                () = serve(cluster, inbound, outbound) => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

type Outbound = mpsc::Sender<Result<v1::MasterMessage, Status>>;

/// Guard that ends the session in the state however the task ends.
struct Registered {
    cluster: Arc<Cluster>,
    node: NodeId,
    session: u64,
    why: String,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let now_us = self.cluster.mono_us();
        if self.cluster.state().disconnect(self.node, self.session, now_us)
            && !self.cluster.shutdown.is_cancelled()
        {
            tracing::info!(node = %self.node, why = self.why, "node is away");
        }
    }
}

async fn serve(cluster: Arc<Cluster>, mut inbound: Streaming<v1::NodeMessage>, outbound: Outbound) {
    let first = timeout(cluster.settings.node_silence, inbound.message()).await;
    let Ok(Ok(Some(v1::NodeMessage { message: Some(node_message::Message::Hello(hello)) }))) =
        first
    else {
        return reject(&outbound, ErrorCode::InvalidArgument, "a session begins with Hello".into())
            .await;
    };
    let own = if cluster.is_restricted() { hello.cluster_id.clone() } else { cluster.cluster_id() };
    if let Err((code, reason)) = check(&hello, &own) {
        let of_another = code == ErrorCode::FailedPrecondition && hello.cluster_id != own;
        // The node asks again every other second.
        if !of_another || cluster.note_refused(NodeId(hello.node_id), &hello.cluster_id) {
            tracing::warn!(node = %NodeId(hello.node_id), address = hello.address, reason, "refused a node");
        }
        return reject(&outbound, code, reason).await;
    }
    let unreachable = match dial_back(&cluster, &hello).await {
        Ok(unreachable) => unreachable,
        Err(reason) => {
            tracing::warn!(node = %NodeId(hello.node_id), address = hello.address, reason, "refused a node");
            return reject(&outbound, ErrorCode::FailedPrecondition, reason).await;
        }
    };
    let Registration { session, replaced, wake } = match register(&cluster, &hello).await {
        Ok(registered) => registered,
        Err(reason) => {
            tracing::warn!(node = %NodeId(hello.node_id), address = hello.address, reason, "refused a node");
            return reject(&outbound, ErrorCode::AlreadyExists, reason).await;
        }
    };
    let node = NodeId(hello.node_id);
    let mut registered =
        Registered { cluster: cluster.clone(), node, session, why: "its connection closed".into() };
    tracing::info!(%node, address = hello.address, zone = hello.zone, pid = hello.pid, "node registered");
    if !is_member(&hello) {
        cluster.state().reached(node, session, unreachable.clone());
    }

    let welcome = v1::Welcome { cluster_id: own, bucket_url: cluster.bucket.url().to_owned() };
    if send(&outbound, master_message::Message::Welcome(welcome)).await.is_err() {
        return;
    }
    let reader = read(&cluster, node, session, &mut inbound, &outbound);
    let writer = async {
        let mut sent = Sent::default();
        loop {
            let outstanding = cluster.state().outstanding(node, session, &mut sent);
            for message in outstanding {
                if outbound.send(Ok(message)).await.is_err() {
                    return;
                }
            }
            wake.notified().await;
        }
    };
    let dialler = dial_until_reached(&cluster, node, session, &hello, unreachable);
    tokio::select! {
        why = reader => registered.why = why,
        () = writer => {}
        () = dialler => {}
        () = replaced.cancelled() => registered.why = "another session replaced it".into(),
    }
}

/// Handles the messages of the node until it is silent or gone; returns why the session ended.
async fn read(
    cluster: &Arc<Cluster>,
    node: NodeId,
    session: u64,
    inbound: &mut Streaming<v1::NodeMessage>,
    outbound: &Outbound,
) -> String {
    let mut complained = false;
    loop {
        let message = match timeout(cluster.settings.node_silence, inbound.message()).await {
            Err(_) => return format!("it was silent for {:?}", cluster.settings.node_silence),
            Ok(Err(status)) => return format!("its connection failed: {}", status.message()),
            Ok(Ok(None)) => return "it closed its session".into(),
            Ok(Ok(Some(message))) => message.message,
        };
        let now_us = cluster.mono_us();
        match message {
            Some(node_message::Message::Report(report)) => {
                let (replicas, bad) = decode(&report);
                let (odd, gone) = {
                    let mut state = cluster.state();
                    let odd = state.report(node, session, &report, replicas, now_us);
                    (
                        odd,
                        if report.sent_ms > 0 {
                            state.gone_besides(node, now_us)
                        } else {
                            Vec::new()
                        },
                    )
                };
                if report.sent_ms > 0 {
                    let gone = gone.into_iter().map(|node| node.0).collect();
                    let presence = v1::Presence { sent_ms: report.sent_ms, gone };
                    let message = v1::MasterMessage {
                        message: Some(master_message::Message::Presence(presence)),
                    };
                    // A node that does not read receives it with its next report.
                    let _ = outbound.try_send(Ok(message));
                }
                for odd in &odd {
                    if let Odd::UnknownKeyspace(keyspace) = odd {
                        look_up(cluster, *keyspace);
                    }
                }
                let misplaced = odd.iter().find(|odd| matches!(odd, Odd::NotItsReplica(..)));
                if (bad.is_some() || misplaced.is_some()) && !complained {
                    complained = true;
                    tracing::warn!(%node, unreadable = bad, ?misplaced, "ignored a part of a report");
                }
            }
            Some(node_message::Message::Done(done)) => {
                cluster.state().command_done(node, session, &done, now_us)
            }
            Some(node_message::Message::Hello(_)) => return "it said Hello twice".into(),
            // A message of a newer node: the node is alive, and this master understands no more.
            None => {}
        }
    }
}

fn decode(report: &v1::Report) -> (Vec<ReplicaReport>, Option<String>) {
    let mut bad = None;
    let replicas = report.replicas.iter().filter_map(|json| match serde_json::from_str(json) {
        Ok(replica) => Some(replica),
        Err(error) => {
            bad = Some(error.to_string());
            None
        }
    });
    (replicas.collect(), bad)
}

/// Refuses a node that must not join.
fn check(hello: &v1::Hello, cluster_id: &str) -> Result<(), (ErrorCode, String)> {
    if hello.protocol != PROTOCOL {
        let reason = format!(
            "the node speaks protocol {}, this master speaks {PROTOCOL}; run the same version of vasto on both",
            hello.protocol
        );
        return Err((ErrorCode::FailedPrecondition, reason));
    }
    if !hello.cluster_id.is_empty() && hello.cluster_id != cluster_id {
        let reason = format!(
            "the node's data directory belongs to cluster {}, this master serves cluster {cluster_id}; start the node \
             with the --master of its own cluster, or with an empty --dir",
            hello.cluster_id
        );
        return Err((ErrorCode::FailedPrecondition, reason));
    }
    if cluster_id.is_empty() {
        let reason = "this master does not know yet whose the bucket is, so no new node can join it; it has to be repaired";
        return Err((ErrorCode::Unavailable, reason.into()));
    }
    if hello.node_id == 0 || hello.address.is_empty() {
        return Err((
            ErrorCode::InvalidArgument,
            "a node needs an id other than 0 and an address".into(),
        ));
    }
    if let Err(bad) = check_address(&hello.address) {
        return Err((ErrorCode::InvalidArgument, format!("{bad}; say so with --advertise")));
    }
    Ok(())
}

/// Registers the session. When a session from another address has the node id, the master does not
/// guess whether that session is alive: it keeps the id if one more message of it arrives.
async fn register(cluster: &Arc<Cluster>, hello: &v1::Hello) -> Result<Registration, String> {
    let began = tokio::time::Instant::now();
    let mut disputed: Option<(u64, u64)> = None;
    loop {
        let give_up = began.elapsed() > DISPUTE_MAX;
        let conflict = match cluster.state().connect(hello, give_up, cluster.mono_us()) {
            Ok(registered) => return Ok(registered),
            Err(conflict) => conflict,
        };
        match disputed {
            Some((session, heard_us))
                if session != conflict.session || conflict.heard_us > heard_us =>
            {
                return Err(format!(
                    "node {} is alive at {}; two processes must not share a node id: do not copy a data directory, \
                     stop the other one first",
                    NodeId(hello.node_id),
                    conflict.address
                ));
            }
            Some(_) => {}
            None => disputed = Some((conflict.session, conflict.heard_us)),
        }
        tokio::time::sleep(DISPUTE_POLL).await;
    }
}

async fn reject(outbound: &Outbound, code: ErrorCode, reason: String) {
    let rejected = v1::Rejected { code: code as u32, reason };
    // The refused node may be gone already.
    let _ = send(outbound, master_message::Message::Rejected(rejected)).await;
}

async fn send(outbound: &Outbound, message: master_message::Message) -> Result<(), ()> {
    outbound.send(Ok(v1::MasterMessage { message: Some(message) })).await.map_err(|_| ())
}
