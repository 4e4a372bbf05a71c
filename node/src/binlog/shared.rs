//! The part of a log that all threads share: positions, syncing, truncation.
//!
//! **Invariant:** `first_lsn - 1 <= synced <= appended`, and every file but the last is synced as a
//! whole. Locks are taken in the order truncation, sync, state; the state lock is never held over
//! IO.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use vasto_core::Lsn;
use vasto_core::record::FILE_HEADER_BYTES;

use super::{BinlogError, LogReader, file};

/// Distance of the entries of the sparse index: the maximum that a new reader scans to find its
/// place. Each entry takes 16 bytes of memory.
const INDEX_STEP_BYTES: u64 = 256 << 10;

/// State of one file.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    /// First record that the file holds or will hold.
    pub(super) first: Lsn,
    /// Last record; the one before `first` when the file is empty.
    pub(super) last: Lsn,
    /// Length of header and whole records.
    pub(super) bytes: u64,
    /// Some records and their offsets, ascending; the first record is always included.
    index: Vec<(Lsn, u64)>,
}

impl Segment {
    pub(super) fn empty(first: Lsn) -> Self {
        Segment {
            first,
            last: Lsn(first.0 - 1),
            bytes: FILE_HEADER_BYTES as u64,
            index: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, lsn: Lsn, offset: u64, end: u64) {
        if self.index.last().is_none_or(|(_, indexed)| offset - indexed >= INDEX_STEP_BYTES) {
            self.index.push((lsn, offset));
        }
        (self.last, self.bytes) = (lsn, end);
    }

    /// Returns the indexed record nearest to `lsn` from below, and its offset.
    fn near(&self, lsn: Lsn) -> (Lsn, u64) {
        let after = self.index.partition_point(|(indexed, _)| *indexed <= lsn);
        after.checked_sub(1).map_or((self.first, FILE_HEADER_BYTES as u64), |at| self.index[at])
    }
}

#[derive(Debug)]
struct LogState {
    segments: VecDeque<Segment>,
    active: Option<Arc<File>>,
    appended: Lsn,
    /// Bytes of the records that were appended since the log was opened.
    written: u64,
    synced: Lsn,
    failed: Option<String>,
}

impl LogState {
    fn check_failed(&self) -> Result<(), BinlogError> {
        match &self.failed {
            Some(reason) => Err(BinlogError::Poisoned { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn bytes_after(&self, lsn: Lsn) -> u64 {
        let later = self.segments.iter().rev().take_while(|segment| segment.last > lsn);
        later.map(|segment| segment.bytes - segment.near(lsn.next()).1).sum()
    }

    fn first_lsn(&self) -> Lsn {
        let oldest = self.segments.front().filter(|segment| segment.first <= segment.last);
        oldest.map_or(self.appended.next(), |segment| segment.first)
    }
}

/// Positions of a log, and all operations on it except appending. Thread-safe.
#[derive(Debug)]
pub(crate) struct LogShared {
    dir: PathBuf,
    state: Mutex<LogState>,
    /// Allows one sync at a time: the kernel reports a failed write-back to one caller per file
    /// handle, so one of two concurrent syncs would succeed over lost data.
    sync_turn: Mutex<()>,
    /// Allows one truncation at a time; true once the log was closed, which ends them.
    truncate_turn: Mutex<bool>,
    synced: watch::Sender<Lsn>,
}

/// State of the log that a reader needs to go on.
pub(super) struct ReadView {
    /// Last record that may be read.
    pub(super) synced: Lsn,
    /// Oldest retained record.
    pub(super) first: Lsn,
    /// File of the wanted record, if it is retained.
    pub(super) place: Option<ReadPlace>,
}

/// Location of a record.
pub(super) struct ReadPlace {
    /// First LSN of the file: its name.
    pub(super) file_first: Lsn,
    /// Length of its whole records.
    pub(super) file_bytes: u64,
    /// A record at or before the wanted one, and its offset.
    pub(super) near: (Lsn, u64),
}

impl LogShared {
    /// Creates a log of these files, all of it durable.
    pub(super) fn new(
        dir: PathBuf,
        segments: VecDeque<Segment>,
        active: Option<Arc<File>>,
        last: Lsn,
    ) -> Self {
        let state =
            LogState { segments, active, appended: last, written: 0, synced: last, failed: None };
        LogShared {
            dir,
            state: Mutex::new(state),
            sync_turn: Mutex::new(()),
            truncate_turn: Mutex::new(false),
            synced: watch::Sender::new(last),
        }
    }

    /// Returns the last record that is known to be durable.
    pub(crate) fn synced_lsn(&self) -> Lsn {
        self.state.lock().synced
    }

    /// Returns the last record that was written, durable or not.
    pub(crate) fn appended_lsn(&self) -> Lsn {
        self.state.lock().appended
    }

    /// Subscribes to changes of [`Self::synced_lsn`].
    pub(crate) fn subscribe(&self) -> watch::Receiver<Lsn> {
        self.synced.subscribe()
    }

    /// For tests: returns the first failure, after which nothing is written or synced any more.
    #[cfg(test)]
    pub(crate) fn failed(&self) -> Option<String> {
        self.state.lock().failed.clone()
    }

    /// Returns the oldest retained record; the next one to be written when there is none.
    pub(crate) fn first_lsn(&self) -> Lsn {
        self.state.lock().first_lsn()
    }

    /// Returns the number of files.
    pub(crate) fn files(&self) -> usize {
        self.state.lock().segments.len()
    }

    /// Returns the bytes of all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.state.lock().segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Returns the bytes of the records that were appended since the log was opened.
    pub(crate) fn written(&self) -> u64 {
        self.state.lock().written
    }

    /// Returns the bytes of the records after `lsn`, too high by less than one step of the sparse
    /// index and a record.
    pub(crate) fn bytes_after(&self, lsn: Lsn) -> u64 {
        self.state.lock().bytes_after(lsn)
    }

    /// Returns the bytes of the durable records after `lsn`, which a reader could be sent now; wrong
    /// by less than one step of the sparse index and a record, but 0 when there are none.
    pub(crate) fn synced_bytes_after(&self, lsn: Lsn) -> u64 {
        let state = self.state.lock();
        match lsn < state.synced {
            true => state.bytes_after(lsn).saturating_sub(state.bytes_after(state.synced)),
            false => 0,
        }
    }

    /// Makes everything appended so far durable and returns the LSN up to which it is.
    ///
    /// Callable from any thread, also while the writer appends or syncs.
    ///
    /// # Errors
    /// A failure poisons the log; it is not retried.
    pub(crate) fn sync_appended(&self) -> Result<Lsn, BinlogError> {
        let _turn = self.sync_turn.lock();
        let (target, file, path) = {
            let state = self.state.lock();
            state.check_failed()?;
            match (&state.active, state.segments.back()) {
                (Some(file), Some(segment)) if state.synced < state.appended => {
                    (state.appended, file.clone(), file::path(&self.dir, segment.first))
                }
                _ => return Ok(state.synced),
            }
        };
        // Records in earlier files were synced before this file was created.
        if let Err(source) = file.sync_data() {
            return Err(self.poison(BinlogError::io("sync", &path)(source)));
        }
        let mut state = self.state.lock();
        state.check_failed()?;
        state.synced = target;
        self.synced.send_replace(target);
        Ok(target)
    }

    /// For tests: lets every sync wait until the guard is dropped.
    #[cfg(test)]
    pub(crate) fn hold_syncs(&self) -> parking_lot::MutexGuard<'_, ()> {
        self.sync_turn.lock()
    }

    /// Ends truncation, after the one that runs: the directory may be opened again from now on, and
    /// its recovery must not meet a file that vanishes.
    pub(super) fn close(&self) {
        *self.truncate_turn.lock() = true;
    }

    /// Removes the files that hold nothing after `lsn`, oldest first, and returns the bytes freed.
    /// The active file always stays. A closed log removes nothing.
    ///
    /// # Errors
    /// When a file cannot be removed: it stays in the log. A failed sync of the directory poisons
    /// the log, since a crash could then leave a gap in it.
    pub(crate) fn truncate_to(&self, lsn: Lsn) -> Result<u64, BinlogError> {
        let closed = self.truncate_turn.lock();
        if *closed {
            return Ok(0);
        }
        let mut freed = 0;
        loop {
            let segment = {
                let mut state = self.state.lock();
                match state.segments.front() {
                    Some(oldest) if state.segments.len() > 1 && oldest.last <= lsn => {
                        state.segments.pop_front()
                    }
                    _ => None,
                }
            };
            let Some(segment) = segment else { return Ok(freed) };
            if let Err(error) = file::remove(&file::path(&self.dir, segment.first)) {
                self.state.lock().segments.push_front(segment);
                return Err(error);
            }
            freed += segment.bytes;
            // Each removal is synced by itself: a crash must not keep an older file and lose a
            // newer one.
            file::sync_dir(&self.dir).map_err(|error| self.poison(error))?;
        }
    }

    /// Returns a reader of the records after `after`.
    ///
    /// # Errors
    /// [`BinlogError::TooOld`] when the next one was truncated, [`BinlogError::Ahead`] when `after`
    /// was never written.
    pub(crate) fn reader(self: &Arc<Self>, after: Lsn) -> Result<LogReader, BinlogError> {
        let state = self.state.lock();
        if after.next() < state.first_lsn() {
            return Err(BinlogError::TooOld { asked: after.next(), first: state.first_lsn() });
        }
        if after > state.appended {
            return Err(BinlogError::Ahead { after, last: state.appended });
        }
        drop(state);
        Ok(LogReader::new(self.clone(), after))
    }

    pub(super) fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    pub(super) fn view(&self, wanted: Lsn) -> ReadView {
        let state = self.state.lock();
        let after = state.segments.partition_point(|segment| segment.first <= wanted);
        let place = after
            .checked_sub(1)
            .map(|at| &state.segments[at])
            .filter(|segment| wanted <= segment.last);
        let place = place.map(|segment| ReadPlace {
            file_first: segment.first,
            file_bytes: segment.bytes,
            near: segment.near(wanted),
        });
        ReadView { synced: state.synced, first: state.first_lsn(), place }
    }

    pub(super) fn check_failed(&self) -> Result<(), BinlogError> {
        self.state.lock().check_failed()
    }

    /// Stops all writes for good; returns the error for the caller that met it.
    pub(super) fn poison(&self, error: BinlogError) -> BinlogError {
        self.state.lock().failed.get_or_insert_with(|| error.to_string());
        error
    }

    pub(super) fn appended(&self, lsn: Lsn, offset: u64, end: u64) {
        let mut state = self.state.lock();
        state.appended = lsn;
        state.written += end - offset;
        state
            .segments
            .back_mut()
            .expect("a record is appended to the last segment")
            .push(lsn, offset, end);
    }

    /// Makes a new file the active one.
    pub(super) fn rotated(&self, segment: Segment, file: Arc<File>) {
        let mut state = self.state.lock();
        assert_eq!(state.synced, state.appended, "everything is synced before a file is created");
        state.segments.push_back(segment);
        state.active = Some(file);
    }

    #[cfg(test)]
    pub(super) fn replace_active(&self, file: Arc<File>) {
        self.state.lock().active = Some(file);
    }
}
