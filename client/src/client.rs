//! The connection to a cluster, and the handles of its keyspaces.

use std::sync::Arc;

use tokio_util::sync::DropGuard;
use vasto_core::limits::{OPERATION_DEADLINE, check_keyspace_name};

use crate::error::{Error, ErrorKind, closed};
use crate::execute::Executor;
use crate::keyspace::Keyspace;
use crate::master::{Master, check_url};
use crate::node::{Pool, Tasks};
use crate::route::Routing;
use crate::watch;

/// A Vasto cluster. Cheap to clone; handles made from it keep working when it is dropped.
#[derive(Clone)]
pub struct Vasto {
    pub(crate) master: Master,
    pool: Arc<Pool>,
    tasks: Tasks,
    /// Ends the background tasks with the last handle.
    alive: Arc<DropGuard>,
}

impl Vasto {
    /// Connects to the master at `http://host:port`.
    ///
    /// # Errors
    /// `InvalidArgument` for another kind of URL; `Unavailable`, within 2 s, when no master
    /// answers.
    pub async fn connect(url: &str) -> Result<Self, Error> {
        let tasks = Tasks::default();
        let master = Master::connect(url, tasks.cancel.clone()).await?;
        let pool = Arc::new(Pool::new(tasks.clone()));
        let alive = Arc::new(tasks.cancel.clone().drop_guard());
        Ok(Self { master, pool, tasks, alive })
    }

    /// Checks the form of a master's URL; does not connect.
    ///
    /// # Errors
    /// `InvalidArgument` with the defect.
    pub fn check_url(url: &str) -> Result<(), Error> {
        check_url(url).map(|_| ())
    }

    /// Returns the master's URL.
    pub fn url(&self) -> &str {
        self.master.url()
    }

    /// Returns a handle of a keyspace.
    ///
    /// # Errors
    /// `NotFound` if there is no keyspace of this name, `InvalidArgument` if the name is not legal,
    /// `Unavailable` when the master does not answer.
    pub async fn keyspace(&self, name: &str) -> Result<Keyspace, Error> {
        check_keyspace_name(name)?;
        let opened = self.tasks.cancel.run_until_cancelled(self.master.watch(name)).await;
        let (topology, stream) = opened.unwrap_or_else(|| Err(closed()))?;
        if !topology.active {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the keyspace `{name}` was deleted"),
            ));
        }
        let routing = Arc::new(Routing::new(topology, self.pool.clone()));
        let cancel = self.tasks.cancel.child_token();
        let watch = cancel.clone().drop_guard();
        let follow =
            watch::follow(self.master.clone(), name.to_owned(), stream, routing.clone(), cancel);
        self.tasks.tracker.spawn(follow);
        Ok(Keyspace::new(Executor::new(routing), OPERATION_DEADLINE, watch, self.alive.clone()))
    }

    /// Ends all connections and background tasks, also those of handles made from this client, and
    /// waits for them. Later calls of these handles return [`ErrorKind::Closed`] at once. Dropping
    /// all handles does the same without waiting.
    pub async fn close(self) {
        self.tasks.cancel.cancel();
        self.tasks.tracker.close();
        self.tasks.tracker.wait().await;
    }
}
