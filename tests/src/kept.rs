//! Rows of every kind that a resize must keep, written before it and during it, and checked after
//! it: plain, overwritten, deleted, with a time to live, and counters.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use vasto_client::Keyspace;
use vasto_testkit::{DEADLINE, until};

use crate::cluster::Cluster;
use crate::counters::{COUNTER, Counters};
use crate::history::History;
use crate::keys::{missing, put_all};
use crate::load::{Load, LoadSpec, LoadSummary, preload};
use crate::replicas::converged;
use crate::verify::verify_beside;

/// Names of what is beside the history of the writers.
const LASTING: &str = "lasting:";
const PASSING: &str = "passing:";
const GONE: &str = "gone:";
/// Rows of each of these kinds.
const ROWS: u64 = 300;
/// Passing rows end from now on until then.
const PASSING_FOR: Duration = Duration::from_secs(4);

/// A keyspace with such rows, under load.
#[derive(Debug)]
pub struct Kept {
    name: String,
    master: String,
    history: Arc<History>,
    load: Load,
    counters: Counters,
    /// Event time and expiry of the lasting rows.
    lasting: Vec<(u64, Option<u64>)>,
    /// Beginnings of keys that the test itself has written.
    others: Vec<&'static str>,
}

/// What a load and its counters saw.
#[derive(Debug)]
pub struct Ended {
    /// Of the clients that put and delete.
    pub summary: LoadSummary,
    /// Acknowledged increments that are missing.
    pub increments_lost: i64,
}

impl Kept {
    /// Writes the rows, `keys` of them plain, and starts the clients, which pause between their
    /// operations.
    ///
    /// # Errors
    /// When a write fails.
    pub async fn start(cluster: &Cluster, name: &str, keys: u64, pace: Duration) -> Result<Self> {
        let keyspace = cluster.keyspace(name).await?;
        let history = Arc::new(History::default());
        preload(&keyspace, &history, "s:", keys).await?;
        put_all(&keyspace, GONE, ROWS).await?;
        let keyspace = &keyspace;
        let write = async |n: u64| -> Result<()> {
            keyspace.delete(format!("{GONE}{n}")).await?;
            let day = Duration::from_secs(86_400);
            keyspace.put(format!("{LASTING}{n}"), "v").ttl(day).await?;
            let passes = PASSING_FOR.mul_f64((n + 1) as f64 / ROWS as f64);
            keyspace.put(format!("{PASSING}{n}"), "v").ttl(passes).await?;
            Ok(())
        };
        let writes = futures::stream::iter(0..ROWS).map(write).buffer_unordered(64);
        writes.try_collect::<()>().await?;
        let lasting = lasting(keyspace).await?;
        let spec = LoadSpec { writers: 3, readers: 0, pace, ..LoadSpec::default() };
        let load = Load::start(&cluster.master(), name, &history, spec).await?;
        let counters = Counters::start(keyspace, 2, pace);
        Ok(Self {
            name: name.to_owned(),
            master: cluster.master(),
            history,
            load,
            counters,
            lasting,
            others: vec![COUNTER, LASTING, PASSING],
        })
    }

    /// Passes over keys that begin like this: the test has written them, and checks them itself.
    pub fn beside(mut self, prefix: &'static str) -> Self {
        self.others.push(prefix);
        self
    }

    /// Returns the clients that put and delete.
    pub fn load(&self) -> &Load {
        &self.load
    }

    /// Stops the clients and checks all rows, once the replicas of each shard hold the same.
    ///
    /// # Errors
    /// The rows that are wrong.
    pub async fn end(self, cluster: &Cluster) -> Result<Ended> {
        let name = self.name.clone();
        self.check(cluster).await.with_context(|| format!("keyspace {name}"))
    }

    async fn check(self, cluster: &Cluster) -> Result<Ended> {
        let summary = self.load.stop().await?;
        let increments = self.counters.stop().await?;
        converged(cluster, &self.name).await?;
        let keyspace = cluster.keyspace(&self.name).await?;
        let verified = verify_beside(&self.master, &self.name, &self.history, &self.others).await?;
        let compared = increments.compare(&keyspace).await?;
        ensure!(compared.over == 0, "increments were applied twice: {:?}", compared.wrong);
        ensure!(missing(&keyspace, GONE, ROWS).await? as u64 == ROWS, "a deleted row is back");
        let now = lasting(&keyspace).await?;
        let differs = now.iter().zip(&self.lasting).position(|(now, then)| now != then);
        if let Some(n) = differs {
            let (now, then) = (now[n], self.lasting[n]);
            anyhow::bail!("{LASTING}{n} has event time and end {now:?} instead of {then:?}");
        }
        until("the passing rows to end", DEADLINE, async || {
            let left = keyspace.scan().prefix(PASSING).keys_only().stream().count().await as u64;
            let gone = missing(&keyspace, PASSING, ROWS).await.ok()? as u64;
            (left == 0 && gone == ROWS).then_some(())
        })
        .await?;
        println!("{}: {verified:?}, {compared:?}, {summary:?}", self.name);
        Ok(Ended { summary, increments_lost: compared.lost })
    }
}

impl Ended {
    /// Checks that no client saw an error and no increment is missing: nobody was killed.
    ///
    /// # Errors
    /// The errors.
    pub fn smoothly(&self) -> Result<()> {
        let summary = &self.summary;
        ensure!(summary.refused + summary.unknown == 0, "clients saw errors: {summary:?}");
        self.completely()
    }

    /// Checks that no acknowledged increment is missing.
    ///
    /// # Errors
    /// Their number.
    pub fn completely(&self) -> Result<()> {
        let lost = self.increments_lost;
        ensure!(lost == 0, "{lost} acknowledged increments are lost");
        Ok(())
    }
}

async fn lasting(keyspace: &Keyspace) -> Result<Vec<(u64, Option<u64>)>> {
    let names: Vec<String> = (0..ROWS).map(|n| format!("{LASTING}{n}")).collect();
    let values = keyspace.get_many(&names).await?.into_iter().zip(&names);
    values
        .map(|(value, name)| {
            let value = value.with_context(|| format!("{name} is missing"))?;
            Ok((value.event_time, value.expires_at))
        })
        .collect()
}
