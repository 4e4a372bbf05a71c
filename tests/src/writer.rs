//! A client as a process of its own, which can be killed, stopped and cut off.
//!
//! **Invariant:** a key is written once, by one process; what a process printed was acknowledged.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vasto_client::Keyspace;
use vasto_testkit::Process;

use crate::binary::tool;
use crate::cluster::Cluster;

/// Pause between two writes, milliseconds.
const PACE_MS: &str = "10";

/// A client, and those that wrote before it in its place.
#[derive(Debug)]
pub struct Writer {
    name: String,
    keyspace: String,
    processes: Vec<(String, Process)>,
}

impl Writer {
    /// What the names of all keys of such clients begin with.
    pub const PREFIX: &str = "w:";

    /// Creates a client of a keyspace that does not run yet; no other one of the cluster has its
    /// name.
    pub fn new(name: &str, keyspace: &str) -> Self {
        Self { name: name.to_owned(), keyspace: keyspace.to_owned(), processes: Vec::new() }
    }

    /// Starts the client, or another one in its place.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(&mut self, cluster: &Cluster) -> Result<()> {
        let number = self.processes.len();
        let name = format!("writer-{}.{number}", self.name);
        let prefix = format!("{}{}.{number}:", Self::PREFIX, self.name);
        let master = cluster.master();
        let args = [master.as_str(), self.keyspace.as_str(), &prefix, "m", PACE_MS];
        let process = cluster.spawn_client(&name, &tool("vasto-test-writer"), &args)?;
        self.processes.push((prefix, process));
        Ok(())
    }

    /// Sends a signal to the client.
    pub fn signal(&self, signal: Signal) {
        if let Some((_, process)) = self.processes.last() {
            process.signal(signal);
        }
    }

    /// Returns the id of the client's process.
    ///
    /// # Errors
    /// When it was never started.
    pub fn pid(&self) -> Result<u32> {
        let (_, process) = self.processes.last().context("the client was never started")?;
        Ok(process.pid())
    }

    /// Returns whether the client runs: an unknown outcome ends it.
    pub fn is_running(&mut self) -> bool {
        self.processes.last_mut().is_some_and(|(_, process)| process.is_running())
    }

    /// Kills the client with `kill -9`, unless it has ended.
    ///
    /// # Errors
    /// When the operating system does not end it.
    pub async fn kill9(&mut self) -> Result<()> {
        match self.processes.last_mut() {
            Some((_, process)) => process.kill9().await,
            None => Ok(()),
        }
    }

    /// Returns the number of acknowledged writes.
    pub fn acked(&self) -> usize {
        self.processes.iter().map(|(_, process)| acked(process)).sum()
    }

    /// Starts the client again if it has ended.
    ///
    /// # Errors
    /// When it does not start.
    pub fn keep_running(&mut self, cluster: &Cluster) -> Result<()> {
        if self.is_running() { Ok(()) } else { self.start(cluster) }
    }

    /// Ends the client, and checks that all that was acknowledged to it is there; returns how many
    /// writes that were.
    ///
    /// # Errors
    /// What is missing.
    pub async fn end(mut self, keyspace: &Keyspace) -> Result<usize> {
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
