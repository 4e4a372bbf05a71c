//! Conditional writes and numeric operations through the client, on two replicas, and on one
//! replica after a failover.
//!
//! **Invariant:** of concurrent writers under one condition exactly one is applied.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::join_all;
use vasto_client::{ErrorKind, Keyspace, Outcome};
use vasto_tests::Cluster;
use vasto_tests::replicas::converged;

fn applied(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Applied { .. })
}

async fn text(keyspace: &Keyspace, key: &str) -> Result<Option<String>> {
    Ok(keyspace.get(key).await?.map(|value| String::from_utf8_lossy(&value.bytes()).into_owned()))
}

/// Checks each condition on a key that exists, and on a key that does not.
async fn conditions_hold(keyspace: &Keyspace, prefix: &str) -> Result<()> {
    let k = format!("{prefix}k");
    let k = k.as_str();
    ensure!(applied(&keyspace.put(k, "1").if_absent().await?));
    ensure!(keyspace.put(k, "2").if_absent().await? == Outcome::NotApplied);
    let first = keyspace.get(k).await?.unwrap();
    ensure!(first.bytes() == "1", "{first:?}");
    ensure!(applied(&keyspace.put(k, "3").if_version(first.version).await?));
    ensure!(keyspace.put(k, "4").if_version(first.version).await? == Outcome::NotApplied);
    ensure!(keyspace.delete(k).if_version(first.version).await? == Outcome::NotApplied);
    ensure!(text(keyspace, k).await?.as_deref() == Some("3"));
    let third = keyspace.get(k).await?.unwrap();
    ensure!(third.version != first.version);
    ensure!(applied(&keyspace.delete(k).if_version(third.version).await?));
    ensure!(text(keyspace, k).await?.is_none());
    // The version of a deleted value does not match an absent key.
    ensure!(keyspace.put(k, "5").if_version(third.version).await? == Outcome::NotApplied);
    ensure!(keyspace.delete(k).if_version(third.version).await? == Outcome::NotApplied);
    ensure!(applied(&keyspace.put(k, "6").if_absent().await?), "it was deleted");
    // An expired value's version does not match either.
    let t = format!("{prefix}ttl");
    keyspace.put(t.as_str(), "short").ttl(Duration::from_millis(50)).await?;
    tokio::time::sleep(Duration::from_millis(80)).await;
    ensure!(applied(&keyspace.put(t.as_str(), "next").if_absent().await?), "it has expired");
    Ok(())
}

/// Checks minima and maxima, whose initial value is the first operand.
async fn bounds_hold(keyspace: &Keyspace, prefix: &str) -> Result<()> {
    let (least, most) = (format!("{prefix}max"), format!("{prefix}min"));
    for (given, stands) in [(1.5, 1.5), (-2.0, 1.5), (7.25, 7.25), (7.0, 7.25)] {
        ensure!(keyspace.max_f64(least.as_str(), given).await? == stands);
        ensure!(keyspace.min_f64(most.as_str(), -given).await? == -stands);
    }
    ensure!(keyspace.get(least.as_str()).await?.unwrap().as_f64() == Some(7.25));
    ensure!(keyspace.add_f64(most.as_str(), 0.25).await? == -7.0);
    keyspace.put(most.as_str(), "text").await?;
    ensure!(keyspace.min_f64(most.as_str(), 1.0).await.unwrap_err().kind() == ErrorKind::WrongType);
    for given in [f64::NAN, f64::INFINITY] {
        ensure!(
            keyspace.max_f64(least.as_str(), given).await.unwrap_err().kind()
                == ErrorKind::OutOfRange
        );
    }
    ensure!(keyspace.get(least.as_str()).await?.unwrap().as_f64() == Some(7.25));
    Ok(())
}

/// Checks that exactly one of many concurrent writers under one condition is applied, and that its
/// value is stored.
async fn one_wins(keyspace: &Keyspace, prefix: &str) -> Result<()> {
    for round in 0..20 {
        let key = format!("{prefix}race{round}");
        let names: Vec<String> = (0..8).map(|n| format!("writer {n}")).collect();
        let racing = names
            .iter()
            .map(|name| async { keyspace.put(key.as_str(), name.as_str()).if_absent().await });
        let outcomes: Vec<Outcome> =
            join_all(racing).await.into_iter().collect::<Result<_, _>>()?;
        let winners: Vec<&String> = names
            .iter()
            .zip(&outcomes)
            .filter(|(_, outcome)| applied(outcome))
            .map(|(name, _)| name)
            .collect();
        ensure!(winners.len() == 1, "round {round}: {outcomes:?}");
        ensure!(text(keyspace, &key).await?.as_ref() == Some(winners[0]), "round {round}");
        let version = keyspace.get(key.as_str()).await?.unwrap().version;
        let racing = (0..8).map(|n| {
            let key = key.as_str();
            async move {
                match n % 2 {
                    0 => keyspace.put(key, "replaced").if_version(version).await,
                    _ => keyspace.delete(key).if_version(version).await,
                }
            }
        });
        let outcomes: Vec<Outcome> =
            join_all(racing).await.into_iter().collect::<Result<_, _>>()?;
        ensure!(
            outcomes.iter().filter(|one| applied(one)).count() == 1,
            "round {round}: {outcomes:?}"
        );
    }
    Ok(())
}

async fn all_hold(keyspace: &Keyspace, prefix: &str) -> Result<()> {
    conditions_hold(keyspace, prefix).await?;
    bounds_hold(keyspace, prefix).await?;
    one_wins(keyspace, prefix).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_and_bounds_of_numbers_hold_before_and_after_a_failover() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("conditions", 2, &["--replicas", "2"]).await?;
    let keyspace = cluster.keyspace("conditions").await?;
    all_hold(&keyspace, "both:").await?;
    converged(&cluster, "conditions").await?;
    let kept = keyspace.get("both:k").await?.unwrap();
    cluster.kill9_node(0).await?;
    // The version is the same on the replica that takes over.
    ensure!(applied(&keyspace.put("both:k", "after").if_version(kept.version).await?));
    ensure!(keyspace.put("both:k", "again").if_version(kept.version).await? == Outcome::NotApplied);
    ensure!(keyspace.put("both:k", "new").if_absent().await? == Outcome::NotApplied);
    all_hold(&keyspace, "one:").await?;
    cluster.start_node(0, vasto_tests::Port::Same).await?;
    converged(&cluster, "conditions").await?;
    ensure!(text(&keyspace, "both:k").await?.as_deref() == Some("after"));
    cluster.finish().await
}
