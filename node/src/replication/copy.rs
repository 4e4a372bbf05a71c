//! A whole copy of a replica over the stream: the files of a checkpoint, and what makes them another
//! replica.
//!
//! **Invariants**
//! - The copy is built in a directory of its own, verified, given its new identity, and moved into its
//!   place whole; an interrupted one is begun again.
//! - It takes nothing of the source's identity, seals, cursors and results; its ranges are those of the
//!   catalog, and what is stored outside of them is gone before it serves.
//! - File names from a peer are plain names.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use vasto_core::Band;
use vasto_core::ids::{CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, OwnSeq, ReplicaId};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::stored_key::MetaKey;
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;
use vasto_proto::v1;

use crate::core::NodeCore;
use crate::engine::{Batch, Engine, EngineError, EngineShared, FlushGuard};
use crate::replica::Replica;
use crate::replica::state::{Head, Identity, Ranges};

/// Bytes of a file in one frame.
const FRAME_BYTES: usize = 1 << 20;
/// Frames that may wait for a slow reader.
const FRAMES_AHEAD: usize = 4;

/// Why a copy is not made.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source, or the way to it.
    #[error("the source: {}", .0.message())]
    Source(#[from] Status),
    /// What arrived is not what was sent.
    #[error("the copy is damaged: {0}")]
    Damaged(String),
    /// A local file.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The database.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CopyError + '_ {
    move |source| CopyError::Io { path: path.to_owned(), source }
}

/// Begins to send a copy of a replica of this node.
pub async fn serve(
    core: &NodeCore,
    request: v1::CopyRequest,
) -> Result<ReceiverStream<Result<v1::CopyFrame, Status>>, Status> {
    let (keyspace, id) = (KeyspaceId(request.keyspace_id), ReplicaId(request.replica_id));
    let unavailable = |reason: String| status_of(&VastoError::new(ErrorCode::Unavailable, reason));
    let replica = core
        .replica(keyspace, id)
        .ok_or_else(|| unavailable(format!("replica {id} of keyspace {keyspace} is not open on this node")))?;
    let permit = core.copies.clone().try_acquire_owned().map_err(|_| {
        let busy = VastoError::new(ErrorCode::Overloaded, "this node sends as many copies as it may; try again later");
        status_of(&busy.retry_after_ms(1_000))
    })?;
    let (frames, receiver) = channel(FRAMES_AHEAD);
    // Ends when everything is sent or the reader is gone.
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        if let Err(reason) = send(&replica, &frames) {
            let _ = frames.blocking_send(Err(unavailable(reason)));
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// Removes a directory whatever happens.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn send(replica: &Replica, frames: &Sender<Result<v1::CopyFrame, Status>>) -> Result<(), String> {
    use std::io::Read;
    // Beside the database, so that the checkpoint is links and not copies.
    let dir = replica.engine().path().with_file_name(format!("copy-{:016x}", rand::random::<u64>()));
    let dir = Removed(dir);
    replica.engine().checkpoint(&dir.0).map_err(|error| error.to_string())?;
    let told = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&dir.0).map_err(|error| told(&dir.0, error))? {
        let entry = entry.map_err(|error| told(&dir.0, error))?;
        let bytes = entry.metadata().map_err(|error| told(&entry.path(), error))?.len();
        files.push((entry.path(), entry.file_name().to_string_lossy().into_owned(), bytes));
    }
    let total_bytes = files.iter().map(|(_, _, bytes)| bytes).sum();
    let count = files.len();
    for (index, (path, name, file_bytes)) in files.into_iter().enumerate() {
        let mut file = std::fs::File::open(&path).map_err(|error| told(&path, error))?;
        let mut offset = 0;
        loop {
            let mut data = vec![0; FRAME_BYTES.min((file_bytes - offset) as usize)];
            file.read_exact(&mut data).map_err(|error| told(&path, error))?;
            let crc32c = crc32c::crc32c(&data);
            let end = offset + data.len() as u64;
            let frame = v1::CopyFrame {
                file: name.clone(),
                file_bytes,
                offset,
                data: data.into(),
                crc32c,
                total_bytes,
                last: index + 1 == count && end == file_bytes,
            };
            if frames.blocking_send(Ok(frame)).is_err() {
                return Ok(()); // the reader is gone
            }
            offset = end;
            if offset == file_bytes {
                break;
            }
        }
    }
    Ok(())
}

/// Writes the frames of a copy into `dir`, which is made anew. `progress` hears `(done, total)` bytes.
pub async fn fetch(
    mut frames: Streaming<v1::CopyFrame>,
    dir: &Path,
    progress: impl Fn(u64, u64),
) -> Result<(), CopyError> {
    let damaged = |what: &str| CopyError::Damaged(what.to_owned());
    let _ = tokio::fs::remove_dir_all(dir).await;
    tokio::fs::create_dir_all(dir).await.map_err(io(dir))?;
    let mut open: Option<(String, PathBuf, tokio::fs::File, u64)> = None;
    let mut done = 0;
    while let Some(frame) = frames.message().await? {
        if open.as_ref().is_none_or(|(name, ..)| *name != frame.file) {
            let plain = matches!(Path::new(&frame.file).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
            if !plain {
                return Err(damaged("a file name that is not plain"));
            }
            let path = dir.join(&frame.file);
            let file = tokio::fs::File::create_new(&path).await.map_err(io(&path))?;
            open = Some((frame.file.clone(), path, file, 0));
        }
        let Some((_, path, file, at)) = &mut open else { return Err(damaged("a frame without a file")) };
        if frame.offset != *at || crc32c::crc32c(&frame.data) != frame.crc32c {
            return Err(damaged("a part of a file is missing or altered"));
        }
        file.write_all(&frame.data).await.map_err(io(path))?;
        *at += frame.data.len() as u64;
        done += frame.data.len() as u64;
        progress(done, frame.total_bytes);
        if *at == frame.file_bytes {
            file.sync_all().await.map_err(io(path))?;
        }
        if frame.last {
            return if done == frame.total_bytes && *at == frame.file_bytes {
                Ok(())
            } else {
                Err(damaged("it ends before it is whole"))
            };
        }
    }
    Err(damaged("it ends in the middle"))
}

/// Who a copy becomes.
#[derive(Debug, Clone, Copy)]
pub struct Adoption {
    /// The keyspace of both.
    pub keyspace: KeyspaceId,
    /// Whose copy it is.
    pub source: ReplicaId,
    /// Who it becomes.
    pub replica: ReplicaId,
    /// What it owns.
    pub owned: BandRange,
    /// The version that says so.
    pub version: CatalogVersion,
    /// Its epoch.
    pub epoch: Epoch,
}

struct NoGuard;

impl FlushGuard for NoGuard {
    fn before_flush(&self) {}
}

/// Makes the copied database in `dir` the database of another replica. Blocks on the disk.
pub fn adopt(engines: &EngineShared, dir: &Path, adoption: &Adoption) -> Result<Lsn, CopyError> {
    let engine = Engine::open(engines, dir, Arc::new(AtomicU64::new(0)), Arc::new(NoGuard))?;
    let result = rewrite(&engine, adoption);
    engine.close();
    result
}

fn rewrite(engine: &Engine, adoption: &Adoption) -> Result<Lsn, CopyError> {
    let odd = |what: &str| CopyError::Damaged(what.to_owned());
    let read = |key: MetaKey| engine.get(&key.encode());
    let identity = read(MetaKey::Identity)?.ok_or_else(|| odd("it has no identity"))?;
    let identity = Identity::decode(&identity).map_err(|error| odd(&error.to_string()))?;
    if (identity.keyspace, identity.replica) != (adoption.keyspace, adoption.source) {
        return Err(odd(&format!("it is of replica {} of keyspace {}", identity.replica, identity.keyspace)));
    }
    let head = read(MetaKey::Head)?.ok_or_else(|| odd("it has no head"))?;
    let head = Head::decode(&head).map_err(|error| odd(&error.to_string()))?;
    let source_lsn = head.applied_lsn;
    let mut ranges = Ranges::all(RangeState::Empty);
    ranges.set(adoption.owned, RangeState::Owned);
    let mut batch = Batch::default();
    for foreign in foreign_bands(adoption.owned) {
        batch.delete_bands(foreign);
    }
    for prefix in [MetaKey::result_prefix(), MetaKey::tail_cursor_prefix(), MetaKey::forward_cursor_prefix()] {
        for (key, _) in engine.with_prefix(&prefix)? {
            if let Ok(key) = MetaKey::decode(&key) {
                batch.delete_meta(key);
            }
        }
    }
    let new = Identity { replica: adoption.replica, incarnation: Incarnation(0), ..identity };
    batch.put_meta(MetaKey::Identity, &new.encode());
    let head =
        Head { applied_lsn: Lsn(0), own_seq: OwnSeq(0), epoch: adoption.epoch, version: adoption.version, ..head };
    batch.put_meta(MetaKey::Head, &head.encode());
    batch.put_meta(MetaKey::RangeStates, &ranges.encode());
    batch.put_meta(MetaKey::TailCursor(adoption.source), &source_lsn.0.to_le_bytes());
    engine.write(batch)?;
    engine.flush()?;
    for foreign in foreign_bands(adoption.owned) {
        engine.compact_bands(foreign);
        if engine.any_in(foreign)? {
            return Err(odd("something is left of bands that it does not own"));
        }
    }
    Ok(source_lsn)
}

fn foreign_bands(owned: BandRange) -> Vec<BandRange> {
    let mut foreign = Vec::new();
    if owned.first > Band::FIRST {
        foreign.push(BandRange { first: Band::FIRST, last: Band(owned.first.0 - 1) });
    }
    if owned.last < Band::LAST {
        foreign.push(BandRange { first: Band(owned.last.0 + 1), last: Band::LAST });
    }
    foreign
}
