//! Flushes the replica whose unflushed data is oldest when the memtables of the node fill up.
//!
//! All databases of the node share one memtable budget. RocksDB's write-buffer manager makes the
//! writing replica flush its own memtable; without this task, a replica without writes would keep
//! its memory for ever, and the busy ones would flush ever smaller files. A replica with data
//! unflushed for `AGE_MAX` is flushed too, which bounds the part of its binlog that is replayed
//! after a restart.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vasto_core::ids::{Incarnation, KeyspaceId, Lsn, ReplicaId};

use crate::clock::Sparse;
use crate::engine::EngineShared;
use crate::registry::NodeRegistry;
use crate::replica::Replica;

/// Poll interval.
const POLL: Duration = Duration::from_secs(1);
/// While the node is idle and the budget is not full, only one poll in so many is carried out.
const POLLS_WHILE_IDLE: u32 = 10;
/// Share of the memtable budget in mutable memtables (not yet being flushed) above which the oldest
/// replica is flushed. It is below the 7/8 at which RocksDB makes the writing replica flush, so
/// that this task acts first.
const FULL: f64 = 0.7;
/// Maximum age of unflushed data.
const AGE_MAX: Duration = Duration::from_secs(600);

/// Replicas with unflushed data, and since which poll.
#[derive(Default)]
struct Waiting {
    since: HashMap<(KeyspaceId, ReplicaId), Instant>,
    /// The incarnation and LSN at which all data of a replica was found in SSTs. Until the replica
    /// applies another record, this spares the check, which reads the persisted LSN from the
    /// database.
    clean: HashMap<(KeyspaceId, ReplicaId), (Incarnation, Lsn)>,
}

impl Waiting {
    /// Records which replicas have unflushed data; returns the replica to flush now, if any.
    fn choose<'a>(
        &mut self,
        replicas: &'a [Replica],
        full: bool,
        now: Instant,
    ) -> Option<&'a Replica> {
        let is_dirty = |replica: &&Replica| {
            let key = (replica.keyspace, replica.id);
            let stands = (replica.incarnation(), replica.applied_lsn());
            // A closed replica takes no writes, for instance after a fault.
            if self.clean.get(&key) == Some(&stands) || replica.closed().is_some() {
                return false;
            }
            // The LSN up to which all data is in SSTs; later records are in memtables only.
            match replica.persisted_lsn() {
                Ok(lsn) if lsn < stands.1 => return true,
                Ok(_) => drop(self.clean.insert(key, stands)),
                Err(_) => {}
            }
            false
        };
        let dirty: Vec<&Replica> = replicas.iter().filter(is_dirty).collect();
        let is_hosted = |key: &(KeyspaceId, ReplicaId)| {
            replicas.iter().any(|replica| (replica.keyspace, replica.id) == *key)
        };
        if self.clean.len() > replicas.len() {
            self.clean.retain(|key, _| is_hosted(key));
        }
        self.since
            .retain(|key, _| dirty.iter().any(|replica| (replica.keyspace, replica.id) == *key));
        let oldest = dirty.into_iter().min_by_key(|replica| {
            *self.since.entry((replica.keyspace, replica.id)).or_insert(now)
        })?;
        let since = self.since.get(&(oldest.keyspace, oldest.id)).copied().unwrap_or(now);
        (full || now.duration_since(since) > AGE_MAX).then_some(oldest)
    }

    fn flushed(&mut self, replica: &Replica) {
        self.since.remove(&(replica.keyspace, replica.id));
    }
}

/// Runs until `cancel` fires.
pub(crate) async fn run(
    registry: Arc<NodeRegistry>,
    engines: EngineShared,
    cancel: CancellationToken,
) {
    let mut waiting = Waiting::default();
    let mut sparse = Sparse::one_in(POLLS_WHILE_IDLE);
    while cancel.run_until_cancelled(tokio::time::sleep(POLL)).await.is_some() {
        let full = engines.memtables_used() > FULL;
        if sparse.skips(registry.is_at_rest() && !full) {
            continue;
        }
        let replicas = registry.replicas();
        let Some(replica) = waiting.choose(&replicas, full, Instant::now()).cloned() else {
            continue;
        };
        let flushed = replica.clone();
        match tokio::task::spawn_blocking(move || flushed.engine().flush()).await {
            Ok(Ok(())) => waiting.flushed(&replica),
            Ok(Err(error)) => {
                tracing::warn!(%error, keyspace = replica.keyspace.0, shard = replica.shard.0, "a flush failed")
            }
            Err(_) => {}
        }
    }
}
