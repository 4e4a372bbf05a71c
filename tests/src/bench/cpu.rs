//! Who used the processors of the machine: the load generator, the nodes, the master, and everything
//! else (an S3 server, other programs).

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use vasto_testkit::cpu_seconds;

use crate::cluster::Cluster;

/// CPU times at one moment, in seconds.
#[derive(Debug, Clone)]
pub(super) struct CpuSample {
    at: Instant,
    own: f64,
    master: f64,
    /// By process.
    nodes: BTreeMap<u32, f64>,
    machine: f64,
}

/// CPU that was used between two moments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct CpuUsed {
    /// By the load generator and the client, seconds.
    pub(super) generator_s: f64,
    /// By the nodes, without those that ended meanwhile, seconds.
    pub(super) nodes_s: f64,
    /// By the master, seconds.
    pub(super) master_s: f64,
    /// By everything else on the machine, seconds.
    pub(super) others_s: f64,
    /// What there was: the time, for each core, seconds.
    pub(super) available_s: f64,
}

impl CpuSample {
    pub(super) fn take(cluster: &mut Cluster) -> Result<Self> {
        let master = cluster.master_process()?.pid();
        let mut nodes = BTreeMap::new();
        for index in 0..cluster.nodes() {
            if let Ok(process) = cluster.node_process(index) {
                let pid = process.pid();
                nodes.insert(pid, cpu_seconds(pid)?);
            }
        }
        Ok(Self {
            at: Instant::now(),
            own: cpu_seconds(std::process::id())?,
            master: cpu_seconds(master)?,
            nodes,
            machine: machine_seconds()?,
        })
    }

    pub(super) fn until(&self, later: &Self) -> CpuUsed {
        let of_node = |(pid, then): (&u32, &f64)| later.nodes.get(pid).map(|now| now - then);
        let nodes_s = self.nodes.iter().filter_map(of_node).sum::<f64>();
        let (generator_s, master_s) = (later.own - self.own, later.master - self.master);
        let known = generator_s + master_s + nodes_s;
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        CpuUsed {
            generator_s,
            nodes_s,
            master_s,
            others_s: (later.machine - self.machine - known).max(0.0),
            available_s: later.at.duration_since(self.at).as_secs_f64() * cores,
        }
    }
}

impl CpuUsed {
    /// Formats the shares of all processors: load generator, nodes and master, everything else.
    pub(super) fn shares(&self) -> String {
        let part = |seconds: f64| seconds / self.available_s.max(1e-9) * 100.0;
        format!(
            "{:.0}/{:.0}/{:.0} %",
            part(self.generator_s),
            part(self.nodes_s + self.master_s),
            part(self.others_s)
        )
    }

    /// Returns the share of all processors that was busy, 0 to 1.
    pub(super) fn busy(&self) -> f64 {
        (self.generator_s + self.nodes_s + self.master_s + self.others_s)
            / self.available_s.max(1e-9)
    }

    pub(super) fn cluster_s(&self) -> f64 {
        self.nodes_s + self.master_s
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.generator_s += other.generator_s;
        self.nodes_s += other.nodes_s;
        self.master_s += other.master_s;
        self.others_s += other.others_s;
        self.available_s += other.available_s;
    }
}

/// Returns the seconds for which processors of the machine were busy since it started.
fn machine_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    busy_ticks(&stat)
        .map(|ticks| ticks / rustix::param::clock_ticks_per_second() as f64)
        .context("/proc/stat does not begin with the sum of all processors")
}

/// Returns user, nice, system, irq and softirq of the first line.
fn busy_ticks(stat: &str) -> Option<f64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|tick| tick.parse().ok()).collect();
    [0usize, 1, 2, 5, 6].into_iter().map(|at| ticks.get(at)).sum::<Option<f64>>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_and_what_others_took_is_not_busy() {
        let stat = "cpu  10 1 20 1000 500 2 3 900 0 0\ncpu0 1 2 3 4\n";
        assert_eq!(busy_ticks(stat), Some(36.0));
        assert_eq!(busy_ticks("cpu  10 1"), None);
        assert_eq!(busy_ticks("intr 1"), None);
    }

    #[test]
    fn shares_are_those_of_all_processors() {
        let used = CpuUsed {
            generator_s: 1.0,
            nodes_s: 3.0,
            master_s: 1.0,
            others_s: 2.0,
            available_s: 10.0,
        };
        assert_eq!(used.shares(), "10/40/20 %");
        assert!((used.busy() - 0.7).abs() < 1e-9);
        let mut twice = used;
        twice.add(&used);
        assert_eq!(twice.shares(), used.shares());
        assert_eq!(CpuUsed::default().shares(), "0/0/0 %");
    }
}
