//! A node's data directory: its lock, its identity, the register of its replicas, the catalog
//! versions that it has applied.
//!
//! ```text
//! <dir>/LOCK                     held while the node runs
//! <dir>/node.json                cluster id, node id, format, bucket; written once, then only the bucket changes
//! <dir>/replicas.json            which replicas this directory holds
//! <dir>/catalog/<keyspace>.json  the last catalog version applied
//! <dir>/replicas/<keyspace>-<replica>/{db,log,ship.json}
//! <dir>/tmp/                     emptied at every start
//! <dir>/replicas/.tmp/           in its place when `replicas` is a file system of its own
//! ```
//!
//! **Invariants**
//! - The node id is drawn once per directory: an emptied directory is another node, so nothing is
//!   ever served from a directory that has lost its data.
//! - A replica that is registered but missing on disk is never created anew.
//! - Every file is replaced by write, fsync, rename, fsync of the directory.
//! - The directory is accessible to its user only, even if it was created with a wider mode.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, KeyspaceId, NodeId, ReplicaId, ShardId};

/// The newest format of the directory that this version reads, and the one that it writes.
const FORMAT: u32 = 1;

/// Temporary directory below `replicas`; no replica has this name.
const TMP: &str = ".tmp";

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// Another process uses the directory.
    #[error(
        "the data directory {0} is in use by another process; stop that one or choose another --dir"
    )]
    Locked(PathBuf),
    /// The directory belongs to another cluster.
    #[error(
        "the data directory {dir} belongs to cluster {found}, but the master serves cluster {wanted}; choose another --dir or another --master"
    )]
    OtherCluster {
        /// The directory.
        dir: PathBuf,
        /// Its cluster.
        found: String,
        /// The master's cluster.
        wanted: String,
    },
    /// A newer version wrote the directory.
    #[error(
        "the data directory {dir} has format {found}, this version reads up to {FORMAT}; use a newer vasto"
    )]
    NewerFormat {
        /// The directory.
        dir: PathBuf,
        /// Its format.
        found: u32,
    },
    /// A file is damaged.
    #[error("{path} is damaged: {reason}; restore it or replace the node")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damage.
        reason: String,
    },
    /// The work was interrupted, but not by the file system.
    #[error("work on the data directory was cut off: {0}")]
    CutOff(String),
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        source: std::io::Error,
    },
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> DirError {
    let path = path.to_owned();
    move |source| DirError::Io { path, source }
}

/// The identity of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeIdentity {
    /// Format of the directory.
    pub format: u32,
    /// Its cluster; empty until the node first joins a master.
    pub cluster_id: String,
    /// The node.
    pub node_id: NodeId,
    /// The bucket that it ships to.
    pub bucket_url: String,
}

/// A replica that the directory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registered {
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// The catalog version that placed it here.
    pub version: CatalogVersion,
    /// The replica has not served yet: it may be deleted and recreated.
    pub building: bool,
    /// The replica came as the target of a plan: once it is placed, it holds what the plan brought.
    #[serde(default)]
    pub target: bool,
}

/// An opened and locked data directory.
pub(crate) struct NodeDir {
    dir: PathBuf,
    tmp: PathBuf,
    _lock: File,
    identity: NodeIdentity,
    replicas: BTreeMap<(KeyspaceId, ReplicaId), Registered>,
}

impl NodeDir {
    /// Opens or creates the directory; `fresh_id` becomes the node id of a new one.
    pub(crate) fn open(dir: &Path, fresh_id: NodeId) -> Result<Self, DirError> {
        let is_new = !dir.exists();
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        keep_private(dir);
        let lock_path = dir.join("LOCK");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(io(&lock_path))?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(DirError::Locked(dir.to_owned()));
        }
        let path = dir.join("node.json");
        let identity = match read_json::<serde_json::Value>(&path)? {
            Some(value) => {
                let format =
                    value.get("format").and_then(serde_json::Value::as_u64).unwrap_or(0) as u32;
                if format > FORMAT {
                    return Err(DirError::NewerFormat { dir: dir.to_owned(), found: format });
                }
                serde_json::from_value(value)
                    .map_err(|error| DirError::Damaged { path, reason: error.to_string() })?
            }
            None => {
                let identity = NodeIdentity {
                    format: FORMAT,
                    cluster_id: String::new(),
                    node_id: fresh_id,
                    bucket_url: String::new(),
                };
                write_json(&path, &identity)?;
                identity
            }
        };
        let registered: Vec<Registered> =
            read_json(&dir.join("replicas.json"))?.unwrap_or_default();
        for sub in ["replicas", "catalog"] {
            let path = dir.join(sub);
            std::fs::create_dir_all(&path).map_err(io(&path))?;
        }
        sync_dir(dir).map_err(io(dir))?;
        if let Some(parent) = dir.parent().filter(|_| is_new) {
            sync_dir(parent).map_err(io(parent))?;
        }
        let replicas = dir.join("replicas");
        let (beside, inside) = (dir.join("tmp"), replicas.join(TMP));
        for old in [&beside, &inside] {
            match std::fs::remove_dir_all(old) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io(old)(error));
                }
                _ => {}
            }
        }
        std::fs::create_dir_all(&beside).map_err(io(&beside))?;
        let tmp = if can_move(&beside, &replicas).map_err(io(&beside))? { beside } else { inside };
        std::fs::create_dir_all(&tmp).map_err(io(&tmp))?;
        Ok(Self {
            dir: dir.to_owned(),
            tmp,
            _lock: lock,
            identity,
            replicas: registered
                .into_iter()
                .map(|replica| ((replica.keyspace, replica.replica), replica))
                .collect(),
        })
    }

    /// Returns the identity of the node.
    pub(crate) fn identity(&self) -> &NodeIdentity {
        &self.identity
    }

    /// Joins the cluster on first contact; refuses any other cluster later.
    pub(crate) fn join(&mut self, cluster_id: &str, bucket_url: &str) -> Result<(), DirError> {
        if !self.identity.cluster_id.is_empty() && self.identity.cluster_id != cluster_id {
            return Err(DirError::OtherCluster {
                dir: self.dir.clone(),
                found: self.identity.cluster_id.clone(),
                wanted: cluster_id.to_owned(),
            });
        }
        if self.identity.cluster_id != cluster_id || self.identity.bucket_url != bucket_url {
            self.identity.cluster_id = cluster_id.to_owned();
            self.identity.bucket_url = bucket_url.to_owned();
            write_json(&self.dir.join("node.json"), &self.identity)?;
        }
        Ok(())
    }

    /// Returns the registered replicas.
    pub(crate) fn replicas(&self) -> Vec<Registered> {
        self.replicas.values().copied().collect()
    }

    /// Returns the registration of a replica.
    pub(crate) fn registered(
        &self,
        keyspace: KeyspaceId,
        replica: ReplicaId,
    ) -> Option<Registered> {
        self.replicas.get(&(keyspace, replica)).copied()
    }

    /// Registers a replica, durably, before it serves anything.
    pub(crate) fn register(&mut self, replica: Registered) -> Result<(), DirError> {
        let mut next = self.replicas.clone();
        if next.insert((replica.keyspace, replica.replica), replica) == Some(replica) {
            return Ok(());
        }
        self.replace_register(next)
    }

    /// Unregisters a replica and removes its files. The order (register last) makes a crash in
    /// between show up as a registered replica without files, which is removed again.
    pub(crate) fn discard(
        &mut self,
        keyspace: KeyspaceId,
        replica: ReplicaId,
    ) -> Result<(), DirError> {
        let path = self.replica_dir(keyspace, replica);
        let grave = self.tmp().join(format!("removed-{keyspace}-{replica}"));
        match std::fs::rename(&path, &grave) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io(&path)(error));
            }
            // Files that reappear after a power loss must still be in the register.
            _ => {
                let replicas = self.dir.join("replicas");
                sync_dir(&replicas).map_err(io(&replicas))?;
            }
        }
        // Gigabytes take a while, so this runs in the background; the next start removes the rest.
        std::thread::spawn(move || std::fs::remove_dir_all(grave));
        let mut next = self.replicas.clone();
        if next.remove(&(keyspace, replica)).is_none() {
            return Ok(());
        }
        self.replace_register(next)
    }

    /// Replaces the register: memory equals the disk, also after a failure.
    fn replace_register(
        &mut self,
        next: BTreeMap<(KeyspaceId, ReplicaId), Registered>,
    ) -> Result<(), DirError> {
        write_json(&self.dir.join("replicas.json"), &next.values().collect::<Vec<_>>())?;
        self.replicas = next;
        Ok(())
    }

    /// Returns the directory of a replica.
    pub(crate) fn replica_dir(&self, keyspace: KeyspaceId, replica: ReplicaId) -> PathBuf {
        self.dir.join("replicas").join(format!("{keyspace}-{replica}"))
    }

    /// Returns the directory for temporary files on the file system of the replicas: finished files
    /// are renamed into place, and `replicas` may be a mount of its own.
    pub(crate) fn tmp(&self) -> PathBuf {
        self.tmp.clone()
    }

    /// Remembers a catalog version before it is applied.
    pub(crate) fn remember_catalog(&self, catalog: &Catalog) -> Result<(), DirError> {
        write_json(&self.dir.join("catalog").join(format!("{}.json", catalog.keyspace)), catalog)
    }

    /// Returns all remembered catalog versions that can be read, and the errors of the others. A
    /// keyspace with an unreadable version is served once the master has sent it again; its
    /// replicas remember for themselves which versions they refuse.
    pub(crate) fn catalogs(&self) -> Result<(Vec<Catalog>, Vec<DirError>), DirError> {
        let dir = self.dir.join("catalog");
        let (mut out, mut damaged) = (Vec::new(), Vec::new());
        for entry in std::fs::read_dir(&dir).map_err(io(&dir))? {
            let path = entry.map_err(io(&dir))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                match read_json(&path) {
                    Ok(catalog) => out.extend(catalog),
                    Err(error) => damaged.push(error),
                }
            }
        }
        Ok((out, damaged))
    }
}

/// Returns whether files of one directory can be renamed into the other: not when that is a mount
/// of its own.
fn can_move(from: &Path, to: &Path) -> std::io::Result<bool> {
    let (probe, there) = (from.join("probe"), to.join(".probe"));
    File::create(&probe)?;
    match std::fs::rename(&probe, &there) {
        Ok(()) => std::fs::remove_file(&there).map(|()| true),
        Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => {
            std::fs::remove_file(&probe).map(|()| false)
        }
        Err(error) => Err(error),
    }
}

/// Restricts access to a directory to its user. A directory that belongs to another user stays as
/// it is: the mode is the owner's decision.
fn keep_private(dir: &Path) {
    use std::os::unix::fs::PermissionsExt;
    if let Err(error) = std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)) {
        tracing::info!(%error, dir = %dir.display(), "the mode of the data directory could not be set to 0700");
    }
}

/// Reads a JSON file; `None` when it does not exist.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DirError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| DirError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(path)(error)),
    }
}

/// Replaces a JSON file durably.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), DirError> {
    let bytes = serde_json::to_vec_pretty(value).expect("plain data always has a JSON form");
    let partial = path.with_extension("json.part");
    let mut file = File::create(&partial).map_err(io(&partial))?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io(&partial))?;
    std::fs::rename(&partial, path).map_err(io(path))?;
    let parent = path.parent().unwrap_or(Path::new("."));
    sync_dir(parent).map_err(io(parent))
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    // The parent of a plain name is the empty path, which means the current directory.
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn registered(replica: u64) -> Registered {
        Registered {
            keyspace: KeyspaceId(1),
            shard: ShardId(0),
            replica: ReplicaId(replica),
            version: CatalogVersion(1),
            building: false,
            target: false,
        }
    }

    #[test]
    fn a_directory_keeps_its_identity_and_refuses_others() {
        let temp = tempfile::tempdir().unwrap();
        let mut dir = NodeDir::open(temp.path(), NodeId(7)).unwrap();
        assert!(matches!(NodeDir::open(temp.path(), NodeId(8)), Err(DirError::Locked(_))));
        dir.join("c1", "file:///b").unwrap();
        assert!(matches!(dir.join("c2", "file:///b"), Err(DirError::OtherCluster { .. })));
        let replica = Registered {
            keyspace: KeyspaceId(1),
            shard: ShardId(0),
            replica: ReplicaId(1),
            version: CatalogVersion(1),
            building: false,
            target: false,
        };
        dir.register(replica).unwrap();
        drop(dir);
        let dir = NodeDir::open(temp.path(), NodeId(8)).unwrap();
        assert_eq!(dir.identity().node_id, NodeId(7));
        assert_eq!(dir.replicas(), vec![replica]);
    }

    #[test]
    fn what_could_not_be_registered_is_not_and_is_tried_again() {
        let temp = tempfile::tempdir().unwrap();
        let mut dir = NodeDir::open(temp.path(), NodeId(7)).unwrap();
        let replica = Registered {
            keyspace: KeyspaceId(1),
            shard: ShardId(0),
            replica: ReplicaId(1),
            version: CatalogVersion(1),
            building: true,
            target: false,
        };
        let in_the_way = temp.path().join("replicas.json.part");
        std::fs::create_dir(&in_the_way).unwrap();
        assert!(matches!(dir.register(replica), Err(DirError::Io { .. })));
        assert_eq!(dir.registered(replica.keyspace, replica.replica), None);
        std::fs::remove_dir(&in_the_way).unwrap();
        dir.register(replica).unwrap();
        std::fs::create_dir(&in_the_way).unwrap();
        assert!(matches!(dir.discard(replica.keyspace, replica.replica), Err(DirError::Io { .. })));
        std::fs::remove_dir(&in_the_way).unwrap();
        dir.discard(replica.keyspace, replica.replica).unwrap();
        drop(dir);
        assert_eq!(NodeDir::open(temp.path(), NodeId(8)).unwrap().replicas(), []);
    }

    #[test]
    fn the_directory_is_its_users_alone() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("wide");
        std::fs::create_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        drop(NodeDir::open(&dir, NodeId(7)).unwrap());
        assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn temporary_files_are_on_the_file_system_of_the_replicas() {
        let temp = tempfile::tempdir().unwrap();
        // `/dev/shm` is a file system of its own on every Linux machine.
        let other = tempfile::tempdir_in("/dev/shm").unwrap();
        std::os::unix::fs::symlink(other.path(), temp.path().join("replicas")).unwrap();
        let replica = registered(1);
        for _ in 0..2 {
            let mut dir = NodeDir::open(temp.path(), NodeId(7)).unwrap();
            assert_eq!(std::fs::read_dir(dir.tmp()).unwrap().count(), 0);
            std::fs::write(dir.tmp().join("left"), "").unwrap();
            // Replicas are built there, and removed replicas are moved there.
            let built = dir.tmp().join("built");
            std::fs::create_dir(&built).unwrap();
            let place = dir.replica_dir(replica.keyspace, replica.replica);
            std::fs::rename(&built, &place).unwrap();
            dir.register(replica).unwrap();
            dir.discard(replica.keyspace, replica.replica).unwrap();
            assert!(!place.exists());
        }
        let plain = tempfile::tempdir().unwrap();
        assert_eq!(NodeDir::open(plain.path(), NodeId(7)).unwrap().tmp(), plain.path().join("tmp"));
    }

    #[test]
    fn one_catalog_version_that_cannot_be_read_hides_no_other() {
        let temp = tempfile::tempdir().unwrap();
        let dir = NodeDir::open(temp.path(), NodeId(7)).unwrap();
        let spec = vasto_core::catalog::KeyspaceSpec::default();
        let catalog = Catalog::first(KeyspaceId(5), "ks", spec, &[vec![NodeId(7)]], 1, 1);
        dir.remember_catalog(&catalog).unwrap();
        std::fs::write(temp.path().join("catalog/6.json"), "{").unwrap();
        let (read, damaged) = dir.catalogs().unwrap();
        assert_eq!(read, [catalog]);
        assert!(
            matches!(&damaged[..], [DirError::Damaged { path, .. }] if path.ends_with("6.json")),
            "{damaged:?}"
        );
    }

    #[test]
    fn newer_formats_and_damage_are_typed() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("node.json"), r#"{"format":2,"new":"things"}"#).unwrap();
        assert!(matches!(
            NodeDir::open(temp.path(), NodeId(7)),
            Err(DirError::NewerFormat { found: 2, .. })
        ));
        std::fs::write(temp.path().join("node.json"), "{").unwrap();
        assert!(matches!(NodeDir::open(temp.path(), NodeId(7)), Err(DirError::Damaged { .. })));
    }
}
