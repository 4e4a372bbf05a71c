//! Listings of a bucket, page by page, in the presence of foreign objects.
//!
//! **Invariants**
//! - A name that Vasto cannot have written (not a valid object name, unreadable, a link cycle)
//!   costs one warning and nothing else: it never ends a listing.
//! - A page that fails is requested again; the pages before it are not.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path as ObjectPath;

use crate::bucket::ObjectInfo;

/// Foreign names that are remembered; more would add no information.
const STRANGERS_MAX: usize = 100;
/// Longest shown part of a foreign name.
const STRANGER_CHARS: usize = 200;

/// The source of a store's pages.
#[derive(Clone)]
pub(crate) enum Source {
    /// Local directories.
    Local(PathBuf),
    /// S3 and compatible stores.
    Pages(Arc<dyn PaginatedListStore>),
    /// One stream, taken as a single page.
    Stream,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Local(root) => f.debug_tuple("Local").field(root).finish(),
            Source::Pages(_) => f.write_str("Pages"),
            Source::Stream => f.write_str("Stream"),
        }
    }
}

/// The content of a prefix.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// The objects.
    pub objects: Vec<ObjectInfo>,
    /// Files that an interrupted write has left beside the objects of a local directory.
    pub staged: Vec<ObjectInfo>,
}

/// Names of foreign objects, each with the reason why it is foreign.
#[derive(Debug, Default)]
pub(crate) struct Strangers(Mutex<BTreeMap<String, String>>);

impl Strangers {
    fn known(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a name; logs it the first time.
    pub(crate) fn add(&self, name: &str, why: &str) {
        let name: String = name.chars().take(STRANGER_CHARS).flat_map(char::escape_debug).collect();
        let mut known = self.known();
        if known.len() < STRANGERS_MAX && !known.contains_key(&name) {
            tracing::warn!(name, why, "something in the bucket is not an object of Vasto; it is passed by");
            known.insert(name, why.to_owned());
        }
    }

    /// Returns the remembered names, each on a line of its own, and forgets them.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.known()).into_iter().map(|(name, why)| format!("{name}: {why}")).collect()
    }
}

/// Reads the next page of a listing; the last has no token.
pub(crate) async fn page(
    store: &dyn PaginatedListStore,
    prefix: &str,
    token: Option<String>,
) -> object_store::Result<(Vec<object_store::ObjectMeta>, Option<String>)> {
    let options = PaginatedListOptions { page_token: token, ..PaginatedListOptions::default() };
    let prefix = (!prefix.is_empty()).then_some(prefix);
    let found = store.list_paginated(prefix, options).await?;
    Ok((found.result.objects, found.page_token))
}

/// Removes the objects with unreadable names from an S3 page, and reports their names.
pub(crate) fn without_strangers(page: &str, mut tell: impl FnMut(&str, String)) -> Option<String> {
    const OPEN: &str = "<Contents>";
    const CLOSE: &str = "</Contents>";
    let mut kept = String::new();
    let mut copied = 0;
    let mut at = 0;
    while let Some(begin) = page[at..].find(OPEN).map(|found| at + found) {
        let end = page[begin..].find(CLOSE).map(|found| begin + found + CLOSE.len())?;
        let key = page[begin..end].split_once("<Key>").and_then(|(_, rest)| rest.split_once("</Key>"));
        let key = unescaped(key.map_or("", |(key, _)| key));
        if let Some(why) = oddity(&key) {
            // A console's folder marker is no object, and needs no warning.
            if key.trim_end_matches('/').is_empty() || !key.ends_with('/') || key.ends_with("//") {
                tell(&key, why);
            }
            kept.push_str(&page[copied..begin]);
            copied = end;
        }
        at = end;
    }
    if copied == 0 {
        return None;
    }
    kept.push_str(&page[copied..]);
    Some(kept)
}

/// Returns why a key of the store cannot be one of Vasto's; `None` when it can.
fn oddity(key: &str) -> Option<String> {
    if key.is_empty() {
        return Some("it has no name".to_owned());
    }
    // Parsing keeps the text except slashes at its ends, without which no read finds the object.
    match ObjectPath::parse(key) {
        Ok(path) if path.as_ref() == key => None,
        Ok(_) => Some("its name begins or ends with a slash".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// Decodes XML's five named and its numeric entities; anything else stays as it is.
fn unescaped(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        let end = rest[at..].find(';').map(|end| at + end);
        let found = end.and_then(|end| {
            let name = &rest[at + 1..end];
            let number = |text: &str, radix| u32::from_str_radix(text, radix).ok().and_then(char::from_u32);
            let character = match name {
                "lt" => Some('<'),
                "gt" => Some('>'),
                "amp" => Some('&'),
                "quot" => Some('"'),
                "apos" => Some('\''),
                _ => match name.strip_prefix('#') {
                    Some(digits) => match digits.strip_prefix('x') {
                        Some(hex) => number(hex, 16),
                        None => number(digits, 10),
                    },
                    None => None,
                },
            };
            character.map(|character| (character, end + 1))
        });
        let (character, next) = found.unwrap_or(('&', at + 1));
        out.push(character);
        rest = &rest[next..];
    }
    out + rest
}

/// Lists everything in a folder of a local directory. Blocks on the disk.
///
/// # Errors
/// When the folder itself cannot be read; a missing folder is empty.
pub(crate) fn walk(root: &Path, folder: &str, strangers: &Strangers) -> std::io::Result<Listing> {
    let mut out = Listing::default();
    let top = root.join(folder);
    let first = match std::fs::read_dir(&top) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(out),
        first => first?,
    };
    let identity = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    // A directory, its name, and the identities of its ancestors. The ancestors of the bucket count too: a
    // link out of it must not bring in the whole disk.
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
            let key = if within.is_empty() { shown.to_string() } else { format!("{within}/{shown}") };
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
                    Ok(entries) => open.push((entries, key, around.iter().copied().chain([number]).collect())),
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
            let modified = found.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
            let modified_us = modified.map_or(0, |at| at.as_micros() as u64);
            let info = ObjectInfo { key, bytes: found.len(), modified_us };
            if staged_for(&info.key).is_some() { out.staged.push(info) } else { out.objects.push(info) }
        }
    }
    Ok(out)
}

/// Returns the object that a staged file was to become: a local directory stages `name` as `name#7`.
pub(crate) fn staged_for(key: &str) -> Option<&str> {
    let (name, number) = key.rsplit_once('#')?;
    (!number.is_empty() && number.bytes().all(|c| c.is_ascii_digit())).then_some(name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn page_of(keys: &[&str]) -> String {
        let one = |key: &&str| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>");
        format!("<List><IsTruncated>false</IsTruncated>{}</List>", keys.iter().map(one).collect::<String>())
    }

    #[test]
    fn a_page_loses_the_names_that_cannot_be_read_and_nothing_else() {
        let odd = ["a//b", "..", "a/../b", "catalog//x", "/a", "a//", "x&#1;y", "x&#x7f;y", ""];
        let good = ["a/b", "a&amp;b", "&lt;", "a b", "ä", "&unknown;", "&", "a..b", "&#99999999;"];
        for stranger in odd {
            let mixed = page_of(&["first", stranger, "between", stranger, "last"]);
            let mut told = Vec::new();
            let kept = without_strangers(&mixed, |key, _| told.push(key.to_owned())).unwrap();
            assert_eq!(kept, page_of(&["first", "between", "last"]), "{stranger}");
            assert_eq!(told, [unescaped(stranger), unescaped(stranger)]);
        }
        let folder = without_strangers(&page_of(&["a/b", "a/"]), |key, _| panic!("{key}"));
        assert_eq!(folder, Some(page_of(&["a/b"])));
        for key in good {
            assert_eq!(without_strangers(&page_of(&[key]), |key, _| panic!("{key}")), None, "{key}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_page(text in "(<Contents>|</Contents>|<Key>|</Key>|&|#|;|x|[0-9a-z/.é]){0,20}") {
            let _ = without_strangers(&text, |_, _| ());
        }
    }

    #[test]
    fn only_what_a_write_stages_counts_as_staged() {
        assert_eq!(staged_for("log/1.chunk#7"), Some("log/1.chunk"));
        for whole in ["log/1.chunk", "a#", "a#b", "a#1b"] {
            assert_eq!(staged_for(whole), None, "{whole}");
        }
    }
}
