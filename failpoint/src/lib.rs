//! Failpoints: named places between two structural steps, at which a test lets a server die, wait
//! or fail.
//!
//! They are always compiled in, and only where the structure of a cluster changes: no read and no
//! write passes one. A point is armed in two ways: by an [`Armed`] guard for the servers of one
//! process, and by a file in a [`Directory`] for servers that were started with
//! [`DIRECTORY_VARIABLE`].
//!
//! **Invariants**
//! - While nothing is armed and no directory is named, a point costs one load of an atomic.
//! - What is armed fires once, at the first that comes by and is meant; of several processes at
//!   one of them.
//! - [`points::ALL`] names every point; each is in the code of a server and in `docs/faults.md`.

#![warn(missing_docs)]

mod action;
mod directory;
mod guard;
pub mod points;

use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Signal, getpid, kill_process};
use vasto_core::ids::{KeyspaceId, ReplicaId};

pub use action::{Action, ActionError, Order};
pub use directory::{DIRECTORY_VARIABLE, Directory, watch_environment};
pub use guard::{Armed, arm};
pub use points::Point;

/// Number of guards that are armed, and 1 more while a directory is watched.
static ARMED: AtomicUsize = AtomicUsize::new(0);

/// The error that an armed failpoint injects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the failpoint {0} is armed with an error")]
pub struct Injected(&'static str);

/// Who comes by a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Passer {
    keyspace: KeyspaceId,
    replica: ReplicaId,
}

/// A point that has fired.
enum Fired {
    Guard(guard::Hit),
    File(directory::Hit),
}

/// Passes a point: `replica` of `keyspace` has reached it; replica 0 is the master.
///
/// # Errors
/// `Injected` when the point is armed with an error.
#[inline]
pub async fn at(point: Point, keyspace: KeyspaceId, replica: ReplicaId) -> Result<(), Injected> {
    if ARMED.load(Ordering::Relaxed) == 0 {
        return Ok(());
    }
    // Boxed: the futures that contain this one stay small.
    Box::pin(reached(point, Passer { keyspace, replica })).await
}

async fn reached(point: Point, passer: Passer) -> Result<(), Injected> {
    let fired = match guard::take(point, passer) {
        Some(hit) => Fired::Guard(hit),
        None => match directory::take(point, passer) {
            Some(hit) => Fired::File(hit),
            None => return Ok(()),
        },
    };
    let action = match &fired {
        Fired::Guard(hit) => hit.action(),
        Fired::File(hit) => hit.action(),
    };
    let (keyspace, replica) = (passer.keyspace.0, passer.replica.0);
    tracing::warn!(failpoint = point.name(), %action, keyspace, replica, "a failpoint fires");
    match action {
        Action::Exit => exit().await,
        Action::Sleep(time) => tokio::time::sleep(time).await,
        Action::Error => return Err(Injected(point.name())),
        Action::Pause => match fired {
            Fired::Guard(hit) => hit.released().await,
            Fired::File(hit) => hit.released().await,
        },
    }
    Ok(())
}

/// Ends the process as `kill -9` does: nothing is flushed, nobody is told.
async fn exit() {
    let _ = kill_process(getpid(), Signal::KILL);
    // Until the signal has arrived.
    std::future::pending::<()>().await;
}
