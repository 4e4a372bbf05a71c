//! Causes for which an operation waits, as text, each with the remedy.
//!
//! **Invariant:** the text is for the operator alone: no rule depends on it.

use super::repair::copy_not_before;
use super::view::{Around, View};
use crate::catalog::{Catalog, DrainingReplica, KeyspaceState, Placed, ShardPlacement};
use crate::control::report::Reports;
use crate::limits::COPIES_PER_NODE_MAX;

/// Returns what keeps a keyspace from having all its replicas, and the remedy; `None` when nothing
/// does.
pub fn waits_for(
    catalog: &Catalog,
    reports: &Reports,
    around: &Around<'_>,
    now_us: u64,
) -> Option<String> {
    if catalog.state != KeyspaceState::Active || catalog.plan.is_some() {
        return None;
    }
    let view = View { catalog, reports, around };
    let mut of_shards = catalog.placement.iter().filter_map(|shard| {
        let leaves = shard.replicas.iter().any(|member| view.leaves(member));
        let lacks = view.staying(shard) < catalog.spec.replicas as usize;
        if !leaves && !lacks {
            return None;
        }
        if !shard.replicas.iter().any(|member| view.is_ready(member)) {
            return Some(why_none_serves(&view, shard));
        }
        if !lacks {
            let waits = shard.replicas.iter().filter(|member| !view.leaves(member) && !view.serves(member));
            let who = waits.map(|member| format!("replica {} on {}", member.replica, member.node)).collect::<Vec<_>>();
            let stays = shard.replicas.iter().any(|member| !view.leaves(member) && view.serves(member));
            return Some(match stays {
                true => format!("shard {} of {} to be handed over", shard.shard, catalog.name),
                false => format!(
                    "{} to serve shard {} of {}: start its node, or undo with `vasto operation cancel`",
                    who.join(" or "),
                    shard.shard,
                    catalog.name
                ),
            });
        }
        let again_us = copy_not_before(catalog, shard.shard);
        if now_us < again_us {
            let seconds = (again_us - now_us).div_ceil(1_000_000);
            return Some(format!(
                "{seconds} s to pass until shard {} of {} is copied again; `vasto operation list` says why the last copy failed",
                shard.shard, catalog.name
            ));
        }
        Some(format!(
            "a node that can take a copy of shard {} of {}: live, without one of it, not cordoned, with room for a \
             replica and its files, and fewer than {COPIES_PER_NODE_MAX} copies under way; start one with `vasto \
             serve node`",
            shard.shard, catalog.name
        ))
    });
    of_shards.next().or_else(|| {
        let waits = |draining: &&DrainingReplica| {
            view.drain_of(draining.node).is_some_and(|drain| drain.accept_loss)
        };
        catalog.draining.iter().find(waits).map(|draining| match around.is_here(draining.node) {
            true => format!("replica {} on {} to be drained", draining.replica, draining.node),
            false => format!(
                "what replica {} had shipped to be taken over from the bucket",
                draining.replica
            ),
        })
    })
}

/// Returns why no replica of a shard serves, and what brings one back.
fn why_none_serves(view: &View<'_>, shard: &ShardPlacement) -> String {
    let mut ways: Vec<String> = Vec::new();
    let state_of = |member: &Placed| {
        let replaced = view.drain_of(member.node).is_some_and(|drain| drain.replace);
        let (state, remedy) =
            match (view.around.is_here(member.node), view.has_failed(member.replica)) {
                (true, true) => {
                    ("has failed", Some(format!("put the files of {} back", member.node)))
                }
                (true, false) => ("does not serve yet", None),
                (false, _) => ("is away", Some(format!("start {}", member.node))),
            };
        if let Some(remedy) = remedy.filter(|_| !replaced) {
            ways.push(format!("{remedy} or give it up with `vasto node replace {}`", member.node));
        }
        format!(
            "replica {} on {} {state}{}",
            member.replica,
            member.node,
            if replaced { " and is replaced" } else { "" }
        )
    };
    let states: Vec<String> = shard.replicas.iter().map(state_of).collect();
    let ways = match ways.is_empty() {
        // All replicas are given up: only a node that could take over is missing.
        true if shard.replicas.iter().all(|member| view.is_given_up(member)) => {
            "it is taken over from the bucket as soon as a live node has room: start one with `vasto serve node`"
                .to_owned()
        }
        true => "it is waited for".to_owned(),
        false => ways.join("; "),
    };
    format!(
        "a replica of shard {} of {} that serves: {}; {ways}",
        shard.shard,
        view.catalog.name,
        states.join(", ")
    )
}
