//! `vasto bench`: throughput and latency of a workload, on a keyspace of a cluster or, as the
//! baseline, on RocksDB embedded in this process.
//!
//! Every client has one operation in flight and starts the next when it is answered (a closed
//! loop). Keys are 16 bytes, values do not compress. The read-modify-write of YCSB F is a get and
//! then a put of the same key, counted as one operation, without a guard against concurrent writes
//! in between. The short scans of YCSB E read up to 100 keys that share all but their last two
//! digits. A run deletes at its end what it wrote to a keyspace, unless `--keep` is given.

mod cluster;
mod embedded;
mod measure;
mod workload;
mod zipf;

use std::{
    future::Future,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use clap::ValueEnum;

use self::{
    embedded::Embedded,
    measure::{Report, Run, Until},
    workload::{Generator, Population, Values, reads},
};
use crate::{
    args::{Ack, Bench},
    config::NodeSection,
    connect,
    output::{self, Failure, OutputFormat, ProgressLine, Unit, format_count},
};

/// Length of a run when neither flag sets one.
const SECONDS_DEFAULT: u64 = 10;
/// Interval between updates of the progress.
const TICK: Duration = Duration::from_millis(200);
/// Seed of the clients and of the values, so that a run can be repeated.
const SEED: u64 = 1;

/// Runs `vasto bench`.
///
/// # Errors
/// An error of the cluster or the database; a run in which an operation failed, after its report.
pub(crate) async fn run(args: &Bench, format: OutputFormat) -> anyhow::Result<()> {
    if args.value_size > vasto_core::limits::VALUE_BYTES_MAX {
        let most = vasto_core::limits::VALUE_BYTES_MAX;
        let failure = Failure::usage(format!(
            "values of {} bytes are over the limit of {most}",
            args.value_size
        ));
        return Err(failure.hint("give a smaller --value-size").into());
    }
    let values = Values::new(args.value_size, SEED);
    let measured = match (&args.embedded, &args.keyspace) {
        (Some(dir), _) => on_embedded(args, dir, &values).await?,
        (None, Some(keyspace)) => on_cluster(args, keyspace, &values).await?,
        (None, None) => {
            return Err(Failure::usage("name a keyspace, or give --embedded DIR").into());
        }
    };
    finish(args, &measured, format)
}

struct Measured {
    run: Arc<Run>,
    elapsed: Duration,
    target: &'static str,
    ack: Option<Ack>,
}

fn finish(args: &Bench, measured: &Measured, format: OutputFormat) -> anyhow::Result<()> {
    let (figures, first_error) = measured.run.finish(measured.elapsed);
    let report = Report {
        workload: name_of(args.workload),
        clients: args.clients,
        figures,
        target: measured.target,
        ack: measured.ack.map(name_of),
        value_size: args.value_size,
        keys: args.keys,
    };
    match format {
        OutputFormat::Json => output::print_json(&report)?,
        OutputFormat::Table => output::print(&report.text())?,
    }
    match first_error {
        Some(error) if figures.ops == 0 => Err(Failure::with_advice(&error).into()),
        Some(error) => Err(Failure::new(format!(
            "{} operations failed, the first one: {error}",
            format_count(figures.errors)
        ))
        .into()),
        None => Ok(()),
    }
}

fn name_of(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|name| name.get_name().to_owned()).unwrap_or_default()
}

fn until(args: &Bench) -> Until {
    match (args.requests, args.seconds) {
        (Some(requests), _) => Until::Requests(requests),
        (None, seconds) => Until::Elapsed(Duration::from_secs(seconds.unwrap_or(SECONDS_DEFAULT))),
    }
}

fn generators(args: &Bench, population: &Arc<Population>) -> Vec<Generator> {
    let generator = |client: u32| {
        Generator::new(args.workload, args.keys, population.clone(), SEED + u64::from(client))
    };
    (0..args.clients).map(generator).collect()
}

// ------------------------------------------------------------------------------ the cluster

async fn on_cluster(args: &Bench, name: &str, values: &Values) -> anyhow::Result<Measured> {
    let keyspace = connect::keyspace(&args.connect, name).await?;
    if reads(args.workload)
        && !cluster::loaded(&keyspace, args.keys).await.map_err(connect::failure)?
    {
        let done = AtomicU64::new(0);
        let add = |count| {
            done.fetch_add(count, Ordering::Relaxed);
        };
        let load = cluster::load(&keyspace, args.keys, values, add);
        loading(args.keys, || done.load(Ordering::Relaxed), load)
            .await
            .map_err(connect::failure)?;
    }
    let population = Population::new(args.keys, args.clients);
    let run = Arc::new(Run::start(until(args)));
    let clients = cluster::run(
        &run,
        &keyspace,
        generators(args, &population),
        values,
        args.ack.map(connect::ack),
    );
    watching(args, &run, clients).await;
    let elapsed = run.elapsed();
    if !args.keep {
        tidy(&keyspace, population.all()).await;
    }
    Ok(Measured { elapsed, run, target: "cluster", ack: args.ack })
}

/// Deletes what the runs have written. A failure to do so does not invalidate the measurement.
async fn tidy(keyspace: &vasto_client::Keyspace, keys: u64) {
    let done = AtomicU64::new(0);
    let add = |count| {
        done.fetch_add(count, Ordering::Relaxed);
    };
    let progress = || done.load(Ordering::Relaxed);
    match showing("deleting its keys", None, progress, cluster::unload(keyspace, keys, add)).await {
        Ok(()) => {}
        Err(error) => eprintln!(
            "not all keys of the benchmark were deleted: {error}; run it again, or delete bench:*"
        ),
    }
}

// --------------------------------------------------------------------------- the baseline

async fn on_embedded(args: &Bench, dir: &Path, values: &Values) -> anyhow::Result<Measured> {
    // The default of a keyspace.
    let ack = args.ack.unwrap_or(Ack::Fsync);
    let node = NodeSection::default();
    let memory = |size: bytesize::ByteSize| usize::try_from(size.as_u64()).unwrap_or(usize::MAX);
    let embedded = Embedded::open(dir, ack, memory(node.cache), memory(node.write_buffer))?;
    let embedded = Arc::new(embedded);
    if reads(args.workload) && !(embedded.has(0)? && embedded.has(args.keys - 1)?) {
        let done = Arc::new(AtomicU64::new(0));
        let (db, values, keys, counter) =
            (embedded.clone(), values.clone(), args.keys, done.clone());
        let load = blocking(move || {
            db.load(keys, &values, |count| counter.store(count, Ordering::Relaxed))
        });
        loading(args.keys, || done.load(Ordering::Relaxed), load).await??;
    }
    let run = Arc::new(Run::start(until(args)));
    let population = Population::new(args.keys, args.clients);
    let (db, values, clients, shared) =
        (embedded, values.clone(), generators(args, &population), run.clone());
    watching(args, &run, blocking(move || db.run(&shared, clients, &values))).await?;
    Ok(Measured { elapsed: run.elapsed(), run, target: "embedded", ack: Some(ack) })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a client of the embedded database panicked")
}

// --------------------------------------------------------------------------------- progress

/// Shows how many keys are loaded, until `load` ends.
async fn loading<T>(keys: u64, done: impl Fn() -> u64, load: impl Future<Output = T>) -> T {
    eprintln!("loading {} keys first, because the workload reads them", format_count(keys));
    showing("loading", Some(keys), done, load).await
}

/// Shows the progress until `work` ends.
async fn showing<T>(
    what: &str,
    of: Option<u64>,
    done: impl Fn() -> u64,
    work: impl Future<Output = T>,
) -> T {
    let mut progress = ProgressLine::start(what, Unit::Items, of);
    let mut ticks = tokio::time::interval(TICK);
    tokio::pin!(work);
    loop {
        tokio::select! {
            ended = &mut work => {
                progress.clear();
                return ended;
            }
            _ = ticks.tick() => progress.set(done(), of),
        }
    }
}

/// Shows the progress of `run` until `clients` end; Ctrl-C ends them early.
async fn watching<T>(args: &Bench, run: &Run, clients: impl Future<Output = T>) -> T {
    let mut progress = ProgressLine::start(name_of(args.workload), Unit::Items, run.total());
    let mut ticks = tokio::time::interval(TICK);
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(clients, interrupted);
    let mut listening = true;
    loop {
        tokio::select! {
            ended = &mut clients => {
                progress.clear();
                return ended;
            }
            _ = ticks.tick() => progress.set(run.done(), run.total()),
            _ = &mut interrupted, if listening => {
                listening = false;
                run.stop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command, Workload};

    fn args(line: &str) -> Bench {
        match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Bench(bench) => bench,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_run_ends_as_the_flags_say() {
        let bench = "vasto bench ks --workload put";
        assert_eq!(until(&args(bench)), Until::Elapsed(Duration::from_secs(SECONDS_DEFAULT)));
        assert_eq!(
            until(&args(&format!("{bench} --seconds 3"))),
            Until::Elapsed(Duration::from_secs(3))
        );
        assert_eq!(until(&args(&format!("{bench} --requests 9"))), Until::Requests(9));
        assert_eq!(
            generators(&args(&format!("{bench} --clients 5")), &Population::new(1, 5)).len(),
            5
        );
    }

    #[test]
    fn reports_use_the_words_of_the_command_line() {
        assert_eq!(
            (name_of(Workload::YcsbA), name_of(Ack::Os)),
            ("ycsb-a".to_owned(), "os".to_owned())
        );
    }

    #[test]
    fn a_run_in_which_something_failed_is_a_failure() {
        let args = args("vasto bench ks --workload put --requests 2");
        let measured = Measured {
            run: Arc::new(Run::start(until(&args))),
            elapsed: TICK,
            target: "cluster",
            ack: None,
        };
        measured.run.record(0, TICK, measure::Found::Yes);
        assert!(finish(&args, &measured, OutputFormat::Json).is_ok());
        measured.run.fail(0, "the node is away", false);
        let error = finish(&args, &measured, OutputFormat::Json).unwrap_err();
        assert!(
            error.to_string().contains("1 operations failed, the first one: the node is away"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn the_yardstick_loads_runs_and_counts() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("db");
        let line = format!(
            "vasto bench --embedded {} --workload get --clients 3 --requests 300 --keys 100 --ack os",
            dir.display()
        );
        let args = args(&line);
        for _ in 0..2 {
            let measured = on_embedded(&args, &dir, &Values::new(10, SEED)).await.unwrap();
            let (figures, error) = measured.run.finish(measured.elapsed);
            assert_eq!((figures.ops, figures.errors, error), (300, 0, None));
            assert_eq!((measured.target, measured.ack), ("embedded", Some(Ack::Os)));
        }
    }
}
