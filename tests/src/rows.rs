//! All rows of a keyspace as a client sees them, and their comparison.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use vasto_client::Keyspace;

/// Key to value and event time.
pub type Rows = BTreeMap<Vec<u8>, (Vec<u8>, u64)>;

/// Returns all rows of a keyspace.
///
/// # Errors
/// When the scan fails.
pub async fn rows(keyspace: &Keyspace) -> Result<Rows> {
    let mut all = Rows::new();
    let mut stream = keyspace.scan().stream();
    while let Some(row) = stream.next().await {
        let row = row?;
        let value = row.value.context("a row without a value")?;
        all.insert(row.key.to_vec(), (value.bytes().to_vec(), value.event_time));
    }
    Ok(all)
}

/// Checks that a keyspace holds exactly these rows.
///
/// # Errors
/// The first differences.
pub fn same(found: &Rows, wanted: &Rows, what: &str) -> Result<()> {
    let text = |key: &[u8]| String::from_utf8_lossy(key).into_owned();
    let wrong: Vec<String> = wanted
        .iter()
        .filter(|(key, value)| found.get(*key) != Some(value))
        .map(|(key, value)| format!("{}: {:?} instead of {value:?}", text(key), found.get(key)))
        .chain(
            found
                .keys()
                .filter(|key| !wanted.contains_key(*key))
                .map(|key| format!("{} is too much", text(key))),
        )
        .collect();
    let shown: Vec<&String> = wrong.iter().take(10).collect();
    ensure!(wrong.is_empty(), "{what}: {} rows are wrong: {shown:?}", wrong.len());
    println!("{what}: {} rows, byte for byte", found.len());
    Ok(())
}
