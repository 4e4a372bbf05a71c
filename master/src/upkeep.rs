//! The upkeep of the bucket: the check for missing objects and the garbage collection.
//!
//! **Invariants**
//! - Several masters may try at once; the last term continues, the others stop.
//! - After a collection that ended early, or after its start, a master waits minutes for the next
//!   one, not a whole interval: otherwise restarts and restores could postpone it for ever.

use std::sync::Arc;
use std::time::Duration;

use vasto_core::catalog::KeyspaceState;
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::report::ReplicaPhase;
use vasto_shipping::gc::{self, Fsck, Known, KnownReplica};
use vasto_shipping::layout::{self, Owner};
use vasto_shipping::{CatalogError, RetryBudget};

use crate::cluster::{Cluster, now_us};

/// The longest pause before the first collection, and after one that ended early or failed.
const SOON_MAX: Duration = Duration::from_secs(600);
/// The shortest pause after a collection that ended early or failed.
const AGAIN_MIN: Duration = Duration::from_secs(60);
/// Keys that a warning names.
const NAMED: usize = 3;

fn unavailable(error: &CatalogError) -> VastoError {
    VastoError::new(
        ErrorCode::Unavailable,
        format!("the bucket cannot be looked through: {error}; try again"),
    )
}

/// Fails within seconds when the bucket does not answer, before a check that would retry for
/// minutes.
async fn is_there(cluster: &Cluster) -> Result<(), VastoError> {
    let probed = cluster.bucket.with_retry(RetryBudget::probe()).head(&layout::cluster()).await;
    probed.map(drop).map_err(|error| unavailable(&error.into()))
}

/// Returns the objects that must exist according to nodes and catalogs.
fn known(cluster: &Cluster) -> Known {
    let state = cluster.state();
    let mut known = Known::default();
    for (id, keyspace) in &state.keyspaces {
        known.catalogs.push((*id, keyspace.catalog.version));
        if keyspace.catalog.state != KeyspaceState::Active {
            continue; // its data is being deleted
        }
        for shard in &keyspace.catalog.placement {
            let reports =
                shard.replicas.iter().filter_map(|placed| keyspace.reports.get(&placed.replica));
            let serving = reports.filter(|report| report.phase == ReplicaPhase::Serving);
            known.replicas.extend(serving.filter(|report| report.shipped_lsn.0 > 0).map(
                |report| KnownReplica {
                    owner: Owner { keyspace: *id, shard: shard.shard, replica: report.replica },
                    manifest_lsn: report.manifest_lsn,
                    shipped_lsn: report.shipped_lsn,
                    behind: report.ships_behind,
                },
            ));
        }
    }
    known
}

/// Checks for missing, damaged and orphaned objects.
pub(crate) async fn check(cluster: &Cluster, deep: bool) -> Result<Fsck, VastoError> {
    is_there(cluster).await?;
    // Read before the bucket is listed: objects that are known now are in that listing.
    let known = known(cluster);
    let fsck = gc::check(&cluster.bucket, deep, &known, now_us())
        .await
        .map_err(|error| unavailable(&error))?;
    cluster.bucket_holds(fsck.bytes);
    Ok(fsck)
}

/// Returns the findings of a check that the cluster status shows.
pub(crate) fn findings(fsck: &Fsck) -> Vec<String> {
    let what = |what: &str, keys: &[String]| {
        let named: Vec<&str> = keys.iter().take(NAMED).map(String::as_str).collect();
        let more = if keys.len() > NAMED { ", …" } else { "" };
        let all = keys.len();
        (all > 0).then(|| {
            format!(
                "{all} objects of the bucket are {what} ({}{more}): run `vasto bucket repair`",
                named.join(", ")
            )
        })
    };
    let broken =
        [what("missing", &fsck.missing), what("damaged", &fsck.corrupt)].into_iter().flatten();
    broken.chain(fsck.warnings.iter().map(|text| format!("in the bucket: {text}"))).collect()
}

/// Deletes objects that are not needed, or only lists them.
pub(crate) async fn collect(cluster: &Cluster, dry_run: bool) -> Result<gc::Collected, VastoError> {
    cluster.check_unrestricted()?;
    is_there(cluster).await?;
    let collected =
        gc::collect_at(&cluster.bucket, cluster.settings.retention, dry_run, now_us()).await;
    let collected = collected.map_err(|error| unavailable(&error))?;
    cluster.bucket_holds(collected.stored_bytes);
    cluster.note_findings(
        collected.warnings.iter().map(|text| format!("in the bucket: {text}")).collect(),
    );
    tracing::info!(
        dry_run,
        deleted = collected.deleted,
        bytes = collected.bytes,
        "collected garbage"
    );
    Ok(collected)
}

/// The result of the last collection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    /// This master has not collected yet.
    None,
    /// The collection ended early or failed, this many times in a row.
    Cut(u32),
    /// The collection was complete.
    Done,
}

/// Returns the pause before the next collection. `random` is uniform in `0.0..1.0`: masters that
/// started together do not collect together.
fn pause(last: Last, interval: Duration, random: f64) -> Duration {
    match last {
        Last::None => SOON_MAX.min(interval).mul_f64(0.5 + 0.5 * random),
        Last::Cut(times) => {
            let longer = AGAIN_MIN * 2u32.saturating_pow(times.saturating_sub(1).min(10));
            longer.min(SOON_MAX).min(interval).mul_f64(0.5 + 0.5 * random)
        }
        Last::Done => interval.mul_f64(0.9 + 0.2 * random),
    }
}

/// Collects repeatedly until the master stops.
pub(crate) async fn collect_regularly(cluster: Arc<Cluster>, interval: Duration) {
    let mut last = Last::None;
    loop {
        let wait = tokio::time::sleep(pause(last, interval, rand::random()));
        if cluster.shutdown.run_until_cancelled(wait).await.is_none() {
            return;
        }
        let cut = if let Last::Cut(times) = last { times.saturating_add(1) } else { 1 };
        let stop = cluster.shutdown.clone();
        last = match stop.run_until_cancelled(collect(&cluster, false)).await {
            Some(Err(error)) => {
                tracing::warn!(
                    error = error.message,
                    "garbage was not collected; it is tried again"
                );
                Last::Cut(cut)
            }
            Some(Ok(collected)) if collected.stopped.is_some() => Last::Cut(cut),
            Some(Ok(_)) => Last::Done,
            None => return,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_restarts_nor_restores_put_a_collection_off_for_an_interval() {
        let day = Duration::from_secs(86_400);
        for random in [0.0, 0.5, 0.999] {
            assert!(pause(Last::None, day, random) <= SOON_MAX);
            let mut before = Duration::ZERO;
            for times in 1..40 {
                let wait = pause(Last::Cut(times), day, random);
                assert!(
                    wait >= AGAIN_MIN / 2 && wait <= SOON_MAX && wait >= before,
                    "{times}: {wait:?}"
                );
                before = wait;
            }
            let done = pause(Last::Done, day, random);
            assert!(done >= day.mul_f64(0.9) && done <= day.mul_f64(1.1), "{done:?}");
            // A short interval bounds every pause.
            let often = Duration::from_millis(100);
            assert!(
                [Last::None, Last::Cut(1), Last::Cut(9)]
                    .iter()
                    .all(|last| pause(*last, often, random) <= often)
            );
        }
    }

    #[test]
    fn findings_name_a_few_and_say_what_to_do() {
        let missing = (0..5).map(|n| format!("data/{n}")).collect();
        let fsck = Fsck { missing, warnings: vec!["a stranger".into()], ..Fsck::default() };
        let warnings = findings(&fsck);
        assert_eq!(warnings.len(), 2);
        assert!(
            warnings[0].contains("5 objects of the bucket are missing (data/0, data/1, data/2, …)"),
            "{warnings:?}"
        );
        assert!(warnings[0].contains("vasto bucket repair"), "{warnings:?}");
    }
}
