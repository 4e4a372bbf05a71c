//! Files of a log on disk: their names, and durable changes of the directory.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vasto_core::Lsn;
use vasto_core::record::FileHeader;

use super::BinlogError;

/// Returns the path of the file whose first record is (or will be) `first`.
pub(super) fn path(dir: &Path, first: Lsn) -> PathBuf {
    dir.join(format!("{:020}.log", first.0))
}

/// Returns the first LSN that a file name encodes; `None` for names that no log file has.
fn parse_name(name: &str) -> Option<Lsn> {
    let digits = name.strip_suffix(".log")?;
    let good = digits.len() == 20 && digits.bytes().all(|c| c.is_ascii_digit());
    good.then(|| digits.parse().ok().map(Lsn)).flatten().filter(|first| first.0 > 0)
}

/// Returns the first LSNs of the log files in the directory, ascending. Ignores other files.
pub(super) fn list(dir: &Path) -> Result<Vec<Lsn>, BinlogError> {
    let mut firsts = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(BinlogError::io("list", dir))? {
        let entry = entry.map_err(BinlogError::io("list", dir))?;
        match entry.file_name().to_str().and_then(parse_name) {
            Some(first) => firsts.push(first),
            None => {
                tracing::warn!(file = %entry.path().display(), "not a binlog file; it is ignored")
            }
        }
    }
    firsts.sort_unstable();
    Ok(firsts)
}

/// Creates a file with its header, and makes both the file and its name durable.
pub(super) fn create(dir: &Path, header: &FileHeader) -> Result<File, BinlogError> {
    let path = path(dir, header.first_lsn);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(BinlogError::io("create", &path))?;
    file.write_all_at(&header.encode(), 0)
        .map_err(BinlogError::io("write the header of", &path))?;
    file.sync_all().map_err(BinlogError::io("sync", &path))?;
    sync_dir(dir)?;
    Ok(file)
}

/// Opens a file for reading and writing.
pub(super) fn open_writable(path: &Path) -> Result<File, BinlogError> {
    OpenOptions::new().read(true).write(true).open(path).map_err(BinlogError::io("open", path))
}

/// Removes a file; durable after [`sync_dir`].
pub(super) fn remove(path: &Path) -> Result<(), BinlogError> {
    std::fs::remove_file(path).map_err(BinlogError::io("remove", path))
}

/// Makes creations and removals in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), BinlogError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(BinlogError::io("sync the directory", dir))
}

/// Creates the directory if it is missing, durably.
pub(super) fn create_dir(dir: &Path) -> Result<(), BinlogError> {
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(dir).map_err(BinlogError::io("create the directory", dir))?;
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_lsn_and_strangers_are_none() {
        let name = path(Path::new(""), Lsn(42));
        assert_eq!(name, Path::new("00000000000000000042.log"));
        assert_eq!(parse_name("00000000000000000042.log"), Some(Lsn(42)));
        assert_eq!(parse_name(&format!("{}.log", u64::MAX)), Some(Lsn(u64::MAX)));
        for stranger in
            ["42.log", "00000000000000000000.log", "99999999999999999999.log", "x", ".log", ""]
        {
            assert_eq!(parse_name(stranger), None, "{stranger}");
        }
        assert_eq!(parse_name("+0000000000000000042.log"), None);
    }
}
