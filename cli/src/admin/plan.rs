//! What a structural change would move and take, as `--plan` prints it.

use std::time::Duration;

use vasto_client::answer::{ChangeCost, ChangePlan, ChangeRequests, NodeDisk, RebalancePlan};

use super::text;
use crate::output::{format_bytes, format_count, format_duration, table};

/// Formats a plan: what moves, the disk that is needed meanwhile, and what it costs.
pub(super) fn text_of(plan: &ChangePlan) -> String {
    let rows = plan.sources.iter().map(|source| {
        vec![
            text(Some(&source.keyspace).filter(|name| !name.is_empty())),
            source.shard.to_string(),
            text(source.node_id.as_ref()),
            format_count(source.keys),
            format_bytes(source.bytes),
            format_bytes(source.bytes_to_read),
        ]
    });
    let headings = ["KEYSPACE", ">SHARD", "NODE", ">KEYS", ">BYTES", ">BYTES TO MOVE"];
    let out = format!("{}; nothing was changed\n\n{}", heading(plan), table(&headings, rows));
    let (moved, read) = (format_bytes(plan.bytes_moved), format_bytes(plan.bytes_from_bucket));
    out + &Takes::from(plan).text(&format!("{moved} to the targets, {read} from the bucket"))
}

/// What any change takes.
pub(super) struct Takes<'a> {
    disk: &'a [NodeDisk],
    requests: ChangeRequests,
    seconds: f64,
    cost: &'a ChangeCost,
    refused: Option<&'a str>,
}

macro_rules! takes_of {
    ($($plan:ty),*) => {$(
        impl<'a> From<&'a $plan> for Takes<'a> {
            fn from(plan: &'a $plan) -> Self {
                Self {
                    disk: &plan.disk_needed,
                    requests: plan.requests,
                    seconds: plan.seconds,
                    cost: &plan.cost,
                    refused: plan.refused.as_deref(),
                }
            }
        }
    )*};
}

takes_of!(ChangePlan, RebalancePlan);

impl Takes<'_> {
    /// Formats the disk that is needed meanwhile, the sum, whose bytes are `all`, and why the change
    /// would be refused, if it would.
    pub(super) fn text(&self, all: &str) -> String {
        let mut out = String::new();
        if !self.disk.is_empty() {
            let rows = self.disk.iter().map(|disk| {
                let free = text(disk.free.map(format_bytes));
                vec![disk.node_id.clone(), format_bytes(disk.bytes), free]
            });
            out += &format!("\n{}", table(&["NODE", ">DISK NEEDED", ">FREE"], rows));
        }
        out += &format!(
            "\nin all about {all}, {} reads and {} writes there, {}; {} {}\n",
            format_count(self.requests.get),
            format_count(self.requests.put),
            text(Duration::try_from_secs_f64(self.seconds).ok().map(format_duration)),
            amount(self.cost.amount),
            self.cost.currency,
        );
        if let Some(reason) = self.refused {
            out += &format!("it would be refused: {reason}\n");
        }
        out
    }
}

fn heading(plan: &ChangePlan) -> String {
    let (from, to) = (text(plan.from.as_ref()), text(plan.to.as_ref()));
    match plan.kind.as_str() {
        "restore" => format!("{} is restored with {to} shards", plan.keyspace),
        "replace" if plan.to.is_some() => format!("the replicas of {from} move to {to}"),
        "replace" => format!("the replicas of {from} move to whoever has room"),
        _ => format!(
            "{} from {from} to {to} shards: {:.1} % of the keys move",
            plan.keyspace,
            plan.moving_fraction * 100.0
        ),
    }
}

/// Formats an amount of money, which may be far below a cent.
fn amount(amount: f64) -> String {
    if amount == 0.0 || amount >= 0.01 { format!("{amount:.2}") } else { format!("{amount:.6}") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, from_value, json};

    use super::*;

    #[test]
    fn a_plan_names_what_each_source_gives() {
        let plan = json!({"keyspace": "users", "kind": "grow", "from": 2, "to": 3, "moving_fraction": 0.3333,
            "sources": [{"keyspace": "users", "shard": 0, "node_id": "n-1", "keys": 1000, "bytes": 4096, "bytes_to_read": 1366},
                        {"keyspace": "users", "shard": 1, "node_id": "n-2", "keys": 1000, "bytes": 4096, "bytes_to_read": 1366}],
            "bytes_moved": 2732, "bytes_from_bucket": 2732, "requests": {"get": 4, "put": 3}, "seconds": 2.0,
            "disk_needed": [{"node_id": "n-3", "bytes": 5464, "free": 1_048_576}, {"node_id": "n-4", "bytes": 1}],
            "cost": {"currency": "EUR", "amount": 0.000_017}, "refused": "n-3 needs more disk"});
        let text = text_of(&from_value(plan.clone()).unwrap());
        for part in [
            "users from 2 to 3 shards: 33.3 % of the keys move; nothing was changed\n",
            "KEYSPACE  SHARD  NODE   KEYS    BYTES  BYTES TO MOVE\n",
            "users         1  n-2   1,000  4.0 KiB        1.3 KiB\n",
            "NODE  DISK NEEDED     FREE\n",
            "n-3       5.3 KiB  1.0 MiB\n",
            "n-4           1 B        -\n",
            "in all about 2.7 KiB to the targets, 2.7 KiB from the bucket, 4 reads and 3 writes there, 2.00 s; \
             0.000017 EUR\n",
            "it would be refused: n-3 needs more disk\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let mut begins = plan;
        begins["refused"] = Value::Null;
        assert!(!text_of(&from_value(begins).unwrap()).contains("refused"));
        assert_eq!([0.0, 0.01, 12.5].map(amount), ["0.00", "0.01", "12.50"]);
    }

    #[test]
    fn a_plan_says_what_kind_of_change_it_is() {
        let of = |document: Value| heading(&from_value(document).unwrap());
        let restore = json!({"keyspace": "copy", "kind": "restore", "from": 4, "to": 4});
        assert_eq!(of(restore), "copy is restored with 4 shards");
        let drain = json!({"kind": "replace", "from": "n-1", "to": null});
        assert_eq!(of(drain), "the replicas of n-1 move to whoever has room");
        let replace = json!({"kind": "replace", "from": "n-1", "to": "n-2"});
        assert_eq!(of(replace), "the replicas of n-1 move to n-2");
        let lost = json!({"kind": "replace", "from": "n-1",
            "sources": [{"keyspace": "users", "shard": 0, "node_id": null, "bytes_to_read": 7}]});
        assert!(text_of(&from_value(lost).unwrap()).contains("users         0  -"));
    }
}
