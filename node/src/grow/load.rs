//! Downloads the moving bands of every source, rewrites them for this shard, ingests them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vasto_core::catalog::Catalog;
use vasto_core::plan::{Plan, Source};
use vasto_core::record::{BandRange, FeedProgress, IngestedObject};
use vasto_core::report::TargetStage;
use vasto_shipping::download::{DownloadProgress, Wanted, download};
use vasto_shipping::manifest::{Manifest, ManifestFile};

use super::rewrite::{Rewritten, SourceFiles, rewrite};
use super::{Build, BuildError, Shape};
use crate::engine::ImportFile;
use crate::replica::command::Control;

/// Parallel ranged requests.
const PARALLEL: usize = 8;

struct Chosen {
    source: Source,
    manifest: Manifest,
    files: Vec<ManifestFile>,
}

pub(super) async fn load(build: &Build, catalog: &Arc<Catalog>, plan: &Plan) -> Result<(), BuildError> {
    let work = build.tmp.join(format!("build-{}-{}", build.replica.id, plan.id));
    // Downloads that finished before an interruption are kept.
    let result = load_in(build, catalog, plan, &work).await;
    if result.as_ref().map_or_else(|error| !error.is_transient(), |()| true) {
        let _ = tokio::fs::remove_dir_all(&work).await;
    }
    result
}

async fn load_in(build: &Build, catalog: &Arc<Catalog>, plan: &Plan, work: &Path) -> Result<(), BuildError> {
    let moving = Shape::of(plan)?.moving;
    let chosen = choose(build, plan, moving).await?;
    let progress = DownloadProgress::default();
    let total: u64 = chosen.iter().flat_map(|one| &one.files).map(|file| file.bytes).sum();
    build.progress.lock().bytes_total = total;
    for one in &chosen {
        let dir = download_dir(work, &one.source);
        let fetch = fetch(build, one, &dir, &progress);
        tokio::pin!(fetch);
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                result = &mut fetch => break result?,
                _ = tick.tick() => build.progress.lock().bytes_done = progress.bytes.load(Ordering::Relaxed).min(total),
            }
        }
    }
    {
        let mut shown = build.progress.lock();
        shown.bytes_done = total;
        shown.bytes_from_bucket += progress.bytes.load(Ordering::Relaxed);
        shown.objects_read += progress.requests.load(Ordering::Relaxed);
        shown.stage = TargetStage::Rewriting;
    }
    build.registry.report.notify_one();
    let rewritten = rewrite_chosen(build, catalog, plan, &chosen, work).await?;
    ingest(build, plan, &chosen, rewritten).await
}

fn download_dir(work: &Path, source: &Source) -> PathBuf {
    work.join(format!("source-{}", source.replica))
}

/// Reads the pinned manifests and picks the files that touch the moving bands.
async fn choose(build: &Build, plan: &Plan, moving: BandRange) -> Result<Vec<Chosen>, BuildError> {
    let mut chosen = Vec::new();
    for source in &plan.sources {
        let pinned = source
            .manifest
            .as_ref()
            .ok_or_else(|| BuildError::Bad(format!("the plan names no manifest of shard {}", source.shard)))?;
        let bytes =
            build.bucket.get(&pinned.key).await?.ok_or_else(|| {
                BuildError::Bad(format!("the pinned manifest {} is missing from the bucket", pinned.key))
            })?;
        {
            let mut shown = build.progress.lock();
            shown.bytes_from_bucket += bytes.len() as u64;
            shown.objects_read += 1;
        }
        let manifest = Manifest::decode(&bytes).map_err(|error| BuildError::Bad(format!("{}: {error}", pinned.key)))?;
        if (manifest.replica, manifest.lsn) != (source.replica, pinned.lsn) {
            return Err(BuildError::Bad(format!("{} is not the manifest that the plan pinned", pinned.key)));
        }
        let files = manifest.files_overlapping(moving).into_iter().cloned().collect();
        chosen.push(Chosen { source: source.clone(), manifest, files });
    }
    Ok(chosen)
}

fn local_name(file: &ManifestFile) -> String {
    format!("{:06}.sst", file.file_number)
}

async fn fetch(build: &Build, one: &Chosen, dir: &Path, progress: &DownloadProgress) -> Result<(), BuildError> {
    let wanted: Vec<Wanted> = one
        .files
        .iter()
        .map(|file| Wanted {
            key: file.key.clone(),
            bytes: file.bytes,
            crc32c: file.crc32c,
            file_name: local_name(file),
        })
        .collect();
    Ok(download(&build.bucket, &wanted, dir, PARALLEL, progress, &build.cancel).await?)
}

async fn rewrite_chosen(
    build: &Build,
    catalog: &Arc<Catalog>,
    plan: &Plan,
    chosen: &[Chosen],
    work: &Path,
) -> Result<Rewritten, BuildError> {
    let sources: Vec<SourceFiles> = chosen
        .iter()
        .map(|one| SourceFiles {
            download_dir: download_dir(work, &one.source),
            scratch_dir: work.join(format!("scratch-{}", one.source.replica)),
            files: one
                .files
                .iter()
                .map(|file| ImportFile {
                    name: local_name(file),
                    bytes: file.bytes,
                    level: file.level,
                    smallest_seqno: file.smallest_seqno,
                    largest_seqno: file.largest_seqno,
                    first_key: file.first_key.clone(),
                    last_key: file.last_key.clone(),
                    entries: file.entries,
                })
                .collect(),
        })
        .collect();
    let floor = chosen.iter().map(|one| one.manifest.floor).max().unwrap_or(0);
    let Shape { shards, moving } = Shape::of(plan)?;
    let (replica, out) = (build.replica.clone(), work.join("tables"));
    let keyspace = catalog.keyspace;
    tokio::task::spawn_blocking(move || rewrite(&replica, &sources, moving, shards, floor, &out))
        .await
        .map_err(|error| BuildError::Bad(format!("rewriting keyspace {keyspace} failed: {error}")))?
}

async fn ingest(build: &Build, plan: &Plan, chosen: &[Chosen], rewritten: Rewritten) -> Result<(), BuildError> {
    let shards = Shape::of(plan)?.shards;
    let objects = chosen
        .iter()
        .flat_map(|one| &one.files)
        .map(|file| IngestedObject { key: file.key.clone(), bytes: file.bytes, crc32c: file.crc32c })
        .collect();
    let cursors: Vec<FeedProgress> =
        chosen.iter().map(|one| FeedProgress::Tail(one.source.replica, one.manifest.lsn)).collect();
    let bytes_moved: u64 = rewritten.tables.iter().map(|table| table.bytes).sum();
    let order = Control::Ingest {
        plan: plan.id,
        range: vasto_core::Band::owned(shards).into(),
        files: rewritten.tables.into_iter().map(|table| table.path).collect(),
        objects,
        event_time_max: rewritten.event_time_max,
        progress: cursors,
    };
    build.replica.control(order).await?;
    let mut shown = build.progress.lock();
    shown.keys_moved = rewritten.rows;
    shown.bytes_moved = bytes_moved;
    Ok(())
}
