//! Sizes of what is read and written: tables, lists of files, and the requests for them.
//!
//! **Invariant:** the constants follow the writers: the greatest size of an SST, the parts of
//! downloads and uploads, the JSON of manifests.

use vasto_core::report::ReplicaReport;

/// The size at which a node ends an SST and begins the next one.
pub(super) const TABLE_BYTES: u64 = 32 << 20;
/// The most bytes of an object that one request reads.
const BYTES_PER_GET: u64 = 8 << 20;
/// The most bytes of an object that one request writes; a larger one takes a beginning, parts and
/// an end.
const BYTES_PER_PUT: u64 = 16 << 20;
/// The manifest of a checkpoint, and what each of its files adds to it.
const MANIFEST: (u64, u64) = (1_100, 310);
/// The manifest of an export, and what each of its tables adds to it.
const EXPORT_MANIFEST: (u64, u64) = (300, 200);
/// A database's own list of its files, and what each of them adds to it.
const DATABASE_LIST: (u64, u64) = (2_000, 150);

fn list((alone, each): (u64, u64), files: f64) -> f64 {
    alone as f64 + each as f64 * files
}

pub(super) fn manifest_bytes(files: f64) -> f64 {
    list(MANIFEST, files)
}

pub(super) fn export_manifest_bytes(tables: f64) -> f64 {
    list(EXPORT_MANIFEST, tables)
}

pub(super) fn database_list_bytes(files: f64) -> f64 {
    list(DATABASE_LIST, files)
}

/// Returns the bytes of a replica's checkpoint, of so many bytes, that are not in the bucket yet: as
/// its node says, or else by the part of the log behind its last manifest. A compaction writes no log
/// and leaves nothing but new files.
pub(super) fn unshipped(report: &ReplicaReport, checkpoint: f64) -> f64 {
    if let Some(bytes) = report.stored.as_ref().and_then(|stored| stored.unshipped_bytes) {
        return (bytes as f64).min(checkpoint);
    }
    let shipped = match report.lsn.0 {
        0 => 0.0,
        lsn => (report.manifest_lsn.0 as f64 / lsn as f64).min(1.0),
    };
    checkpoint * (1.0 - shipped)
}

/// Returns the tables that hold so many bytes, written one after the other.
pub(super) fn tables(bytes: f64) -> f64 {
    (bytes / TABLE_BYTES as f64).floor() + 1.0
}

/// Returns the requests that read tables of so many bytes.
pub(super) fn gets(bytes: u64) -> u64 {
    of_tables(bytes, |table| table.div_ceil(BYTES_PER_GET))
}

/// Returns the requests that write tables of so many bytes.
pub(super) fn puts(bytes: u64) -> u64 {
    of_tables(bytes, |table| match table {
        0..=BYTES_PER_PUT => 1,
        _ => 2 + table.div_ceil(BYTES_PER_PUT),
    })
}

fn of_tables(bytes: u64, requests: impl Fn(u64) -> u64) -> u64 {
    let rest = match bytes % TABLE_BYTES {
        0 => 0,
        rest => requests(rest),
    };
    bytes / TABLE_BYTES * requests(TABLE_BYTES) + rest
}

#[cfg(test)]
mod tests {
    use vasto_core::ids::Lsn;
    use vasto_core::stored::Stored;

    use super::*;
    use crate::state::tests::replica_report;

    #[test]
    fn what_is_not_shipped_is_what_the_node_says_or_the_log_behind_the_manifest() {
        let mut report = replica_report(1, 1);
        (report.lsn, report.manifest_lsn) = (Lsn(100), Lsn(75));
        assert_eq!(unshipped(&report, 1_000.0), 250.0);
        let stored = |unshipped_bytes| Stored { unshipped_bytes, ..Stored::default() };
        report.stored = Some(stored(None));
        assert_eq!(unshipped(&report, 1_000.0), 250.0, "an older node does not say");
        report.stored = Some(stored(Some(900)));
        assert_eq!(unshipped(&report, 1_000.0), 900.0);
        assert_eq!(unshipped(&report, 800.0), 800.0);
        report.lsn = Lsn(0);
        report.stored = None;
        assert_eq!(unshipped(&report, 800.0), 800.0);
    }

    #[test]
    fn requests_follow_the_parts_of_each_table() {
        const MIB: u64 = 1 << 20;
        assert_eq!([0, 1, 8 * MIB, 9 * MIB, 100 * MIB].map(gets), [0, 1, 1, 2, 3 * 4 + 1]);
        assert_eq!([0, 1, 16 * MIB, 17 * MIB, 100 * MIB].map(puts), [0, 1, 1, 4, 3 * 4 + 1]);
        assert_eq!([0.0, 33e6, 34e6].map(tables), [1.0, 1.0, 2.0]);
    }
}
