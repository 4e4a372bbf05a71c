//! Writes SSTs: for an ingest, one open table per band, cut at band edges and at a maximum size; for
//! an export, one open table, cut at a maximum size.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use rocksdb::{Options, SstFileWriter};
use vasto_core::Band;
use vasto_core::stored_key::data_key;

use super::{Engine, EngineError, TABLE_BYTES, failed};

/// A finished SST.
#[derive(Debug, Clone)]
pub(crate) struct WrittenTable {
    /// Path of the file.
    pub path: PathBuf,
    /// Size of the file.
    pub bytes: u64,
    /// Number of its rows.
    pub rows: u64,
}

struct Open<'a> {
    writer: SstFileWriter<'a>,
    path: PathBuf,
    rows: u64,
}

impl<'a> Open<'a> {
    fn create(options: &'a Options, path: PathBuf) -> Result<Self, EngineError> {
        let mut writer = SstFileWriter::create(options);
        writer.open(&path).map_err(failed("create an SST"))?;
        Ok(Self { writer, path, rows: 0 })
    }

    fn put(&mut self, stored_key: &[u8], entry: &[u8]) -> Result<(), EngineError> {
        self.rows += 1;
        self.writer.put(stored_key, entry).map_err(failed("write an SST"))
    }

    /// Returns true when the next row begins another file.
    fn is_full(&self) -> bool {
        self.rows.is_multiple_of(1024) && self.writer.file_size() >= TABLE_BYTES
    }

    fn finish(mut self) -> Result<WrittenTable, EngineError> {
        self.writer.finish().map_err(failed("finish an SST"))?;
        Ok(WrittenTable { bytes: self.writer.file_size(), path: self.path, rows: self.rows })
    }
}

/// Tables under construction. Keys of one band must arrive in ascending order; bands may mix.
pub(crate) struct TableSet<'a> {
    options: &'a Options,
    dir: PathBuf,
    open: BTreeMap<Band, Open<'a>>,
    done: Vec<WrittenTable>,
    files: u64,
}

impl<'a> TableSet<'a> {
    /// Creates tables in `dir` that match `engine`'s own.
    pub(crate) fn new(engine: &'a Engine, dir: &Path) -> Self {
        Self {
            options: engine.options(),
            dir: dir.to_owned(),
            open: BTreeMap::new(),
            done: Vec::new(),
            files: 0,
        }
    }

    /// Adds a row.
    pub(crate) fn put(
        &mut self,
        band: Band,
        user_key: &[u8],
        entry: &[u8],
    ) -> Result<(), EngineError> {
        let table = match self.open.entry(band) {
            Entry::Occupied(table) => table.into_mut(),
            Entry::Vacant(slot) => {
                self.files += 1;
                let path = self.dir.join(format!("{:06}.sst", self.files));
                slot.insert(Open::create(self.options, path)?)
            }
        };
        table.put(&data_key(band, user_key), entry)?;
        if table.is_full()
            && let Some(table) = self.open.remove(&band)
        {
            self.done.push(table.finish()?);
        }
        Ok(())
    }

    /// Closes all tables; returns them and the number of rows.
    pub(crate) fn finish(mut self) -> Result<(Vec<WrittenTable>, u64), EngineError> {
        while let Some((_, table)) = self.open.pop_first() {
            self.done.push(table.finish()?);
        }
        let rows = self.done.iter().map(|table| table.rows).sum();
        Ok((self.done, rows))
    }
}

/// Tables that are written one after the other. All keys must arrive in ascending order.
pub(crate) struct TableRun<'a> {
    options: &'a Options,
    dir: PathBuf,
    open: Option<Open<'a>>,
    done: Vec<WrittenTable>,
}

impl<'a> TableRun<'a> {
    /// Creates tables in `dir` that match `engine`'s own.
    pub(crate) fn new(engine: &'a Engine, dir: PathBuf) -> Self {
        Self { options: engine.options(), dir, open: None, done: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn put(&mut self, stored_key: &[u8], entry: &[u8]) -> Result<(), EngineError> {
        let mut table = match self.open.take() {
            Some(table) => table,
            None => {
                let path = self.dir.join(format!("{:06}.sst", self.done.len() + 1));
                Open::create(self.options, path)?
            }
        };
        table.put(stored_key, entry)?;
        match table.is_full() {
            true => self.done.push(table.finish()?),
            false => self.open = Some(table),
        }
        Ok(())
    }

    /// Closes the last table; returns all of them.
    pub(crate) fn finish(mut self) -> Result<Vec<WrittenTable>, EngineError> {
        if let Some(table) = self.open.take() {
            self.done.push(table.finish()?);
        }
        Ok(self.done)
    }
}
