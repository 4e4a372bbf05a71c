//! The commands that read and write data: `vasto kv` and `vasto bench`.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use super::{
    Ack, Connect,
    parse::{Escaped, escaped_parser, parse_event_time, parse_hash, parse_size, parse_ttl},
};

/// `vasto kv`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    vasto kv put users ada 'Ada Lovelace' --ttl 1h\n  \
    vasto kv put users portrait <portrait.png\n  \
    vasto kv get users ada\n  \
    vasto kv put users user:1:name Ada --partition user:1\n  \
    vasto kv scan users --partition user:1 --prefix user:1: --limit 100\n  \
    vasto kv get users '\\xff\\x00id'\n  \
    vasto kv delete users ada\n\n\
    In keys, prefixes and partitions \\xNN is the byte NN and \\\\ a backslash; keys are printed the same way.\n\
    A row of a scan that was written with a partition names it: read it with --partition, or with the\n\
    --partition-hash that the row shows.")]
pub(crate) struct Kv {
    #[command(flatten)]
    pub connect: Connect,
    #[command(subcommand)]
    pub command: KvCommand,
}

/// The commands of `vasto kv`.
#[derive(Debug, Subcommand)]
pub(crate) enum KvCommand {
    /// Print the value of a key; exit code 1 when there is none
    Get(KvGet),
    /// Write a value
    Put(KvPut),
    /// Delete a key
    Delete(KvDelete),
    /// Print keys and values in the order of the keys
    Scan(KvScan),
}

/// A key in a keyspace.
#[derive(Debug, Args)]
pub(crate) struct KvKey {
    /// The keyspace
    pub keyspace: String,
    /// The key; \xNN is the byte NN, \\ a backslash
    #[arg(allow_hyphen_values = true, value_parser = escaped_parser())]
    pub key: Escaped,
    /// The partition key, when it is not the key itself
    #[arg(long, value_name = "P", value_parser = escaped_parser())]
    pub partition: Option<Escaped>,
    /// The hash of the partition key, as a scan shows it
    #[arg(long, value_name = "HEX", value_parser = parse_hash, conflicts_with = "partition")]
    pub partition_hash: Option<u64>,
}

/// How to write.
#[derive(Debug, Args)]
pub(crate) struct KvWrite {
    /// Ask for more certainty than the keyspace does
    #[arg(long, value_enum)]
    pub ack: Option<Ack>,
    /// The time of the event: RFC 3339, or microseconds since 1970 [default: now]
    #[arg(long, value_name = "T", value_parser = parse_event_time)]
    pub event_time: Option<u64>,
}

/// `vasto kv get`
#[derive(Debug, Args)]
pub(crate) struct KvGet {
    #[command(flatten)]
    pub key: KvKey,
}

/// `vasto kv put`
#[derive(Debug, Args)]
pub(crate) struct KvPut {
    #[command(flatten)]
    pub key: KvKey,
    /// The value, as it is [default: all bytes of stdin]
    #[arg(allow_hyphen_values = true)]
    pub value: Option<OsString>,
    /// Forget it after this time, for example 1h
    #[arg(long, value_name = "DURATION", value_parser = parse_ttl)]
    pub ttl: Option<Duration>,
    #[command(flatten)]
    pub write: KvWrite,
}

/// `vasto kv delete`
#[derive(Debug, Args)]
pub(crate) struct KvDelete {
    #[command(flatten)]
    pub key: KvKey,
    #[command(flatten)]
    pub write: KvWrite,
}

/// `vasto kv scan`
#[derive(Debug, Args)]
pub(crate) struct KvScan {
    /// The keyspace
    pub keyspace: String,
    /// Only keys that start with this
    #[arg(long, value_name = "P", value_parser = escaped_parser())]
    pub prefix: Option<Escaped>,
    /// At most this many [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// Only keys of this partition
    #[arg(long, value_name = "P", value_parser = escaped_parser())]
    pub partition: Option<Escaped>,
}

/// The workloads of `vasto bench`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Writes of random keys
    Put,
    /// Reads of random keys
    Get,
    /// Half reads, half writes
    Mixed,
    /// 50 % reads, 50 % updates
    YcsbA,
    /// 95 % reads, 5 % updates
    YcsbB,
    /// Reads only
    YcsbC,
    /// 95 % reads of the latest, 5 % inserts
    YcsbD,
    /// 95 % short scans, 5 % inserts
    YcsbE,
    /// 50 % reads, 50 % read-modify-writes
    YcsbF,
}

/// `vasto bench`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    vasto bench users --workload put --clients 16 --seconds 10\n  \
    vasto bench users --workload get --clients 256 --requests 1000000 --output json\n  \
    vasto bench --embedded /tmp/rocksdb --workload put --ack fsync\n\n\
    Its keys are bench:0000000000 and so on. They are deleted at the end, unless --keep is given.")]
pub(crate) struct Bench {
    /// The keyspace
    #[arg(required_unless_present = "embedded", conflicts_with = "embedded")]
    pub keyspace: Option<String>,
    /// What to do
    #[arg(long, value_enum)]
    pub workload: Workload,
    /// How many do it at the same time
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub clients: u32,
    /// Stop after this many operations
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "seconds",
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub requests: Option<u64>,
    /// Stop after this many seconds [default: 10]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: Option<u64>,
    /// Bytes of a value, for example 100 or 4KiB
    #[arg(long, value_name = "SIZE", default_value = "100", value_parser = parse_size)]
    pub value_size: usize,
    /// How many distinct keys
    #[arg(
        long,
        value_name = "N",
        default_value_t = 100_000,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub keys: u64,
    /// Ask for more certainty than the keyspace does
    #[arg(long, value_enum)]
    pub ack: Option<Ack>,
    /// Leave the keys in the keyspace, for the next run
    #[arg(long, conflicts_with = "embedded")]
    pub keep: bool,
    /// Do the same on a RocksDB in this directory, without a cluster: the yardstick
    #[arg(long, value_name = "DIR")]
    pub embedded: Option<PathBuf>,
    #[command(flatten)]
    pub connect: Connect,
}
