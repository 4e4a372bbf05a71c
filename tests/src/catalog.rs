//! Reads the catalog in a bucket of which the test sees the objects themselves: the quickest way to
//! see the step of a plan, also while no master runs or nobody reaches the bucket.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use vasto_core::catalog::Catalog;
use vasto_core::plan::Step;
use vasto_testkit::http_store::HttpStore;

/// The catalog of one keyspace.
#[derive(Debug, Clone)]
pub struct CatalogDir(Versions);

/// Where the versions are.
#[derive(Debug, Clone)]
enum Versions {
    Dir(PathBuf),
    Store(Arc<HttpStore>, String),
}

impl Versions {
    fn names(&self) -> Result<Vec<String>> {
        match self {
            Self::Dir(dir) => Ok(std::fs::read_dir(dir)
                .with_context(|| format!("no catalog in {}", dir.display()))?
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect()),
            Self::Store(store, prefix) => Ok(store.keys_below(prefix)),
        }
    }

    fn object(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match self {
            Self::Dir(dir) => match std::fs::read(dir.join(name)) {
                Ok(object) => Ok(Some(object)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error.into()),
            },
            Self::Store(store, prefix) => {
                Ok(store.object(&format!("{prefix}{name}")).map(|object| object.to_vec()))
            }
        }
    }
}

impl CatalogDir {
    /// Opens the catalog of keyspace `id` in the bucket at `root`.
    pub fn new(root: &Path, id: u64) -> Self {
        Self(Versions::Dir(root.join(prefix(id))))
    }

    /// Opens the catalog of keyspace `id` in a store.
    pub fn in_store(store: &Arc<HttpStore>, id: u64) -> Self {
        Self(Versions::Store(Arc::clone(store), prefix(id)))
    }

    /// Returns the last version.
    ///
    /// # Errors
    /// When there is no version, or it cannot be read.
    pub fn tip(&self) -> Result<Catalog> {
        let names = self.0.names()?.into_iter();
        let last = names.filter(|name| name.bytes().all(|c| c.is_ascii_digit())).max();
        let last = last.with_context(|| format!("no version in {:?}", self.0))?;
        self.read(&last)?.with_context(|| format!("version {last} is gone"))
    }

    fn read(&self, name: &str) -> Result<Option<Catalog>> {
        let Some(text) = self.0.object(name)? else { return Ok(None) };
        let mut object: Value = serde_json::from_slice(&text)?;
        Ok(Some(serde_json::from_value(object["body"].take())?))
    }

    /// Waits, reading every version after `after` in turn, for a version whose plan is in `step`;
    /// returns it as soon as it exists, or `None` when the plan ends before.
    ///
    /// # Errors
    /// When the deadline passes.
    pub async fn step(
        &self,
        after: &Catalog,
        step: Step,
        deadline: Duration,
    ) -> Result<Option<Catalog>> {
        let start = Instant::now();
        let mut version = after.version.0 + 1;
        let mut began = after.plan.is_some();
        loop {
            if let Some(catalog) = self.read(&format!("{version:020}"))? {
                match &catalog.plan {
                    Some(plan) if plan.step == step => return Ok(Some(catalog)),
                    None if began => return Ok(None),
                    plan => began |= plan.is_some(),
                }
                version += 1;
                continue;
            }
            if start.elapsed() > deadline {
                bail!(
                    "waited {deadline:?} in vain for the step {step:?}, after version {}",
                    version - 1
                );
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Returns the prefix of the versions' keys.
fn prefix(id: u64) -> String {
    let first = vasto_shipping::layout::catalog_version(id.into(), 1.into());
    first.rsplit_once('/').map_or_else(String::new, |(dir, _)| format!("{dir}/"))
}
