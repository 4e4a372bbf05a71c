//! `vasto operation`: the arguments of its commands, and those of all commands that start one.
//!
//! Invariant: names and flags are a contract with scripts; they are added, never changed.

use clap::{Args, Subcommand};

use super::Connect;
use super::parse::{RateBound, parse_rate, parse_rate_bound};

/// How an operation starts; the last flags of every command that starts one.
#[derive(Debug, Args)]
pub(crate) struct Start {
    /// The most bytes a second that all nodes together read and write at the bucket for this
    #[arg(long, value_name = "BYTES", value_parser = parse_rate)]
    pub max_rate: Option<u64>,
    /// Start it and return; follow it with `vasto operation show`
    #[arg(long)]
    pub no_wait: bool,
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
        is not paused: that takes a moment. A paused rebalance, or drain of a node, begins nothing\n\
        further, and what it moves stands still.\n\n\
        Examples:\n  \
        vasto operation pause op-1-3"
    )]
    Pause(OperationId),
    /// Let a paused operation go on
    #[command(after_help = "Examples:\n  vasto operation resume op-1-3")]
    Resume(OperationId),
    /// Bound the bytes a second that an operation moves, or lift the bound
    #[command(
        after_help = "All nodes together read and write at most so many bytes at the bucket; of a rebalance, or\n\
        a drain of a node, all that it moves together.\n\n\
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
