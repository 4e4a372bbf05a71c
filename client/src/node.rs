//! Nodes by address, each with at most one connection, shared by all keyspaces of a client.
//!
//! **Invariant:** at most one attempt to connect to an address is under way; callers that wait for
//! it share its result, and for a moment also its failure.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::Connection;

/// A failed attempt to connect answers for this long: hundreds of callers that wait for a node to
/// come back must not become hundreds of connection attempts.
const FAILURE_STANDS: Duration = Duration::from_millis(20);

/// The background tasks of a client.
#[derive(Clone, Default)]
pub(crate) struct Tasks {
    pub tracker: TaskTracker,
    pub cancel: CancellationToken,
}

/// Where a node listens, and the connection to it.
pub(crate) struct Node {
    address: String,
    tasks: Tasks,
    connection: ArcSwapOption<Connection>,
    connecting: tokio::sync::Mutex<Option<(Instant, String)>>,
}

impl Node {
    /// Its address, `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    fn open_connection(&self) -> Option<Arc<Connection>> {
        self.connection.load().as_ref().filter(|connection| connection.is_open()).cloned()
    }

    /// The open connection, or a new one; an error says why there is none by the deadline.
    pub async fn connection(&self, deadline: Instant) -> Result<Arc<Connection>, String> {
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        match tokio::time::timeout_at(deadline, self.connect()).await {
            Ok(result) => result,
            Err(_elapsed) => Err(format!("the node at {} could not be reached in time", self.address)),
        }
    }

    async fn connect(&self) -> Result<Arc<Connection>, String> {
        let asked = Instant::now();
        let mut failure = self.connecting.lock().await;
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        if let Some((_, message)) = failure.as_ref().filter(|(at, _)| *at + FAILURE_STANDS > asked) {
            return Err(message.clone());
        }
        match Connection::open(&self.address, &self.tasks.tracker, self.tasks.cancel.clone()).await {
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

/// All nodes that topologies name at present.
pub(crate) struct Pool {
    nodes: Mutex<HashMap<String, Weak<Node>>>,
    tasks: Tasks,
}

impl Pool {
    pub fn new(tasks: Tasks) -> Self {
        Self { nodes: Mutex::default(), tasks }
    }

    /// The node at an address. It lives as long as a topology names it.
    pub fn node(&self, address: &str) -> Arc<Node> {
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
        });
        nodes.insert(address.to_owned(), Arc::downgrade(&node));
        node
    }
}
