//! Locates the programs under test next to the running program, and rejects a stale `vasto`.
//!
//! **Invariant:** a test never runs against a `vasto` that is older than its source.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// Returns the `vasto` binary: `VASTO_BIN`, or the binary that was built together with this
/// program.
///
/// # Panics
/// When there is no binary, or when it is older than its source.
pub fn vasto_binary() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        if let Some(given) = std::env::var_os("VASTO_BIN") {
            let given = PathBuf::from(given);
            assert!(given.is_file(), "VASTO_BIN is {}, which is no file", given.display());
            return given;
        }
        let found = tool("vasto");
        if let Some(newer) = newer_source(&found) {
            panic!(
                "{} is older than {newer}; build everything first: cargo build --release --workspace",
                found.display()
            );
        }
        found
    })
}

/// Returns a program that was built together with this one.
///
/// # Panics
/// When it was not built.
pub fn tool(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("a running program has a path");
    // Tests run from `<profile>/deps`, programs from `<profile>`.
    this.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file()).unwrap_or_else(|| {
        panic!(
            "there is no {name} beside {}; build everything first: cargo build --release --workspace",
            this.display()
        )
    })
}

/// Returns a file that the build named as an input of `binary` and that has changed since.
///
/// A missing input proves nothing: a build directory outlives the checkout that filled it, and
/// cargo reuses a program of equal sources from there without rewriting its list of inputs.
fn newer_source(binary: &Path) -> Option<String> {
    let built = modified(binary)?;
    let listing = std::fs::read_to_string(binary.with_extension("d")).ok()?;
    inputs(&listing)
        .into_iter()
        .find(|input| modified(Path::new(input)).is_some_and(|changed| changed > built))
}

/// Parses the inputs of a dep-info file: `output: input input ...` with spaces escaped.
fn inputs(listing: &str) -> Vec<String> {
    let Some((_, list)) = listing.lines().next().and_then(|line| line.split_once(": ")) else {
        return Vec::new();
    };
    let marked = list.replace("\\ ", "\0");
    marked.split_whitespace().map(|input| input.replace('\0', " ")).collect()
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).ok()?.modified().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn inputs_with_spaces_are_kept_whole() {
        assert_eq!(inputs("/t/vasto: /a/b.rs /a/c\\ d.rs\n"), ["/a/b.rs", "/a/c d.rs"]);
        assert!(inputs("").is_empty());
    }

    #[test]
    fn a_binary_older_than_its_source_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("source.rs"), "").unwrap();
        std::fs::write(path("vasto"), "").unwrap();
        std::fs::write(
            path("vasto.d"),
            format!("{}: {}\n", path("vasto").display(), path("source.rs").display()),
        )
        .unwrap();
        let built = modified(&path("vasto")).unwrap();
        let touch = |at: SystemTime| {
            let file = std::fs::OpenOptions::new().write(true).open(path("source.rs")).unwrap();
            file.set_modified(at).unwrap();
        };
        touch(built - std::time::Duration::from_secs(1));
        assert_eq!(newer_source(&path("vasto")), None);
        touch(built + std::time::Duration::from_secs(1));
        assert!(newer_source(&path("vasto")).unwrap().ends_with("source.rs"));
        std::fs::remove_file(path("source.rs")).unwrap();
        assert_eq!(newer_source(&path("vasto")), None);
    }
}
