//! Creates a keyspace, writes and reads it. Needs a cluster: `vasto dev`.
//!
//! `cargo run -p vasto-client --example quickstart -- http://127.0.0.1:8278`

use std::time::Duration;

use vasto_client::{Batch, ErrorKind, Key, KeyspaceSpec, Value, Vasto};

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let vasto = Vasto::connect(&url).await?;
    match vasto.create_keyspace("quickstart", KeyspaceSpec::default().shards(3)).await {
        Ok(_) => println!("created the keyspace `quickstart`"),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            println!("the keyspace `quickstart` exists")
        }
        Err(error) => return Err(error),
    }
    let ks = vasto.keyspace("quickstart").await?;

    ks.put("k", "v").await?;
    ks.put(Key::new("user:1:name").partition("user:1"), "Ada").ttl(Duration::from_secs(60)).await?;
    let value: Option<Value> = ks.get("k").await?;
    println!("k = {}", value.map_or_else(|| "(none)".to_owned(), |value| value.to_string()));

    let outcomes = ks.write(Batch::new().put("a", "1").put("b", "2").delete("k")).await?;
    println!("batch: {outcomes:?}");
    for (key, value) in ["a", "b", "k"].iter().zip(ks.get_many(["a", "b", "k"]).await?) {
        println!(
            "{key} = {}",
            value.map_or_else(|| "(none)".to_owned(), |value| value.to_string())
        );
    }

    let mut rows = ks.scan().partition("user:1").prefix("user:1:").limit(100).stream();
    while let Some(row) = rows.try_next().await? {
        println!(
            "{} = {}",
            String::from_utf8_lossy(&row.key),
            row.value.map(|v| v.to_string()).unwrap_or_default()
        );
    }
    vasto.close().await;
    Ok(())
}
