//! Loads many rows as fast as the cluster takes them: batches, several at a time. The client slows
//! down by itself where nodes do. Needs the keyspace of the example `quickstart`.
//!
//! `cargo run -p vasto-client --example bulk_load -- http://127.0.0.1:8278 20000`

use std::time::Instant;

use futures::{StreamExt, TryStreamExt};
use vasto_client::{Batch, Vasto};

const BATCH: u64 = 500;
const AT_A_TIME: usize = 8;

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let rows = std::env::args().nth(2).and_then(|rows| rows.parse().ok()).unwrap_or(20_000u64);
    let ks = Vasto::connect(&url).await?.keyspace("quickstart").await?;

    let began = Instant::now();
    let loaded = futures::stream::iter((0..rows).step_by(BATCH as usize))
        .map(|first| {
            let keys = first..(first + BATCH).min(rows);
            let batch = keys.fold(Batch::new(), |batch, n| {
                batch.put(format!("row:{n:08}"), format!("value of row {n}"))
            });
            async { ks.write(batch).await.map(|outcomes| outcomes.len()) }
        })
        .buffer_unordered(AT_A_TIME)
        .try_fold(0, |sum, written| async move { Ok(sum + written) })
        .await?;
    println!("loaded {loaded} rows in {:.1?}", began.elapsed());

    let mut scanned = 0u64;
    let mut scan = ks.scan().prefix("row:").keys_only().stream();
    while scan.try_next().await?.is_some() {
        scanned += 1;
    }
    println!("a scan finds {scanned}");
    assert!(scanned >= rows, "rows are missing");
    Ok(())
}
