//! The command line: every command, flag and help text of `vasto`.
//!
//! Invariant: names and flags are a contract with scripts; commands and flags are added, never
//! changed. Every example in a help text parses; a test checks that.
//!
//! Not here: executing the commands. Flags that belong to the configuration become
//! [`crate::config::Overrides`], so that a flag that was not given leaves the value of the file or
//! the environment in force.

mod cluster;
mod data;
mod keyspace;
mod operation;
mod parse;
mod server;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use self::parse::parse_assignment;
pub(crate) use self::{cluster::*, data::*, keyspace::*, operation::*, server::*};
use crate::output::OutputFormat;

/// A distributed key-value store on local RocksDB shards that grows and heals from a bucket.
#[derive(Debug, Parser)]
#[command(
    name = "vasto",
    version,
    max_term_width = 100,
    disable_help_subcommand = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 not used as intended.\n\n\
        Examples:\n  \
        vasto dev\n  \
        vasto keyspace create users --shards 2\n  \
        vasto kv put users ada 'Ada Lovelace'\n  \
        vasto kv get users ada\n  \
        vasto keyspace resize users --shards 3\n  \
        vasto cluster status --output json"
)]
pub(crate) struct Cli {
    /// Flags that every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Read the configuration from this TOML file
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub config: Option<PathBuf>,
    /// Print results for people or for scripts
    #[arg(long, global = true, value_enum, default_value_t, help_heading = "Global options")]
    pub output: OutputFormat,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster in this process, to try things out
    Dev(Dev),
    /// Run one server of a cluster
    #[command(subcommand)]
    Serve(Serve),
    /// Create, inspect, resize and delete keyspaces
    Keyspace(Keyspace),
    /// Look at the nodes
    Node(Node),
    /// Look at the cluster as a whole
    Cluster(Cluster),
    /// Follow, pause, slow down and cancel long operations
    Operation(Operation),
    /// Check the bucket, and delete what is not needed any more
    Bucket(Bucket),
    /// Read and write single keys
    Kv(Kv),
    /// Measure throughput and latency
    Bench(Bench),
    /// Show and check the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
}

// ---------------------------------------------------------------------- administration

/// How to find the cluster.
#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// The master of the cluster
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "VASTO_MASTER",
        default_value = "http://127.0.0.1:8278"
    )]
    pub master: String,
}

// ---------------------------------------------------------------------- configuration

/// The commands of `vasto config`.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Show every value in force and where it comes from; secrets are not shown
    #[command(after_help = "Defaults < the file of --config < VASTO_SECTION__FIELD < flags.\n\n\
        Examples:\n  \
        vasto config show\n  \
        vasto config show --config /etc/vasto.toml --output json")]
    Show(ConfigShow),
    /// Check a file: exit code 0 when every field in it is known and has a good value
    #[command(after_help = "Examples:\n  vasto config check /etc/vasto.toml")]
    Check(ConfigCheck),
}

/// `vasto config show`
#[derive(Debug, Args)]
pub(crate) struct ConfigShow {
    /// Show it as if a server had been started with this (repeatable)
    #[arg(long, value_name = "SECTION.FIELD=VALUE", value_parser = parse_assignment)]
    pub set: Vec<(String, String)>,
}

/// `vasto config check`
#[derive(Debug, Args)]
pub(crate) struct ConfigCheck {
    /// The TOML file
    pub file: PathBuf,
}

#[cfg(test)]
mod tests;
