//! One node of a crowd: its session with the master, which is begun again when it ends.
//!
//! **Invariant:** reports go out as those of a node do: at once when there is something new, with a
//! small gap between two, and twice a second anyway. A lost node sends nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId};
use vasto_core::limits::{MESSAGE_BYTES_MAX, REPORT_INTERVAL};
use vasto_proto::PROTOCOL;
use vasto_proto::v1;
use vasto_proto::v1::master_message::Message as FromMaster;
use vasto_proto::v1::membership_client::MembershipClient;
use vasto_proto::v1::node_message::Message as ToMaster;

use super::reports::Known;
use super::{Shared, Traffic};

/// Least time between two reports.
const GAP: Duration = Duration::from_millis(2);
/// Pause before a session is begun again.
const AGAIN: Duration = Duration::from_millis(100);
/// Replicas that a node takes.
const REPLICAS_MAX: u32 = 10_000;

/// What the session and its observers share.
#[derive(Debug)]
struct State {
    node: NodeId,
    address: String,
    /// The cluster; empty before the first welcome.
    cluster_id: Mutex<String>,
    joined: Mutex<bool>,
    known: Mutex<Known>,
    /// There may be something to report.
    news: Notify,
}

/// A node. Its tasks end when it is dropped.
#[derive(Debug)]
pub(super) struct Member {
    state: Arc<State>,
    /// Accepts the connections by which a master finds out whether it can be reached.
    listener: JoinHandle<()>,
    session: JoinHandle<()>,
}

impl Member {
    pub(super) async fn start(shared: &Arc<Shared>, node: NodeId) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let listener = tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        let state = Arc::new(State {
            node,
            address,
            cluster_id: Mutex::default(),
            joined: Mutex::new(false),
            known: Mutex::new(Known::new(node, shared.copy_takes)),
            news: Notify::new(),
        });
        let session = tokio::spawn(keep(Arc::clone(shared), Arc::clone(&state)));
        Ok(Self { state, listener, session })
    }

    /// Begins the session anew, as a process that was started again.
    pub(super) fn restart(&mut self, shared: &Arc<Shared>) {
        self.session.abort();
        *self.state.joined.lock() = false;
        self.session = tokio::spawn(keep(Arc::clone(shared), Arc::clone(&self.state)));
    }

    pub(super) fn node(&self) -> NodeId {
        self.state.node
    }

    pub(super) fn has_joined(&self) -> bool {
        *self.state.joined.lock()
    }

    pub(super) fn catalogs(&self) -> Vec<Arc<Catalog>> {
        self.state.known.lock().catalogs.values().cloned().collect()
    }

    pub(super) fn replicas(&self) -> BTreeSet<(KeyspaceId, ReplicaId)> {
        self.state.known.lock().replicas()
    }

    pub(super) fn most_copies(&self) -> usize {
        self.state.known.lock().most_copies
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.state.known.lock().traffic
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.session.abort();
        self.listener.abort();
    }
}

async fn keep(shared: Arc<Shared>, state: Arc<State>) {
    loop {
        // The master ends the session of a lost node, which knows nothing of that.
        while shared.is_lost(state.node) {
            tokio::time::sleep(AGAIN).await;
        }
        if let Err(error) = session(&shared, &state).await {
            eprintln!("the session of {} ended: {error:#}", state.node);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Holds one session, until it ends.
async fn session(shared: &Shared, state: &State) -> Result<()> {
    let mut client = MembershipClient::connect(shared.master.clone())
        .await?
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (to_master, messages) = mpsc::channel(16);
    send(&to_master, ToMaster::Hello(hello(state))).await?;
    let outbound =
        futures::stream::unfold(messages, |mut messages: mpsc::Receiver<_>| async move {
            let next: v1::NodeMessage = messages.recv().await?;
            Some((next, messages))
        });
    let mut from_master = client.session(outbound).await?.into_inner();
    state.known.lock().begin_session();
    let listen = async {
        while let Some(message) = from_master.message().await? {
            if shared.is_lost(state.node) {
                continue;
            }
            take(shared, state, message, &to_master).await?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        ended = listen => ended,
        ended = report(shared, state, &to_master) => ended,
    }
}

fn hello(state: &State) -> v1::Hello {
    v1::Hello {
        node_id: state.node.0,
        cluster_id: state.cluster_id.lock().clone(),
        address: state.address.clone(),
        zone: String::new(),
        pid: std::process::id(),
        protocol: PROTOCOL,
        max_replicas: REPLICAS_MAX,
    }
}

async fn send(to_master: &mpsc::Sender<v1::NodeMessage>, message: ToMaster) -> Result<()> {
    let message = v1::NodeMessage { message: Some(message) };
    to_master.send(message).await.ok().context("the master is gone")
}

/// Takes a message of the master.
async fn take(
    shared: &Shared,
    state: &State,
    message: v1::MasterMessage,
    to_master: &mpsc::Sender<v1::NodeMessage>,
) -> Result<()> {
    match message.message {
        Some(FromMaster::Welcome(welcome)) => {
            *state.cluster_id.lock() = welcome.cluster_id;
            *state.joined.lock() = true;
        }
        Some(FromMaster::Rejected(rejected)) => bail!("refused: {}", rejected.reason),
        Some(FromMaster::Keyspace(v1::KeyspaceVersion { keyspace_id, version, catalog_json })) => {
            let catalog = shared.decode(KeyspaceId(keyspace_id), version, &catalog_json)?;
            let mut known = state.known.lock();
            known.traffic.received += catalog_json.len() as u64;
            known.traffic.versions += 1;
            known.learn(catalog, Instant::now());
            state.news.notify_one();
        }
        Some(FromMaster::Command(command)) => {
            let done = v1::CommandDone { id: command.id, ..v1::CommandDone::default() };
            send(to_master, ToMaster::Done(done)).await?;
        }
        Some(FromMaster::Nodes(_) | FromMaster::Presence(_)) | None => {}
    }
    Ok(())
}

/// Reports until the session ends.
async fn report(
    shared: &Shared,
    state: &State,
    to_master: &mpsc::Sender<v1::NodeMessage>,
) -> Result<()> {
    let began = Instant::now();
    let mut lost = shared.lost.subscribe();
    let mut regular = began;
    loop {
        let now = Instant::now();
        let unreachable = lost.borrow_and_update().clone();
        if unreachable.contains(&state.node) {
            // Its connection stays; only time tells the others.
            return std::future::pending().await;
        }
        let is_regular = now >= regular;
        let (replicas, due) = {
            let mut known = state.known.lock();
            if is_regular {
                regular = now + REPORT_INTERVAL;
                known.look_at_copies();
            }
            (known.due_reports(&unreachable, now), known.next_due())
        };
        if is_regular || !replicas.is_empty() {
            let report = v1::Report {
                replicas,
                disk_used: 1 << 40,
                disk_free: 1 << 40,
                sent_ms: began.elapsed().as_millis() as u64 + 1,
                ..v1::Report::default()
            };
            send(to_master, ToMaster::Report(report)).await?;
            tokio::time::sleep(GAP).await;
        }
        let next = due.map_or(regular, |due| due.min(regular));
        tokio::select! {
            () = state.news.notified() => {}
            () = tokio::time::sleep_until(next.into()) => {}
            changed = lost.changed() => {
                changed.context("the crowd has ended")?;
                state.known.lock().look_at_all();
            }
        }
    }
}
