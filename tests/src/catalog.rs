//! Reads the catalog in a bucket that is a local directory: the quickest way to see the step of a
//! plan, also while no master runs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use vasto_core::catalog::Catalog;
use vasto_core::plan::Step;

/// The catalog of one keyspace.
#[derive(Debug, Clone)]
pub struct CatalogDir {
    dir: PathBuf,
}

impl CatalogDir {
    /// Opens the catalog of keyspace `id` in the bucket at `root`.
    pub fn new(root: &Path, id: u64) -> Self {
        let key = vasto_shipping::layout::catalog_version(id.into(), 1.into());
        let dir = root.join(key).parent().map(Path::to_path_buf).unwrap_or_default();
        Self { dir }
    }

    /// Returns the last version.
    ///
    /// # Errors
    /// When there is no version, or it cannot be read.
    pub fn tip(&self) -> Result<Catalog> {
        let mut names: Vec<String> = std::fs::read_dir(&self.dir)
            .with_context(|| format!("no catalog in {}", self.dir.display()))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.bytes().all(|c| c.is_ascii_digit()))
            .collect();
        names.sort_unstable();
        let last = names.last().with_context(|| format!("no version in {}", self.dir.display()))?;
        self.read(last)
    }

    fn read(&self, name: &str) -> Result<Catalog> {
        let text = std::fs::read(self.dir.join(name))?;
        let mut object: Value = serde_json::from_slice(&text)?;
        Ok(serde_json::from_value(object["body"].take())?)
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
            let name = format!("{version:020}");
            if self.dir.join(&name).exists() {
                let catalog = self.read(&name)?;
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
