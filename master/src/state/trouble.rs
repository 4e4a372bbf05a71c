//! Why a running plan does not go on, and what to do about it.
//!
//! **Invariant:** pure, and for people alone: no rule depends on it. A paused plan is in no
//! trouble. Whatever holds a plan up is named within [`TOLD_WITHIN_US`], unless a part of it is at
//! work that reports nothing; then within [`SILENT_MAX_US`], or [`SILENT_YIELDING_MAX_US`].

use std::collections::BTreeSet;

use vasto_core::catalog::Catalog;
use vasto_core::ids::{NodeId, ReplicaId, ShardId};
use vasto_core::limits::BULK_YIELD_RATE_MIN;
use vasto_core::operation::operation_id;
use vasto_core::plan::{NODE_AWAY_MAX_US, Plan, Step};
use vasto_core::report::{Reports, SourceProgress, TargetProgress, TargetStage};

/// Time without any movement after which a plan is in trouble, microseconds.
pub(crate) const TOLD_WITHIN_US: u64 = 8_000_000;
/// The same while a checkpoint is made, or files are taken into a database: neither reports how far
/// it is.
pub(crate) const SILENT_MAX_US: u64 = 60_000_000;
/// The same while that work yields to requests.
pub(crate) const SILENT_YIELDING_MAX_US: u64 = 3_600_000_000;
/// Time without movement after which a known cause is named, microseconds: a restart, or one failed
/// request, takes less.
const CAUSE_TOLD_US: u64 = 2_000_000;
/// Largest piece that waits for the rate of a plan as a whole: a table of an export, in `prepare`,
/// and the buffers of a download later.
const PIECES: (u64, u64) = (64 << 20, 8 << 20);

/// Rate at which a target uploads its first manifest at least, bytes a second; its reports do not
/// tell how far it is.
const UPLOAD_RATE_MIN: u64 = 4 << 20;

/// Why a plan does not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// What holds it up.
    pub(crate) what: String,
    /// What to do.
    pub(crate) next: String,
    /// How long that has lasted, microseconds.
    pub(crate) for_us: u64,
}

/// What is known around a running plan.
pub(crate) struct Facts<'a> {
    pub(crate) catalog: &'a Catalog,
    pub(crate) plan: &'a Plan,
    pub(crate) reports: &'a Reports,
    /// The condition that the rules wait for.
    pub(crate) waiting_for: Option<&'a str>,
    /// How long nothing has moved, microseconds.
    pub(crate) still_us: u64,
    /// How long a node has been away, microseconds; 0 for a live one.
    pub(crate) away_us: &'a dyn Fn(NodeId) -> u64,
    /// The fault that keeps a node from the bucket.
    pub(crate) bucket_trouble: &'a dyn Fn(NodeId) -> Option<String>,
    /// Bulk work of the node waits for its requests.
    pub(crate) yields: &'a dyn Fn(NodeId) -> bool,
    /// The outage of the bucket at the master.
    pub(crate) outage: Option<&'a str>,
}

impl Facts<'_> {
    /// Returns the nodes that take part.
    pub(crate) fn nodes(&self) -> BTreeSet<NodeId> {
        let resizes = self.plan.resize().is_some();
        let gives = |shard: ShardId| self.plan.sources.iter().any(|source| source.shard == shard);
        let placement = self.catalog.placement.iter();
        let sealing = placement.filter(|shard| resizes && gives(shard.shard));
        let sealing = sealing.flat_map(|shard| shard.replicas.iter().map(|member| member.node));
        self.plan.nodes().chain(sealing).collect()
    }

    fn source(&self, replica: ReplicaId) -> Option<&SourceProgress> {
        let progress = self.reports.get(&replica)?.source.as_ref();
        progress.filter(|progress| progress.plan == self.plan.id)
    }

    fn target(&self, replica: ReplicaId) -> Option<&TargetProgress> {
        let progress = self.reports.get(&replica)?.target.as_ref();
        progress.filter(|progress| progress.plan == self.plan.id)
    }

    /// Returns true while a part of the plan may be at work that reports nothing.
    fn works_in_silence(&self) -> bool {
        let waits_for_floor = self.plan.shrinks() && self.plan.floor.is_none();
        let makes_checkpoint = self.plan.step == Step::Prepare
            && !waits_for_floor
            && self.plan.sources.iter().any(|source| {
                self.source(source.replica)
                    .is_none_or(|progress| progress.manifest.is_none() && progress.export.is_none())
            });
        let takes_files = self.plan.targets.iter().any(|target| {
            self.target(target.replica).is_some_and(|progress| {
                let ships = progress.stage == TargetStage::Tailing && !progress.manifest_shipped;
                progress.stage == TargetStage::Rewriting || (ships && !self.plan.adds_member())
            })
        });
        makes_checkpoint || (self.plan.step != Step::Prepare && takes_files)
    }

    /// Returns the time without movement that is in order, microseconds.
    fn patience_us(&self) -> u64 {
        // Work that yields is at work.
        let yields = self.nodes().into_iter().any(|node| (self.yields)(node));
        let silent = match (self.works_in_silence(), yields) {
            (true, true) => SILENT_YIELDING_MAX_US,
            (true, false) => SILENT_MAX_US,
            (false, _) => TOLD_WITHIN_US,
        };
        let piece = if self.plan.step == Step::Prepare { PIECES.0 } else { PIECES.1 };
        let bound = self.plan.rate_of_each_node().unwrap_or(u64::MAX).max(1);
        let rate = if yields { bound.min(BULK_YIELD_RATE_MIN) } else { bound };
        let waits = piece.saturating_mul(1_000_000) / rate;
        let uploads = self.uploads().saturating_mul(1_000_000) / rate.min(UPLOAD_RATE_MIN);
        silent.saturating_add(waits).saturating_add(uploads)
    }

    /// Returns the bytes of the first manifests that targets may be uploading: no report tells how
    /// far they are.
    fn uploads(&self) -> u64 {
        let targets = self.plan.targets.iter().filter_map(|target| self.target(target.replica));
        let uploading = targets.filter(|progress| {
            self.plan.resize().is_some()
                && !progress.manifest_shipped
                && matches!(progress.stage, TargetStage::Rewriting | TargetStage::Tailing)
        });
        uploading.map(|progress| progress.bytes_total).sum()
    }

    /// Returns the part that fails again and again: what it is, how often it failed, and why.
    fn failing(&self) -> Option<(String, u32, String)> {
        let sources = self.plan.sources.iter().filter_map(|source| {
            let progress = self.source(source.replica)?;
            let error = progress.last_error.clone()?;
            let who = format!("the source of shard {} on {}", source.shard, source.node);
            Some((who, progress.failures, error))
        });
        let targets = self.plan.targets.iter().filter_map(|target| {
            let progress = self.target(target.replica)?;
            let error = progress.last_error.clone()?;
            let who = format!("the target of shard {} on {}", target.shard, target.node);
            Some((who, progress.failures, error))
        });
        sources.chain(targets).next()
    }
}

/// Returns why a plan does not go on; `None` while it does, or may.
pub(crate) fn trouble(facts: &Facts<'_>) -> Option<Trouble> {
    let Facts { plan, still_us, .. } = *facts;
    if plan.paused || still_us < CAUSE_TOLD_US {
        return None;
    }
    let id = operation_id(facts.catalog.keyspace, plan.id);
    let undo = match plan.step {
        Step::Committed => "it cannot be undone any more".to_owned(),
        _ => format!("undo it with `vasto operation cancel {id}`"),
    };
    let found = |what: String, next: String| Some(Trouble { what, next, for_us: still_us });
    let away = facts.nodes().into_iter().find(|node| (facts.away_us)(*node) >= CAUSE_TOLD_US);
    if let Some(node) = away {
        let seconds = NODE_AWAY_MAX_US / 1_000_000;
        let then = match plan.step {
            Step::Committed => "is not waited for any more",
            _ => "ends the operation, which changes nothing then",
        };
        return found(
            format!("{node} is away"),
            format!("start it; a node that is away for {seconds} s {then}"),
        );
    }
    let bucket = "look at the bucket and the way to it; the operation goes on by itself".to_owned();
    if let Some(why) = facts.outage {
        return found(format!("the bucket does not answer the master: {why}"), bucket);
    }
    let mut nodes = facts.nodes().into_iter();
    let cut_off = nodes.find_map(|node| Some((node, (facts.bucket_trouble)(node)?)));
    if let Some((node, why)) = cut_off {
        // A time in it would make another text of it each second.
        let why = why.split_once(" s: ").map_or(why.as_str(), |(_, cause)| cause);
        return found(format!("{node} does not reach the bucket: {why}"), bucket);
    }
    if let Some((who, failures, error)) = facts.failing() {
        let times = match failures {
            1 => "once".to_owned(),
            more => format!("{more} times"),
        };
        return found(
            format!("{who} has failed {times}: {error}"),
            format!("it is tried again by itself; remove the cause, or {undo}"),
        );
    }
    if still_us < facts.patience_us() {
        return None;
    }
    let waits = facts.waiting_for.unwrap_or("the catalog to be written");
    found(
        format!("nothing moves; it waits for {waits}"),
        format!("`vasto cluster status` and the logs of its nodes say more; {undo}"),
    )
}

/// Returns why a drain or a rebalance does not go on, of which no part runs; `None` while it may.
pub(crate) fn trouble_of_whole(
    id: &str,
    waiting_for: Option<&str>,
    still_us: u64,
    outage: Option<&str>,
) -> Option<Trouble> {
    let found = |what: String, next: String| Some(Trouble { what, next, for_us: still_us });
    if let Some(why) = outage.filter(|_| still_us >= CAUSE_TOLD_US) {
        let next = "look at the bucket and the way to it; the operation goes on by itself";
        return found(format!("the bucket does not answer the master: {why}"), next.to_owned());
    }
    if still_us < TOLD_WITHIN_US {
        return None;
    }
    let waits = waiting_for.unwrap_or("its nodes to report");
    found(
        format!("nothing moves; it waits for {waits}"),
        format!(
            "`vasto operation list` says what has failed; end it with `vasto operation cancel {id}`"
        ),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vasto_core::catalog::KeyspaceSpec;
    use vasto_core::ids::{KeyspaceId, PlanId};
    use vasto_core::reconcile::start_resize;
    use vasto_core::report::{ReplicaPhase, ReplicaReport};

    use super::*;

    fn growing(step: Step) -> Catalog {
        let spec = KeyspaceSpec::default();
        let first = Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1)]], 1, 1);
        let mut growing = start_resize(&first, 2, &[vec![NodeId(2)]], 2, 2).unwrap();
        growing.plan.as_mut().unwrap().step = step;
        growing
    }

    /// The reports of a target at work.
    fn loading(change: impl FnOnce(&mut TargetProgress)) -> Reports {
        let mut progress = TargetProgress::new(PlanId(1));
        change(&mut progress);
        let replica = ReplicaId(2);
        let (keyspace, shard) = (KeyspaceId(1), ShardId(1));
        let report = ReplicaReport {
            target: Some(progress),
            ..ReplicaReport::new(keyspace, shard, replica, ReplicaPhase::Building)
        };
        Reports::from([(replica, report)])
    }

    #[derive(Default)]
    struct Given {
        away: Option<(u64, u64)>,
        cut_off: Option<u64>,
        outage: Option<&'static str>,
        yields: bool,
    }

    fn found(
        catalog: &Catalog,
        reports: &Reports,
        still_us: u64,
        given: &Given,
    ) -> Option<Trouble> {
        trouble(&Facts {
            catalog,
            plan: catalog.plan.as_ref().unwrap(),
            reports,
            waiting_for: Some("shard 1 to load its bands"),
            still_us,
            away_us: &|node| {
                given.away.filter(|(away, _)| NodeId(*away) == node).map_or(0, |(_, us)| us)
            },
            bucket_trouble: &|node| {
                given.cut_off.filter(|cut| NodeId(*cut) == node).map(|_| "refused".to_owned())
            },
            yields: &|node| given.yields && node == NodeId(2),
            outage: given.outage,
        })
    }

    #[test]
    fn every_cause_is_named_with_what_to_do_before_ten_seconds_have_passed() {
        let tail = growing(Step::Tail);
        let downloads = loading(|_| ());
        let fails = loading(|progress| {
            progress.failed_for_now(&"no space");
            progress.failed_for_now(&"no space");
        });
        let none = Given::default;
        for (given, reports, what, next) in [
            (Given { away: Some((2, 9_000_000)), ..none() }, &downloads, "is away", "start it"),
            (Given { outage: Some("timed out"), ..none() }, &downloads, "timed out", "the bucket"),
            (Given { cut_off: Some(1), ..none() }, &downloads, "refused", "goes on by itself"),
            (
                none(),
                &fails,
                "shard 1 on n-0000000000000002 has failed 2 times: no space",
                "cancel",
            ),
            (none(), &downloads, "shard 1 to load its bands", "vasto operation cancel op-1-1"),
        ] {
            let trouble = found(&tail, reports, 9_999_999, &given).unwrap();
            assert!(trouble.what.contains(what) && trouble.next.contains(next), "{trouble:?}");
            assert_eq!(trouble.for_us, 9_999_999);
            assert_eq!(
                found(&tail, reports, 1_000_000, &given),
                None,
                "it may be over in a moment"
            );
            let mut paused = tail.clone();
            paused.plan.as_mut().unwrap().paused = true;
            assert_eq!(found(&paused, reports, u64::MAX, &given), None);
        }
        let elsewhere = Given { away: Some((7, u64::MAX)), cut_off: Some(8), ..none() };
        assert_eq!(
            found(&tail, &downloads, 3_000_000, &elsewhere),
            None,
            "they have no part in it"
        );
        let committed = found(&growing(Step::Committed), &downloads, 9_000_000, &none()).unwrap();
        assert!(committed.next.contains("cannot be undone"), "{committed:?}");
    }

    #[test]
    fn work_that_reports_nothing_and_a_low_rate_get_more_time() {
        let none = Given::default();
        let is_told = |catalog: &Catalog, reports: &Reports, still_us| {
            found(catalog, reports, still_us, &none).is_some()
        };
        let (prepare, tail) = (growing(Step::Prepare), growing(Step::Tail));
        let rewrites = loading(|progress| progress.stage = TargetStage::Rewriting);
        for (catalog, reports) in [(&prepare, &Reports::new()), (&tail, &rewrites)] {
            assert!(!is_told(catalog, reports, SILENT_MAX_US - 1));
            assert!(is_told(catalog, reports, SILENT_MAX_US));
        }
        let mut slow = tail.clone();
        slow.plan.as_mut().unwrap().max_rate = Some(1 << 20);
        let downloads = loading(|_| ());
        assert!(is_told(&tail, &downloads, TOLD_WITHIN_US));
        assert!(!is_told(&slow, &downloads, TOLD_WITHIN_US));
        assert!(is_told(&slow, &downloads, TOLD_WITHIN_US + 8_000_000));
        let yields = Given { yields: true, ..none };
        let is_told = |still_us| found(&tail, &downloads, still_us, &yields).is_some();
        assert!(!is_told(TOLD_WITHIN_US), "what yields is not stuck");
        assert!(is_told(TOLD_WITHIN_US + 8_000_000));
        let rewriting = found(&tail, &rewrites, SILENT_YIELDING_MAX_US - 1, &yields);
        assert_eq!(rewriting, None);
    }
}
