//! Writes SSTs for an ingest: one open table per band, cut at band edges and at a maximum size.

use std::collections::BTreeMap;
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
}

struct Open<'a> {
    writer: SstFileWriter<'a>,
    path: PathBuf,
}

/// Tables under construction. Keys of one band must arrive in ascending order; bands may mix.
pub(crate) struct TableSet<'a> {
    options: &'a Options,
    dir: PathBuf,
    open: BTreeMap<Band, Open<'a>>,
    done: Vec<WrittenTable>,
    files: u64,
    rows: u64,
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
            rows: 0,
        }
    }

    /// Adds a row.
    pub(crate) fn put(
        &mut self,
        band: Band,
        user_key: &[u8],
        entry: &[u8],
    ) -> Result<(), EngineError> {
        if !self.open.contains_key(&band) {
            self.files += 1;
            let path = self.dir.join(format!("{:06}.sst", self.files));
            let mut writer = SstFileWriter::create(self.options);
            writer.open(&path).map_err(failed("create an SST"))?;
            self.open.insert(band, Open { writer, path });
        }
        let table = self.open.get_mut(&band).expect("it was opened above");
        table.writer.put(data_key(band, user_key), entry).map_err(failed("write an SST"))?;
        self.rows += 1;
        if self.rows.is_multiple_of(1024) && table.writer.file_size() >= TABLE_BYTES {
            let table = self.open.remove(&band).expect("it was used above");
            self.finish_one(table)?;
        }
        Ok(())
    }

    fn finish_one(&mut self, mut table: Open<'a>) -> Result<(), EngineError> {
        table.writer.finish().map_err(failed("finish an SST"))?;
        self.done.push(WrittenTable { bytes: table.writer.file_size(), path: table.path });
        Ok(())
    }

    /// Closes all tables; returns them and the number of rows.
    pub(crate) fn finish(mut self) -> Result<(Vec<WrittenTable>, u64), EngineError> {
        while let Some((_, table)) = self.open.pop_first() {
            self.finish_one(table)?;
        }
        Ok((self.done, self.rows))
    }
}
