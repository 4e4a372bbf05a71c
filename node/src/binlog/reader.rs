//! Sequential reading of synced records, concurrent with the writer and across files.
//!
//! **Invariant:** a reader returns contiguous, verified and synced records. The reader reads only
//! bytes of completely appended records, which never change, so a buffer of them never goes stale.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vasto_core::Lsn;
use vasto_core::limits::RECORD_BYTES_MAX;
use vasto_core::record::{RECORD_HEADER_BYTES, frame_at, positions_at};

use super::shared::ReadView;
use super::{BinlogError, LogShared, file};

/// Minimum and maximum of one read-ahead.
const READ_AHEAD_BYTES: std::ops::RangeInclusive<usize> = (4 << 10)..=(1 << 20);

/// Reader of a log from a position on. A file that truncation removes meanwhile stays readable to
/// its end.
#[derive(Debug)]
pub(crate) struct LogReader {
    shared: Arc<LogShared>,
    position: Lsn,
    open: Option<OpenFile>,
    buffer: Buffer,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    /// First LSN of the file: its name.
    first: Lsn,
    /// Record that starts at `offset`.
    at: Lsn,
    offset: u64,
}

/// Bytes of the open file from `start` on.
#[derive(Debug, Default)]
struct Buffer {
    start: u64,
    bytes: Vec<u8>,
}

impl Buffer {
    fn clear(&mut self) {
        self.bytes = Vec::new();
    }

    /// Returns `len` bytes from `offset`; reads up to `ahead` if they are not buffered, never
    /// beyond `end`.
    fn get(
        &mut self,
        file: &File,
        offset: u64,
        len: usize,
        ahead: usize,
        end: u64,
    ) -> std::io::Result<&[u8]> {
        let inside =
            offset >= self.start && offset + len as u64 <= self.start + self.bytes.len() as u64;
        if !inside {
            let want = (len.max(ahead) as u64).min(end - offset) as usize;
            if self.bytes.capacity() > 2 * want.max(*READ_AHEAD_BYTES.end()) {
                self.bytes = Vec::new();
            }
            self.bytes.resize(want, 0);
            self.start = offset;
            if let Err(error) = file.read_exact_at(&mut self.bytes, offset) {
                self.clear();
                return Err(error);
            }
        }
        let from = (offset - self.start) as usize;
        Ok(&self.bytes[from..from + len])
    }
}

impl LogReader {
    pub(super) fn new(shared: Arc<LogShared>, after: Lsn) -> Self {
        LogReader { shared, position: after, open: None, buffer: Buffer::default() }
    }

    /// Returns the last record that was returned, or the one given at the start.
    pub(crate) fn position(&self) -> Lsn {
        self.position
    }

    /// Returns the next synced records with their encodings: as many as fit into `bytes_max`, but
    /// at least one; none at the synced end. Blocks on the disk.
    ///
    /// # Errors
    /// [`BinlogError::TooOld`] when truncation overtook the reader, [`BinlogError::Rot`] when a
    /// record fails its checks. The position stays where it was.
    pub(crate) fn next_batch(
        &mut self,
        bytes_max: usize,
    ) -> Result<Vec<(Lsn, Vec<u8>)>, BinlogError> {
        let wanted = self.position.next();
        let view = self.shared.view(wanted);
        if wanted > view.synced {
            return Ok(Vec::new());
        }
        let end = self.open_for(wanted, &view)?;
        let batch = self.read(wanted, view.synced, end, bytes_max);
        match &batch {
            Ok(batch) => {
                self.position = batch.last().expect("a synced record is there and was read").0
            }
            // The next call starts over from the index.
            Err(_) => self.open = None,
        }
        batch
    }

    /// Opens the file of the wanted record and returns where its whole records end.
    fn open_for(&mut self, wanted: Lsn, view: &ReadView) -> Result<u64, BinlogError> {
        let too_old = |first| BinlogError::TooOld { asked: wanted, first };
        let Some(place) = &view.place else {
            // Truncated, but a file that is open can be read to its end.
            let open = self.open.as_ref().ok_or_else(|| too_old(view.first))?;
            let path = file::path(self.shared.dir(), open.first);
            let end = open.file.metadata().map_err(BinlogError::io("inspect", &path))?.len();
            return if open.offset < end { Ok(end) } else { Err(too_old(view.first)) };
        };
        if self.open.as_ref().is_none_or(|open| open.first != place.file_first) {
            let path = file::path(self.shared.dir(), place.file_first);
            let file = match File::open(&path) {
                // A file leaves the log's list before it is removed.
                Err(_) if self.shared.first_lsn() > wanted => {
                    return Err(too_old(self.shared.first_lsn()));
                }
                opened => opened.map_err(BinlogError::io("open", &path))?,
            };
            let (at, offset) = place.near;
            self.open = Some(OpenFile { file, first: place.file_first, at, offset });
            self.buffer.clear();
        }
        Ok(place.file_bytes)
    }

    /// Reads from the open file, up to the record `synced` and the byte `end`.
    fn read(
        &mut self,
        wanted: Lsn,
        synced: Lsn,
        end: u64,
        bytes_max: usize,
    ) -> Result<Vec<(Lsn, Vec<u8>)>, BinlogError> {
        let open = self.open.as_mut().expect("open_for has opened it");
        let path = file::path(self.shared.dir(), open.first);
        let ahead = bytes_max.clamp(*READ_AHEAD_BYTES.start(), *READ_AHEAD_BYTES.end());
        let mut batch = Vec::new();
        let mut batch_bytes = 0;
        while open.at <= synced && open.offset < end {
            let rot = |why: String| BinlogError::Rot {
                file: path.clone(),
                offset: open.offset,
                lsn: open.at,
                evidence: format!("read back: {why}"),
            };
            let left = (end - open.offset) as usize;
            if left < RECORD_HEADER_BYTES {
                return Err(rot("the file ends inside a record".to_owned()));
            }
            let head = self
                .buffer
                .get(&open.file, open.offset, 4, ahead, end)
                .map_err(BinlogError::io("read", &path))?;
            let length =
                u32::from_le_bytes(head.try_into().expect("four bytes were asked for")) as usize;
            if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX.min(left)).contains(&length) {
                return Err(rot(format!("a record of {length} bytes")));
            }
            if !batch.is_empty() && batch_bytes + length > bytes_max {
                break;
            }
            let record = self
                .buffer
                .get(&open.file, open.offset, length, ahead, end)
                .map_err(BinlogError::io("read", &path))?;
            frame_at(record).map_err(|error| rot(error.to_string()))?;
            let (lsn, _) = positions_at(record).expect("a whole record has positions");
            if lsn != open.at {
                return Err(rot(format!("record {lsn} stands in its place")));
            }
            if lsn >= wanted {
                batch.push((lsn, record.to_vec()));
                batch_bytes += length;
            }
            open.offset += length as u64;
            open.at = lsn.next();
        }
        Ok(batch)
    }
}
