//! Keeps sessions that end by themselves.
//! Needs the keyspace of the example `quickstart`.
//!
//! `cargo run -p vasto-client --example ttl -- http://127.0.0.1:8278`

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vasto_client::Vasto;

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let ks = Vasto::connect(&url).await?.keyspace("quickstart").await?;

    ks.put("session:long", "Ada").ttl(Duration::from_secs(3_600)).await?;
    ks.put("session:short", "Bob").ttl(Duration::from_millis(300)).await?;

    let long = ks.get("session:long").await?.expect("it was just written");
    #[allow(clippy::disallowed_methods)] // A program of its own reads the clock of its machine.
    let now_us =
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    let left_us = long.expires_at.map_or(0, |at| at.saturating_sub(now_us));
    println!("session:long ends in {} minutes", (left_us + 30_000_000) / 60_000_000);

    tokio::time::sleep(Duration::from_millis(400)).await;
    println!("session:short = {:?}", ks.get("session:short").await?);

    // A put without a time to live keeps the value for good, or as long as the keyspace says.
    ks.put("session:long", "Ada").await?;
    println!("expires_at = {:?}", ks.get("session:long").await?.and_then(|value| value.expires_at));
    Ok(())
}
