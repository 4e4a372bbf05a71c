//! Feeds readings that arrive out of order: the later event time stands, whatever comes last.
//! Needs the keyspace of the example `quickstart`.
//!
//! `cargo run -p vasto-client --example event_time -- http://127.0.0.1:8278`

use std::time::{SystemTime, UNIX_EPOCH};

use vasto_client::{Outcome, Vasto};

#[tokio::main]
async fn main() -> Result<(), vasto_client::Error> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "http://127.0.0.1:8278".to_owned());
    let ks = Vasto::connect(&url).await?.keyspace("quickstart").await?;

    // Microseconds since 1970.
    #[allow(clippy::disallowed_methods)] // A program of its own reads the clock of its machine.
    let now_us =
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    let readings = [(3_000_000, "19.5"), (1_000_000, "18.0"), (2_000_000, "19.0")];
    for (after_us, celsius) in readings {
        let outcome =
            ks.put("sensor:1", celsius).event_time(now_us + after_us - 10_000_000).await?;
        match outcome {
            Outcome::Applied { event_time } => println!("{celsius} stands since {event_time}"),
            Outcome::Superseded => println!("{celsius} is older than what stands"),
            Outcome::NotApplied => unreachable!("a put without a condition"),
        }
    }
    let value = ks.get("sensor:1").await?.expect("it was just written");
    println!("sensor:1 = {value}, measured at {}", value.event_time);
    Ok(())
}
