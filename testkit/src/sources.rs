//! The sources of the workspace, for tests that read them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Returns the directory of the checkout.
pub fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Returns the folders of the members of the workspace.
pub fn members() -> Vec<String> {
    let manifest = std::fs::read_to_string(checkout().join("Cargo.toml")).unwrap();
    let (_, rest) = manifest.split_once("members = [").unwrap();
    let (list, _) = rest.split_once(']').unwrap();
    list.split(',')
        .map(|name| name.trim().trim_matches('"').to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

/// Returns the Rust files below a folder of the checkout with their text, by their path in the
/// checkout; the code that a build generates is not among them.
pub fn below(folder: &str) -> BTreeMap<String, String> {
    let root = checkout();
    let mut out = BTreeMap::new();
    collect(&root, &root.join(folder), &mut out);
    out
}

fn collect(root: &Path, dir: &Path, out: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, out);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            out.insert(name, std::fs::read_to_string(&path).unwrap());
        }
    }
}
