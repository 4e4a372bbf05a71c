//! Reader of SSTs downloaded from a bucket: files of a checkpoint are imported into a throw-away
//! database, tables of an export are ingested; then it iterates.
//!
//! RocksDB's C API has no reader for a single SST. The levels and sequence ranges of the manifest
//! are correctness data: an import with wrong ones, or with an L0 file left out, returns wrong rows
//! without an error, so they are used exactly.

use std::path::{Path, PathBuf};

use rocksdb::{
    DB, DBRawIterator, ExportImportFilesMetaData, ImportColumnFamilyOptions,
    IngestExternalFileOptions, LiveFile, Options,
};
use vasto_core::Band;

use super::{EngineError, RowRef, band_bounds, failed};

/// Downloaded SST with the data of its manifest.
#[derive(Debug, Clone)]
pub(crate) struct ImportFile {
    /// File name inside the download directory.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Level in the source.
    pub level: i32,
    /// Smallest sequence number in it.
    pub smallest_seqno: u64,
    /// Largest sequence number in it.
    pub largest_seqno: u64,
    /// First stored key.
    pub first_key: Vec<u8>,
    /// Last stored key.
    pub last_key: Vec<u8>,
    /// Number of entries.
    pub entries: u64,
}

const CF: &str = "import";

/// Throw-away database over downloaded SSTs.
pub(crate) struct Scratch {
    db: DB,
}

impl Scratch {
    /// Imports `files` of `download_dir` into a new database in `dir`. Checksums must have been
    /// verified before: the import drops them.
    pub(crate) fn import(
        dir: &Path,
        download_dir: &Path,
        files: &[ImportFile],
    ) -> Result<Self, EngineError> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_disable_auto_compactions(true);
        let mut db = DB::open(&options, dir).map_err(failed("open the scratch database"))?;
        if !files.is_empty() {
            let directory = download_dir.to_string_lossy().into_owned();
            let live: Vec<LiveFile> = files
                .iter()
                .map(|file| LiveFile {
                    column_family_name: CF.into(),
                    name: format!("/{}", file.name),
                    directory: directory.clone(),
                    size: file.bytes as usize,
                    level: file.level,
                    start_key: Some(file.first_key.clone()),
                    end_key: Some(file.last_key.clone()),
                    smallest_seqno: file.smallest_seqno,
                    largest_seqno: file.largest_seqno,
                    num_entries: file.entries,
                    num_deletions: 0,
                })
                .collect();
            let mut metadata = ExportImportFilesMetaData::default();
            metadata.set_db_comparator_name("leveldb.BytewiseComparator");
            metadata.set_files(&live).map_err(failed("describe the downloaded SSTs"))?;
            let mut import = ImportColumnFamilyOptions::default();
            import.set_move_files(true);
            db.create_column_family_with_import(&options, CF, &import, &metadata)
                .map_err(failed("import the downloaded SSTs"))?;
        }
        Ok(Self { db })
    }

    /// Moves tables whose keys do not overlap into a new database in `dir`.
    pub(crate) fn ingest(dir: &Path, tables: &[PathBuf]) -> Result<Self, EngineError> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_disable_auto_compactions(true);
        let db = DB::open(&options, dir).map_err(failed("open the scratch database"))?;
        if !tables.is_empty() {
            let mut ingest = IngestExternalFileOptions::default();
            ingest.set_move_files(true);
            db.ingest_external_file_opts(&ingest, tables.to_vec())
                .map_err(failed("read the exported SSTs"))?;
        }
        Ok(Self { db })
    }

    /// Returns the rows of one band in the order of their keys, read ahead by this many bytes.
    pub(crate) fn rows(&self, band: Band, readahead: usize) -> BandRows<'_> {
        let (from, to) = band_bounds(band);
        let mut options = rocksdb::ReadOptions::default();
        options.set_iterate_upper_bound(to);
        options.set_verify_checksums(true);
        options.set_readahead_size(readahead);
        options.fill_cache(false);
        let mut iterator = match self.db.cf_handle(CF) {
            Some(cf) => self.db.raw_iterator_cf_opt(&cf, options),
            None => self.db.raw_iterator_opt(options),
        };
        iterator.seek(from);
        BandRows { iterator }
    }
}

/// Cursor over one band.
pub(crate) struct BandRows<'a> {
    iterator: DBRawIterator<'a>,
}

impl BandRows<'_> {
    /// Returns `(user key, entry)` under the cursor; `None` at the end.
    pub(crate) fn current(&self) -> Result<Option<RowRef<'_>>, EngineError> {
        match self.iterator.item() {
            Some((key, value)) => Ok(Some((&key[1..], value))),
            None => {
                self.iterator.status().map_err(failed("read the downloaded SSTs"))?;
                Ok(None)
            }
        }
    }

    /// Moves to the next row.
    pub(crate) fn advance(&mut self) {
        self.iterator.next();
    }
}
