//! What happens during a walk, for a while each.

use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use vasto_testkit::http_store::Fault;
use vasto_tests::{Numbers, Port};

use super::walk::{KEYSPACES, NODES, Walk};

/// How much later a slow bucket answers.
const SLOW: Duration = Duration::from_millis(150);

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    NodeKilled,
    NodeStandsStill,
    NodeCutOff,
    MasterKilled,
    MasterStandsStill,
    MasterCutOff,
    ClientKilled,
    ClientStandsStill,
    ClientsCutOff,
    BucketGone,
    BucketRefuses,
    BucketThrottles,
    BucketSlow,
    Compaction,
}

pub(super) const EVENTS: [Event; 14] = [
    Event::NodeKilled,
    Event::NodeStandsStill,
    Event::NodeCutOff,
    Event::MasterKilled,
    Event::MasterStandsStill,
    Event::MasterCutOff,
    Event::ClientKilled,
    Event::ClientStandsStill,
    Event::ClientsCutOff,
    Event::BucketGone,
    Event::BucketRefuses,
    Event::BucketThrottles,
    Event::BucketSlow,
    Event::Compaction,
];

impl Walk {
    /// Lets something happen for a while, and ends it.
    pub(super) async fn happens(&mut self, event: Event, numbers: &mut Numbers) -> Result<()> {
        let node = numbers.below(NODES as u64) as usize;
        let of = numbers.below(KEYSPACES.len() as u64) as usize;
        let lasts = Duration::from_millis(100 + numbers.below(1_900));
        let port = numbers.of(&[Port::Same, Port::New]);
        let name = KEYSPACES[of].0;
        println!("    {event:?} (node {node}, client of {name}) for {lasts:?}");
        match event {
            Event::NodeKilled => {
                self.cluster.kill9_node(node).await?;
                tokio::time::sleep(lasts).await;
                self.cluster.start_node(node, port).await?;
            }
            Event::MasterKilled => {
                self.cluster.kill9_master().await?;
                tokio::time::sleep(lasts).await;
                self.cluster.start_master(Port::Same).await?;
            }
            Event::ClientKilled => {
                self.writers[of].kill9().await?;
                tokio::time::sleep(lasts).await;
                self.writers[of].start(&self.cluster)?;
            }
            Event::NodeStandsStill | Event::MasterStandsStill | Event::ClientStandsStill => {
                self.signal(event, (node, of), Signal::STOP)?;
                tokio::time::sleep(lasts * 2).await;
                self.signal(event, (node, of), Signal::CONT)?;
            }
            Event::NodeCutOff => self.cut_off(node, lasts * 2).await?,
            Event::MasterCutOff => self.cut_off(self.cluster.master_host(), lasts * 2).await?,
            Event::ClientsCutOff => self.cut_off(self.cluster.client_host(), lasts * 2).await?,
            Event::BucketGone
            | Event::BucketRefuses
            | Event::BucketThrottles
            | Event::BucketSlow => {
                match event {
                    Event::BucketGone => self.store.fail_everything(Some(Fault::ResetBefore)),
                    Event::BucketRefuses => self.store.fail_everything(Some(Fault::SlowDown)),
                    Event::BucketThrottles => self.store.throttle_half(),
                    _ => self.store.answer_later(SLOW),
                }
                tokio::time::sleep(lasts).await;
                self.store.heal();
            }
            Event::Compaction => {
                // It may be refused, or fail with a plan that ends meanwhile.
                let ran = self.cluster.vasto(&["keyspace", "compact", name]).await?;
                ensure!(!ran.stderr.contains("panicked"), "{ran:?}");
            }
        }
        // An unknown outcome has ended a client.
        for writer in &mut self.writers {
            writer.keep_running(&self.cluster)?;
        }
        Ok(())
    }

    /// Sends a signal to whom the event is about: this node, the master, or this client.
    fn signal(&mut self, event: Event, at: (usize, usize), signal: Signal) -> Result<()> {
        let (node, client) = at;
        match event {
            Event::NodeStandsStill => self.cluster.node_process(node)?.signal(signal),
            Event::MasterStandsStill => self.cluster.master_process()?.signal(signal),
            _ => self.writers[client].signal(signal),
        }
        Ok(())
    }

    async fn cut_off(&self, host: usize, lasts: Duration) -> Result<()> {
        self.network.cut(host)?;
        tokio::time::sleep(lasts).await;
        self.network.heal(host)
    }
}
