//! A client of the matrix as a process of its own, which can be killed, stopped and cut off.
//!
//! **Invariant:** a key is written once, by one process; what a process printed was acknowledged.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use vasto_client::Keyspace;
use vasto_tests::{Cluster, Process, tool};

use super::change::KEYSPACE;

/// What the names of all keys of such clients begin with.
pub(super) const PREFIX: &str = "w:";

/// Pause between two writes.
const PACE_MS: &str = "10";

/// A client, and those that wrote before it for the same cell.
pub(super) struct Writer {
    cell: u64,
    processes: Vec<(String, Process)>,
}

impl Writer {
    /// Creates a client that does not run yet.
    pub(super) fn new(cell: u64) -> Self {
        Self { cell, processes: Vec::new() }
    }

    pub(super) fn start(&mut self, cluster: &Cluster) -> Result<()> {
        let name = format!("writer-{}.{}", self.cell, self.processes.len());
        let prefix = format!("{PREFIX}{}.{}:", self.cell, self.processes.len());
        let master = cluster.master();
        let args = [master.as_str(), KEYSPACE, &prefix, "m", PACE_MS];
        let process = cluster.spawn_client(&name, &tool("vasto-test-writer"), &args)?;
        self.processes.push((prefix, process));
        Ok(())
    }

    pub(super) fn signal(&self, signal: Signal) {
        if let Some((_, process)) = self.processes.last() {
            process.signal(signal);
        }
    }

    pub(super) async fn kill9(&mut self) -> Result<()> {
        match self.processes.last_mut() {
            Some((_, process)) => process.kill9().await,
            None => Ok(()),
        }
    }

    /// Returns the number of acknowledged writes.
    pub(super) fn acked(&self) -> usize {
        self.processes.iter().map(|(_, process)| acked(process)).sum()
    }

    /// Starts the client again if it has ended: an unknown outcome ends it.
    pub(super) fn keep_running(&mut self, cluster: &Cluster) -> Result<()> {
        let ended = self.processes.last_mut().is_some_and(|(_, process)| !process.is_running());
        if ended { self.start(cluster) } else { Ok(()) }
    }

    /// Ends the client and reads all that was acknowledged to it.
    pub(super) async fn end(mut self, keyspace: &Keyspace) -> Result<usize> {
        self.kill9().await?;
        let mut all = 0;
        for (prefix, process) in &self.processes {
            let count = acked(process);
            let names: Vec<String> = (0..count).map(|n| format!("{prefix}{n}")).collect();
            let values = keyspace.get_many(&names).await?;
            let wrong = values.iter().enumerate().find(|(n, value)| {
                value.as_ref().is_none_or(|value| value.bytes() != format!("m{n}"))
            });
            ensure!(wrong.is_none(), "{prefix}: acknowledged were {count}, wrong is {wrong:?}");
            all += count;
        }
        Ok(all)
    }
}

fn acked(process: &Process) -> usize {
    process.printed().matches('\n').count()
}
