//! `vasto cluster rebalance`: plans it, or starts it, follows it, and prints the report.

use vasto_client::{
    OperationState, Vasto,
    answer::{PlannedMove, RebalancePlan},
};

use super::{plan::Takes, print, resize};
use crate::{
    args::ClusterRebalance,
    connect,
    output::{OutputFormat, format_bytes, format_count, table},
};

/// The most steps that a plan shows.
const STEPS_SHOWN: usize = 40;

/// Runs `vasto cluster rebalance`.
///
/// # Errors
/// An error of the cluster; a rebalance that was cancelled.
pub(crate) async fn run(
    vasto: &Vasto,
    args: &ClusterRebalance,
    format: OutputFormat,
) -> anyhow::Result<()> {
    if args.plan {
        let plan = vasto.plan_rebalance_at(args.start.max_rate).await.map_err(connect::failure)?;
        return print(&plan, format, estimate);
    }
    let started = vasto.start_rebalance_at(args.start.max_rate).await.map_err(connect::failure)?;
    if started.state == OperationState::Done {
        return print(&started, format, |_| BALANCED.to_owned());
    }
    resize::wait(vasto, started, args.start.no_wait, format).await
}

const BALANCED: &str = "the cluster is balanced; nothing moves\n";

/// Formats a plan: the replicas that move, the primaries that change, and what it takes.
fn estimate(plan: &RebalancePlan) -> String {
    if plan.balanced {
        return BALANCED.to_owned();
    }
    let mut out = format!(
        "{} replicas move, {} shards get another preferred primary; nothing was changed\n",
        format_count(plan.moves.len() as u64),
        format_count(plan.primaries.len() as u64),
    );
    out += &steps("MOVES FROM", &plan.moves);
    out += &steps("PRIMARY FROM", &plan.primaries);
    let all = format!("{} from the bucket", format_bytes(plan.bytes_from_bucket));
    out + &Takes::from(plan).text(&all)
}

/// Formats steps of a plan; `from` heads the column of the nodes that give.
fn steps(from: &str, steps: &[PlannedMove]) -> String {
    if steps.is_empty() {
        return String::new();
    }
    let rows = steps.iter().take(STEPS_SHOWN).map(|step| {
        vec![
            step.keyspace.clone(),
            step.shard.to_string(),
            step.replica_id.to_string(),
            step.from.clone(),
            step.to.clone(),
            format_bytes(step.bytes),
        ]
    });
    let heads = ["KEYSPACE", ">SHARD", ">REPLICA", from, "TO", ">BYTES"];
    let more = steps.len().saturating_sub(STEPS_SHOWN);
    let more = if more > 0 { format!("and {more} more\n") } else { String::new() };
    format!("\n{}{more}", table(&heads, rows))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn a_plan_names_what_moves_and_a_balanced_cluster_says_so() {
        let one = json!({"keyspace": "users", "shard": 3, "replica_id": 12, "from": "n-1", "to": "n-4", "bytes": 4096});
        let mut plan = json!({"kind": "rebalance", "balanced": false, "moves": [one.clone(), one.clone()],
            "primaries": [one.clone()], "bytes_moved": 8192, "bytes_from_bucket": 8192,
            "requests": {"get": 4, "put": 5}, "seconds": 6.0,
            "disk_needed": [{"node_id": "n-4", "bytes": 8192, "free": 1_048_576}],
            "cost": {"currency": "EUR", "amount": 0.02}, "refused": null});
        let text = estimate(&from_value(plan.clone()).unwrap());
        for part in [
            "2 replicas move, 1 shards get another preferred primary; nothing was changed\n",
            "KEYSPACE  SHARD  REPLICA  MOVES FROM  TO     BYTES\n",
            "users         3       12  n-1         n-4  4.0 KiB\n",
            "PRIMARY FROM",
            "n-4       8.0 KiB  1.0 MiB\n",
            "in all about 8.0 KiB from the bucket, 4 reads and 5 writes there, 6.00 s; 0.02 EUR\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        plan["moves"] = vec![one; STEPS_SHOWN + 2].into();
        assert!(estimate(&from_value(plan).unwrap()).contains("\nand 2 more\n"));
        let balanced = from_value(json!({"balanced": true})).unwrap();
        assert_eq!(estimate(&balanced), "the cluster is balanced; nothing moves\n");
    }
}
