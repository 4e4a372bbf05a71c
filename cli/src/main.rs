//! The `vasto` binary: servers, administration, data and measurements.
//!
//! Where to start: `args` has every command, and each of the other modules executes one group:
//! `serve`, `admin`, `kv`, `bench`, `config`. `connect` connects to a cluster, `output` writes for
//! the user.

mod admin;
mod args;
mod bench;
mod config;
mod connect;
mod kv;
mod output;
#[cfg(test)]
mod reference;
mod serve;

use std::{io::Write, time::Duration};

use anyhow::Context;
use clap::Parser;

use args::{Cli, Command, ConfigCommand, Serve};

/// Time that the runtime may take to drop its threads; all durable work is done by then.
const RUNTIME_END: Duration = Duration::from_millis(200);
/// Threads for what blocks, at most: they are started when they are needed.
const BLOCKING_THREADS_MAX: usize = 4_096;

fn main() {
    let code = match run(&Cli::parse()) {
        Ok(()) => 0,
        Err(error) => output::report(&error),
    };
    vasto_observability::flush_logs(RUNTIME_END);
    // A failure cannot be reported anywhere: stdout is gone.
    let _ = std::io::stdout().flush();
    // All data that must be durable is durable. A thread that still closes a database would abort
    // the process if the globals of the database library were destroyed meanwhile, as happens when
    // `main` returns.
    signal_hook::low_level::exit(code.into());
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Config(ConfigCommand::Show(show)) => {
            let flags = config::Overrides::new().assign(&show.set);
            config::load(cli.global.config.as_deref(), flags)?.show(cli.global.output)?;
            Ok(())
        }
        Command::Config(ConfigCommand::Check(check)) => {
            config::check_file(&check.file).map_err(|error| error.finding())?;
            output::print(&format!("{} is good\n", check.file.display()))?;
            Ok(())
        }
        _ => {
            // A pause keeps a thread for each export and each target of a node; reads, and the version
            // that ends the pause, need threads beside them.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .max_blocking_threads(BLOCKING_THREADS_MAX)
                .enable_all()
                .build();
            let runtime = runtime.context("cannot start the threads of the runtime")?;
            let result = runtime.block_on(command(cli));
            runtime.shutdown_timeout(RUNTIME_END);
            result
        }
    }
}

/// Runs the commands that wait for the network. Their futures are large, and only one runs.
async fn command(cli: &Cli) -> anyhow::Result<()> {
    let (file, format) = (cli.global.config.as_deref(), cli.global.output);
    match &cli.command {
        Command::Dev(args) => Box::pin(serve::dev(args, file)).await,
        Command::Serve(Serve::Master(args)) => Box::pin(serve::master(args, file)).await,
        Command::Serve(Serve::Node(args)) => Box::pin(serve::node(args, file)).await,
        Command::Keyspace(args) => Box::pin(admin::keyspace::run(args, format)).await,
        Command::Node(args) => Box::pin(admin::cluster::node(args, format)).await,
        Command::Cluster(args) => Box::pin(admin::cluster::cluster(args, format)).await,
        Command::Bucket(args) => Box::pin(admin::bucket::run(args, format)).await,
        Command::Operation(args) => Box::pin(admin::operation::run(args, format)).await,
        Command::Kv(args) => Box::pin(kv::run(args, format)).await,
        Command::Bench(args) => Box::pin(bench::run(args, format)).await,
        Command::Config(_) => unreachable!("`run` has done it"),
    }
}
