//! What the master has been told of the replicas of this node, and what it is to be told next.
//!
//! **Invariant:** whatever a rule of the master may decide by is told at once. Figures alone (positions
//! in logs, sizes, rates) of so many replicas are told in an interval, those first that have waited
//! longest: a node with hundreds of busy replicas costs the master no more than one with some.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use vasto_core::ids::{KeyspaceId, ReplicaId};
use vasto_core::limits::REPORT_INTERVAL;
use vasto_core::report::ReplicaReport;

/// Replicas of which figures alone are told in an interval.
const FIGURES_AT_ONCE: usize = 64;
/// The interval.
const INTERVAL: Duration = REPORT_INTERVAL;

type Key = (KeyspaceId, ReplicaId);

/// What was told in a session.
pub(crate) struct Reported {
    /// The last report of each replica, and the number of the message that had it.
    last: HashMap<Key, (ReplicaReport, u64)>,
    messages: u64,
    /// Figures that may still be told in the interval that ends then.
    left: usize,
    until: Instant,
}

impl Reported {
    /// Creates the memory of a session in which nothing was told yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self { last: HashMap::new(), messages: 0, left: FIGURES_AT_ONCE, until: now + INTERVAL }
    }

    /// Returns the JSON of the reports that are to be sent now, given those of all replicas.
    pub(crate) fn due(&mut self, all: Vec<ReplicaReport>, now: Instant) -> Vec<String> {
        self.messages += 1;
        if now >= self.until {
            (self.left, self.until) = (FIGURES_AT_ONCE, now + INTERVAL);
        }
        self.forget_others(&all);
        let (mut news, mut figures) = (Vec::new(), Vec::new());
        for report in all {
            match self.last.get(&key(&report)) {
                Some((before, _)) if *before == report => {}
                Some((before, at)) if !report.is_news_after(before) => figures.push((*at, report)),
                _ => news.push(report),
            }
        }
        figures.sort_by_key(|(at, _)| *at);
        figures.truncate(self.left);
        self.left -= figures.len();
        let figures = figures.into_iter().map(|(_, report)| report);
        news.into_iter().chain(figures).map(|report| self.told(report)).collect()
    }

    /// Records that a report is sent; returns its JSON.
    fn told(&mut self, report: ReplicaReport) -> String {
        let key = key(&report);
        let text = text_of(&report, self.last.get(&key).map(|(before, _)| before));
        self.last.insert(key, (report, self.messages));
        text
    }

    /// Forgets replicas that the node has not any more, once there are many.
    fn forget_others(&mut self, all: &[ReplicaReport]) {
        if self.last.len() > 2 * all.len() {
            let here: HashSet<Key> = all.iter().map(key).collect();
            self.last.retain(|key, _| here.contains(key));
        }
    }
}

fn key(report: &ReplicaReport) -> Key {
    (report.keyspace, report.replica)
}

/// Returns the JSON of a report that follows another one of its session: the contents by band, most
/// of it, are left out when they are the same.
fn text_of(report: &ReplicaReport, before: Option<&ReplicaReport>) -> String {
    let text = match before.is_some_and(|before| before.stored == report.stored) {
        true => serde_json::to_string(&ReplicaReport { stored: None, ..report.clone() }),
        false => serde_json::to_string(report),
    };
    text.expect("plain data always has a JSON form")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vasto_core::ids::{Lsn, ShardId};
    use vasto_core::report::ReplicaPhase;

    use super::*;

    /// Returns the reports of so many replicas, each at this position of its log.
    fn replicas(count: u64, lsn: u64) -> Vec<ReplicaReport> {
        let report = |replica: u64| {
            let (keyspace, replica) = (KeyspaceId(1), ReplicaId(replica));
            let report = ReplicaReport::new(keyspace, ShardId(0), replica, ReplicaPhase::Serving);
            ReplicaReport { lsn: Lsn(lsn), ..report }
        };
        (1..=count).map(report).collect()
    }

    fn ids(texts: &[String]) -> HashSet<u64> {
        let read = |text: &String| serde_json::from_str::<ReplicaReport>(text).unwrap().replica.0;
        texts.iter().map(read).collect()
    }

    #[test]
    fn everything_is_told_once_and_then_what_has_changed() {
        let began = Instant::now();
        let mut reported = Reported::new(began);
        assert_eq!(reported.due(replicas(200, 1), began).len(), 200, "a session begins with all");
        assert!(reported.due(replicas(200, 1), began).is_empty());
        let mut all = replicas(200, 1);
        all[7].lsn = Lsn(2);
        assert_eq!(ids(&reported.due(all, began)), HashSet::from([8]));
    }

    #[test]
    fn figures_are_told_in_turns_and_news_at_once() {
        let began = Instant::now();
        let mut reported = Reported::new(began);
        reported.due(replicas(200, 1), began);
        let mut told: HashSet<u64> = HashSet::new();
        let mut at = began;
        for lsn in 10..14 {
            let now = ids(&reported.due(replicas(200, lsn), at));
            assert_eq!(now.len(), FIGURES_AT_ONCE, "at {lsn}");
            told.extend(now);
            at += INTERVAL;
        }
        assert_eq!(told.len(), 200, "nobody waits for longer than the others");
        // Within an interval there are no more figures, and whatever is news.
        let at = began + 3 * INTERVAL;
        let mut failed = replicas(200, 14);
        failed[7].phase = ReplicaPhase::Failed("rot".into());
        assert_eq!(ids(&reported.due(failed, at)), HashSet::from([8]));
    }

    #[test]
    fn replicas_that_are_gone_are_forgotten() {
        let began = Instant::now();
        let mut reported = Reported::new(began);
        reported.due(replicas(100, 1), began);
        reported.due(replicas(10, 1), began);
        assert_eq!(reported.last.len(), 10);
        assert_eq!(reported.due(replicas(11, 1), began).len(), 1, "it is told anew");
    }
}
