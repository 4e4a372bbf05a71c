//! Takes a lock with `if_absent`, and changes a document with `if_version` until no other writer
//! interferes. Needs the keyspace of the example `quickstart`.
//!
//! `cargo run -p vasto-client --example conditional_write -- http://127.0.0.1:8278`

use std::time::Duration;

use vasto_client::{Keyspace, Outcome, Vasto};

/// Adds a line to a document; reads and tries again while others change it.
async fn add_line(ks: &Keyspace, key: &str, line: &str) -> Result<u32, vasto_client::Error> {
    let mut attempts = 1;
    loop {
        let outcome = match ks.get(key).await? {
            Some(value) => {
                ks.put(key, format!("{value}{line}\n")).if_version(value.version).await?
            }
            None => ks.put(key, format!("{line}\n")).if_absent().await?,
        };
        match outcome {
            Outcome::NotApplied => attempts += 1,
            Outcome::Applied { .. } | Outcome::Superseded => return Ok(attempts),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let ks = Vasto::connect(&url).await?.keyspace("quickstart").await?;

    // A lock that ends by itself if its holder dies.
    ks.delete("lock").await?;
    let first = ks.put("lock", "worker-1").if_absent().ttl(Duration::from_secs(30)).await?;
    let second = ks.put("lock", "worker-2").if_absent().ttl(Duration::from_secs(30)).await?;
    println!("worker-1: {first:?}");
    println!("worker-2: {second:?}");
    let held = ks.get("lock").await?.expect("worker-1 holds it");
    println!("release by its holder: {:?}", ks.delete("lock").if_version(held.version).await?);

    ks.delete("document").await?;
    let writers = (0..4).map(|writer| {
        let ks = ks.clone();
        tokio::spawn(
            async move { add_line(&ks, "document", &format!("line of writer {writer}")).await },
        )
    });
    let mut attempts = 0;
    for writer in writers.collect::<Vec<_>>() {
        attempts += writer.await.expect("the task does not panic")?;
    }
    let document = ks.get("document").await?.map(|value| value.to_string()).unwrap_or_default();
    println!("{} lines after {attempts} attempts", document.lines().count());
    Ok(())
}
