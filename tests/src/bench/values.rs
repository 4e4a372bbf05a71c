//! Values that do not compress, rows of them, and what must be there in the end.
//!
//! **Invariant:** the value of a row is a function of the seed and its number, however often the row
//! is written: a row can be checked without knowing what was overwritten.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use vasto_client::{Batch, Keyspace};
use vasto_testkit::Numbers;

use super::table::{mib, note};

/// Bytes of a row's value.
pub(super) const ROW_BYTES: usize = 4 << 10;
/// Random bytes that values are cut from: far more than any compressor looks back.
const POOL_BYTES: usize = 32 << 20;
/// Rows in a batch.
const BATCH: usize = 128;
/// Batches under way.
const PARALLEL: usize = 8;
/// Of so many rows, one is checked in the end.
const CHECKED: u64 = 499;
/// Interval between two lines about the progress.
const TELL: Duration = Duration::from_secs(10);

/// The source of all values of a run.
#[derive(Debug, Clone)]
pub(super) struct Values {
    pool: Bytes,
    seed: u64,
}

fn key(row: u64) -> String {
    format!("bulk{row:010}")
}

/// Returns the number of rows that have so many GiB of values.
pub(super) fn rows_of(gib: f64) -> u64 {
    ((gib * f64::from(1 << 30)) as u64 / ROW_BYTES as u64).max(BATCH as u64)
}

impl Values {
    pub(super) fn new(seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let pool = (0..POOL_BYTES / 8).flat_map(|_| numbers.draw().to_le_bytes());
        Self { pool: pool.collect::<Vec<u8>>().into(), seed }
    }

    /// Returns so many bytes that a number decides; they share the memory of all others.
    pub(super) fn cut(&self, number: u64, bytes: usize) -> Bytes {
        let mut numbers = Numbers::new(self.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let at = numbers.below((POOL_BYTES - bytes) as u64) as usize;
        self.pool.slice(at..at + bytes)
    }

    /// Writes these rows, a few batches at a time.
    ///
    /// # Errors
    /// When a write fails.
    pub(super) async fn write(&self, keyspace: &Keyspace, rows: Vec<u64>) -> Result<()> {
        let (began, total) = (Instant::now(), mib((rows.len() * ROW_BYTES) as u64));
        let batches = rows.chunks(BATCH).map(|rows| async move {
            let batch = rows
                .iter()
                .fold(Batch::new(), |batch, row| batch.put(key(*row), self.cut(*row, ROW_BYTES)));
            keyspace.write(batch).await.map(|_| rows.len())
        });
        let mut written = futures::stream::iter(batches).buffer_unordered(PARALLEL);
        let (mut done, mut told) = (0, began);
        while let Some(rows) = written.try_next().await? {
            done += rows;
            if told.elapsed() >= TELL {
                told = Instant::now();
                note(&format!("{:.0} of {total:.0} MiB written", mib((done * ROW_BYTES) as u64)));
            }
        }
        let rate = total / began.elapsed().as_secs_f64().max(1e-9);
        note(&format!("{total:.0} MiB written, {rate:.0} MiB/s"));
        Ok(())
    }

    /// Writes all rows once.
    ///
    /// # Errors
    /// When a write fails.
    pub(super) async fn fill(&self, keyspace: &Keyspace, rows: u64) -> Result<()> {
        self.write(keyspace, (0..rows).collect()).await
    }

    /// Writes a share of the rows once more, in the order of `numbers`.
    ///
    /// # Errors
    /// When a write fails.
    pub(super) async fn overwrite(
        &self,
        keyspace: &Keyspace,
        rows: u64,
        share: f64,
        numbers: &mut Numbers,
    ) -> Result<()> {
        let count = (rows as f64 * share) as u64;
        self.write(keyspace, (0..count).map(|_| numbers.below(rows)).collect()).await
    }

    /// Reads a sample of the rows; each holds what was written.
    ///
    /// # Errors
    /// The row that does not.
    pub(super) async fn check(&self, keyspace: &Keyspace, rows: u64) -> Result<()> {
        let sample: Vec<u64> = (0..rows).step_by(CHECKED as usize).collect();
        for rows in sample.chunks(BATCH) {
            let values = keyspace.get_many(rows.iter().map(|row| key(*row))).await?;
            for (row, value) in rows.iter().zip(values) {
                let value = value.with_context(|| format!("row {row} is lost"))?;
                ensure!(
                    value.bytes() == self.cut(*row, ROW_BYTES),
                    "row {row} is not what was written"
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_number_gives_the_same_value_and_others_give_others() {
        let values = Values::new(7);
        assert_eq!(values.cut(1, 100), values.cut(1, 100));
        assert_ne!(values.cut(1, 100), values.cut(2, 100));
        assert_eq!(values.cut(3, ROW_BYTES).len(), ROW_BYTES);
    }

    #[test]
    fn two_gib_are_half_a_million_rows() {
        assert_eq!(rows_of(2.0), 524_288);
    }
}
