//! `vasto node` and `vasto cluster`.

use std::time::Duration;

use serde_json::Value;
use vasto_client::Vasto;

use super::{bytes, keyspace, list, resize, text};
use crate::{
    args::{Cluster, ClusterCommand, Node, NodeCommand},
    connect,
    output::{self, OutputFormat, format_duration, table},
};

/// Runs one command of `vasto node`.
///
/// # Errors
/// An error of the cluster.
pub async fn node(args: &Node, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    let (started, no_wait) = match &args.command {
        NodeCommand::List => return list_nodes(&vasto, format).await,
        NodeCommand::Cordon(one) => return cordon(&vasto, &one.node, true, format).await,
        NodeCommand::Uncordon(one) => return cordon(&vasto, &one.node, false, format).await,
        NodeCommand::Replace(replace) if replace.accept_loss => {
            (vasto.start_giving_up_node(&replace.node, replace.with.as_deref()).await, replace.no_wait)
        }
        NodeCommand::Replace(replace) => {
            (vasto.start_emptying_node(&replace.node, replace.with.as_deref(), true).await, replace.no_wait)
        }
        NodeCommand::Drain(drain) => (vasto.start_emptying_node(&drain.node, None, false).await, drain.no_wait),
    };
    resize::wait(&vasto, connect::operation(started)?, no_wait, format).await
}

async fn cordon(vasto: &Vasto, node: &str, cordoned: bool, format: OutputFormat) -> anyhow::Result<()> {
    let now = connect::document(vasto.cordon_node(node, cordoned).await)?;
    match format {
        OutputFormat::Json => output::print_json(&now)?,
        OutputFormat::Table => output::print(&listing(&Value::Array(vec![now])))?,
    }
    Ok(())
}

async fn list_nodes(vasto: &Vasto, format: OutputFormat) -> anyhow::Result<()> {
    let nodes = connect::document(vasto.list_nodes().await)?;
    match format {
        OutputFormat::Json => output::print_json(&nodes)?,
        OutputFormat::Table => output::print(&listing(&nodes))?,
    }
    Ok(())
}

/// Runs one command of `vasto cluster`.
///
/// # Errors
/// An error of the cluster.
pub async fn cluster(args: &Cluster, format: OutputFormat) -> anyhow::Result<()> {
    let ClusterCommand::Status = args.command;
    let status = connect::document(connect::connect(&args.connect).await?.cluster_status().await)?;
    match format {
        OutputFormat::Json => output::print_json(&status)?,
        OutputFormat::Table => output::print(&overview(&status))?,
    }
    Ok(())
}

fn listing(nodes: &Value) -> String {
    let rows = list(nodes).iter().map(|node| {
        let column = |name: &str| text(&node[name]);
        vec![
            column("node_id"),
            column("address"),
            column("zone"),
            match node["cordoned"].as_bool() {
                Some(true) => format!("{}, cordoned", column("state")),
                _ => column("state"),
            },
            column("replicas"),
            bytes(&node["disk_used"]),
            bytes(&node["disk_free"]),
        ]
    });
    table(&["NODE", "ADDRESS", "ZONE", "STATE", ">REPLICAS", ">DISK USED", ">DISK FREE"], rows)
}

fn overview(status: &Value) -> String {
    let mut out = format!("cluster {}", text(&status["cluster_id"]));
    if let Some(bucket) = status["master"]["bucket"].as_str() {
        out += &format!(", bucket {bucket}");
    }
    out += &format!("\n\n{}\n{}", listing(&status["nodes"]), keyspace::listing(&status["keyspaces"]));
    out += &bill(&status["bill"]);
    let warnings = list(&status["warnings"]);
    if warnings.is_empty() {
        return out + "\nno warnings\n";
    }
    out += "\n";
    warnings.iter().for_each(|warning| out += &format!("warning: {}\n", text(warning)));
    out
}

/// Formats the estimated monthly cost and its note; empty when the master reports no estimate.
fn bill(bill: &Value) -> String {
    if bill.is_null() {
        return String::new();
    }
    let amount = |part: &str| bill["per_month"][part].as_f64().map_or("-".to_owned(), |amount| format!("{amount:.2}"));
    let measured = Duration::from_secs(bill["measured_s"].as_u64().unwrap_or_default());
    let mut out = format!(
        "\nestimated bill of the bucket, {} a month: {} (requests {}, storage {}, egress {}), measured over {}\n",
        text(&bill["currency"]),
        amount("total"),
        amount("requests"),
        amount("storage"),
        amount("egress"),
        format_duration(measured),
    );
    if let Some(note) = bill["note"].as_str() {
        out += &format!("  {note}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_status_shows_nodes_keyspaces_and_warnings() {
        let mut status = json!({
            "cluster_id": "c-1", "term": 0, "master": {"bucket": "file:///b"},
            "nodes": [{"node_id": "n-1", "address": "127.0.0.1:1", "zone": "a", "state": "alive", "cordoned": true, "replicas": 2,
                "disk_used": 1024, "disk_free": null}],
            "keyspaces": [{"name": "users"}], "warnings": ["n-2 is away"],
        });
        let text = overview(&status);
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
        let text = overview(&status);
        let line = "\nestimated bill of the bucket, USD a month: - (requests 1.20, storage -, egress 0.00), \
                    measured over 2 h 3 min\n  not yet\n\nwarning:";
        assert!(text.contains(line), "{text}");
        status["warnings"] = json!([]);
        assert!(overview(&status).ends_with("\nno warnings\n"));
    }
}
