//! Handles each kind of failure: what to repeat, when, and what to read back first.
//! Needs the keyspace of the example `quickstart`.
//!
//! `cargo run -p vasto-client --example unknown_outcome -- http://127.0.0.1:8278`

use std::time::Duration;

use vasto_client::{Error, ErrorKind, Keyspace, Vasto};

/// Puts a value and does not return before it stands. A put may be repeated: the second one changes
/// nothing.
async fn put_for_sure(ks: &Keyspace, key: &str, value: &str) -> Result<u32, Error> {
    let mut attempts = 1;
    loop {
        let error = match ks.put(key, value).await {
            Ok(_) => return Ok(attempts),
            Err(error) => error,
        };
        match error.kind() {
            // Nothing was changed, or repeating does no harm.
            ErrorKind::Unavailable | ErrorKind::DeadlineExceeded | ErrorKind::Unknown => {}
            ErrorKind::Overloaded | ErrorKind::NoSpace => {
                tokio::time::sleep(error.retry_after().unwrap_or(Duration::from_millis(100))).await;
            }
            // The same request fails again.
            _ => return Err(error),
        }
        attempts += 1;
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let ks = Vasto::connect(&url)
        .await?
        .keyspace("quickstart")
        .await?
        .with_deadline(Duration::from_secs(2));

    println!("the put stands after {} attempt", put_for_sure(&ks, "order:7", "paid").await?);

    // An increment must not be repeated blindly: read back, and decide.
    ks.delete("stock").await?;
    match ks.add_i64("stock", 10).await {
        Ok(stock) => println!("stock = {stock}"),
        Err(error) if error.kind() == ErrorKind::Unknown => {
            println!(
                "it may have been done: {:?}",
                ks.get("stock").await?.and_then(|value| value.as_i64())
            );
        }
        Err(error) => return Err(error),
    }

    // What can never succeed is refused before anything is sent.
    let too_long = "k".repeat(100_000);
    let error = ks.put(too_long.as_str(), "v").await.expect_err("a key has at most 64 KiB");
    println!("{:?}: {error}", error.kind());
    Ok(())
}
