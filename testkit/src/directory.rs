//! Directories for tests.

use tempfile::TempDir;

/// Creates a directory in memory where there is one: a sync is still a call, and costs nothing.
pub fn memory_dir() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}
