//! Reads from the nearest zone where it may lag behind, and from the primary where it must not.
//! Needs the keyspace of the example `quickstart`.
//!
//! `cargo run -p vasto-client --example nearest_zone -- http://127.0.0.1:8278`

use vasto_client::{Ack, ReadFrom, Vasto, WriteTo};

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let ks = Vasto::connect(&url).await?.keyspace("quickstart").await?;

    // Acknowledged once a second replica holds it, where the keyspace has one.
    ks.put("price", "42").ack(Ack::Replica).await?;
    println!("at the primary: {:?}", ks.get("price").await?.map(|value| value.to_string()));

    // A replica in the zone "eu" where there is one, else the primary: it may lag behind by a moment.
    let near = ks.clone().read_from(ReadFrom::Zone("eu".to_owned()));
    println!("in the zone:    {:?}", near.get("price").await?.map(|value| value.to_string()));

    // Puts and deletes may be taken by the zone too; the later event time wins everywhere.
    let local = ks.clone().write_to(WriteTo::Zone("eu".to_owned()));
    println!("written near:   {:?}", local.put("price:eu", "41").await?);
    Ok(())
}
