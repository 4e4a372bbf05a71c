//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything on a busy machine, short enough to end a hung test.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Interval between two checks of a condition.
const LOOK: Duration = Duration::from_millis(10);

/// Polls until `condition` returns a value.
///
/// # Errors
/// When the deadline passes first; the text names the condition.
pub async fn until<T, F>(what: &str, deadline: Duration, mut condition: F) -> Result<T>
where
    F: AsyncFnMut() -> Option<T>,
{
    let start = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        if start.elapsed() > deadline {
            bail!("waited {deadline:?} in vain for {what}");
        }
        tokio::time::sleep(LOOK).await;
    }
}
