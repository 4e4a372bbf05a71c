//! A downloaded checkpoint becomes the database of the replica under construction.
//!
//! **Invariants**
//! - The database is assembled in a directory of its own on the same file system, verified, given
//!   its new identity, and renamed into place whole.
//! - The new replica drops the source's identity, seals, cursors and dedup table, but for the cursors
//!   of logs that it is to go on with; its ranges are those of the catalog, and rows outside of them
//!   are gone before it serves.
//! - Its archive begins with a checkpoint of its own: its log does not hold the records that it
//!   began with.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vasto_core::Band;
use vasto_core::ids::{Incarnation, Lsn, OwnSeq, ReplicaId};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::stored_key::MetaKey;
use vasto_shipping::archive::ArchivedCheckpoint;

use super::bootstrap::{Adoption, Log};
use super::error::{BuildError, io};
use crate::engine::{Batch, Engine, EngineShared, FlushGuard};
use crate::replica::state::{Head, Identity, Ranges};
use crate::ship;

struct NoGuard;

impl FlushGuard for NoGuard {
    fn before_flush(&self) {}
}

/// Installs the downloaded files as the database of the new replica. `followed` are the replicas of
/// other shards whose cursors stay. Blocks on the disk.
pub(super) fn install(
    engines: &EngineShared,
    dir: &Path,
    side: &Path,
    base: &ArchivedCheckpoint,
    adoption: Adoption,
    log: Log,
    followed: &[ReplicaId],
) -> Result<(), BuildError> {
    let name =
        base.manifest.database.as_ref().map(|database| database.name.as_str()).unwrap_or_default();
    let current = side.join("CURRENT");
    std::fs::write(&current, format!("{name}\n")).map_err(io(&current))?;
    let engine = Engine::open(engines, side, Arc::new(AtomicU64::new(0)), Arc::new(NoGuard))?;
    let adopted = adopt(&engine, base, adoption, log, followed);
    engine.close();
    drop(engine);
    adopted?;
    std::fs::create_dir_all(dir).map_err(io(dir))?;
    match log {
        Log::Replicate => ship::begin_with_a_checkpoint(dir)?,
        Log::Fork { .. } => ship::begin_with_files_of(dir, &base.key)?,
    }
    let database = crate::replica::database_dir(dir);
    let _ = std::fs::remove_dir_all(&database);
    std::fs::rename(side, &database).map_err(io(&database))?;
    std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io(dir))
}

/// Gives a database the identity of another replica.
fn adopt(
    engine: &Engine,
    base: &ArchivedCheckpoint,
    adoption: Adoption,
    log: Log,
    followed: &[ReplicaId],
) -> Result<(), BuildError> {
    let identity = engine.get(&MetaKey::Identity.encode())?;
    let identity = identity.ok_or_else(|| BuildError::unusable(base, "it has no identity"))?;
    let identity =
        Identity::decode(&identity).map_err(|error| BuildError::unusable(base, error))?;
    // A crash may have come between the rewrite and the rename.
    if (identity.keyspace, identity.replica) != (adoption.keyspace, adoption.replica) {
        rewrite_metadata(engine, base, identity, adoption, log, followed)?;
    }
    for bands in foreign_bands(adoption.owned) {
        if engine.band_bytes(bands)? != (0, 0) {
            engine.compact_bands(bands);
        }
        if engine.any_in(bands)? {
            return Err(BuildError::unusable(
                base,
                "something is left of bands that it does not own",
            ));
        }
    }
    Ok(())
}

fn rewrite_metadata(
    engine: &Engine,
    base: &ArchivedCheckpoint,
    identity: Identity,
    adoption: Adoption,
    log: Log,
    followed: &[ReplicaId],
) -> Result<(), BuildError> {
    let manifest = &base.manifest;
    if (identity.keyspace, identity.shard, identity.replica)
        != (manifest.keyspace, manifest.shard, manifest.replica)
    {
        let reason =
            format!("it is of replica {} of keyspace {}", identity.replica, identity.keyspace);
        return Err(BuildError::unusable(base, reason));
    }
    let head = engine
        .get(&MetaKey::Head.encode())?
        .ok_or_else(|| BuildError::unusable(base, "it has no head"))?;
    let head = Head::decode(&head).map_err(|error| BuildError::unusable(base, error))?;
    if head.applied_lsn != manifest.lsn {
        let reason = format!("it ends at {} instead of {}", head.applied_lsn, manifest.lsn);
        return Err(BuildError::unusable(base, reason));
    }
    let foreign = foreign_bands(adoption.owned);
    for bands in &foreign {
        // Whole files first; the range delete below hides the remaining rows, and is compacted
        // away.
        engine.delete_files_in(*bands)?;
    }
    let mut batch = Batch::default();
    for bands in &foreign {
        batch.delete_bands(*bands);
    }
    drop_foreign_metadata(engine, &mut batch, log, followed)?;
    let identity = Identity {
        keyspace: adoption.keyspace,
        replica: adoption.replica,
        incarnation: Incarnation(0),
        ..identity
    };
    batch.put_meta(MetaKey::Identity, &identity.encode());
    let head = Head {
        applied_lsn: Lsn(0),
        own_seq: OwnSeq(0),
        epoch: adoption.epoch,
        version: adoption.version,
        ..head
    };
    batch.put_meta(MetaKey::Head, &head.encode());
    let mut ranges = Ranges::all(RangeState::Empty);
    ranges.set(adoption.owned, RangeState::Owned);
    if matches!(log, Log::Replicate) {
        // A new keyspace counts its plans anew.
        ranges.ingested = manifest.ingested;
    }
    batch.put_meta(MetaKey::RangeStates, &ranges.encode());
    batch.put_meta(
        MetaKey::TailCursor(log.cursor_of(manifest.replica)),
        &manifest.lsn.0.to_le_bytes(),
    );
    engine.write(batch)?;
    Ok(engine.flush()?)
}

/// Drops the metadata of the source that mean nothing here; the cursors of the logs of `followed`
/// stay.
fn drop_foreign_metadata(
    engine: &Engine,
    batch: &mut Batch,
    log: Log,
    followed: &[ReplicaId],
) -> Result<(), BuildError> {
    let mut prefixes = vec![
        MetaKey::result_prefix(),
        MetaKey::tail_cursor_prefix(),
        MetaKey::forward_cursor_prefix(),
    ];
    if matches!(log, Log::Fork { .. }) {
        prefixes.push(MetaKey::vector_prefix());
    }
    for prefix in prefixes {
        for (key, _) in engine.with_prefix(&prefix)? {
            if let Ok(key) = MetaKey::decode(&key) {
                batch.delete_meta(key);
            }
        }
    }
    for (source, lsn) in cursors_of(engine, followed)? {
        batch.put_meta(MetaKey::TailCursor(log.cursor_of(source)), &lsn);
    }
    Ok(())
}

/// Returns the stored cursors of these replicas' logs.
fn cursors_of(
    engine: &Engine,
    followed: &[ReplicaId],
) -> Result<Vec<(ReplicaId, Vec<u8>)>, BuildError> {
    let stored = engine.with_prefix(&MetaKey::tail_cursor_prefix())?;
    let of = |(key, lsn): (Vec<u8>, Vec<u8>)| match MetaKey::decode(&key) {
        Ok(MetaKey::TailCursor(source)) if followed.contains(&source) => Some((source, lsn)),
        _ => None,
    };
    Ok(stored.into_iter().filter_map(of).collect())
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
