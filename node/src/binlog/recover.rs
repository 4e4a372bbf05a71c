//! Opening of a log: reads all of it, distinguishes an unfinished write of a crash from damage, and
//! cuts the unfinished write off.
//!
//! Reading stops at the first bad place: a file without a good header, or a record that is torn,
//! fails its checksum or has another LSN than the one after its predecessor. A power loss writes
//! pages back in any order, so good records after it prove nothing by themselves. The bad place is
//! **rot**, and the log is left unchanged, when the record expected there is known to have been
//! durable:
//!
//! - *A later file exists.* A file is created only after everything before it was synced. (So a
//!   cut never removes a file with a good header; also a gap between two files is rot.)
//! - *A good record after it names a `synced_lsn` at or after it.*
//! - *The file has bytes after a bad header.* The header was synced before the first record was
//!   written, so no crash can remove it.
//!
//! Otherwise the bad place is the end of the log: the file is **cut** there and synced before any
//! append. A file that is no longer than a header, without a good one, is an unfinished creation
//! and is removed; if no other file exists, the log is empty and goes on at the LSN in its name. If
//! a crash interrupts a cut, the next recovery finds the same place or a clean end.
//!
//! A damaged record that was synced, but in the last group before the crash, cannot be
//! distinguished from an unfinished one: no later record proves that it was synced.
//!
//! **Invariant:** everything is decided before the first change, and after a recovery all records
//! found are durable. The last file is synced and its pages are dropped from the cache before it is
//! read: after a failed sync the cache holds records that the disk does not.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vasto_core::Lsn;
use vasto_core::codec::DecodeError;
use vasto_core::limits::RECORD_BYTES_MAX;
use vasto_core::record::{
    FILE_FORMAT, FILE_HEADER_BYTES, FileHeader, RECORD_HEADER_BYTES, frame_at, positions_at,
};

use super::shared::Segment;
use super::{BinlogConfig, BinlogError, file};

/// A log that is ready to be appended to.
pub(super) struct Recovered {
    pub(super) segments: VecDeque<Segment>,
    /// File of the last segment.
    pub(super) active: Option<File>,
    pub(super) last: Lsn,
}

/// Recovers the log of a directory; see the top of this file.
pub(super) fn recover(config: &BinlogConfig) -> Result<Recovered, BinlogError> {
    file::create_dir(&config.dir)?;
    let firsts = file::list(&config.dir)?;
    let mut headers_good = Vec::new();
    for first in &firsts {
        headers_good.push(check_header(config, *first)?);
    }
    let Some(newest) = firsts.last() else {
        return Ok(Recovered { segments: VecDeque::new(), active: None, last: Lsn(0) });
    };
    settle(&config.dir, *newest)?;

    let mut segments = VecDeque::new();
    let mut expected = firsts[0];
    for (at, (first, header_good)) in firsts.iter().zip(headers_good).enumerate() {
        let path = file::path(&config.dir, *first);
        let newest = at + 1 == firsts.len();
        if *first != expected {
            let evidence = format!("the log goes on with record {first}");
            return Err(BinlogError::Rot { file: path, offset: 0, lsn: expected, evidence });
        }
        let bytes = std::fs::read(&path).map_err(BinlogError::io("read", &path))?;
        if !header_good {
            let evidence = match bytes.len() {
                _ if !newest => LATER_FILE.to_owned(),
                0..=FILE_HEADER_BYTES => {
                    let active = drop_unfinished(config, &path, segments.back())?;
                    return Ok(Recovered { segments, active, last: Lsn(first.0 - 1) });
                }
                _ => "the file's header was synced before its first record was written".to_owned(),
            };
            return Err(BinlogError::Rot { file: path, offset: 0, lsn: *first, evidence });
        }
        let segment = scan(&bytes, *first);
        if segment.bytes < bytes.len() as u64 {
            let bad = segment.last.next();
            let evidence = if newest {
                evidence_after(&bytes, segment.bytes as usize, bad)
            } else {
                Some(LATER_FILE.to_owned())
            };
            if let Some(evidence) = evidence {
                return Err(BinlogError::Rot {
                    file: path,
                    offset: segment.bytes,
                    lsn: bad,
                    evidence,
                });
            }
            cut(&path, &segment, bytes.len() as u64)?;
        }
        expected = segment.last.next();
        segments.push_back(segment);
    }
    let active = file::open_writable(&file::path(&config.dir, *newest))?;
    Ok(Recovered { segments, active: Some(active), last: Lsn(expected.0 - 1) })
}

const LATER_FILE: &str =
    "a later file exists, which is created only when everything before it is synced";

/// Returns true when the file has a good header of this log, false when it has no readable header.
fn check_header(config: &BinlogConfig, first: Lsn) -> Result<bool, BinlogError> {
    let path = file::path(&config.dir, first);
    let opened = File::open(&path).map_err(BinlogError::io("open", &path))?;
    let mut bytes = [0; FILE_HEADER_BYTES];
    match opened.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
        read => read.map_err(BinlogError::io("read", &path))?,
    }
    let header = match FileHeader::decode(&bytes) {
        Ok(header) => header,
        Err(DecodeError::Unknown { value, .. }) if !only_format_differs(&bytes) => {
            return Err(BinlogError::NewerFormat { file: path, format: value });
        }
        Err(_) => return Ok(false),
    };
    let here = (header.keyspace, header.shard, header.replica)
        == (config.keyspace, config.shard, config.replica);
    if !here || header.first_lsn != first {
        let reason = format!(
            "it is of keyspace {}, shard {}, replica {} from record {}; this is keyspace {}, shard {}, replica {}",
            header.keyspace,
            header.shard,
            header.replica,
            header.first_lsn,
            config.keyspace,
            config.shard,
            config.replica
        );
        return Err(BinlogError::Foreign { file: path, reason });
    }
    Ok(true)
}

/// Returns true for a header that is good with the right format: damaged, not newer, as its
/// checksum covers the format.
fn only_format_differs(header: &[u8; FILE_HEADER_BYTES]) -> bool {
    let mut put_right = *header;
    put_right[8..12].copy_from_slice(&FILE_FORMAT.to_le_bytes());
    FileHeader::decode(&put_right).is_ok()
}

/// Makes the newest file and the directory durable as they are, and drops the file's cached pages.
fn settle(dir: &Path, newest: Lsn) -> Result<(), BinlogError> {
    let path = file::path(dir, newest);
    let opened = file::open_writable(&path)?;
    opened.sync_all().map_err(BinlogError::io("sync", &path))?;
    file::sync_dir(dir)?;
    if let Err(error) = rustix::fs::fadvise(&opened, 0, None, rustix::fs::Advice::DontNeed) {
        tracing::debug!(file = %path.display(), %error, "this file system keeps its cache");
    }
    Ok(())
}

/// Returns the good records at the front of a file with a good header.
fn scan(bytes: &[u8], first: Lsn) -> Segment {
    let mut segment = Segment::empty(first);
    let mut offset = FILE_HEADER_BYTES;
    let mut expected = first;
    while let Ok(length) = frame_at(&bytes[offset..]) {
        if positions_at(&bytes[offset..]).is_none_or(|(lsn, _)| lsn != expected) {
            break;
        }
        segment.push(expected, offset as u64, (offset + length) as u64);
        offset += length;
        expected = expected.next();
    }
    segment
}

/// Returns the evidence that record `bad`, missing at `offset`, must have been durable; `None`
/// without evidence.
///
/// Tries every byte after it as the start of a record. A false start is cheap to refute: the LSN of
/// a true record is bounded by the room that the records between would need. A good record is
/// skipped as a whole, so that user data in it is not taken for records. If stored bytes still look
/// like records everywhere, the search gives up on the safe side.
fn evidence_after(bytes: &[u8], offset: usize, bad: Lsn) -> Option<String> {
    let mut budget = (1u64 << 30).max(16 * bytes.len() as u64);
    let mut at = offset + 1;
    while at + RECORD_HEADER_BYTES <= bytes.len() {
        let candidate = &bytes[at..];
        let room = ((at - offset) / RECORD_HEADER_BYTES) as u64;
        let possible =
            positions_at(candidate).filter(|(lsn, _)| *lsn > bad && lsn.0 - bad.0 <= room);
        let length = u32::from_le_bytes(candidate[..4].try_into().expect("four bytes")) as usize;
        let fits = (RECORD_HEADER_BYTES..=RECORD_BYTES_MAX.min(candidate.len())).contains(&length);
        let (Some((lsn, synced)), true) = (possible, fits) else {
            at += 1;
            continue;
        };
        if frame_at(candidate).is_ok() {
            if (bad..lsn).contains(&synced) {
                return Some(format!(
                    "record {lsn} behind it, at byte {at}, says that {synced} was synced"
                ));
            }
            at += length;
            continue;
        }
        at += 1;
        budget = budget.saturating_sub(length as u64);
        if budget == 0 {
            return Some(
                "what follows looks like records all over, and the search was given up".to_owned(),
            );
        }
    }
    None
}

/// Removes the bytes after the good records of the newest file, durably.
fn cut(path: &Path, good: &Segment, found_bytes: u64) -> Result<(), BinlogError> {
    let opened = file::open_writable(path)?;
    opened.set_len(good.bytes).map_err(BinlogError::io("cut", path))?;
    opened.sync_all().map_err(BinlogError::io("sync", path))?;
    let removed_bytes = found_bytes - good.bytes;
    tracing::info!(file = %path.display(), last_lsn = good.last.0, removed_bytes, "cut an unfinished write off the log");
    Ok(())
}

/// Removes a file whose creation a crash interrupted; returns the file before it, if any.
fn drop_unfinished(
    config: &BinlogConfig,
    path: &Path,
    before: Option<&Segment>,
) -> Result<Option<File>, BinlogError> {
    file::remove(path)?;
    file::sync_dir(&config.dir)?;
    tracing::info!(file = %path.display(), "removed a log file that was not finished");
    before.map(|segment| file::open_writable(&file::path(&config.dir, segment.first))).transpose()
}
