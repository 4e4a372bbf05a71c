//! `vasto node` and `vasto cluster`.

use std::time::Duration;

use vasto_client::{
    EmptyOptions, Vasto,
    answer::{Bill, ClusterCheck, ClusterStatus, Finding, NodeStatus},
};

use super::{bytes, keyspace, plan, print, rebalance, resize, text};
use crate::{
    args::{Cluster, ClusterCommand, Node, NodeCommand},
    connect,
    output::{Failure, OutputFormat, format_duration, table},
};

/// Runs one command of `vasto node`.
///
/// # Errors
/// An error of the cluster.
pub(crate) async fn node(args: &Node, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    let (node, options, plan, no_wait) = match &args.command {
        NodeCommand::List => return list_nodes(&vasto, format).await,
        NodeCommand::Cordon(which) => return cordon(&vasto, &which.node, true, format).await,
        NodeCommand::Uncordon(which) => return cordon(&vasto, &which.node, false, format).await,
        NodeCommand::Replace(args) => {
            let options = EmptyOptions {
                to: args.with.clone(),
                replace: true,
                accept_loss: args.accept_loss,
                max_rate: args.start.max_rate,
            };
            (&args.node, options, args.plan, args.start.no_wait)
        }
        NodeCommand::Drain(args) => {
            let options = EmptyOptions { max_rate: args.start.max_rate, ..EmptyOptions::default() };
            (&args.node, options, args.plan, args.start.no_wait)
        }
    };
    if plan {
        let planned = vasto.plan_emptying_node_with(node, options).await;
        return print(&planned.map_err(connect::failure)?, format, plan::text_of);
    }
    let started = vasto.start_emptying_node_with(node, options).await.map_err(connect::failure)?;
    resize::wait(&vasto, started, no_wait, format).await
}

async fn cordon(
    vasto: &Vasto,
    node: &str,
    cordoned: bool,
    format: OutputFormat,
) -> anyhow::Result<()> {
    let now = vasto.cordon_node(node, cordoned).await.map_err(connect::failure)?;
    print(&now, format, |node| listing(std::slice::from_ref(node)))
}

async fn list_nodes(vasto: &Vasto, format: OutputFormat) -> anyhow::Result<()> {
    print(&vasto.list_nodes().await.map_err(connect::failure)?, format, |nodes| listing(nodes))
}

/// Runs one command of `vasto cluster`.
///
/// # Errors
/// An error of the cluster.
pub(crate) async fn cluster(args: &Cluster, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    match &args.command {
        ClusterCommand::Status => {
            let status = vasto.cluster_status().await.map_err(connect::failure)?;
            print(&status, format, overview)
        }
        ClusterCommand::Check => check(&vasto, format).await,
        ClusterCommand::Rebalance(which) => rebalance::run(&vasto, which, format).await,
    }
}

async fn check(vasto: &Vasto, format: OutputFormat) -> anyhow::Result<()> {
    let checked = vasto.check_cluster().await.map_err(connect::failure)?;
    print(&checked, format, findings)?;
    if checked.ok {
        return Ok(());
    }
    let bad = checked.findings.iter().filter(|finding| !finding.ok).count();
    let failure = Failure::new(format!("{bad} findings need attention"));
    Err(failure.hint("each of them says what to do").into())
}

fn findings(checked: &ClusterCheck) -> String {
    let line = |finding: &Finding| {
        let state = if finding.ok { "ok" } else { "NOT OK" };
        format!("{:<12} {state:<7} {}\n", finding.check, finding.message)
    };
    checked.findings.iter().map(line).collect()
}

fn listing(nodes: &[NodeStatus]) -> String {
    let rows = nodes.iter().map(|node| {
        vec![
            node.node_id.clone(),
            text(node.address.as_ref()),
            text(node.zone.as_ref()),
            if node.cordoned { format!("{}, cordoned", node.state) } else { node.state.clone() },
            node.replicas.to_string(),
            bytes(node.disk_used),
            bytes(node.disk_free),
        ]
    });
    table(&["NODE", "ADDRESS", "ZONE", "STATE", ">REPLICAS", ">DISK USED", ">DISK FREE"], rows)
}

fn overview(status: &ClusterStatus) -> String {
    let mut out = format!("cluster {}", status.cluster_id);
    if let Some(bucket) = status.master.as_ref().and_then(|master| master.bucket.as_ref()) {
        out += &format!(", bucket {bucket}");
    }
    out += &format!("\n\n{}\n{}", listing(&status.nodes), keyspace::listing(&status.keyspaces));
    out += &status.bill.as_ref().map(estimated).unwrap_or_default();
    if status.warnings.is_empty() {
        return out + "\nno warnings\n";
    }
    out += "\n";
    status.warnings.iter().for_each(|warning| out += &format!("warning: {warning}\n"));
    out
}

/// Formats the estimated monthly cost and its note.
fn estimated(bill: &Bill) -> String {
    let amount = |part: Option<f64>| text(part.map(|amount| format!("{amount:.2}")));
    let mut out = format!(
        "\nestimated bill of the bucket, {} a month: {} (requests {}, storage {}, egress {}), measured over {}\n",
        bill.currency,
        amount(bill.per_month.total),
        amount(bill.per_month.requests),
        amount(bill.per_month.storage),
        amount(bill.per_month.egress),
        format_duration(Duration::from_secs(bill.measured_s)),
    );
    if let Some(note) = &bill.note {
        out += &format!("  {note}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, from_value, json};

    use super::*;

    fn overview_of(status: &Value) -> String {
        overview(&from_value(status.clone()).unwrap())
    }

    #[test]
    fn a_check_names_what_is_wrong_and_what_is_well() {
        let checked = json!({"ok": false, "findings": [
            {"check": "nodes", "ok": true, "message": "nothing to warn of"},
            {"check": "operations", "ok": false, "message": "operation op-1-1 has not gone on"}]});
        assert_eq!(
            findings(&from_value(checked).unwrap()),
            "nodes        ok      nothing to warn of\n\
             operations   NOT OK  operation op-1-1 has not gone on\n"
        );
    }

    #[test]
    fn a_status_shows_nodes_keyspaces_and_warnings() {
        let mut status = json!({
            "cluster_id": "c-1", "term": 0, "master": {"bucket": "file:///b"},
            "nodes": [{"node_id": "n-1", "address": "127.0.0.1:1", "zone": "a", "state": "alive", "cordoned": true, "replicas": 2,
                "disk_used": 1024, "disk_free": null}],
            "keyspaces": [{"name": "users"}], "warnings": ["n-2 is away"],
        });
        let text = overview_of(&status);
        for part in [
            "cluster c-1, bucket file:///b\n",
            "n-1   127.0.0.1:1  a     alive, cordoned         2    1.0 KiB          -\n",
            "users",
            "\nwarning: n-2 is away\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        assert!(!text.contains("bill"), "{text}");
        status["bill"] = json!({"currency": "USD", "measured_s": 7_380, "note": "not yet",
            "per_month": {"requests": 1.204, "storage": null, "egress": 0.0, "total": null}});
        let text = overview_of(&status);
        let line = "\nestimated bill of the bucket, USD a month: - (requests 1.20, storage -, egress 0.00), \
                    measured over 2 h 3 min\n  not yet\n\nwarning:";
        assert!(text.contains(line), "{text}");
        status["warnings"] = json!([]);
        assert!(overview_of(&status).ends_with("\nno warnings\n"));
    }
}
