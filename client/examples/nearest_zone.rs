//! Reads from the nearest zone where it may lag behind, and from the primary where it must not.
//! Creates a keyspace with two replicas of each shard, so it needs a cluster of two nodes or more.
//!
//! `cargo run -p vasto-client --example nearest_zone -- http://127.0.0.1:8278`

use vasto_client::{Ack, ErrorKind, KeyspaceSpec, ReadFrom, Vasto, WriteTo};

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let vasto = Vasto::connect(&url).await?;
    match vasto.create_keyspace("prices", KeyspaceSpec::default().replicas(2)).await {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let ks = vasto.keyspace("prices").await?;

    // Acknowledged once a second replica holds it.
    ks.put("price", "42").ack(Ack::Replica).await?;
    println!("at the primary: {:?}", ks.get("price").await?.map(|value| value.to_string()));

    // A replica in the zone "eu" where there is one, else the primary: it may lag behind by a
    // moment.
    let near = ks.clone().read_from(ReadFrom::Zone("eu".to_owned()));
    println!("in the zone:    {:?}", near.get("price").await?.map(|value| value.to_string()));

    // Puts and deletes may be taken by the zone too; the later event time wins everywhere.
    let local = ks.clone().write_to(WriteTo::Zone("eu".to_owned()));
    println!("written near:   {:?}", local.put("price:eu", "41").await?);
    Ok(())
}
