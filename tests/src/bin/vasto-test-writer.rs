//! A client as a separate process, for tests that stop it with a signal: writes the keys
//! `<prefix><n>` with the value `<mark><n>`, n = 0, 1, 2, ..., and prints each n once the write is
//! acknowledged; `PACE` is the pause between two writes in milliseconds.
//!
//! Usage: `vasto-test-writer MASTER KEYSPACE PREFIX [MARK [PACE]]`

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use vasto_client::Vasto;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut next = || args.next().context("usage: vasto-test-writer MASTER KEYSPACE PREFIX");
    let (master, keyspace, prefix) = (next()?, next()?, next()?);
    let mark = next().unwrap_or_default();
    let pace = Duration::from_millis(next().ok().map_or(Ok(0), |pace| pace.parse())?);
    let keyspace = Vasto::connect(&master).await?.keyspace(&keyspace).await?;
    let mut out = std::io::stdout().lock();
    for n in 0u64.. {
        keyspace.put(format!("{prefix}{n}"), format!("{mark}{n}")).await?;
        writeln!(out, "{n}")?;
        out.flush()?;
        if !pace.is_zero() {
            tokio::time::sleep(pace).await;
        }
    }
    Ok(())
}
