//! `vasto node`, `vasto cluster` and `vasto bucket`: the arguments of their commands.
//!
//! Invariant: names and flags are a contract with scripts; they are added, never changed.

use clap::{Args, Subcommand};

use super::Connect;
use super::operation::Start;

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
    #[command(after_help = "Examples:\n  \
        vasto node drain n-1f2e3d4c5b6a7988 --plan\n  \
        vasto node drain n-1f2e3d4c5b6a7988 --max-rate 20MiB")]
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
    #[command(flatten)]
    pub start: Start,
}

/// `vasto node drain`
#[derive(Debug, Args)]
pub(crate) struct NodeDrain {
    /// The node, as `vasto node list` names it
    pub node: String,
    /// Only tell what would move, what it takes, and whether it would be refused
    #[arg(long, conflicts_with = "no_wait")]
    pub plan: bool,
    #[command(flatten)]
    pub start: Start,
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
        vasto cluster rebalance --max-rate 20MiB\n  \
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
    #[command(flatten)]
    pub start: Start,
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
