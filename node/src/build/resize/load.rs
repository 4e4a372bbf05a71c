//! Downloads the rows that arrive at this shard, rewrites them, ingests them: of a plan that
//! exports, the tables that the sources have exported for the shard; otherwise the files of their
//! checkpoints that hold the leaving bands.

use std::path::{Path, PathBuf};

use vasto_core::plan::{PinnedManifest, Plan, Source};
use vasto_core::record::{FeedProgress, IngestedObject};
use vasto_core::report::TargetStage;
use vasto_failpoint::points;
use vasto_shipping::download::Wanted;

use super::rewrite::{Files, Rewriting, Rewritten, SourceFiles, rewrite};
use super::{Build, Shape};
use crate::build::error::BuildError;
use crate::build::files;
use crate::rates;
use crate::replica::Replica;
use crate::replica::command::Control;

/// What is loaded from a source.
struct Chosen {
    source: Source,
    pinned: PinnedManifest,
    floor: u64,
    wanted: Vec<Wanted>,
    files: Files,
}

pub(super) async fn load(build: &Build, plan: &Plan) -> Result<(), BuildError> {
    // Ids of replicas and plans are counted for each keyspace.
    let Replica { keyspace, id, .. } = build.replica;
    let work = build.tmp.join(format!("build-{keyspace}-{id}-{}", plan.id));
    // Downloads that finished before an interruption are kept.
    let result = load_in(build, plan, &work).await;
    if result.as_ref().map_or_else(|error| !error.is_transient(), |()| true) {
        let _ = tokio::fs::remove_dir_all(&work).await;
    }
    result
}

async fn load_in(build: &Build, plan: &Plan, work: &Path) -> Result<(), BuildError> {
    let shape = Shape::of(plan)?;
    let mut span = build.trace.begin("bucket get");
    span.set("vasto.what", "manifests");
    let chosen = choose(build, plan, shape).await;
    span.end(&chosen);
    let chosen = chosen?;
    {
        let mut progress = build.progress.lock();
        progress.bytes_total =
            chosen.iter().flat_map(|chosen| &chosen.wanted).map(|object| object.bytes).sum();
        progress.bytes_done = 0;
    }
    for Chosen { source, wanted, .. } in &chosen {
        build.reader().download(wanted, &download_dir(work, source)).await?;
        build.passes(points::TARGET_DOWNLOAD_HALF).await?;
    }
    build.progress.lock().stage = TargetStage::Rewriting;
    build.registry.report.notify_one();
    let (objects, cursors) = (objects(&chosen), cursors(&chosen));
    let rewriting = rates::REWRITES.begin();
    let mut span = build.trace.begin("target rewrite");
    let rewritten = rewrite_chosen(build, shape, chosen, work).await;
    if let Ok(rewritten) = &rewritten {
        span.count("vasto.keys_moved", rewritten.rows);
        span.count("vasto.bytes_moved", rewritten.bytes());
    }
    span.end(&rewritten);
    let rewritten = rewritten?;
    rewriting.end(rewritten.bytes());
    let mut span = build.trace.begin("target ingest");
    span.count("vasto.objects", rewritten.tables.len() as u64);
    let ingested = ingest(build, plan, shape, objects, cursors, rewritten).await;
    span.end(&ingested);
    ingested
}

/// Reads what the manifests of all sources name.
async fn choose(build: &Build, plan: &Plan, shape: Shape) -> Result<Vec<Chosen>, BuildError> {
    let mut chosen = Vec::new();
    for source in &plan.sources {
        chosen.push(match plan.exports() {
            true => choose_exported(build, plan, source).await?,
            false => choose_banded(build, shape, source).await?,
        });
    }
    Ok(chosen)
}

fn download_dir(work: &Path, source: &Source) -> PathBuf {
    work.join(format!("source-{}", source.replica))
}

fn pinned_of(source: &Source) -> Result<PinnedManifest, BuildError> {
    let none =
        || BuildError::Mismatch(format!("the plan names no manifest of shard {}", source.shard));
    source.manifest.clone().ok_or_else(none)
}

/// Reads the pinned manifest of a source and picks the files that touch the leaving bands.
async fn choose_banded(build: &Build, shape: Shape, source: &Source) -> Result<Chosen, BuildError> {
    let pinned = pinned_of(source)?;
    let base = build.reader().manifest(&pinned.key).await?;
    if (base.manifest.replica, base.manifest.lsn) != (source.replica, pinned.lsn) {
        return Err(BuildError::unusable(&base, "it is not the manifest that the plan pinned"));
    }
    let picked = base.manifest.files_overlapping(shape.bands);
    Ok(Chosen {
        source: source.clone(),
        pinned,
        floor: base.manifest.floor,
        wanted: picked.iter().map(|file| files::wanted(file)).collect(),
        files: Files::Checkpoint(picked.iter().map(|file| files::imported(file)).collect()),
    })
}

/// Reads the export of a source and picks the tables for this shard.
async fn choose_exported(
    build: &Build,
    plan: &Plan,
    source: &Source,
) -> Result<Chosen, BuildError> {
    let pinned = pinned_of(source)?;
    let none =
        || BuildError::Mismatch(format!("the plan names no export of shard {}", source.shard));
    let key = source.export.as_ref().ok_or_else(none)?;
    let export = build.reader().export(key).await?;
    let names = (export.keyspace, export.plan, export.replica, export.lsn);
    let is_pinned = names == (build.replica.keyspace, plan.id, source.replica, pinned.lsn);
    if !is_pinned || plan.floor.is_some_and(|floor| export.floor < floor) {
        let reason = "it is not the export that the plan pinned".to_owned();
        return Err(BuildError::Unusable { key: key.clone(), reason });
    }
    let wanted: Vec<Wanted> = export
        .tables_for(build.replica.shard)
        .enumerate()
        .map(|(index, table)| Wanted {
            key: table.key.clone(),
            bytes: table.bytes,
            crc32c: table.crc32c,
            file_name: format!("{:06}.sst", index + 1),
        })
        .collect();
    let names = wanted.iter().map(|object| object.file_name.clone()).collect();
    Ok(Chosen {
        source: source.clone(),
        pinned,
        floor: export.floor,
        wanted,
        files: Files::Export(names),
    })
}

fn objects(chosen: &[Chosen]) -> Vec<IngestedObject> {
    let wanted = chosen.iter().flat_map(|chosen| &chosen.wanted);
    wanted
        .map(|object| IngestedObject {
            key: object.key.clone(),
            bytes: object.bytes,
            crc32c: object.crc32c,
        })
        .collect()
}

fn cursors(chosen: &[Chosen]) -> Vec<FeedProgress> {
    chosen
        .iter()
        .map(|chosen| FeedProgress::Tail(chosen.source.replica, chosen.pinned.lsn))
        .collect()
}

async fn rewrite_chosen(
    build: &Build,
    shape: Shape,
    chosen: Vec<Chosen>,
    work: &Path,
) -> Result<Rewritten, BuildError> {
    let floor = chosen.iter().map(|chosen| chosen.floor).max().unwrap_or(0);
    let sources: Vec<SourceFiles> = chosen
        .into_iter()
        .map(|Chosen { source, files, .. }| SourceFiles {
            download_dir: download_dir(work, &source),
            scratch_dir: work.join(format!("scratch-{}", source.replica)),
            files,
        })
        .collect();
    let rewriting = Rewriting {
        replica: build.replica.clone(),
        bucket: build.bucket.clone(),
        progress: build.progress.clone(),
        cancel: build.cancel.clone(),
    };
    let out = work.join("tables");
    tokio::task::spawn_blocking(move || rewrite(&rewriting, &sources, shape, floor, &out)).await?
}

async fn ingest(
    build: &Build,
    plan: &Plan,
    shape: Shape,
    objects: Vec<IngestedObject>,
    cursors: Vec<FeedProgress>,
    rewritten: Rewritten,
) -> Result<(), BuildError> {
    let bytes_moved = rewritten.bytes();
    let order = Control::Ingest {
        plan: plan.id,
        range: shape.arriving,
        files: rewritten.tables.into_iter().map(|table| table.path).collect(),
        objects,
        event_time_max: rewritten.event_time_max,
        progress: cursors,
    };
    // The writer flushes before it ingests: a replica that serves has little left to flush then.
    let flushed = build.replica.clone();
    tokio::task::spawn_blocking(move || flushed.engine().flush()).await??;
    build.unless_paused().await?;
    build.passes(points::TARGET_INGEST_BEFORE).await?;
    build.replica.control(order).await?;
    build.passes(points::TARGET_INGEST_AFTER).await?;
    let mut progress = build.progress.lock();
    progress.keys_moved = rewritten.rows;
    progress.bytes_moved = bytes_moved;
    Ok(())
}
