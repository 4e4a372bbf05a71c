//! Nodes by address, each with at most one connection, shared by all keyspaces of a client.
//!
//! A node that could not be reached, or was silent, is *suspect*: operations that another replica
//! can execute skip it until a background probe finds it healthy. An outage costs only the
//! operations that meet it first.
//!
//! **Invariant:** at most one attempt to connect to an address is under way; callers that wait for
//! it share its result, and for a short time also its failure. A node has at most one probe.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use vasto_core::error::ErrorCode;
use vasto_core::limits::ATTEMPT_PATIENCE;
use vasto_proto::v1;

use crate::connection::{Connection, NodeReply};

/// Time for which a failed attempt to connect is returned to callers: hundreds of callers that wait
/// for a node to come back must not become hundreds of connection attempts.
const FAILURE_STANDS: Duration = Duration::from_millis(20);

/// First and longest pause between two probes of a suspect node.
const PROBE_PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// The background tasks of a client.
#[derive(Clone, Default)]
pub(crate) struct Tasks {
    pub tracker: TaskTracker,
    pub cancel: CancellationToken,
}

/// The address of a node, and the connection to it.
pub(crate) struct Node {
    address: String,
    tasks: Tasks,
    connection: ArcSwapOption<Connection>,
    connecting: tokio::sync::Mutex<Option<(Instant, String)>>,
    suspect: AtomicBool,
}

impl Node {
    /// Returns the address, `host:port`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Returns true while operations should skip the node.
    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Acquire)
    }

    /// Makes the node suspect until it answers `probe`, a request that any healthy node answers.
    pub(crate) fn suspect(self: &Arc<Self>, probe: v1::Request) {
        if self.suspect.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::debug!(address = self.address, "passing a node by until it answers again");
        let (node, cancel) = (Arc::downgrade(self), self.tasks.cancel.clone());
        self.tasks.tracker.spawn(async move {
            let _ = cancel.run_until_cancelled(probe_until_well(node, probe)).await;
        });
    }

    fn open_connection(&self) -> Option<Arc<Connection>> {
        self.connection.load().as_ref().filter(|connection| connection.is_open()).cloned()
    }

    /// Drops a connection, so that the next caller makes a new one.
    fn drop_connection(&self, connection: &Arc<Connection>) {
        let current = self.connection.load();
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, connection)) {
            self.connection.store(None);
        }
    }

    /// Returns the open connection or a new one; an error says why there is none by the deadline.
    pub(crate) async fn connection(&self, deadline: Instant) -> Result<Arc<Connection>, String> {
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        match tokio::time::timeout_at(deadline, self.connect()).await {
            Ok(result) => result,
            Err(_elapsed) => {
                Err(format!("the node at {} could not be reached in time", self.address))
            }
        }
    }

    async fn connect(&self) -> Result<Arc<Connection>, String> {
        let asked = Instant::now();
        let mut failure = self.connecting.lock().await;
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        if let Some((_, message)) = failure.as_ref().filter(|(at, _)| *at + FAILURE_STANDS > asked)
        {
            return Err(message.clone());
        }
        match Connection::open(&self.address, &self.tasks.tracker, self.tasks.cancel.clone()).await
        {
            Ok(connection) => {
                let connection = Arc::new(connection);
                self.connection.store(Some(connection.clone()));
                *failure = None;
                Ok(connection)
            }
            Err(message) => {
                *failure = Some((Instant::now(), message.clone()));
                Err(message)
            }
        }
    }
}

/// Probes until the node answers; ends also when no topology names the node any more.
async fn probe_until_well(node: Weak<Node>, probe: v1::Request) {
    let mut pause = PROBE_PAUSES.0;
    loop {
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(PROBE_PAUSES.1);
        let Some(node) = node.upgrade() else { return };
        let deadline = Instant::now() + ATTEMPT_PATIENCE;
        let Ok(connection) = node.connection(deadline).await else { continue };
        match connection.call(probe.clone(), 0, deadline).await {
            NodeReply::Reply(v1::reply::Result::Error(error))
                if error.code == ErrorCode::CatchingUp as u32 =>
            {
                pause = PROBE_PAUSES.0;
            }
            NodeReply::Reply(_) => {
                tracing::debug!(address = node.address, "the node answers again");
                node.suspect.store(false, Ordering::Release);
                return;
            }
            // A connection that makes no progress is useless.
            NodeReply::Expired { sent: true } => node.drop_connection(&connection),
            NodeReply::Lost { .. } | NodeReply::Expired { .. } => {}
        }
    }
}

/// All nodes that topologies name at present.
pub(crate) struct Pool {
    nodes: Mutex<HashMap<String, Weak<Node>>>,
    tasks: Tasks,
}

impl Pool {
    pub(crate) fn new(tasks: Tasks) -> Self {
        Self { nodes: Mutex::default(), tasks }
    }

    /// Returns the token that is cancelled when the client is closed.
    pub(crate) fn closed(&self) -> &CancellationToken {
        &self.tasks.cancel
    }

    /// Returns the node at an address. It lives as long as a topology names it.
    pub(crate) fn node(&self, address: &str) -> Arc<Node> {
        let mut nodes = self.nodes.lock();
        if let Some(node) = nodes.get(address).and_then(Weak::upgrade) {
            return node;
        }
        nodes.retain(|_, node| node.strong_count() > 0);
        let node = Arc::new(Node {
            address: address.to_owned(),
            tasks: self.tasks.clone(),
            connection: ArcSwapOption::empty(),
            connecting: tokio::sync::Mutex::new(None),
            suspect: AtomicBool::new(false),
        });
        nodes.insert(address.to_owned(), Arc::downgrade(&node));
        node
    }
}
