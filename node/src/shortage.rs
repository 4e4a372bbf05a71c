//! Shortages that pass: a full disk, no descriptors left. What ran into one is not damaged: it can go on as soon
//! as there is room again.
//!
//! **Invariant:** only what certainly says so counts as a shortage; everything else that fails stays failed until
//! somebody has looked.

use std::fs::File;
use std::path::Path;

use vasto_core::limits::{DISK_LOW_BYTES_MAX, DISK_LOW_BYTES_MIN};

/// What there is too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shortage {
    /// Room on the disk, or in a quota of it.
    Disk,
    /// Descriptors, of the process or of the machine.
    Descriptors,
    /// Threads.
    Threads,
    /// The database of a replica that has just been closed: its last user is about to let go of it.
    Database,
}

/// How a replica says that its writer did not get a thread.
pub const NO_THREAD: &str = "there is no thread for its writer";

/// How the operating system, the standard library and RocksDB name them.
const WORDS: [(&str, Shortage); 7] = [
    ("No space left on device", Shortage::Disk),
    ("no space left", Shortage::Disk),
    ("Disk quota exceeded", Shortage::Disk),
    ("Too many open files", Shortage::Descriptors),
    (NO_THREAD, Shortage::Threads),
    ("lock hold by current process", Shortage::Database),
    ("lock is held by current process", Shortage::Database),
];

/// Descriptors that must be free before what ran out of them is tried again: what opening a replica takes.
const DESCRIPTORS_WANTED: usize = 48;

/// The shortage that an error tells of, if it does.
pub fn told_by(error: &str) -> Option<Shortage> {
    WORDS.iter().find(|(words, _)| error.contains(words)).map(|(_, shortage)| *shortage)
}

impl Shortage {
    /// Whether it is over, for what lives in this directory.
    pub fn is_over(self, dir: &Path) -> bool {
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

/// Room on the file system of a directory, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRoom {
    /// What an unprivileged process may still use.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

impl DiskRoom {
    /// What is there now; nothing when the file system does not say.
    pub fn of(dir: &Path) -> Option<Self> {
        let found = rustix::fs::statvfs(dir).ok()?;
        Some(Self { free: found.f_bavail * found.f_frsize, total: found.f_blocks * found.f_frsize })
    }

    /// Below this, what is free belongs to flushes, compactions and what others have written already.
    fn reserve(self) -> u64 {
        (self.total / 50).clamp(DISK_LOW_BYTES_MIN, DISK_LOW_BYTES_MAX)
    }

    /// Clients' writes are refused before anything is written.
    pub fn is_low(self) -> bool {
        self.free < self.reserve()
    }

    /// They are taken again: more than at the edge, so that it does not go to and fro.
    pub fn is_comfortable(self) -> bool {
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
            ("IO error: No space left on device: While appending to file: /d/1.sst".to_owned(), Shortage::Disk),
            ("IO error: While open a file for lock: /d/LOCK: Too many open files".to_owned(), Shortage::Descriptors),
        ] {
            assert_eq!(told_by(&error), Some(shortage), "{error}");
        }
        for other in [
            Error::from_raw_os_error(5).to_string(),
            Error::from_raw_os_error(30).to_string(),
            "Corruption: block checksum mismatch".to_owned(),
            "the replica was closed".to_owned(),
        ] {
            assert_eq!(told_by(&other), None, "{other}");
        }
    }

    #[test]
    fn the_reserve_of_a_disk_is_a_fiftieth_within_bounds() {
        const MIB: u64 = 1 << 20;
        let room = |free, total| DiskRoom { free: free * MIB, total: total * MIB };
        assert!(room(15, 256).is_low() && !room(17, 256).is_low(), "16 MiB of a small one");
        assert!(!room(17, 256).is_comfortable() && room(20, 256).is_comfortable());
        assert!(room(199, 10_000).is_low() && !room(201, 10_000).is_low());
        assert!(room(1_023, 1 << 30).is_low() && !room(1_025, 1 << 30).is_low(), "1 GiB of a large one");
        assert!(DiskRoom::of(Path::new("/")).unwrap().total > 0);
        assert_eq!(DiskRoom::of(Path::new("/no/such/place")), None);
    }
}
