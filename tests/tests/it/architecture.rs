//! The rules of ARCHITECTURE.md that a compiler does not hold: who may depend on whom, where
//! RocksDB is known, a head for every file, and no file without bounds.

use std::collections::BTreeMap;

use vasto_testkit::sources;

/// Lines of code of one file, its tests not counted.
const LINES_MAX: usize = 770;

/// All sources of the workspace by their path in it, but for what is generated.
fn all_sources() -> BTreeMap<String, String> {
    sources::members().iter().flat_map(|member| sources::below(member)).collect()
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
        ("testkit", &["shipping", "core"][..]),
        ("cli", &["core", "client", "master", "node", "observability", "proto", "shipping"][..]),
    ]);
    for (member, may) in &allowed {
        let text =
            std::fs::read_to_string(sources::checkout().join(member).join("Cargo.toml")).unwrap();
        let dependencies = text.split("\n[").filter(|section| section.starts_with("dependencies]"));
        let found: Vec<&str> = dependencies
            .flat_map(str::lines)
            .filter_map(|line| line.strip_prefix("vasto-")?.split([' ', '.', '=']).next())
            .collect();
        assert!(
            found.iter().all(|one| may.contains(one)),
            "{member} depends on {found:?}, and may on {may:?}"
        );
        assert!(
            member == &"core" || member == &"observability" || !found.is_empty(),
            "{member}: {text}"
        );
    }
}

#[test]
fn only_the_engine_knows_rocksdb() {
    let mut uses = 0;
    for (path, text) in all_sources() {
        let knows = text
            .lines()
            .any(|line| !line.trim_start().starts_with("//") && line.contains("rocksdb::"));
        uses += usize::from(knows);
        let may = path.starts_with("node/src/engine/")
            || path.contains("bench")
            || path.contains("/tests/");
        assert!(!knows || may, "{path} uses RocksDB; that is for node/src/engine");
    }
    assert!(uses > 0, "the search finds nothing at all");
}

#[test]
fn every_file_says_what_it_owns_and_has_a_bound() {
    let all = all_sources();
    assert!(all.len() > 250, "{}", all.len());
    for (path, text) in &all {
        assert!(text.starts_with("//!"), "{path} does not begin with what it owns");
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap().lines().count();
        let is_test = path.contains("/tests/") || path.ends_with("tests.rs");
        assert!(is_test || code <= LINES_MAX, "{path} has {code} lines; split it");
    }
}
