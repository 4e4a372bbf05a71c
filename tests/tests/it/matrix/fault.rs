//! Faults of the matrix: what begins, what shows that it strikes, and what ends it.
//!
//! **Invariant:** a fault that nobody met is an error: its cell has shown nothing.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vasto_testkit::http_store;
use vasto_testkit::http_store::HttpStore;
use vasto_tests::netns::Network;
use vasto_tests::{Cluster, DEADLINE, Port, Writer, until};

use super::cells::Fault;

/// How much later a slow bucket answers.
const SLOW: Duration = Duration::from_millis(300);

/// How long faults last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lasting {
    /// As in a run of all tests.
    Short,
    /// As long as it takes for peers to be given up, and for backoffs to grow.
    Long,
}

impl Lasting {
    pub(super) fn of(self, fault: Fault) -> Duration {
        match (self, fault) {
            (Self::Short, Fault::Kill) => Duration::from_millis(500),
            (Self::Short, _) => Duration::from_secs(2),
            (Self::Long, Fault::Kill) => Duration::from_secs(2),
            (Self::Long, Fault::Stop | Fault::Cut) => Duration::from_secs(10),
            (Self::Long, _) => Duration::from_secs(30),
        }
    }
}

/// The victim of a cell, found while the change is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Struck {
    Master,
    Node(usize),
    Client,
    Bucket,
}

/// All that a fault can strike.
pub(super) struct Field<'a> {
    pub(super) cluster: &'a mut Cluster,
    pub(super) network: &'a Network,
    pub(super) store: &'a Arc<HttpStore>,
    pub(super) writer: &'a mut Writer,
}

impl Field<'_> {
    fn host(&self, struck: Struck) -> usize {
        match struck {
            Struck::Node(node) => node,
            Struck::Master | Struck::Bucket => self.cluster.master_host(),
            Struck::Client => self.cluster.client_host(),
        }
    }

    fn signal(&mut self, struck: Struck, signal: Signal) -> Result<()> {
        match struck {
            Struck::Master => self.cluster.master_process()?.signal(signal),
            Struck::Node(node) => self.cluster.node_process(node)?.signal(signal),
            Struck::Client => self.writer.signal(signal),
            Struck::Bucket => {}
        }
        Ok(())
    }

    fn pid(&mut self, struck: Struck) -> Result<u32> {
        match struck {
            Struck::Master => Ok(self.cluster.master_process()?.pid()),
            Struck::Node(node) => Ok(self.cluster.node_process(node)?.pid()),
            Struck::Client => self.writer.pid(),
            Struck::Bucket => anyhow::bail!("the bucket is no process of the cluster"),
        }
    }

    pub(super) async fn begin(&mut self, struck: Struck, fault: Fault) -> Result<()> {
        let is_there = struck != Struck::Client || self.writer.is_running();
        ensure!(is_there, "the client has ended before the fault");
        let _ = self.store.take_served();
        match (fault, struck) {
            (Fault::Kill, Struck::Master) => self.cluster.kill9_master().await?,
            (Fault::Kill, Struck::Node(node)) => self.cluster.kill9_node(node).await?,
            (Fault::Kill, _) => self.writer.kill9().await?,
            (Fault::Stop, _) => {
                self.signal(struck, Signal::STOP)?;
                let pid = self.pid(struck)?;
                until("the process to stand still", DEADLINE, async || {
                    stands_still(pid).ok()?.then_some(())
                })
                .await?;
            }
            (Fault::Cut, _) => self.network.cut(self.host(struck))?,
            (Fault::Slow, _) => self.store.answer_later(SLOW),
            (Fault::Throttled, _) => {
                self.store.fail_everything(Some(http_store::Fault::SlowDown));
            }
            (Fault::Gone, _) => {
                self.store.fail_everything(Some(http_store::Fault::ResetBefore));
            }
        }
        Ok(())
    }

    /// Checks, at the end of the time of a fault, that it still lasts and was met.
    pub(super) fn strikes(&mut self, struck: Struck, fault: Fault) -> Result<()> {
        match fault {
            // Whoever kills waits for the end.
            Fault::Kill => {}
            Fault::Stop => {
                ensure!(stands_still(self.pid(struck)?)?, "{struck:?} has gone on by itself");
            }
            Fault::Cut => {
                let dropped = self.network.dropped(self.host(struck))?;
                ensure!(dropped > 0, "{struck:?} was cut off and nobody has sent anything");
            }
            Fault::Slow => {
                ensure!(!self.store.take_served().is_empty(), "nobody has asked the slow bucket");
            }
            Fault::Throttled | Fault::Gone => {
                let met = self.store.take_served().iter().any(|served| served.fault.is_some());
                ensure!(met, "nobody has met the fault of the bucket");
            }
        }
        Ok(())
    }

    pub(super) async fn end(&mut self, struck: Struck, fault: Fault) -> Result<()> {
        match (fault, struck) {
            (Fault::Kill, Struck::Master) => self.cluster.start_master(Port::Same).await?,
            (Fault::Kill, Struck::Node(node)) => {
                self.cluster.start_node(node, Port::Same).await?;
            }
            (Fault::Kill, _) => self.writer.start(self.cluster).context("the client again")?,
            (Fault::Stop, _) => self.signal(struck, Signal::CONT)?,
            (Fault::Cut, _) => self.network.heal(self.host(struck))?,
            (Fault::Slow | Fault::Throttled | Fault::Gone, _) => self.store.heal(),
        }
        Ok(())
    }
}

/// Returns whether a process was stopped by a signal.
fn stands_still(pid: u32) -> Result<bool> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("no name")?;
    Ok(rest.trim_start().starts_with('T'))
}
