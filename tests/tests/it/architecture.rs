//! The rules of ARCHITECTURE.md that a compiler does not hold: which crates may depend on which,
//! where RocksDB is known, no circle of files, a head for every file, a bound for its length, and
//! documents that name tests which exist.

use std::collections::{BTreeMap, BTreeSet};

use vasto_failpoint::points;
use vasto_testkit::sources;

/// Lines of code of one file, its tests not counted.
const LINES_MAX: usize = 550;

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
        ("failpoint", &["core"][..]),
        ("trace", &["core"][..]),
        ("master", &["proto", "shipping", "core", "failpoint", "trace"][..]),
        ("node", &["proto", "shipping", "core", "failpoint", "trace"][..]),
        ("observability", &["trace"][..]),
        ("testkit", &["shipping", "core"][..]),
        (
            "cli",
            &[
                "core",
                "client",
                "failpoint",
                "master",
                "node",
                "observability",
                "proto",
                "shipping",
            ][..],
        ),
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
        assert!(member == &"core" || !found.is_empty(), "{member}: {text}");
    }
}

#[test]
fn only_the_engine_knows_rocksdb() {
    let mut uses = 0;
    for (path, text) in all_sources() {
        // A test may compare the engine's words with those of RocksDB itself.
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
        let knows = code
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

/// The path of a module in its crate; the root is empty.
type Module = Vec<String>;

/// Returns the module paths that `text`, the source of `module`, names by `crate`, `super` or
/// `self`; each may end in an item of that module.
fn named_paths(module: &Module, text: &str) -> Vec<Module> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut named = Vec::new();
    for root in ["crate::", "super::", "self::"] {
        for (at, _) in text.match_indices(root) {
            if text[..at].ends_with(is_word) || text[..at].ends_with("::") {
                continue;
            }
            let rest = &text[at..];
            let end = rest.find(|c: char| !is_word(c) && c != ':').unwrap_or(rest.len());
            let group = rest[end..].strip_prefix('{').and_then(|group| group.split('}').next());
            for last in group.unwrap_or_default().split([',', '{']).map(str::trim) {
                let mut path = if rest.starts_with("crate") { Vec::new() } else { module.clone() };
                for part in rest[..end].split("::").chain(last.split("::")) {
                    match part {
                        "super" => drop(path.pop()),
                        "" | "crate" | "self" => {}
                        part => path.push(part.to_owned()),
                    }
                }
                named.push(path);
            }
        }
    }
    named
}

/// Returns a circle that can be reached from `module`, if there is one.
fn circle<'a>(
    uses: &'a BTreeMap<Module, BTreeSet<Module>>,
    module: &'a Module,
    way: &mut Vec<&'a Module>,
    checked: &mut BTreeSet<&'a Module>,
) -> Option<Vec<String>> {
    if let Some(from) = way.iter().position(|earlier| *earlier == module) {
        return Some(way[from..].iter().map(|module| module.join("::")).collect());
    }
    if checked.contains(module) {
        return None;
    }
    way.push(module);
    let found = uses[module].iter().find_map(|used| circle(uses, used, way, checked));
    way.pop();
    checked.insert(module);
    found
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    for member in sources::members() {
        let src = format!("{member}/src");
        let mut modules = BTreeMap::new();
        for (path, text) in sources::below(&src) {
            if path.contains("/tests/") || path.ends_with("tests.rs") || path.contains("/bin/") {
                continue;
            }
            let name = path[src.len() + 1..].trim_end_matches(".rs");
            let parts = name.split('/').filter(|part| !["mod", "lib", "main"].contains(part));
            let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
            let lines = code.lines().map(|line| line.split("//").next().unwrap());
            modules.insert(
                parts.map(str::to_owned).collect::<Module>(),
                lines.collect::<Vec<_>>().join("\n"),
            );
        }
        let mut uses = BTreeMap::new();
        for (module, code) in &modules {
            let mut used = BTreeSet::new();
            for mut path in named_paths(module, code) {
                while !path.is_empty() && !modules.contains_key(&path) {
                    path.pop();
                }
                // A module may name those that it lies in: they declare it.
                if modules.contains_key(&path) && !module.starts_with(&path) {
                    used.insert(path);
                }
            }
            uses.insert(module.clone(), used);
        }
        assert!(
            uses.len() < 5 || uses.values().any(|used| !used.is_empty()),
            "{member}: no import"
        );
        let mut checked = BTreeSet::new();
        for module in uses.keys() {
            let found = circle(&uses, module, &mut Vec::new(), &mut checked);
            assert_eq!(found, None, "{member}: these files import each other");
        }
    }
}

#[test]
fn failpoints_are_where_the_list_and_the_document_say() {
    let servers = ["master/src", "node/src"].map(sources::below);
    let code: String = servers
        .iter()
        .flatten()
        .filter(|(path, _)| !path.contains("/tests"))
        .map(|(_, text)| text.as_str())
        .collect();
    let text = std::fs::read_to_string(sources::checkout().join("docs/faults.md")).unwrap();
    let (_, rest) = text.split_once("\n## Failpoints\n").unwrap();
    let documented = rest.split("\n## ").next().unwrap();
    let rows: BTreeSet<&str> = documented
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` |").map(|(name, _)| name))
        .collect();
    let names: BTreeSet<&str> = points::ALL.iter().map(|point| point.name()).collect();
    assert_eq!(rows, names, "docs/faults.md and failpoint/src/points.rs");
    for point in points::ALL {
        let constant = point.name().replace('.', "_").to_uppercase();
        let uses = code.split("points::").skip(1).filter(|rest| {
            rest.strip_prefix(constant.as_str())
                .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
        });
        assert_eq!(uses.count(), 1, "{} is passed at one place", point.name());
        let row = format!("| `{}` | {} |", point.name(), point.moment());
        assert!(documented.contains(&row), "docs/faults.md says something else than {row}");
    }
}

#[test]
fn documents_name_tests_that_exist() {
    let mut functions = BTreeSet::new();
    for text in all_sources().values() {
        for (at, _) in text.match_indices("fn ") {
            let name = text[at + 3..].split(|c: char| !c.is_alphanumeric() && c != '_').next();
            functions.insert(name.unwrap().to_owned());
        }
    }
    let mut cited = 0;
    for document in ["faults.md", "hazards.md", "planted-bugs.md", "guarantees.md"] {
        let text =
            std::fs::read_to_string(sources::checkout().join("docs").join(document)).unwrap();
        for quoted in text.split('`').skip(1).step_by(2) {
            let name = quoted.split("::").last().unwrap();
            let is_name = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            // Names of tests are sentences; those of metrics begin with the product's name.
            let is_test = is_name && name.matches('_').count() >= 3 && !name.starts_with("vasto");
            cited += usize::from(is_test);
            assert!(!is_test || functions.contains(name), "docs/{document} names `{quoted}`");
        }
    }
    assert!(cited > 50, "{cited}");
}
