//! The ids of an operation's trace.
//!
//! **Invariant:** they never change: processes of several releases take part in one operation.

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

/// Tells the hash that is the root span's id from other hashes of the same text.
const ROOT_SEED: u64 = 1;

/// Returns the context of an operation's root span. It counts as sampled: whether the spans of a
/// trace are exported is decided by its id, or for all traces, and so is the same in all processes.
pub(crate) fn root_of(cluster: &str, operation: &str) -> SpanContext {
    // Neither name holds a zero byte: no two pairs are one text.
    let text = format!("{cluster}\0{operation}");
    // Zero means that there is no id.
    let trace = TraceId::from(xxh3_128(text.as_bytes()).max(1));
    let root = SpanId::from(xxh3_64_with_seed(text.as_bytes(), ROOT_SEED).max(1));
    SpanContext::new(trace, root, TraceFlags::SAMPLED, true, TraceState::NONE)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_release_derives_the_same_ids() {
        for (operation, trace, root) in [
            ("op-7-3", "070d29c6134a616d95e0d7db3d0b789c", "0c206438e99ad99e"),
            ("op-7-4", "dcea455a76d8087c2ca52a44575e77e9", "4695b9807070615d"),
        ] {
            let context = root_of("c-0000000000000001", operation);
            assert_eq!(context.trace_id().to_string(), trace);
            assert_eq!(context.span_id().to_string(), root);
            assert!(context.is_valid() && context.is_sampled() && context.is_remote());
        }
    }

    #[test]
    fn operations_and_clusters_have_traces_of_their_own() {
        let mut seen = HashSet::new();
        for cluster in ["", "c-1", "c-2", "c-1\u{1}"] {
            for keyspace in 1..50 {
                for plan in 1..50 {
                    let root = root_of(cluster, &format!("op-{keyspace}-{plan}"));
                    assert!(seen.insert(root.trace_id()), "{cluster} {keyspace} {plan}");
                    assert!(seen.insert(TraceId::from(u128::from_be_bytes(widened(&root)))));
                }
            }
        }
    }

    /// Returns the id of the root span as one that no trace has.
    fn widened(root: &SpanContext) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[8..].copy_from_slice(&root.span_id().to_bytes());
        bytes
    }
}
