//! `vasto keyspace`: the arguments of its commands.
//!
//! Invariant: names and flags are a contract with scripts; they are added, never changed.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::Connect;
use super::operation::Start;
use super::parse::{parse_duration, parse_ttl};

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
    #[command(flatten)]
    pub start: Start,
}

/// `vasto keyspace restore`
#[derive(Debug, Args)]
#[command(
    after_help = "The source may be deleted, and all its nodes may be gone. The time is compared with the\n\
    clocks of the nodes that took the writes, each shard by itself.\n\n\
    Examples:\n  \
    vasto keyspace restore users --into users-2\n  \
    vasto keyspace restore users --into users-2 --max-rate 50MiB\n  \
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
    #[command(flatten)]
    pub start: Start,
}
