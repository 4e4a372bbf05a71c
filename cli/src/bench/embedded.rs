//! The baseline: the same operations by the same number of threads on a RocksDB in this process.
//!
//! The database has the settings of a node's databases (compression, block size, filters, memory),
//! and RocksDB's own write-ahead log in place of a node's binlog: synced by each write at `fsync`
//! (RocksDB syncs once for all waiting writes), handed to the operating system at `os`.
//!
//! Invariant: a directory that does not carry this bench's mark is never written to.

use std::{fs, path::Path, sync::Arc, time::Instant};

use anyhow::Context;
use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, Direction, IteratorMode, Options, WriteBatch,
    WriteOptions,
};

use super::{
    measure::{Found, Run},
    workload::{Generator, Op, Values, key, neighbourhood},
};
use crate::{args::Ack, output::Failure};

/// The file that marks a directory as belonging to this bench.
const MARK: &str = "VASTO-BENCH";
/// Keys in a batch when loading.
const LOAD_BATCH: u64 = 1_000;

/// An open database.
pub(super) struct Embedded {
    db: DB,
    sync: bool,
}

impl Embedded {
    /// Opens the database in `dir`, or creates one in a directory that is empty or does not exist.
    ///
    /// # Errors
    /// [`Failure`] for a directory with other contents, for an acknowledgement level that one
    /// process cannot give, and for an error of RocksDB.
    pub(super) fn open(
        dir: &Path,
        ack: Ack,
        cache_bytes: usize,
        write_buffer_bytes: usize,
    ) -> anyhow::Result<Embedded> {
        let sync = match ack {
            Ack::Os => false,
            Ack::Fsync => true,
            Ack::Replica | Ack::Bucket => {
                let failure = Failure::usage("an embedded database has no replicas and no bucket");
                return Err(failure.hint("say --ack os or --ack fsync").into());
            }
        };
        claim(dir)?;
        let db = DB::open(&options(cache_bytes, write_buffer_bytes), dir.join("db"))
            .with_context(|| format!("cannot open the database in {}", dir.display()))?;
        Ok(Embedded { db, sync })
    }

    /// Returns whether the key of this number exists.
    pub(super) fn has(&self, number: u64) -> anyhow::Result<bool> {
        Ok(self.db.get_pinned(key(number))?.is_some())
    }

    /// Writes the keys `0..keys`; `progress` receives the number of keys written so far.
    pub(super) fn load(
        &self,
        keys: u64,
        values: &Values,
        progress: impl Fn(u64),
    ) -> anyhow::Result<()> {
        let mut start = 0;
        while start < keys {
            let end = keys.min(start + LOAD_BATCH);
            let mut batch = WriteBatch::default();
            (start..end).for_each(|number| batch.put(key(number), values.at(number)));
            self.db.write_opt(&batch, &self.write_options())?;
            progress(end);
            start = end;
        }
        Ok(())
    }

    /// Runs one thread per generator, until the run ends.
    pub(super) fn run(&self, run: &Arc<Run>, generators: Vec<Generator>, values: &Values) {
        std::thread::scope(|threads| {
            for (client, mut generator) in generators.into_iter().enumerate() {
                threads.spawn(move || {
                    let write = self.write_options();
                    while run.begin() {
                        let op = generator.next_op();
                        let value = values.at(generator.random());
                        let started = Instant::now();
                        match self.perform(op, &value, &write) {
                            Ok(found) => run.record(client, started.elapsed(), found),
                            Err(error) => run.fail(client, error, true),
                        }
                    }
                });
            }
        });
    }

    fn perform(&self, op: Op, value: &[u8], write: &WriteOptions) -> Result<Found, rocksdb::Error> {
        let found = |value: Option<_>| if value.is_some() { Found::Yes } else { Found::No };
        match op {
            // Copied, as a client would receive it.
            Op::Get(number) => Ok(found(self.db.get(key(number))?)),
            Op::Put(number) => self.db.put_opt(key(number), value, write).map(|()| Found::Yes),
            Op::Modify(number) => {
                let old = found(self.db.get(key(number))?);
                self.db.put_opt(key(number), value, write).map(|()| old)
            }
            Op::Scan(number, rows) => {
                let prefix = neighbourhood(number);
                let mut count = 0;
                for row in self
                    .db
                    .iterator(IteratorMode::From(prefix.as_bytes(), Direction::Forward))
                    .take(rows)
                {
                    let (key, _) = row?;
                    count += usize::from(key.starts_with(prefix.as_bytes()));
                }
                Ok(if count > 0 { Found::Yes } else { Found::No })
            }
        }
    }

    fn write_options(&self) -> WriteOptions {
        let mut options = WriteOptions::default();
        options.set_sync(self.sync);
        options
    }
}

fn claim(dir: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot use {}", dir.display());
    fs::create_dir_all(dir).with_context(cannot)?;
    let mark = dir.join(MARK);
    if mark.exists() {
        return Ok(());
    }
    if fs::read_dir(dir).with_context(cannot)?.next().is_some() {
        let failure =
            Failure::usage(format!("{} holds files that are not of this bench", dir.display()));
        return Err(failure.hint("give a directory that is empty or does not exist").into());
    }
    fs::write(mark, "The directory of `vasto bench --embedded`; it may be removed.\n")
        .with_context(cannot)
}

/// The settings of a node's databases, except for the write-ahead log and for concurrent writers,
/// which a node does not need: each of its databases has one writer.
fn options(cache_bytes: usize, write_buffer_bytes: usize) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(cache_bytes));
    table.set_bloom_filter(10.0, false);
    table.set_block_size(8 << 10);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_format_version(6);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_write_buffer_size((write_buffer_bytes / 2).clamp(1 << 20, 64 << 20));
    options.set_max_write_buffer_number(4);
    options.set_max_background_jobs(2);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_bottommost_compression_type(DBCompressionType::Zstd);
    options.set_target_file_size_base(32 << 20);
    options.set_block_based_table_factory(&table);
    options
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;
    use crate::{
        args::Workload,
        bench::{measure::Until, workload::Population},
    };

    fn open(dir: &Path, ack: Ack) -> anyhow::Result<Embedded> {
        Embedded::open(dir, ack, 8 << 20, 8 << 20)
    }

    #[test]
    fn every_workload_finds_what_was_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let values = Values::new(100, 1);
        let embedded = open(dir.path(), Ack::Os).unwrap();
        assert!(!embedded.has(0).unwrap());
        embedded.load(2_500, &values, |_| ()).unwrap();
        assert!(embedded.has(2_499).unwrap() && !embedded.has(2_500).unwrap());
        for workload in [Workload::Mixed, Workload::YcsbA, Workload::YcsbE, Workload::YcsbF] {
            let run = Arc::new(Run::start(Until::Requests(500)));
            let population = Population::new(2_500, 4);
            let generators = (0..4)
                .map(|seed| Generator::new(workload, 2_500, population.clone(), seed))
                .collect();
            embedded.run(&run, generators, &values);
            let json = serde_json::to_value(run.finish(Duration::from_secs(1)).0).unwrap();
            assert_eq!(
                (&json["ops"], &json["errors"], &json["not_found"]),
                (&500.into(), &0.into(), &0.into())
            );
        }
    }

    #[test]
    fn directories_of_others_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.txt"), "mine").unwrap();
        assert!(open(dir.path(), Ack::Os).err().unwrap().to_string().contains("not of this bench"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(open(&dir.path().join("new"), Ack::Replica).is_err());
        drop(open(&dir.path().join("new"), Ack::Fsync).unwrap());
        open(&dir.path().join("new"), Ack::Os).unwrap();
    }
}
