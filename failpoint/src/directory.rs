//! Points that are armed across processes, by files in a directory.
//!
//! `<dir>/<point>` holds the order. The process that fires renames it to `<point>.reached-<pid>`;
//! one that pauses waits until that file is gone.
//!
//! **Invariants**
//! - The rename decides: of several processes one fires.
//! - A directory that is not there, or a file that cannot be read, arms nothing.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::action::{Action, Order};
use crate::points::Point;
use crate::{ARMED, Passer};

/// The environment variable that names the directory to servers.
pub const DIRECTORY_VARIABLE: &str = "VASTO_FAILPOINTS";

/// Interval at which a process that pauses looks for its release.
const LOOK: Duration = Duration::from_millis(5);

/// What is between the name of a point and the process that has fired.
const REACHED: &str = ".reached-";

static WATCHED: OnceLock<Directory> = OnceLock::new();

/// Watches the directory that the environment names, if any, from now on. Servers call this when
/// they start; it is meant for tests, and a server that is so started says so.
pub fn watch_environment() {
    let Some(dir) = std::env::var_os(DIRECTORY_VARIABLE).filter(|dir| !dir.is_empty()) else {
        return;
    };
    if WATCHED.set(Directory::new(Path::new(&dir))).is_ok() {
        ARMED.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(?dir, "failpoints are watched: this is a server under test");
    }
}

/// A directory whose files arm the points of other processes.
#[derive(Debug, Clone)]
pub struct Directory(PathBuf);

impl Directory {
    /// Names a directory.
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// Arms a point. What was armed there before is forgotten.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn arm(&self, point: Point, order: impl Into<Order>) -> std::io::Result<()> {
        self.release(point)?;
        // Nobody reads half an order.
        let partial = self.0.join(format!(".{}", point.name()));
        std::fs::write(&partial, order.into().to_string())?;
        std::fs::rename(partial, self.0.join(point.name()))
    }

    /// Returns the id of the process that has fired at a point, if any.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn reached(&self, point: Point) -> std::io::Result<Option<u32>> {
        let pid = |path: PathBuf| {
            path.file_name()?
                .to_str()?
                .strip_prefix(point.name())?
                .strip_prefix(REACHED)?
                .parse()
                .ok()
        };
        Ok(self.files()?.into_iter().find_map(pid))
    }

    /// Lets whoever waits at a point go on; the point may be armed again.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn release(&self, point: Point) -> std::io::Result<()> {
        let reached = format!("{}{REACHED}", point.name());
        let is_of_point = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with(&reached)
        };
        self.files()?.into_iter().filter(is_of_point).try_for_each(remove)
    }

    /// Disarms all points, and lets all that wait go on.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn disarm_all(&self) -> std::io::Result<()> {
        self.files()?.into_iter().try_for_each(remove)
    }

    fn files(&self) -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(&self.0)?.map(|entry| Ok(entry?.path())).collect()
    }

    fn take(&self, point: Point, passer: Passer) -> Option<Hit> {
        let armed = self.0.join(point.name());
        let text = std::fs::read_to_string(&armed).ok()?;
        let order: Order = match text.parse() {
            Ok(order) => order,
            Err(error) => {
                tracing::error!(%error, file = %armed.display(), "the failpoint does not fire");
                return None;
            }
        };
        if !order.means(passer) {
            return None;
        }
        let reached = self.0.join(format!("{}{REACHED}{}", point.name(), std::process::id()));
        std::fs::rename(&armed, &reached).ok()?;
        Some(Hit { action: order.action, reached })
    }
}

fn remove(path: PathBuf) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A point that has fired.
pub(crate) struct Hit {
    action: Action,
    reached: PathBuf,
}

impl Hit {
    pub(crate) fn action(&self) -> Action {
        self.action
    }

    pub(crate) async fn released(self) {
        while self.reached.exists() {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Returns what is armed for this one in the watched directory, which has then fired.
pub(crate) fn take(point: Point, passer: Passer) -> Option<Hit> {
    WATCHED.get()?.take(point, passer)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vasto_core::ids::{KeyspaceId, ReplicaId};

    use super::*;
    use crate::points;

    const PASSER: Passer = Passer { keyspace: KeyspaceId(1), replica: ReplicaId(2) };

    #[tokio::test]
    async fn a_file_fires_once_says_where_and_pauses_until_it_is_released() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Directory::new(temp.path());
        let point = points::TARGET_OPEN_BEFORE;
        assert!(dir.take(point, PASSER).is_none());
        dir.arm(point, Action::Pause).unwrap();
        assert_eq!(dir.reached(point).unwrap(), None);
        assert!(dir.take(points::TARGET_OPEN_AFTER, PASSER).is_none());
        let hit = dir.take(point, PASSER).unwrap();
        assert_eq!(hit.action(), Action::Pause);
        assert!(dir.take(point, PASSER).is_none(), "it has fired");
        assert_eq!(dir.reached(point).unwrap(), Some(std::process::id()));
        let waiting = tokio::spawn(hit.released());
        tokio::time::sleep(LOOK * 4).await;
        assert!(!waiting.is_finished());
        dir.release(point).unwrap();
        tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
        assert_eq!(dir.reached(point).unwrap(), None);
    }

    #[test]
    fn a_file_for_somebody_else_or_without_sense_arms_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Directory::new(temp.path());
        let point = points::REMOVAL_AFTER;
        let order = Order { replica: Some(ReplicaId(3)), ..Order::from(Action::Error) };
        dir.arm(point, order).unwrap();
        assert!(dir.take(point, PASSER).is_none());
        assert!(dir.take(point, Passer { replica: ReplicaId(3), ..PASSER }).is_some());
        std::fs::write(temp.path().join(point.name()), "explode").unwrap();
        assert!(dir.take(point, PASSER).is_none());
        dir.disarm_all().unwrap();
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
        assert!(Directory::new(&temp.path().join("none")).take(point, PASSER).is_none());
    }
}
