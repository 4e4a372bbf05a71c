//! Counts with `add_i64`, keeps a maximum and appends to a log: the primary does each exactly once.
//! Needs the keyspace of the example `quickstart`.
//!
//! `cargo run -p vasto-client --example counter -- http://127.0.0.1:8278`

use vasto_client::{ErrorKind, Vasto};

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let ks = Vasto::connect(&url).await?.keyspace("quickstart").await?;

    ks.delete("hits").await?;
    let tasks = (0..8).map(|_| {
        let ks = ks.clone();
        tokio::spawn(async move {
            for _ in 0..25 {
                ks.add_i64("hits", 1).await?;
            }
            Ok::<(), vasto_client::Error>(())
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("the task does not panic")?;
    }
    println!("hits = {}", ks.add_i64("hits", 0).await?);

    ks.delete("slowest_ms").await?;
    for sample in [12.5, 40.25, 7.0] {
        ks.max_f64("slowest_ms", sample).await?;
    }
    println!("slowest_ms = {:?}", ks.get("slowest_ms").await?.and_then(|value| value.as_f64()));

    ks.delete("log").await?;
    for line in ["started\n", "working\n"] {
        ks.append("log", line).await?;
    }
    print!("{}", ks.get("log").await?.map(|value| value.to_string()).unwrap_or_default());

    // A key of another type is an error, and stays as it is.
    let error = ks.add_i64("log", 1).await.expect_err("`log` holds bytes");
    assert_eq!(error.kind(), ErrorKind::WrongType);
    println!("add_i64 on bytes: {error}");
    Ok(())
}
