//! The rules of ARCHITECTURE.md that a compiler does not hold: who may depend on whom, where RocksDB is known,
//! a head for every file, and no file without bounds.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Lines of code of one file, its tests not counted.
const LINES_MAX: usize = 770;
/// Larger ones, to be split: they may shrink, not grow.
const LARGE: [(&str, usize); 1] = [("node/src/ship.rs", 825)];

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn collect(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, out);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            out.push(path);
        }
    }
}

/// All sources of the workspace by their path in it, but for what is generated.
fn sources() -> BTreeMap<String, String> {
    let root = checkout();
    let mut files = Vec::new();
    for member in ["core", "proto", "shipping", "client", "master", "node", "observability", "cli", "tests"] {
        collect(&root.join(member), &mut files);
    }
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(), text)
    };
    files.into_iter().map(read).collect()
}

#[test]
fn crates_depend_downward_only() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("core", &[][..]),
        ("proto", &["core"][..]),
        ("shipping", &["core"][..]),
        ("client", &["proto", "core"][..]),
        ("master", &["proto", "shipping", "core"][..]),
        ("node", &["proto", "shipping", "core"][..]),
        ("observability", &[][..]),
        ("cli", &["core", "client", "master", "node", "observability", "proto", "shipping"][..]),
    ]);
    for (member, may) in &allowed {
        let text = std::fs::read_to_string(checkout().join(member).join("Cargo.toml")).unwrap();
        let dependencies = text.split("\n[").filter(|section| section.starts_with("dependencies]"));
        let found: Vec<&str> = dependencies
            .flat_map(str::lines)
            .filter_map(|line| line.strip_prefix("vasto-")?.split([' ', '.', '=']).next())
            .collect();
        assert!(found.iter().all(|one| may.contains(one)), "{member} depends on {found:?}, and may on {may:?}");
        assert!(member == &"core" || member == &"observability" || !found.is_empty(), "{member}: {text}");
    }
}

#[test]
fn only_the_engine_knows_rocksdb() {
    let mut uses = 0;
    for (path, text) in sources() {
        let knows = text.lines().any(|line| !line.trim_start().starts_with("//") && line.contains("rocksdb::"));
        uses += usize::from(knows);
        let may = path.starts_with("node/src/engine/") || path.contains("bench") || path.contains("/tests/");
        assert!(!knows || may, "{path} uses RocksDB; that is for node/src/engine");
    }
    assert!(uses > 0, "the search finds nothing at all");
}

#[test]
fn every_file_says_what_it_owns_and_has_a_bound() {
    let all = sources();
    assert!(all.len() > 250, "{}", all.len());
    for (path, text) in &all {
        assert!(text.starts_with("//!"), "{path} does not begin with what it owns");
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap().lines().count();
        let large = LARGE.iter().find(|(name, _)| name == path).map(|(_, most)| *most);
        let is_test = path.contains("/tests/") || path.ends_with("tests.rs");
        assert!(is_test || code <= large.unwrap_or(LINES_MAX), "{path} has {code} lines; split it");
    }
    for (name, _) in LARGE {
        assert!(all.contains_key(name), "{name} is gone: take it from the list");
    }
}
