//! Stores the data of each user in one partition and reads it back with one seek. Needs a cluster
//! with the keyspace: `vasto dev`, `vasto keyspace create users --shards 3`.
//!
//! `cargo run -p vasto-client --example partition_scan -- http://127.0.0.1:8278 users`

use futures::StreamExt;
use vasto_client::{Batch, Key, Vasto};

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let keyspace = arguments.next().unwrap_or_else(|| "users".to_owned());
    let ks = Vasto::connect(&url).await?.keyspace(&keyspace).await?;

    for user in 0..100 {
        let partition = format!("user:{user}");
        // One partition: the batch is atomic.
        let orders = (0..20).fold(Batch::new(), |batch, order| {
            let key = Key::new(format!("user:{user}:order:{order:04}")).partition(&partition);
            batch.put(key, format!("{} EUR", 5 + order * user % 95))
        });
        ks.write(orders).await?;
    }

    println!("the first orders of user 42, from one shard:");
    let mut rows = ks.scan().partition("user:42").prefix("user:42:order:").limit(3).stream();
    while let Some(row) = rows.next().await {
        let row = row?;
        println!(
            "  {} = {}",
            String::from_utf8_lossy(&row.key),
            row.value.map(|v| v.to_string()).unwrap_or_default()
        );
    }

    let mut count = 0u64;
    let mut all = ks.scan().prefix("user:").keys_only().stream();
    while all.try_next().await?.is_some() {
        count += 1;
    }
    println!(
        "{count} orders of all users, merged from {} shards in the order of keys",
        ks.shards()
    );
    Ok(())
}
