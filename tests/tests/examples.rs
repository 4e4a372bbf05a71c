//! The client's examples run as they stand.
#![allow(clippy::unwrap_used)]

use anyhow::{Result, ensure};
use vasto_tests::{Cluster, tool};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_examples_of_the_client_run_on_a_real_cluster() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    for (example, shows) in [("quickstart", "user:1:name = Ada"), ("partition_scan", "orders of all users")] {
        let program = tool(&format!("examples/{example}"));
        let ran =
            tokio::process::Command::new(program).args([cluster.master().as_str(), "quickstart"]).output().await?;
        let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        ensure!(ran.status.success() && out.contains(shows), "{example}: {}\n{out}\n{err}", ran.status);
    }
    cluster.finish().await
}
