//! Creates a keyspace, grows it while a client writes, makes a checkpoint, restores it under
//! another name.
//!
//! `cargo run -p vasto-client --example admin -- http://127.0.0.1:8278`

use vasto_client::{ErrorKind, KeyspaceSpec, OperationState, Vasto};

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let vasto = Vasto::connect(&url).await?;
    match vasto.create_keyspace("orders", KeyspaceSpec::default().shards(1)).await {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            println!("the keyspace `orders` exists")
        }
        Err(error) => return Err(error),
    }
    let ks = vasto.keyspace("orders").await?;
    for n in 0..200 {
        ks.put(format!("order:{n:03}"), "open").await?;
    }

    let shards = ks.shards() + 1;
    let resize = vasto.start_resize("orders", shards);
    let (resize, written) = tokio::join!(resize, ks.put("order:during", "open"));
    written?;
    let resized = vasto.wait_operation(resize?).await?;
    println!("resize {}: {:?}", resized.id, resized.state);
    assert_eq!(resized.state, OperationState::Done, "{}", resized.json());

    vasto.checkpoint_keyspace("orders").await?;
    let copy = format!("orders-copy-{shards}");
    let restored = vasto.wait_operation(vasto.start_restore("orders", &copy, None).await?).await?;
    println!("restore into {copy}: {:?}", restored.state);
    let mut rows = 0;
    let mut scan = vasto.keyspace(&copy).await?.scan().keys_only().stream();
    while scan.try_next().await?.is_some() {
        rows += 1;
    }
    println!("{rows} rows in the copy");
    vasto.delete_keyspace(&copy).await?;
    vasto.close().await;
    Ok(())
}
