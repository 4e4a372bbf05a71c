//! The position of a shipper, in `ship.json` of the replica's directory.
//!
//! **Invariant:** the file is only a hint: the bucket decides. It is written after the objects that
//! it names.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vasto_core::ids::Lsn;
use vasto_core::plan::PinnedManifest;
use vasto_core::report::{Continues, ShipsBehind};
use vasto_shipping::layout::{self, Shipped};

use crate::node_dir::{DirError, read_json, write_json};

/// Position of a shipper.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct ShipState {
    /// LSN up to which chunks and manifests cover the log.
    pub(super) shipped_lsn: Lsn,
    /// The last manifest.
    pub(super) manifest: Option<PinnedManifest>,
    /// Key of the object that the next chunk names as its predecessor.
    pub(super) previous: Option<String>,
    /// The log does not hold the records that the replica began with: a checkpoint precedes the
    /// first chunk.
    #[serde(default)]
    pub(super) began_full: bool,
    /// The manifest of another keyspace whose files the database began with: they need no second
    /// upload as long as the plan that restores this keyspace keeps them.
    #[serde(default)]
    pub(super) inherited: Option<String>,
    /// Chunks after the last manifest.
    #[serde(default)]
    pub(super) chunks: u64,
    /// LSN from which chunks cover the log without a gap; unknown in files of older versions.
    #[serde(default)]
    chained_from: Option<Lsn>,
    /// LSN up to which archives of others covered the log when this replica continued after them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) went_on_behind: Option<Lsn>,
    /// Whose archive it was, while no manifest of this replica covers that LSN; unknown in files of
    /// older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    continues: Option<Continues>,
}

impl ShipState {
    /// Reads the position of an open replica; an unreadable one makes the next checkpoint come
    /// first.
    pub(super) fn read(dir: &Path) -> Self {
        match read_json(&file(dir)) {
            Ok(state) => Option::unwrap_or_default(state),
            Err(error) => {
                tracing::warn!(%error, "the shipping position is lost; the next checkpoint replaces it");
                Self { began_full: true, ..Self::default() }
            }
        }
    }

    pub(super) fn write(&self, dir: &Path) -> Result<(), DirError> {
        write_json(&file(dir), self)
    }

    pub(super) fn chained_from(&self) -> Lsn {
        self.chained_from.unwrap_or(self.shipped_lsn)
    }

    /// LSN of the last manifest.
    pub(super) fn manifest_lsn(&self) -> Option<Lsn> {
        self.manifest.as_ref().map(|manifest| manifest.lsn)
    }

    /// Returns what the bucket holds before this replica's own objects; `None` when that is not known.
    pub(super) fn ships_behind(&self) -> Option<ShipsBehind> {
        let covered = self.manifest_lsn().unwrap_or_default();
        match (self.continues, self.went_on_behind) {
            (Some(continues), _) => Some(ShipsBehind::Others(continues)),
            // Written before the other replica was noted.
            (None, Some(lsn)) if lsn > covered => None,
            (None, _) => Some(ShipsBehind::Nobody),
        }
    }

    /// Records a chunk that ends with `last`.
    pub(super) fn add_chunk(&mut self, key: String, last: Lsn) {
        self.chained_from = Some(self.chained_from());
        self.shipped_lsn = last;
        self.previous = Some(key);
        self.chunks += 1;
    }

    /// Records a manifest, which supersedes so many chunks.
    pub(super) fn add_manifest(&mut self, manifest: PinnedManifest, superseded: u64) {
        self.inherited = None;
        self.continues = self.continues.filter(|continues| continues.lsn > manifest.lsn);
        self.chunks = self.chunks.saturating_sub(superseded);
        if manifest.lsn > self.shipped_lsn {
            // Records in between are in no chunk.
            self.chained_from = Some(manifest.lsn);
            self.shipped_lsn = manifest.lsn;
            self.previous = Some(manifest.key.clone());
        }
        self.manifest = Some(manifest);
    }

    /// Records that archives of others cover the log up to `lsn`: `previous` is their last object,
    /// with so many chunks after a manifest.
    pub(super) fn continue_after(&mut self, lsn: Lsn, previous: String, chunks: u64) {
        self.continues = match layout::parse_shipped(&previous) {
            Some((other, Shipped::Chunk(object) | Shipped::Manifest(object))) => {
                Some(Continues { replica: other.replica, object, lsn })
            }
            _ => None,
        };
        self.shipped_lsn = lsn;
        self.went_on_behind = Some(lsn);
        // Earlier records are in no chunk of this replica.
        self.chained_from = Some(lsn);
        self.previous = Some(previous);
        self.chunks = chunks;
    }
}

/// Records, for a replica that is not open yet, that its log does not hold everything.
pub(crate) fn begin_with_a_checkpoint(dir: &Path) -> Result<(), DirError> {
    begin(dir, None)
}

/// Does the same for a database that begins with the files of another keyspace's checkpoint.
pub(crate) fn begin_with_files_of(dir: &Path, manifest: &str) -> Result<(), DirError> {
    begin(dir, Some(manifest.to_owned()))
}

/// Returns the LSN up to which a replica that is not open has shipped, by its own record.
pub(crate) fn shipped_by(dir: &Path) -> Lsn {
    let state: Option<ShipState> = read_json(&file(dir)).ok().flatten();
    state.unwrap_or_default().shipped_lsn
}

fn begin(dir: &Path, inherited: Option<String>) -> Result<(), DirError> {
    std::fs::create_dir_all(dir).map_err(|source| DirError::Io { path: dir.to_owned(), source })?;
    ShipState { began_full: true, inherited, ..ShipState::default() }.write(dir)
}

fn file(dir: &Path) -> PathBuf {
    dir.join("ship.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(lsn: u64) -> PinnedManifest {
        PinnedManifest { key: format!("manifest {lsn}"), lsn: Lsn(lsn) }
    }

    #[test]
    fn a_manifest_ahead_of_the_chunks_breaks_their_chain_and_one_beside_them_does_not() {
        let mut state = ShipState::default();
        state.add_chunk("a".into(), Lsn(10));
        state.add_chunk("b".into(), Lsn(20));
        state.add_manifest(manifest(15), 1);
        assert_eq!((state.shipped_lsn, state.chained_from(), state.chunks), (Lsn(20), Lsn(0), 1));
        assert_eq!(state.previous.as_deref(), Some("b"));
        state.add_manifest(manifest(30), 1);
        assert_eq!((state.shipped_lsn, state.chained_from(), state.chunks), (Lsn(30), Lsn(30), 0));
        assert_eq!(state.previous.as_deref(), Some("manifest 30"));
        state.add_chunk("c".into(), Lsn(40));
        assert_eq!((state.shipped_lsn, state.chained_from()), (Lsn(40), Lsn(30)));
    }

    #[test]
    fn whose_archive_is_continued_is_known_until_a_manifest_covers_it() {
        use vasto_core::ids::{KeyspaceId, ReplicaId, ShardId};
        let chunk = layout::chunk(KeyspaceId(1), ShardId(0), ReplicaId(7), Lsn(41));
        let mut state = ShipState::default();
        assert_eq!(state.ships_behind(), Some(ShipsBehind::Nobody));
        state.continue_after(Lsn(12), chunk, 3);
        let continues = Continues { replica: ReplicaId(7), object: Lsn(41), lsn: Lsn(12) };
        assert_eq!(state.ships_behind(), Some(ShipsBehind::Others(continues)));
        state.add_chunk("own".into(), Lsn(20));
        let text = serde_json::to_string(&state).unwrap_or_default();
        let mut read: ShipState = serde_json::from_str(&text).unwrap_or_default();
        assert_eq!(read.ships_behind(), Some(ShipsBehind::Others(continues)), "{text}");
        read.add_manifest(manifest(11), 0);
        assert_eq!(read.ships_behind(), Some(ShipsBehind::Others(continues)));
        read.add_manifest(manifest(25), 1);
        assert_eq!(read.ships_behind(), Some(ShipsBehind::Nobody));
        let old = r#"{"shipped_lsn":20,"manifest":null,"previous":null,"went_on_behind":12}"#;
        let old: ShipState = serde_json::from_str(old).unwrap_or_default();
        assert_eq!(old.ships_behind(), None);
    }

    #[test]
    fn a_file_of_an_older_version_claims_no_chain_before_its_position() {
        let old = r#"{"shipped_lsn":7,"manifest":null,"previous":null}"#;
        let state: ShipState = serde_json::from_str(old).unwrap_or_default();
        assert_eq!((state.shipped_lsn, state.chained_from()), (Lsn(7), Lsn(7)));
    }
}
