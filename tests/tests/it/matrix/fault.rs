//! Faults of the matrix: what begins, and what ends it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use vasto_testkit::http_store;
use vasto_testkit::http_store::HttpStore;
use vasto_tests::netns::Network;
use vasto_tests::{Cluster, Port};

use super::cells::Fault;
use super::writer::Writer;

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

    pub(super) async fn begin(&mut self, struck: Struck, fault: Fault) -> Result<()> {
        match (fault, struck) {
            (Fault::Kill, Struck::Master) => self.cluster.kill9_master().await?,
            (Fault::Kill, Struck::Node(node)) => self.cluster.kill9_node(node).await?,
            (Fault::Kill, _) => self.writer.kill9().await?,
            (Fault::Stop, _) => self.signal(struck, Signal::STOP)?,
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
