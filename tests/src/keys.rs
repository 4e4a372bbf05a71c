//! Numbered keys of a keyspace: written all, and counted when they are missing.

use anyhow::Result;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use vasto_client::Keyspace;

/// Keys that are read together.
const READ_TOGETHER: usize = 10_000;

/// Writes `<prefix><0..count>`, each with a value that only this key has.
///
/// # Errors
/// When a write fails.
pub async fn put_all(keyspace: &Keyspace, prefix: &str, count: u64) -> Result<()> {
    put_each(keyspace, prefix, count, |n| format!("{prefix}:{n}").into()).await
}

/// Writes `<prefix><0..count>` with these values.
///
/// # Errors
/// When a write fails.
pub async fn put_each(
    keyspace: &Keyspace,
    prefix: &str,
    count: u64,
    value: impl Fn(u64) -> Bytes,
) -> Result<()> {
    let put = |n: u64| {
        let value = value(n);
        async move { keyspace.put(format!("{prefix}{n}"), value).await.map(|_| ()) }
    };
    Ok(futures::stream::iter(0..count).map(put).buffer_unordered(64).try_collect().await?)
}

/// Returns how many of `<prefix><0..count>` are absent.
///
/// # Errors
/// When a read fails.
pub async fn missing(keyspace: &Keyspace, prefix: &str, count: u64) -> Result<usize> {
    let names: Vec<String> = (0..count).map(|n| format!("{prefix}{n}")).collect();
    let mut missing = 0;
    // Of many keys, the values take a lot of memory.
    for some in names.chunks(READ_TOGETHER) {
        missing += keyspace.get_many(some).await?.iter().filter(|value| value.is_none()).count();
    }
    Ok(missing)
}
