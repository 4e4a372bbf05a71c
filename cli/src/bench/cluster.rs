//! The operations of a workload on a keyspace of a running cluster, through the client library: one
//! task per client, each with one operation in flight.

use std::{sync::Arc, time::Instant};

use futures::{StreamExt, TryStreamExt, future, stream};
use tokio::task::JoinSet;
use vasto_client::{Ack, Batch, Bytes, Error, ErrorKind, Keyspace};

use super::{
    measure::{Found, Run},
    workload::{Generator, KEY_PREFIX, Op, Values, key, neighbourhood, number_of},
};

/// Keys in a batch when loading.
const LOAD_BATCH: u64 = 500;
/// Batches in flight when loading.
const LOAD_PARALLEL: usize = 8;
/// Keys that [`loaded`] samples.
const SAMPLE: u64 = 64;

/// Returns whether the keys `0..keys` exist, judged by a sample that includes the first and the
/// last.
pub(super) async fn loaded(keyspace: &Keyspace, keys: u64) -> Result<bool, Error> {
    let sample = (0..SAMPLE.min(keys)).map(|step| key(sampled(step, keys)));
    Ok(keyspace.get_many(sample).await?.iter().all(Option::is_some))
}

/// Spreads `0..SAMPLE` evenly over `0..keys`, from the first to the last.
fn sampled(step: u64, keys: u64) -> u64 {
    let steps = SAMPLE.min(keys).saturating_sub(1).max(1);
    (u128::from(step) * u128::from(keys - 1) / u128::from(steps)) as u64
}

/// Writes the keys `0..keys`; `progress` receives the number of keys written since its last call.
pub(super) async fn load(
    keyspace: &Keyspace,
    keys: u64,
    values: &Values,
    progress: impl Fn(u64),
) -> Result<(), Error> {
    let starts = (0..keys).step_by(LOAD_BATCH as usize);
    let batches = stream::iter(starts).map(|start| async move {
        let end = keys.min(start + LOAD_BATCH);
        let batch = (start..end)
            .fold(Batch::new(), |batch, number| batch.put(key(number), values.at(number)));
        keyspace.write(batch).await.map(|_| end - start)
    });
    let mut written = batches.buffer_unordered(LOAD_PARALLEL);
    while let Some(count) = written.try_next().await? {
        progress(count);
    }
    Ok(())
}

/// Deletes those of the keys `0..keys` that exist, and nothing else; `progress` receives the number
/// of keys deleted since its last call.
pub(super) async fn unload(
    keyspace: &Keyspace,
    keys: u64,
    progress: impl Fn(u64),
) -> Result<(), Error> {
    let rows = keyspace.scan().prefix(KEY_PREFIX).keys_only().stream();
    let mine = rows.try_filter(|row| {
        let mine =
            row.partition_hash.is_none() && number_of(&row.key).is_some_and(|number| number < keys);
        future::ready(mine)
    });
    let batches =
        mine.try_chunks(LOAD_BATCH as usize).map_err(|error| error.1).map_ok(|rows| async move {
            let batch = rows.iter().fold(Batch::new(), |batch, row| batch.delete(row));
            keyspace.write(batch).await.map(|_| rows.len() as u64)
        });
    let mut gone = std::pin::pin!(batches.try_buffer_unordered(LOAD_PARALLEL));
    while let Some(count) = gone.try_next().await? {
        progress(count);
    }
    Ok(())
}

/// Runs one task per generator, until the run ends.
pub(super) async fn run(
    run: &Arc<Run>,
    keyspace: &Keyspace,
    generators: Vec<Generator>,
    values: &Values,
    ack: Option<Ack>,
) {
    let mut clients = JoinSet::new();
    for (number, generator) in generators.into_iter().enumerate() {
        let client = Client { keyspace: keyspace.clone(), values: values.clone(), ack };
        clients.spawn(client.run(number, generator, run.clone()));
    }
    while let Some(ended) = clients.join_next().await {
        if let Err(error) = ended {
            run.fail(0, format!("a client panicked: {error}"), true);
        }
    }
}

struct Client {
    keyspace: Keyspace,
    values: Values,
    ack: Option<Ack>,
}

impl Client {
    async fn run(self, number: usize, mut generator: Generator, run: Arc<Run>) {
        while run.begin() {
            let op = generator.next_op();
            let value = self.values.at(generator.random());
            let started = Instant::now();
            match self.perform(op, value).await {
                Ok(found) => run.record(number, started.elapsed(), found),
                Err(error) => run.fail(number, error.message(), hopeless(error.kind())),
            }
        }
    }

    async fn perform(&self, op: Op, value: Bytes) -> Result<Found, Error> {
        match op {
            Op::Get(number) => self.get(number).await,
            Op::Put(number) => self.put(number, value).await,
            Op::Modify(number) => {
                let found = self.get(number).await?;
                self.put(number, value).await?;
                Ok(found)
            }
            Op::Scan(number, rows) => {
                let mut scan =
                    self.keyspace.scan().prefix(neighbourhood(number)).limit(rows).stream();
                let mut found = Found::No;
                while scan.try_next().await?.is_some() {
                    found = Found::Yes;
                }
                Ok(found)
            }
        }
    }

    async fn get(&self, number: u64) -> Result<Found, Error> {
        Ok(if self.keyspace.get(key(number)).await?.is_some() { Found::Yes } else { Found::No })
    }

    async fn put(&self, number: u64, value: Bytes) -> Result<Found, Error> {
        let put = self.keyspace.put(key(number), value);
        match self.ack {
            Some(ack) => put.ack(ack).await?,
            None => put.await?,
        };
        Ok(Found::Yes)
    }
}

/// Returns whether a repetition of the request would fail again.
fn hopeless(kind: ErrorKind) -> bool {
    !matches!(
        kind,
        ErrorKind::Unavailable
            | ErrorKind::Overloaded
            | ErrorKind::DeadlineExceeded
            | ErrorKind::Unknown
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_holds_the_first_and_the_last_key_and_none_twice() {
        for keys in [1, 2, SAMPLE - 1, SAMPLE, SAMPLE + 1, 1_000_000, u64::MAX] {
            let sample: Vec<u64> = (0..SAMPLE.min(keys)).map(|step| sampled(step, keys)).collect();
            assert_eq!((sample[0], sample[sample.len() - 1]), (0, keys - 1), "{keys}");
            assert!(sample.windows(2).all(|pair| pair[0] < pair[1]), "{keys}");
        }
    }
}
