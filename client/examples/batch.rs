//! Moves an amount between two accounts: a batch within one partition is applied as a whole or not
//! at all. Needs the keyspace of the example `quickstart`.
//!
//! `cargo run -p vasto-client --example batch -- http://127.0.0.1:8278`

use vasto_client::{Batch, Key, Keyspace, Vasto};

fn account(user: &str, name: &str) -> Key {
    Key::new(format!("{user}:{name}")).partition(user)
}

async fn balance(ks: &Keyspace, name: &str) -> Result<u64, vasto_client::Error> {
    let stored = ks.get(account("ada", name)).await?;
    Ok(stored.and_then(|value| value.to_string().parse().ok()).unwrap_or(0))
}

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let ks = Vasto::connect(&url).await?.keyspace("quickstart").await?;

    ks.write(
        Batch::new().put(account("ada", "checking"), "100").put(account("ada", "savings"), "0"),
    )
    .await?;
    let (checking, savings) = (balance(&ks, "checking").await?, balance(&ks, "savings").await?);
    let moved = Batch::new()
        .put(account("ada", "checking"), (checking - 40).to_string())
        .put(account("ada", "savings"), (savings + 40).to_string())
        .put(account("ada", "last_transfer"), "40 to savings");
    println!("{} operations: {:?}", moved.len(), ks.write(moved).await?);
    println!(
        "checking {}, savings {}",
        balance(&ks, "checking").await?,
        balance(&ks, "savings").await?
    );

    // Keys of several partitions go to their shards side by side: faster than single puts, not
    // atomic.
    let many =
        (0..500).fold(Batch::new(), |batch, n| batch.put(format!("item:{n:03}"), n.to_string()));
    println!("{} puts to {} shards", ks.write(many).await?.len(), ks.shards());
    Ok(())
}
