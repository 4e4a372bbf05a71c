//! Nodes: list and cordon, and the status and the check of the cluster.

use std::sync::Arc;

use tokio::time::timeout;
use vasto_core::error::VastoError;
use vasto_core::ids::NodeId;
use vasto_proto::v1;
use vasto_shipping::ClusterSettings;

use super::answer::{ANSWER_WITHIN, Answer, invalid, not_found, unknown};
use crate::cluster::{Cluster, nonce, now_us};
use crate::view::cost::cost;
use crate::view::{self, json, status};

pub(crate) fn list(cluster: &Cluster) -> String {
    let nodes = view::node::nodes(&cluster.state(), cluster.mono_us());
    json(&nodes)
}

/// Returns the status of the cluster, with the warnings about the bucket first.
pub(crate) fn status(cluster: &Cluster) -> String {
    let own = cluster.bucket.usage();
    let bucket = cluster.bucket.url();
    let mono_us = cluster.mono_us();
    let stored = cluster.stored();
    let warnings = cluster.warnings();
    // The text of a large cluster takes a while: it is made without the lock.
    let document = {
        let state = cluster.state();
        let bill = cost(&state, own, stored, &cluster.settings.prices, bucket, mono_us);
        status::cluster(&state, cluster.cluster_id(), bucket, own, bill, warnings, mono_us)
    };
    json(&document)
}

/// Returns what the status warns of, check by check.
pub(crate) fn check(cluster: &Cluster) -> String {
    let warnings = cluster.warnings();
    let document = status::check(&cluster.state(), warnings, cluster.mono_us());
    json(&document)
}

/// Cordons a node, so that it gets no new replicas, or uncordons it. Its present replicas stay.
pub(super) async fn cordon(
    cluster: &Arc<Cluster>,
    node: NodeId,
    cordoned: bool,
) -> Result<(), VastoError> {
    let before = cluster.state().settings.clone();
    let (now_us, nonce) = (now_us(), nonce());
    let change = |now: &ClusterSettings| now.with_cordon(node, cordoned, now_us, nonce);
    let what = format!("{} {node}", if cordoned { "cordoning" } else { "uncordoning" });
    let unsure = |cause: String| {
        let message = format!(
            "{what}: {cause}; it may or may not have taken effect: check with `vasto node list`"
        );
        unknown(message)
    };
    match timeout(ANSWER_WITHIN, cluster.store.change_settings(&before, change)).await {
        Ok(Ok(newest)) => {
            if cluster.learn_settings(newest) {
                tracing::info!(%node, cordoned, "a node is to get replicas or not");
            }
            Ok(())
        }
        Ok(Err(cause)) => Err(unsure(cause.to_string())),
        Err(_) => Err(unsure("the bucket did not answer in time".into())),
    }
}

/// Cordons or uncordons a node on request; returns the node.
pub(crate) async fn cordon_node(cluster: &Arc<Cluster>, request: v1::CordonNodeRequest) -> Answer {
    let node = node_of(&request.node_id)?;
    let is_known = cluster.state().node_ids().contains(&node);
    // A node that was forgotten may still be uncordoned.
    if !is_known && request.cordoned {
        return Err(not_found(format!("no node {node} is known; see `vasto node list`")));
    }
    cordon(cluster, node, request.cordoned).await?;
    Ok(json(&view::node::node(&cluster.state(), node, cluster.mono_us())))
}

pub(super) fn node_of(text: &str) -> Result<NodeId, VastoError> {
    text.parse().map_err(|_| invalid(format!("`{text}` is not a node id; see `vasto node list`")))
}
