//! What must hold after each cell: nothing runs any more, a restored keyspace has what it was to
//! have, and neither a node nor the bucket holds what nothing needs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use vasto_core::catalog::Catalog;
use vasto_core::ids::ReplicaId;
use vasto_tests::{DEADLINE, KeyHistory, Seen, is_delete, key_of, number_of, until};

use super::change::{KEYSPACE, Running};
use super::ground::{CALM_MAX, Ground, NODES};

impl Ground {
    /// Waits until the change and all that it brings have ended, and all nodes are back.
    pub(super) async fn rests(&self, running: &Running, healed: Instant) -> Result<()> {
        let mut why = String::new();
        let left = CALM_MAX.saturating_sub(healed.elapsed());
        let rested =
            until("the cluster to be at rest", left, async || match self.unrest(running).await {
                Ok(None) => Some(()),
                Ok(Some(what)) => {
                    why = what;
                    None
                }
                Err(error) => {
                    why = format!("{error:#}");
                    None
                }
            });
        rested.await.with_context(|| format!("{:?} after the fault: {why}", healed.elapsed()))
    }

    /// Returns what is not at rest.
    async fn unrest(&self, running: &Running) -> Result<Option<String>> {
        for catalog in [&self.catalog, &running.catalog] {
            let tip = catalog.tip()?;
            let leaving = tip.draining.len() + tip.draining_nodes.len() + tip.retired.len();
            let runs = tip.plans().next().is_some();
            let rests = !runs && tip.quarantines.is_empty() && leaving == 0;
            let wanted = tip.spec.replicas as usize;
            let whole = tip.placement.iter().all(|shard| shard.replicas.len() == wanted);
            if !(rests && whole) {
                return Ok(Some(format!("{tip:?}")));
            }
        }
        if let Some(what) = running.runs_on(&self.cluster).await? {
            return Ok(Some(what));
        }
        let status = self.cluster.json(&["cluster", "status"]).await?;
        let nodes = status["nodes"].as_array().context("no nodes")?;
        let live = nodes.iter().all(|node| node["state"] != "away");
        Ok((!live).then(|| format!("{status}")))
    }

    /// Checks that a restored keyspace holds what was acknowledged before the restore began, and
    /// nothing that was deleted by then.
    pub(super) async fn holds(
        &self,
        name: &str,
        promised: &BTreeMap<String, KeyHistory>,
        gone: &[String],
    ) -> Result<()> {
        let keyspace = self.cluster.keyspace(name).await?;
        let names: Vec<&String> = promised.keys().collect();
        for names in names.chunks(500) {
            let values = keyspace.get_many(names.iter().map(|name| key_of(name))).await?;
            for (name, value) in names.iter().zip(values) {
                let (then, now) = (&promised[*name], self.history.get(name));
                let number = value.map(|value| number_of(name, &value.bytes()).unwrap_or(u64::MAX));
                let holds = match number {
                    Some(number) => {
                        then.allows(Seen::Number(number))
                            || (number >= then.acked && number <= now.tried)
                    }
                    None => then.allows(Seen::Absent) || (then.acked..=now.tried).any(is_delete),
                };
                ensure!(holds, "{name} is {number:?}; promised then {then:?}, now {now:?}");
            }
        }
        let back = keyspace.get_many(gone).await?.iter().flatten().count();
        ensure!(back == 0, "{back} of {} rows that were deleted before are there", gone.len());
        Ok(())
    }

    /// Checks that the cells so far have left nothing on nodes and in the bucket that nothing
    /// needs.
    pub(super) async fn leaves_nothing(&self) -> Result<()> {
        self.nothing_is_left_on_nodes().await?;
        self.cluster.shipped(KEYSPACE).await?;
        self.cluster.collect().await.map(drop)
    }

    /// Waits until nodes hold nothing that no replica of the keyspace needs.
    pub(super) async fn nothing_is_left_on_nodes(&self) -> Result<()> {
        let tip = self.catalog.tip()?;
        let mut last = Vec::new();
        let gone = until("what nothing needs to go from the nodes", DEADLINE, async || {
            last = self.left_on_nodes(&tip).ok()?;
            last.is_empty().then_some(())
        });
        gone.await.with_context(|| format!("{last:?}"))
    }

    /// Returns directories on nodes that no replica of the keyspace has any more.
    fn left_on_nodes(&self, tip: &Catalog) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for node in 0..NODES {
            let id = self.cluster.node_id(node).context("the node was never up")?;
            let placed = tip.placement.iter().flat_map(|shard| &shard.replicas);
            let here: BTreeSet<ReplicaId> =
                placed.filter(|one| one.node.to_string() == id).map(|one| one.replica).collect();
            let needed: BTreeSet<String> =
                here.iter().map(|replica| format!("{}-{replica}", tip.keyspace)).collect();
            let dir = self.cluster.node_dir(node);
            for (part, any) in [("replicas", true), ("tmp", false)] {
                for entry in std::fs::read_dir(dir.join(part))? {
                    let name = entry?.file_name().to_string_lossy().into_owned();
                    let is_work = ["build-", "export-"].iter().any(|work| name.starts_with(work));
                    let is_needed = name.starts_with('.') || needed.contains(&name);
                    if (any && !is_needed) || is_work {
                        left.push(format!("node {node}: {part}/{name}"));
                    }
                }
            }
        }
        Ok(left)
    }
}
