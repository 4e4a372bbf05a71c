//! Metrics of a process's bucket requests, through the global OpenTelemetry meter.
//!
//! `vasto_bucket_requests{kind}` with the kinds of [`RequestCounts::by_kind`], `vasto_bucket_sent`
//! and `vasto_bucket_received` (the Prometheus exporter adds `_total`, and `_bytes` to the last
//! two).
//!
//! **Invariant:** several servers may share a process, each with a bucket of its own: the caller's
//! labels distinguish them, else one would hide the other. A closed bucket reports nothing.

use opentelemetry::KeyValue;

use crate::bucket::{Bucket, RequestCounts};

/// Registers the counts of this bucket, to be read at each export. Keeps only a weak handle.
pub fn observe(bucket: &Bucket, labels: &[KeyValue]) {
    let meter = opentelemetry::global::meter("vasto-shipping");
    let (counts, labels_of) = (bucket.counts_while_open(), labels.to_vec());
    meter
        .u64_observable_counter("vasto_bucket_requests")
        .with_description("Requests sent to the bucket, every attempt counted, by kind: put, get, head, list or delete")
        .with_callback(move |observer| {
            for (kind, requests) in counts().iter().flat_map(RequestCounts::by_kind) {
                let mut labels = labels_of.clone();
                labels.push(KeyValue::new("kind", kind));
                observer.observe(requests, &labels);
            }
        })
        .build();
    let (counts, labels_of) = (bucket.counts_while_open(), labels.to_vec());
    meter
        .u64_observable_counter("vasto_bucket_sent")
        .with_unit("By")
        .with_description("Body bytes sent to the bucket")
        .with_callback(move |observer| {
            counts().iter().for_each(|counts| observer.observe(counts.bytes_written, &labels_of));
        })
        .build();
    let (counts, labels_of) = (bucket.counts_while_open(), labels.to_vec());
    meter
        .u64_observable_counter("vasto_bucket_received")
        .with_unit("By")
        .with_description("Body bytes received from the bucket")
        .with_callback(move |observer| {
            counts().iter().for_each(|counts| observer.observe(counts.bytes_read, &labels_of));
        })
        .build();
}
