//! The command line: every command, flag and help text of `vasto`.
//!
//! Invariant: names and flags are a contract with scripts; commands and flags are added, never
//! changed. Every example in a help text parses; a test checks that.
//!
//! Not here: executing the commands. Flags that belong to the configuration become
//! [`crate::config::Overrides`], so that a flag that was not given leaves the value of the file or
//! the environment in force.

mod data;
mod parse;
mod server;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use self::parse::{
    RateBound, parse_assignment, parse_duration, parse_rate, parse_rate_bound, parse_ttl,
};
pub(crate) use self::{data::*, server::*};
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

/// The acknowledgement levels of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ack {
    /// The operating system has it: survives a crash of the process, not a loss of power
    Os,
    /// It is on the disk of the node
    Fsync,
    /// One more replica has it on disk
    Replica,
    /// The bucket has it
    Bucket,
}

/// `vasto keyspace`
#[derive(Debug, Args)]
pub(crate) struct Keyspace {
    #[command(flatten)]
    pub connect: Connect,
    #[command(subcommand)]
    pub command: KeyspaceCommand,
}

/// The commands of `vasto keyspace`.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyspaceCommand {
    /// Create a keyspace
    Create(KeyspaceCreate),
    /// List all keyspaces
    List,
    /// Show shards, replicas and the running operation of a keyspace
    Describe(KeyspaceName),
    /// Delete a keyspace and its data
    #[command(after_help = "Examples:\n  vasto keyspace delete users --yes")]
    Delete(KeyspaceDelete),
    /// Take a replica out of its placement; another node gets a copy
    #[command(after_help = "What the replica alone holds is drained once its node is there.\n\n\
        Examples:\n  \
        vasto keyspace evict users --replica 3\n  \
        vasto keyspace evict users --replica 3 --accept-loss --yes")]
    Evict(KeyspaceEvict),
    /// Write a checkpoint of every shard to the bucket now
    Checkpoint(KeyspaceName),
    /// Compact every shard now
    Compact(KeyspaceName),
    /// Change the number of shards, up or down, while reads and writes go on
    Resize(KeyspaceResize),
    /// Make a new keyspace out of what the bucket holds of another one, now or at a time
    Restore(KeyspaceRestore),
}

/// A keyspace by its name.
#[derive(Debug, Args)]
pub(crate) struct KeyspaceName {
    /// The keyspace
    pub name: String,
}

/// `vasto keyspace create`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    vasto keyspace create users\n  \
    vasto keyspace create sessions --shards 4 --ack os --ttl 30d")]
pub(crate) struct KeyspaceCreate {
    /// A name: a to z first, then a to z, 0 to 9, _ and -, at most 63 in all
    pub name: String,
    /// Shards: 1 to 64
    #[arg(long, default_value_t = 1)]
    pub shards: u32,
    /// Copies of each shard, on distinct nodes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=7))]
    pub replicas: u32,
    /// When a write counts as done
    #[arg(long, value_enum, default_value_t = Ack::Fsync)]
    pub ack: Ack,
    /// Forget every entry this long after it was written, for example 30d [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_ttl)]
    pub ttl: Option<Duration>,
    /// How long the old place of moved keys is kept after a resize
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = parse_duration)]
    pub quarantine: Duration,
    /// How long deletes are remembered at least
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = parse_duration)]
    pub tombstone_grace: Duration,
}

/// `vasto keyspace delete`
#[derive(Debug, Args)]
pub(crate) struct KeyspaceDelete {
    /// The keyspace
    pub name: String,
    /// Say that you mean it
    #[arg(long, required = true)]
    pub yes: bool,
}

/// `vasto keyspace evict`
#[derive(Debug, Args)]
pub(crate) struct KeyspaceEvict {
    /// The keyspace
    pub name: String,
    /// The replica, as `vasto keyspace describe` numbers it
    #[arg(long, value_name = "ID")]
    pub replica: u64,
    /// Give up what only this replica holds; its files go when its node is back
    #[arg(long, requires = "yes")]
    pub accept_loss: bool,
    /// Say that you mean it
    #[arg(long)]
    pub yes: bool,
}

/// `vasto keyspace resize`
#[derive(Debug, Args)]
#[command(
    after_help = "The shards that get keys take them from the bucket; reads and writes go on. The old\n\
    place of the keys is kept for the quarantine of the keyspace. A shrink is refused while the\n\
    shards that stay keep such keys themselves; --end-quarantine removes them first, once the\n\
    bucket holds them elsewhere.\n\n\
    Examples:\n  \
    vasto keyspace resize users --shards 5 --plan\n  \
    vasto keyspace resize users --shards 5\n  \
    vasto keyspace resize users --shards 5 --max-rate 20MiB\n  \
    vasto keyspace resize users --shards 2 --end-quarantine"
)]
pub(crate) struct KeyspaceResize {
    /// The keyspace
    pub name: String,
    /// The new number of shards, more or fewer: 1 to 64
    #[arg(long)]
    pub shards: u32,
    /// Only tell what would move, from where, what it takes, and whether it would be refused
    #[arg(long, conflicts_with = "no_wait")]
    pub plan: bool,
    /// Remove at once the kept keys of an earlier grow that are in the way of a shrink
    #[arg(long, conflicts_with = "plan")]
    pub end_quarantine: bool,
    /// The most bytes a second that all nodes together read and write at the bucket for this
    #[arg(long, value_name = "BYTES", value_parser = parse_rate, conflicts_with = "plan")]
    pub max_rate: Option<u64>,
    /// Start it and return; follow it with `vasto operation show`
    #[arg(long)]
    pub no_wait: bool,
}

/// `vasto keyspace restore`
#[derive(Debug, Args)]
#[command(
    after_help = "The source may be deleted, and all its nodes may be gone. The time is compared with the\n\
    clocks of the nodes that took the writes, each shard by itself.\n\n\
    Examples:\n  \
    vasto keyspace restore users --into users-2\n  \
    vasto keyspace restore users --into users-before --at 2026-11-24T08:30:00Z"
)]
pub(crate) struct KeyspaceRestore {
    /// Whose data
    pub name: String,
    /// The name of the new keyspace
    #[arg(long, value_name = "NEW")]
    pub into: String,
    /// What was there at this time (RFC 3339) [default: everything]
    #[arg(long, value_name = "TIME")]
    pub at: Option<jiff::Timestamp>,
    /// What the bucket holds is enough: no node is asked to ship first what it has
    #[arg(long)]
    pub from_bucket: bool,
    /// Only tell what would be read, what it takes, and whether it would be refused
    #[arg(long, conflicts_with = "no_wait")]
    pub plan: bool,
    /// Start it and return; follow it with `vasto operation show`
    #[arg(long)]
    pub no_wait: bool,
}

/// `vasto node`
#[derive(Debug, Args)]
pub(crate) struct Node {
    #[command(flatten)]
    pub connect: Connect,
    #[command(subcommand)]
    pub command: NodeCommand,
}

/// The commands of `vasto node`.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List all nodes with their address, zone, state and disk
    List,
    /// Give the replicas of a node to others; it may be lost for good
    #[command(
        after_help = "What nobody else holds comes from the bucket; should the node return, what was not\n\
        shipped is drained from it.\n\n\
        Examples:\n  \
        vasto node replace n-1f2e3d4c5b6a7988\n  \
        vasto node replace n-1f2e3d4c5b6a7988 --with n-0a1b2c3d4e5f6071\n  \
        vasto node replace n-1f2e3d4c5b6a7988 --accept-loss --yes"
    )]
    Replace(NodeReplace),
    /// Move all replicas away from a running node, and cordon it
    Drain(NodeDrain),
    /// Give a node no more replicas; it keeps those that it has
    #[command(after_help = "Examples:\n  vasto node cordon n-1f2e3d4c5b6a7988")]
    Cordon(NodeName),
    /// Let a node get replicas again
    #[command(after_help = "Examples:\n  vasto node uncordon n-1f2e3d4c5b6a7988")]
    Uncordon(NodeName),
}

/// A node by its id.
#[derive(Debug, Args)]
pub(crate) struct NodeName {
    /// The node, as `vasto node list` names it
    pub node: String,
}

/// `vasto node replace`
#[derive(Debug, Args)]
pub(crate) struct NodeReplace {
    /// The node, as `vasto node list` names it
    pub node: String,
    /// Who takes its replicas [default: whoever has room]
    #[arg(long, value_name = "NODE")]
    pub with: Option<String>,
    /// Give up what it alone holds, once it is gone and the bucket was read: nothing waits for it
    /// any more
    #[arg(long, requires = "yes")]
    pub accept_loss: bool,
    /// Say that you mean it
    #[arg(long)]
    pub yes: bool,
    /// Only tell what would move, what it takes, and whether it would be refused
    #[arg(long, conflicts_with_all = ["no_wait", "accept_loss"])]
    pub plan: bool,
    /// Start it and return; follow it with `vasto operation show`
    #[arg(long)]
    pub no_wait: bool,
}

/// `vasto node drain`
#[derive(Debug, Args)]
pub(crate) struct NodeDrain {
    /// The node, as `vasto node list` names it
    pub node: String,
    /// Only tell what would move, what it takes, and whether it would be refused
    #[arg(long, conflicts_with = "no_wait")]
    pub plan: bool,
    /// Start it and return; follow it with `vasto operation show`
    #[arg(long)]
    pub no_wait: bool,
}

/// `vasto cluster`
#[derive(Debug, Args)]
pub(crate) struct Cluster {
    #[command(flatten)]
    pub connect: Connect,
    #[command(subcommand)]
    pub command: ClusterCommand,
}

/// The commands of `vasto cluster`.
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Show nodes, keyspaces and warnings
    Status,
    /// Check that everything is well: nodes, replicas, shipping, running operations
    #[command(after_help = "Exits with 1 when there is anything to warn of.\n\n\
        Examples:\n  \
        vasto cluster check")]
    Check,
    /// Move replicas between nodes until all hold and do alike
    #[command(
        after_help = "By bytes, load and preferred primaries; replicas of a shard stay in as many zones as they are\n\
        in. Reads and writes go on: what moves comes from the bucket. Cordoned nodes give and get\n\
        nothing. With master.rebalance = \"on\" the master begins this by itself; master.moves_at_once\n\
        replicas move at a time.\n\n\
        Examples:\n  \
        vasto cluster rebalance --plan\n  \
        vasto cluster rebalance"
    )]
    Rebalance(ClusterRebalance),
}

/// `vasto cluster rebalance`
#[derive(Debug, Args)]
pub(crate) struct ClusterRebalance {
    /// Only tell what would move, and what it takes
    #[arg(long, conflicts_with = "no_wait")]
    pub plan: bool,
    /// Start it and return; follow it with `vasto operation show`
    #[arg(long)]
    pub no_wait: bool,
}

/// `vasto bucket`
#[derive(Debug, Args)]
pub(crate) struct Bucket {
    #[command(flatten)]
    pub connect: Connect,
    #[command(subcommand)]
    pub command: BucketCommand,
}

/// The commands of `vasto bucket`.
#[derive(Debug, Subcommand)]
pub(crate) enum BucketCommand {
    /// Look for objects that are missing, damaged, or needed by nothing
    #[command(after_help = "Exits with 1 when anything is missing or damaged.\n\n\
        Examples:\n  \
        vasto bucket fsck\n  \
        vasto bucket fsck --deep")]
    Fsck {
        /// Read every byte of every object, not only manifests, logs and sizes
        #[arg(long)]
        deep: bool,
    },
    /// Delete objects that nothing needs any more
    #[command(
        after_help = "What stays is set by bucket.keep_checkpoints, bucket.keep_for and bucket.min_age. The master\n\
        does this by itself every bucket.gc_interval.\n\n\
        Examples:\n  \
        vasto bucket gc --dry-run"
    )]
    Gc {
        /// Only tell what would be deleted
        #[arg(long)]
        dry_run: bool,
    },
    /// Put back what the bucket has lost and the nodes still know
    #[command(
        after_help = "Start all nodes first: they remember the cluster, the catalog and what they have shipped. What is in\n\
        the bucket is not changed. Exits with 1 when something is missing or damaged afterwards.\n\n\
        Examples:\n  \
        vasto bucket repair"
    )]
    Repair {
        /// Go on without what nodes know that do not come back
        #[arg(long)]
        accept_loss: bool,
    },
}

/// `vasto operation`
#[derive(Debug, Args)]
pub(crate) struct Operation {
    #[command(flatten)]
    pub connect: Connect,
    #[command(subcommand)]
    pub command: OperationCommand,
}

/// The commands of `vasto operation`.
#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List running and recent operations
    List,
    /// Show one operation
    Show(OperationId),
    /// Cancel an operation that is not committed yet
    Cancel(OperationId),
    /// Stop the bulk work of an operation for a while; it changes no ownership meanwhile
    #[command(
        after_help = "Reads, writes and the tails of the logs go on. An operation that is in its cutover\n\
        is not paused: that takes a moment.\n\n\
        Examples:\n  \
        vasto operation pause op-1-3"
    )]
    Pause(OperationId),
    /// Let a paused operation go on
    #[command(after_help = "Examples:\n  vasto operation resume op-1-3")]
    Resume(OperationId),
    /// Bound the bytes a second that an operation moves, or lift the bound
    #[command(
        after_help = "All nodes together read and write at most so many bytes at the bucket.\n\n\
        Examples:\n  \
        vasto operation rate op-1-3 20MiB\n  \
        vasto operation rate op-1-3 none"
    )]
    Rate(OperationRate),
}

/// An operation by its id.
#[derive(Debug, Args)]
pub(crate) struct OperationId {
    /// The id, as `vasto operation list` shows it
    pub id: String,
}

/// `vasto operation rate`
#[derive(Debug, Args)]
pub(crate) struct OperationRate {
    /// The id, as `vasto operation list` shows it
    pub id: String,
    /// Bytes a second, or none
    #[arg(value_name = "BYTES", value_parser = parse_rate_bound)]
    pub rate: RateBound,
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
