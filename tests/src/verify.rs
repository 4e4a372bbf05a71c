//! Compares the contents of a cluster with its promises.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use vasto_client::{Keyspace, Vasto};

use crate::history::{History, Seen, key_of, number_of};

/// Counts of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Keys that were ever written.
    pub keys: usize,
    /// Keys that exist now.
    pub present: usize,
    /// Acknowledged writes in all.
    pub acked: u64,
}

/// Reads every key by get and all rows by scan, with no write in flight, and checks: acknowledged
/// writes are present; refused writes and unwritten keys are absent; the scan is in order, has each
/// key once, and agrees with the gets.
///
/// # Errors
/// A list of the discrepancies.
pub async fn verify(master: &str, keyspace: &str, history: &History) -> Result<Verified> {
    verify_beside(master, keyspace, history, &[]).await
}

/// Compares as [`verify`] does, in a keyspace that holds other keys too: those whose names begin
/// with one of `others`.
///
/// # Errors
/// As of [`verify`].
pub async fn verify_beside(
    master: &str,
    keyspace: &str,
    history: &History,
    others: &[&str],
) -> Result<Verified> {
    let keyspace = Vasto::connect(master).await?.keyspace(keyspace).await?;
    let all = history.all();
    let names: Vec<&String> = all.keys().collect();
    let found: HashMap<&str, Seen> = futures::stream::iter(names.chunks(500).map(<[_]>::to_vec))
        .map(|names| get(&keyspace, names))
        .buffer_unordered(4)
        .try_concat()
        .await
        .context("reading all keys")?
        .into_iter()
        .collect();
    let mut problems = Vec::new();
    for (name, kept) in &all {
        let seen = found[name.as_str()];
        if !kept.allows(seen) {
            problems.push(format!("{name}: a get gives {seen:?}, promised was {kept:?}"));
        }
    }
    let present = scan(&keyspace, &found, others, &mut problems).await?;
    if !problems.is_empty() {
        let count = problems.len();
        problems.truncate(30);
        bail!("{count} of {} keys are wrong:\n{}", all.len(), problems.join("\n"));
    }
    Ok(Verified { keys: all.len(), present, acked: history.counts().1 })
}

async fn get<'a>(keyspace: &Keyspace, names: Vec<&'a String>) -> Result<Vec<(&'a str, Seen)>> {
    let values = keyspace.get_many(names.iter().map(|name| key_of(name))).await?;
    anyhow::ensure!(
        values.len() == names.len(),
        "{} keys asked for, {} answered",
        names.len(),
        values.len()
    );
    Ok(names
        .into_iter()
        .zip(values)
        .map(|(name, value)| {
            let seen = match value {
                None => Seen::Absent,
                // A value of another key gets a number that was never attempted.
                Some(value) => Seen::Number(number_of(name, &value.bytes()).unwrap_or(u64::MAX)),
            };
            (name.as_str(), seen)
        })
        .collect())
}

async fn scan(
    keyspace: &Keyspace,
    found: &HashMap<&str, Seen>,
    others: &[&str],
    problems: &mut Vec<String>,
) -> Result<usize> {
    let mut rows = std::pin::pin!(keyspace.scan().stream());
    let mut last: Option<Vec<u8>> = None;
    let mut present = 0;
    while let Some(row) = rows.next().await {
        let row = row.context("scanning all keys")?;
        let name = String::from_utf8_lossy(&row.key).into_owned();
        if last.as_deref().is_some_and(|last| last >= &row.key[..]) {
            problems.push(format!(
                "{name}: the scan gives it after {:?}",
                last.as_deref().map(String::from_utf8_lossy)
            ));
        }
        last = Some(row.key.to_vec());
        if others.iter().any(|other| name.starts_with(other)) {
            continue;
        }
        present += 1;
        let value = row.value.map(|value| value.bytes()).unwrap_or_default();
        let seen = Seen::Number(number_of(&name, &value).unwrap_or(u64::MAX));
        match found.get(name.as_str()) {
            None => problems.push(format!("{name}: the scan gives it and nobody wrote it")),
            Some(got) if *got != seen => {
                problems.push(format!("{name}: the scan gives {seen:?}, a get {got:?}"))
            }
            Some(_) => {}
        }
    }
    let expected = found.values().filter(|seen| **seen != Seen::Absent).count();
    if present != expected {
        problems.push(format!("the scan gives {present} keys, gets find {expected}"));
    }
    Ok(present)
}
