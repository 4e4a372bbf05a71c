//! Passing shortages: a full disk, no free descriptors. A replica that ran into one is not damaged:
//! it can continue as soon as the shortage is over.
//!
//! **Invariant:** only an error that certainly names a shortage counts as one; any other failure
//! stays until an operator has checked it.

use std::fs::File;
use std::path::Path;

use vasto_core::limits::{DISK_LOW_BYTES_MAX, DISK_LOW_BYTES_MIN};

/// The resource that is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Shortage {
    /// Space on the disk, or in a quota of it.
    Disk,
    /// Descriptors, of the process or of the machine.
    Descriptors,
    /// Threads.
    Threads,
    /// The database of a replica that has just been closed: its last user is about to release it.
    Database,
}

/// Error of a replica whose writer did not get a thread.
pub(crate) const NO_THREAD: &str = "there is no thread for its writer";

/// Texts by which the operating system, the standard library and RocksDB name shortages.
const WORDS: [(&str, Shortage); 7] = [
    ("No space left on device", Shortage::Disk),
    ("no space left", Shortage::Disk),
    ("Disk quota exceeded", Shortage::Disk),
    ("Too many open files", Shortage::Descriptors),
    (NO_THREAD, Shortage::Threads),
    ("lock hold by current process", Shortage::Database),
    ("lock is held by current process", Shortage::Database),
];

/// Descriptors that must be free before a retry: the number that opening a replica takes.
const DESCRIPTORS_WANTED: usize = 48;

/// Returns the shortage that an error names, if any.
pub(crate) fn shortage_of(error: &str) -> Option<Shortage> {
    WORDS.iter().find(|(words, _)| error.contains(words)).map(|(_, shortage)| *shortage)
}

impl Shortage {
    /// Returns whether the shortage is over for files in this directory.
    pub(crate) fn is_over(self, dir: &Path) -> bool {
        match self {
            Shortage::Disk => DiskRoom::of(dir).is_some_and(|room| room.is_comfortable()),
            Shortage::Threads => std::thread::Builder::new().spawn(|| ()).is_ok(),
            Shortage::Descriptors => can_open(DESCRIPTORS_WANTED),
            Shortage::Database => true,
        }
    }
}

fn can_open(count: usize) -> bool {
    let files: Result<Vec<File>, _> = (0..count).map(|_| File::open("/dev/null")).collect();
    files.is_ok()
}

/// Space on the file system of a directory, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DiskRoom {
    /// Bytes that an unprivileged process may still use.
    pub free: u64,
    /// Total bytes.
    pub total: u64,
}

impl DiskRoom {
    /// Reads the current space; `None` when the file system does not report it.
    pub(crate) fn of(dir: &Path) -> Option<Self> {
        let stat = rustix::fs::statvfs(dir).ok()?;
        Some(Self { free: stat.f_bavail * stat.f_frsize, total: stat.f_blocks * stat.f_frsize })
    }

    /// Returns the reserve: free space below it belongs to flushes, compactions and data that is
    /// written already.
    fn reserve(self) -> u64 {
        (self.total / 50).clamp(DISK_LOW_BYTES_MIN, DISK_LOW_BYTES_MAX)
    }

    /// Returns true when client writes are to be refused.
    pub(crate) fn is_low(self) -> bool {
        self.free < self.reserve()
    }

    /// Returns true when client writes can be accepted again: above the reserve by a margin,
    /// against flapping.
    pub(crate) fn is_comfortable(self) -> bool {
        self.free >= self.reserve() + self.reserve() / 4
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Error;

    #[test]
    fn what_the_system_says_of_a_shortage_is_understood_and_nothing_else() {
        for (error, shortage) in [
            (Error::from_raw_os_error(28).to_string(), Shortage::Disk),
            (Error::from_raw_os_error(122).to_string(), Shortage::Disk),
            (Error::from_raw_os_error(24).to_string(), Shortage::Descriptors),
            (Error::from_raw_os_error(23).to_string(), Shortage::Descriptors),
            (
                "IO error: No space left on device: While appending to file: /d/1.sst".to_owned(),
                Shortage::Disk,
            ),
            (
                "IO error: While open a file for lock: /d/LOCK: Too many open files".to_owned(),
                Shortage::Descriptors,
            ),
        ] {
            assert_eq!(shortage_of(&error), Some(shortage), "{error}");
        }
        for other in [
            Error::from_raw_os_error(5).to_string(),
            Error::from_raw_os_error(30).to_string(),
            "Corruption: block checksum mismatch".to_owned(),
            "the replica was closed".to_owned(),
        ] {
            assert_eq!(shortage_of(&other), None, "{other}");
        }
    }

    #[test]
    fn a_database_that_its_last_user_has_not_released_yet_is_a_passing_shortage() {
        let temp = tempfile::tempdir().unwrap();
        let _user = rocksdb::DB::open_default(temp.path()).unwrap();
        let Err(error) = rocksdb::DB::open_default(temp.path()) else {
            panic!("a database was opened twice")
        };
        assert_eq!(shortage_of(error.as_ref()), Some(Shortage::Database), "{error}");
    }

    #[test]
    fn the_reserve_of_a_disk_is_a_fiftieth_within_bounds() {
        const MIB: u64 = 1 << 20;
        let room = |free, total| DiskRoom { free: free * MIB, total: total * MIB };
        assert!(room(15, 256).is_low() && !room(17, 256).is_low(), "16 MiB of a small one");
        assert!(!room(17, 256).is_comfortable() && room(20, 256).is_comfortable());
        assert!(room(199, 10_000).is_low() && !room(201, 10_000).is_low());
        assert!(
            room(1_023, 1 << 30).is_low() && !room(1_025, 1 << 30).is_low(),
            "1 GiB of a large one"
        );
        assert!(DiskRoom::of(Path::new("/")).unwrap().total > 0);
        assert_eq!(DiskRoom::of(Path::new("/no/such/place")), None);
    }
}
