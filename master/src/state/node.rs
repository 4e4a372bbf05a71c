//! A node that has registered, and its live session.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;
use vasto_core::limits::NODE_REPLICAS_MAX;
use vasto_proto::v1;

use crate::placement::Disk;

/// A node that has registered since the master started.
pub(crate) struct Node {
    pub(crate) address: String,
    pub(crate) zone: String,
    pub(crate) pid: u32,
    /// The most replicas that the node takes.
    pub(crate) max_replicas: usize,
    pub(crate) disk_used: u64,
    pub(crate) disk_free: u64,
    pub(crate) bucket: v1::BucketRequests,
    /// How fast it moved bytes lately.
    pub(crate) rates: v1::Rates,
    /// The fault that keeps the node from shipping; empty when there is none.
    pub(crate) bucket_trouble: String,
    /// Its bulk work waits for its requests.
    pub(crate) yields: bool,
    /// The cluster that the node says it belongs to; empty when there is none yet.
    pub(crate) cluster_id: String,
    /// When the last message of the node arrived.
    pub(super) heard_us: u64,
    /// The live session; `None` means away.
    pub(super) session: Option<Session>,
    /// When the session began, or when the node went away.
    pub(super) away_since_us: u64,
    /// When the session began; meaningless while there is none.
    pub(super) here_since_us: u64,
    /// Why the master cannot connect to the advertised address of the node.
    pub(crate) unreachable: Option<String>,
}

/// A live session of a node.
pub(super) struct Session {
    pub(super) id: u64,
    /// Cancelled when another session replaces it.
    pub(super) replaced: CancellationToken,
    /// There is something to send.
    pub(super) wake: Arc<Notify>,
    pub(super) commands: VecDeque<v1::Command>,
    /// Callers that wait for a command; dropped with the session, so that they learn that the node
    /// was lost.
    pub(super) waiting: HashMap<u64, oneshot::Sender<Done>>,
}

/// The result of a command: the catalogs that it asked for, or why it failed.
pub(crate) type Done = Result<Vec<String>, String>;

impl Node {
    /// Creates a node that has not registered and reported yet.
    pub(super) fn new(now_us: u64) -> Self {
        Self {
            address: String::new(),
            zone: String::new(),
            pid: 0,
            max_replicas: NODE_REPLICAS_MAX,
            disk_used: 0,
            disk_free: 0,
            bucket: v1::BucketRequests::default(),
            rates: v1::Rates::default(),
            bucket_trouble: String::new(),
            yields: false,
            cluster_id: String::new(),
            heard_us: now_us,
            session: None,
            away_since_us: now_us,
            here_since_us: now_us,
            unreachable: None,
        }
    }

    /// Returns true while the node has a live session.
    pub(crate) fn is_live(&self) -> bool {
        self.session.is_some()
    }

    /// Returns true while this session of the node is the live one.
    pub(super) fn is_served_by(&self, session: u64) -> bool {
        self.session.as_ref().is_some_and(|live| live.id == session)
    }

    /// Returns the disk by the node's last report.
    pub(super) fn disk(&self) -> Disk {
        Disk {
            bytes: self.disk_used.saturating_add(self.disk_free),
            free: self.disk_free,
            promised: 0,
        }
    }
}

impl Session {
    pub(super) fn new(id: u64) -> Self {
        Self {
            id,
            replaced: CancellationToken::new(),
            wake: Arc::new(Notify::new()),
            commands: VecDeque::new(),
            waiting: HashMap::new(),
        }
    }
}
