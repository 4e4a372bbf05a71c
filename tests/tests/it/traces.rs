//! One trace for each operation: what a collector gets from the processes of a real cluster.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use serde_json::Value;
use vasto_core::operation::OperationReport;
use vasto_core::plan::Step;
use vasto_testkit::otlp::{CollectedSpan, Collector};
use vasto_tests::{
    Cluster, ClusterBuilder, DEADLINE, Numbers, Port, Resizing, put_each, records, resized, until,
};

/// Interval at which processes export their spans, milliseconds.
const EXPORTED_EVERY_MS: u64 = 200;
const VALUE: usize = 4 << 10;
/// The most spans of one of these operations: there is none for each object, row or request.
const SPANS_MAX: usize = 200;

fn traced(collector: &Collector, nodes: usize) -> ClusterBuilder {
    Cluster::builder()
        .nodes(nodes)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint())
        .env("OTEL_BSP_SCHEDULE_DELAY", &EXPORTED_EVERY_MS.to_string())
}

/// Writes values that no compression makes smaller.
async fn load(cluster: &Cluster, name: &str, count: u64) -> Result<()> {
    let value = |n: u64| {
        let mut numbers = Numbers::new(n);
        (0..VALUE / 8).flat_map(|_| numbers.draw().to_le_bytes()).collect::<Bytes>()
    };
    put_each(&cluster.keyspace(name).await?, "bulk", count, value).await
}

/// Waits until the targets have taken some of their bytes, and not all.
async fn midway(cluster: &Cluster, id: &str) -> Result<Value> {
    until("bytes to move", DEADLINE, async || {
        let shown = cluster.json(&["operation", "show", id]).await.ok()?;
        let (done, total) = (shown["bytes_done"].as_u64()?, shown["bytes_total"].as_u64()?);
        (shown["step"] == "tail" && done > 0 && done < total).then_some(shown)
    })
    .await
}

/// The trace of one operation.
#[derive(Debug)]
struct Trace {
    root: CollectedSpan,
    rest: Vec<CollectedSpan>,
}

impl Trace {
    /// Takes the trace of an operation out of all spans: one root, whose children all others are.
    fn of(spans: &[CollectedSpan], id: &str) -> Result<Self> {
        let of_it = spans.iter().filter(|span| span.text("vasto.operation") == id);
        let (roots, rest): (Vec<_>, Vec<_>) =
            of_it.cloned().partition(|span| span.parent_id.is_empty());
        ensure!(roots.len() == 1, "{id} has the roots {roots:?}");
        let root = roots[0].clone();
        ensure!(rest.len() < SPANS_MAX, "{id} has {} spans", rest.len());
        for span in &rest {
            ensure!(span.trace_id == root.trace_id, "another trace: {span:?}");
            ensure!(span.parent_id == root.span_id, "the root is {}: {span:?}", root.span_id);
            ensure!(span.end_ns >= span.start_ns, "{span:?}");
        }
        Ok(Self { root, rest })
    }

    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a CollectedSpan> {
        self.rest.iter().filter(move |span| span.name == name)
    }

    /// Returns the shards at which something was done to its end.
    fn shards_of(&self, name: &str) -> BTreeSet<u64> {
        let done = self.named(name).filter(|span| span.error.is_none());
        done.map(|span| span.count("vasto.shard")).collect()
    }

    fn sum(&self, key: &str) -> u64 {
        self.rest.iter().map(|span| span.count(key)).sum()
    }

    /// Checks that the steps follow one another from the start of the operation to its end; returns
    /// their names.
    fn steps(&self) -> Result<Vec<&str>> {
        let mut steps: Vec<&CollectedSpan> =
            self.rest.iter().filter(|span| span.name.starts_with("step ")).collect();
        steps.sort_by_key(|span| (span.start_ns, span.end_ns));
        let mut at = self.root.start_ns;
        for step in &steps {
            ensure!(step.start_ns == at, "a step is missing before {step:?}: {steps:?}");
            ensure!(!step.has("vasto.node"), "it is of the master: {step:?}");
            at = step.end_ns;
        }
        ensure!(at == self.root.end_ns, "the last step is missing: {:?}, {steps:?}", self.root);
        Ok(steps.iter().map(|span| span.name.as_str()).collect())
    }

    /// Checks the trace of a resize that nobody disturbed against its report.
    fn check_resize(&self, report: &OperationReport, nodes: &BTreeSet<String>) -> Result<()> {
        let (from, to) = (u64::from(report.from), u64::from(report.to));
        ensure!(self.root.error.is_none(), "{:?}", self.root);
        for (key, want) in [
            ("vasto.bytes_from_bucket", report.bytes_from_bucket),
            ("vasto.bytes_from_peers", report.bytes_from_peers),
            ("vasto.requests", report.objects_read),
        ] {
            let (told, sum) = (self.root.count(key), self.sum(key));
            ensure!(told == want && sum == want, "{key}: {told}, {sum} of {want}: {self:?}");
        }
        let rewritten = self.named("target rewrite").map(|span| span.count("vasto.bytes_moved"));
        ensure!(rewritten.sum::<u64>() == report.bytes_moved && report.bytes_moved > 0, "{self:?}");
        let mut steps = self.steps()?;
        steps.dedup();
        let all = ["step prepare", "step tail", "step sealing", "step committed"];
        ensure!(all.iter().all(|step| steps.contains(step)), "{steps:?}");

        let exports = to > from + 1;
        let sources: BTreeSet<u64> = (0..from).collect();
        let targets: BTreeSet<u64> = (from..to).collect();
        for name in ["source checkpoint", "source seal", "source pause"] {
            ensure!(self.shards_of(name) == sources, "{name}: {self:?}");
        }
        let exported = if exports { sources } else { BTreeSet::new() };
        ensure!(self.shards_of("source export") == exported, "{self:?}");
        for name in ["target rewrite", "target ingest", "target checkpoint", "target open"] {
            ensure!(self.shards_of(name) == targets, "{name}: {self:?}");
        }
        for name in ["bucket get", "target catch up", "target tail"] {
            ensure!(self.shards_of(name).is_superset(&targets), "{name}: {self:?}");
        }
        let mut checkpoints =
            self.named("source checkpoint").chain(self.named("target checkpoint"));
        ensure!(checkpoints.all(|span| span.has("vasto.bytes_to_bucket")), "{self:?}");
        let of_nodes = self.rest.iter().filter(|span| span.has("vasto.node"));
        let at: BTreeSet<String> =
            of_nodes.map(|span| span.text("vasto.node").to_owned()).collect();
        ensure!(at == *nodes, "{at:?} took part: {self:?}");
        self.check_calls(exports)
    }

    /// Checks that calls of the bucket have bytes, and those of catalog versions are the master's.
    fn check_calls(&self, exports: bool) -> Result<()> {
        let versions: Vec<&CollectedSpan> = self
            .named("bucket put")
            .filter(|span| span.text("vasto.what") == "catalog version")
            .collect();
        ensure!(versions.len() >= 5, "{versions:?}");
        for put in self.named("bucket put") {
            ensure!(put.count("vasto.bytes_to_bucket") > 0, "{put:?}");
        }
        ensure!(versions.iter().all(|put| !put.has("vasto.node")), "{versions:?}");
        let tables = self.named("bucket put").filter(|put| put.text("vasto.what") == "tables");
        let moved = self.named("source export").map(|span| span.count("vasto.bytes_moved"));
        let (uploaded, moved): (u64, u64) =
            (tables.map(|put| put.count("vasto.bytes_to_bucket")).sum(), moved.sum());
        ensure!(uploaded == moved && exports == (moved > 0), "{uploaded} of {moved}: {self:?}");
        Ok(())
    }
}

/// Starts an operation and waits until it is done; returns its id.
async fn done(cluster: &Cluster, args: &[&str]) -> Result<String> {
    let started = cluster.json(&[args, &["--no-wait"]].concat()).await?;
    let id = started["id"].as_str().with_context(|| format!("no id: {started}"))?.to_owned();
    until(&format!("{id} to be done"), DEADLINE * 2, async || {
        let shown = cluster.json(&["operation", "show", &id]).await.ok()?;
        (shown["state"] == "done").then_some(())
    })
    .await?;
    Ok(id)
}

fn nodes_of(cluster: &Cluster) -> BTreeSet<String> {
    (0..cluster.nodes()).filter_map(|node| cluster.node_id(node)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grow_is_one_trace_of_master_sources_targets_and_bucket_whose_bytes_add_up() -> Result<()>
{
    let collector = Collector::start().await?;
    // Spans do not depend on what is logged.
    let cluster =
        traced(&collector, 2).env("VASTO_LOG__FILTER", "warn,vasto_master=info").start().await?;
    cluster.create("traced", 2, &["--quarantine", "1s"]).await?;
    put_each(&cluster.keyspace("traced").await?, "r", 20_000, records::value).await?;
    let mut reports: Vec<OperationReport> = Vec::new();
    for to in [3, 5] {
        let report = cluster.resize("traced", to).await?;
        println!("{}", resized(&report));
        reports.push(serde_json::from_value(report)?);
    }
    let nodes = nodes_of(&cluster);
    let log = std::fs::read_to_string(cluster.dir().join("logs/master.1.log"))?;
    // Stopping exports what is left.
    cluster.finish().await?;
    let spans = collector.spans();
    for report in &reports {
        let trace = Trace::of(&spans, &report.id)?;
        ensure!(trace.root.name == "operation grow", "{:?}", trace.root);
        trace.check_resize(report, &nodes)?;
        ensure!(log.contains(&trace.root.trace_id), "the log does not name {}", report.id);
    }
    Ok(())
}

/// A grow that is cancelled has failed with the reason. The next one outlives its master, and is one
/// trace all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_grow_ends_its_trace_and_a_new_master_goes_on_with_one() -> Result<()> {
    let collector = Collector::start().await?;
    let mut cluster = traced(&collector, 2).allow_warnings().start().await?;
    cluster.create("ks", 2, &["--quarantine", "1s"]).await?;
    load(&cluster, "ks", 4_000).await?;
    let slow = ["--max-rate", "512KiB"];
    let cancelled = Resizing::start_with(&cluster, "ks", 3, &slow).await?;
    midway(&cluster, &cancelled.id).await?;
    ensure!(cancelled.cancelled(&cluster).await?, "it has committed");

    let goes_on = Resizing::start_with(&cluster, "ks", 3, &slow).await?;
    midway(&cluster, &goes_on.id).await?;
    // What has ended is exported by then.
    tokio::time::sleep(Duration::from_millis(10 * EXPORTED_EVERY_MS)).await;
    ensure!(goes_on.step()? == Some(Step::Tail), "it is not midway any more");
    cluster.kill9_master().await?;
    cluster.start_master(Port::Same).await?;
    until("the nodes to report to the new master", DEADLINE, async || {
        cluster.json(&["operation", "rate", &goes_on.id, "none"]).await.ok()
    })
    .await?;
    let report = goes_on.done().await?;
    println!("{}", resized(&serde_json::to_value(&report)?));
    cluster.finish().await?;

    let spans = collector.spans();
    let trace = Trace::of(&spans, &cancelled.id)?;
    let reason = trace.root.error.as_deref().context("the root has not failed")?;
    ensure!(reason == "cancelled by an administrator", "{reason}");
    ensure!(trace.steps()? == ["step prepare", "step tail"], "{trace:?}");
    ensure!(trace.shards_of("source checkpoint").len() == 2, "{trace:?}");
    let files = trace.named("bucket get").filter(|span| span.text("vasto.what") == "files");
    let failed: Vec<&CollectedSpan> = files.filter(|span| span.error.is_some()).collect();
    ensure!(!failed.is_empty(), "a download was cut off: {trace:?}");
    ensure!(trace.shards_of("target ingest").is_empty(), "{trace:?}");

    let next = Trace::of(&spans, &goes_on.id)?;
    ensure!(next.root.trace_id != trace.root.trace_id, "{:?}", next.root);
    ensure!(next.root.error.is_none(), "{:?}", next.root);
    let mut steps = next.steps()?;
    steps.dedup();
    ensure!(steps.starts_with(&["step prepare", "step tail", "step sealing"]), "{steps:?}");
    ensure!(steps.last() == Some(&"step committed"), "{steps:?}");
    ensure!(next.sum("vasto.bytes_from_bucket") == report.bytes_from_bucket, "{next:?}");
    Ok(())
}

/// A drain has a trace of its own, which the traces of the copies that it makes are linked to; so
/// has a restore.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drains_copies_and_restores_have_traces() -> Result<()> {
    let collector = Collector::start().await?;
    let cluster = traced(&collector, 3).allow_warnings().start().await?;
    cluster.create("ks", 2, &["--replicas", "1"]).await?;
    put_each(&cluster.keyspace("ks").await?, "r", 5_000, records::value).await?;
    let first = cluster.catalog("ks").await?.tip()?.placement[0].replicas[0];
    let drain = done(&cluster, &["node", "drain", &first.node.to_string()]).await?;
    done(&cluster, &["keyspace", "restore", "ks", "--into", "made"]).await?;
    let copies = cluster.catalog("ks").await?.tip()?.operations;
    let made = cluster.catalog("made").await?.tip()?.operations;
    cluster.finish().await?;

    let spans = collector.spans();
    let whole = Trace::of(&spans, &drain)?;
    ensure!(whole.root.name == "operation replace" && whole.root.error.is_none(), "{whole:?}");
    ensure!(whole.root.count("vasto.copies") > 0, "{whole:?}");
    ensure!(whole.named("drain of a keyspace").count() == 1, "{whole:?}");
    let copies: Vec<&OperationReport> = copies.iter().filter(|report| report.is_copy()).collect();
    ensure!(!copies.is_empty());
    for (report, name) in copies
        .into_iter()
        .map(|copy| (copy, "operation replica"))
        .chain(made.iter().map(|restore| (restore, "operation restore")))
    {
        let trace = Trace::of(&spans, &report.id)?;
        ensure!(trace.root.name == name && trace.root.error.is_none(), "{:?}", trace.root);
        let is_copy = report.is_copy();
        ensure!(trace.root.links.contains(&whole.root.trace_id) == is_copy, "{:?}", trace.root);
        trace.steps()?;
        let parts = ["bucket get", "target log", "target adopt", "target catch up"];
        // A keyspace that was never checkpointed is restored from its log alone.
        for part in &parts[..if is_copy { 4 } else { 2 }] {
            ensure!(trace.named(part).any(|span| span.error.is_none()), "{part}: {trace:?}");
        }
        ensure!(trace.sum("vasto.bytes_from_bucket") == report.bytes_from_bucket, "{trace:?}");
        ensure!(report.bytes_from_bucket > 0, "{report:?}");
    }
    ensure!(made.len() == 1, "{made:?}");
    Ok(())
}
