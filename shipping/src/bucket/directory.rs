//! Listings of a bucket in a local directory.
//!
//! **Invariant:** a name that Vasto cannot have written, an unreadable entry and a link cycle never
//! end a listing.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::object::{Listing, ObjectInfo};
use super::strangers::{Strangers, oddity};

/// Lists everything in a folder of a local directory. Blocks on the disk.
///
/// # Errors
/// When the folder itself cannot be read; a missing folder is empty.
pub(super) fn walk(root: &Path, folder: &str, strangers: &Strangers) -> std::io::Result<Listing> {
    let mut out = Listing::default();
    let top = root.join(folder);
    let first = match std::fs::read_dir(&top) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(out),
        first => first?,
    };
    let identity =
        |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    // A directory, its name, and the identities of its ancestors. The ancestors of the bucket count
    // too: a link out of it must not bring in the whole disk.
    let around = std::fs::canonicalize(&top)?.ancestors().filter_map(identity).collect::<Vec<_>>();
    let mut open = vec![(first, folder.to_owned(), around)];
    while let Some((entries, within, around)) = open.pop() {
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    strangers.add(&within, &format!("it cannot be read: {error}"));
                    continue;
                }
            };
            let raw = entry.file_name();
            let shown = raw.to_string_lossy();
            let key =
                if within.is_empty() { shown.to_string() } else { format!("{within}/{shown}") };
            if raw.to_str().is_none() {
                strangers.add(&key, "its name is not UTF-8");
                continue;
            }
            let path = entry.path();
            let found = match std::fs::metadata(&path) {
                Ok(found) => found,
                // Deleted meanwhile; a dangling link still exists.
                Err(_) if std::fs::symlink_metadata(&path).is_err() => continue,
                Err(error) => {
                    strangers.add(&key, &format!("it cannot be read: {error}"));
                    continue;
                }
            };
            if found.is_dir() {
                let number = (found.dev(), found.ino());
                if around.contains(&number) {
                    strangers.add(&key, "it leads back to a folder around it");
                    continue;
                }
                match std::fs::read_dir(&path) {
                    Ok(entries) => {
                        open.push((entries, key, around.iter().copied().chain([number]).collect()))
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => strangers.add(&key, &format!("it cannot be read: {error}")),
                }
                continue;
            }
            if !found.is_file() {
                strangers.add(&key, "it is not a file");
                continue;
            }
            if let Some(why) = oddity(&key) {
                strangers.add(&key, &why);
                continue;
            }
            let modified =
                found.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
            let modified_us = modified.map_or(0, |at| at.as_micros() as u64);
            let info = ObjectInfo { key, bytes: found.len(), modified_us };
            if staged_for(&info.key).is_some() {
                out.staged.push(info)
            } else {
                out.objects.push(info)
            }
        }
    }
    Ok(out)
}

/// Returns the object that a staged file was to become: a local directory stages `name` as
/// `name#7`.
pub(crate) fn staged_for(key: &str) -> Option<&str> {
    let (name, number) = key.rsplit_once('#')?;
    (!number.is_empty() && number.bytes().all(|c| c.is_ascii_digit())).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_write_stages_counts_as_staged() {
        assert_eq!(staged_for("log/1.chunk#7"), Some("log/1.chunk"));
        for whole in ["log/1.chunk", "a#", "a#b", "a#1b"] {
            assert_eq!(staged_for(whole), None, "{whole}");
        }
    }
}
