//! The client's examples run unchanged.

use anyhow::{Result, ensure};
use vasto_tests::{Cluster, tool};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_examples_of_the_client_run_on_a_real_cluster() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    for (example, shows) in [
        ("quickstart", "user:1:name = Ada"),
        ("partition_scan", "orders of all users"),
        ("counter", "hits = 200\nslowest_ms = Some(40.25)\nstarted\nworking\n"),
        ("conditional_write", "worker-2: NotApplied"),
        ("batch", "checking 60, savings 40"),
        ("ttl", "session:short = None\nexpires_at = None"),
        ("event_time", "sensor:1 = 19.5"),
        ("nearest_zone", "in the zone:    Some(\"42\")"),
        ("unknown_outcome", "InvalidArgument: "),
        ("bulk_load", "loaded 20000 rows"),
        ("admin", "201 rows in the copy"),
    ] {
        let program = tool(&format!("examples/{example}"));
        let master = cluster.master();
        let ran = tokio::process::Command::new(program)
            .args([master.as_str(), "quickstart"])
            .output()
            .await?;
        let (out, err) =
            (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        ensure!(
            ran.status.success() && out.contains(shows),
            "{example}: {}\n{out}\n{err}",
            ran.status
        );
    }
    cluster.finish().await
}
