//! Downloads the bands of every source that may hold keys of this shard, rewrites them, ingests
//! them.

use std::path::{Path, PathBuf};

use vasto_core::Band;
use vasto_core::plan::{Plan, Source};
use vasto_core::record::{BandRange, FeedProgress, IngestedObject};
use vasto_core::report::TargetStage;
use vasto_shipping::download::Wanted;
use vasto_shipping::manifest::{Manifest, ManifestFile};

use super::rewrite::{Rewritten, SourceFiles, rewrite};
use super::{Build, Shape};
use crate::build::error::BuildError;
use crate::build::files;
use crate::replica::command::Control;

/// Files to load from a source: those of its pinned manifest that touch the bands.
struct Chosen {
    source: Source,
    manifest: Manifest,
    files: Vec<ManifestFile>,
}

pub(super) async fn load(build: &Build, plan: &Plan) -> Result<(), BuildError> {
    let work = build.tmp.join(format!("build-{}-{}", build.replica.id, plan.id));
    // Downloads that finished before an interruption are kept.
    let result = load_in(build, plan, &work).await;
    if result.as_ref().map_or_else(|error| !error.is_transient(), |()| true) {
        let _ = tokio::fs::remove_dir_all(&work).await;
    }
    result
}

async fn load_in(build: &Build, plan: &Plan, work: &Path) -> Result<(), BuildError> {
    let shape = Shape::of(plan, build.replica.shard)?;
    let chosen = choose(build, plan, shape.bands).await?;
    {
        let mut progress = build.progress.lock();
        progress.bytes_total =
            chosen.iter().flat_map(|chosen| &chosen.files).map(|file| file.bytes).sum();
        progress.bytes_done = 0;
    }
    for Chosen { source, files, .. } in &chosen {
        let wanted: Vec<Wanted> = files.iter().map(files::wanted).collect();
        build.reader().download(&wanted, &download_dir(work, source)).await?;
    }
    build.progress.lock().stage = TargetStage::Rewriting;
    build.registry.report.notify_one();
    let rewritten = rewrite_chosen(build, shape, &chosen, work).await?;
    ingest(build, plan, shape, &chosen, rewritten).await
}

fn download_dir(work: &Path, source: &Source) -> PathBuf {
    work.join(format!("source-{}", source.replica))
}

/// Reads the pinned manifests and picks the files that touch the bands.
async fn choose(build: &Build, plan: &Plan, bands: BandRange) -> Result<Vec<Chosen>, BuildError> {
    let mut chosen = Vec::new();
    for source in &plan.sources {
        let none = || {
            BuildError::Mismatch(format!("the plan names no manifest of shard {}", source.shard))
        };
        let pinned = source.manifest.as_ref().ok_or_else(none)?;
        let base = build.reader().manifest(&pinned.key).await?;
        if (base.manifest.replica, base.manifest.lsn) != (source.replica, pinned.lsn) {
            return Err(BuildError::unusable(&base, "it is not the manifest that the plan pinned"));
        }
        let files = base.manifest.files_overlapping(bands).into_iter().cloned().collect();
        chosen.push(Chosen { source: source.clone(), manifest: base.manifest, files });
    }
    Ok(chosen)
}

async fn rewrite_chosen(
    build: &Build,
    shape: Shape,
    chosen: &[Chosen],
    work: &Path,
) -> Result<Rewritten, BuildError> {
    let sources: Vec<SourceFiles> = chosen
        .iter()
        .map(|Chosen { source, files, .. }| SourceFiles {
            download_dir: download_dir(work, source),
            scratch_dir: work.join(format!("scratch-{}", source.replica)),
            files: files.iter().map(files::imported).collect(),
        })
        .collect();
    let floor = chosen.iter().map(|chosen| chosen.manifest.floor).max().unwrap_or(0);
    let (replica, out) = (build.replica.clone(), work.join("tables"));
    tokio::task::spawn_blocking(move || rewrite(&replica, &sources, shape, floor, &out)).await?
}

async fn ingest(
    build: &Build,
    plan: &Plan,
    shape: Shape,
    chosen: &[Chosen],
    rewritten: Rewritten,
) -> Result<(), BuildError> {
    let objects = chosen
        .iter()
        .flat_map(|chosen| &chosen.files)
        .map(|file| IngestedObject {
            key: file.key.clone(),
            bytes: file.bytes,
            crc32c: file.crc32c,
        })
        .collect();
    let cursors: Vec<FeedProgress> = chosen
        .iter()
        .map(|chosen| FeedProgress::Tail(chosen.source.replica, chosen.manifest.lsn))
        .collect();
    let bytes_moved: u64 = rewritten.tables.iter().map(|table| table.bytes).sum();
    let order = Control::Ingest {
        plan: plan.id,
        range: Band::owned(shape.shards).into(),
        files: rewritten.tables.into_iter().map(|table| table.path).collect(),
        objects,
        event_time_max: rewritten.event_time_max,
        progress: cursors,
    };
    build.replica.control(order).await?;
    let mut progress = build.progress.lock();
    progress.keys_moved = rewritten.rows;
    progress.bytes_moved = bytes_moved;
    Ok(())
}
