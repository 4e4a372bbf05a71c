//! Documents of `vasto bucket`.

use serde::Deserialize;

/// The result of [`Vasto::check_bucket`](crate::Vasto::check_bucket).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct BucketCheck {
    /// Number of objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Number of objects that are needed.
    pub referenced: u64,
    /// The objects that are not needed.
    pub orphans: Vec<Orphan>,
    /// Keys of objects that are needed and not there.
    pub missing: Vec<String>,
    /// Keys of objects that differ from what was written.
    pub corrupt: Vec<String>,
    /// Sentences for the operator.
    pub warnings: Vec<String>,
}

/// An object that nothing needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Orphan {
    /// Its key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// Seconds since it was written.
    pub age_s: u64,
}

/// The result of [`Vasto::collect_garbage`](crate::Vasto::collect_garbage).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct GarbageCollection {
    /// Nothing was deleted, only listed.
    pub dry_run: bool,
    /// Number of deleted objects.
    pub deleted: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Number of objects that are not needed and too young to be deleted.
    pub young: u64,
    /// Number of objects that stay.
    pub kept: u64,
    /// Bytes of all objects when the collection began.
    pub stored_bytes: u64,
    /// Why the collection ended early.
    pub stopped: Option<String>,
    /// Keys of the deleted objects.
    pub keys: Vec<String>,
    /// Sentences for the operator.
    pub warnings: Vec<String>,
}

/// The result of [`Vasto::repair_bucket`](crate::Vasto::repair_bucket).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct BucketRepair {
    /// The id of the cluster.
    pub cluster_id: String,
    /// `cluster.json` was written again.
    pub claimed: bool,
    /// Number of versions and names of the catalog that were written again.
    pub written: u64,
    /// Names of the keyspaces that serve.
    pub keyspaces: Vec<String>,
    /// Shards of which a new checkpoint was shipped.
    pub shipped_anew: Vec<String>,
    /// Ids of keyspaces that have data in the bucket and no catalog anywhere.
    pub unknown_keyspaces: Vec<u64>,
    /// Ids of nodes that were away.
    pub away: Vec<String>,
    /// Keys of objects that are still missing.
    pub missing: Vec<String>,
    /// Keys of objects that differ from what was written.
    pub corrupt: Vec<String>,
    /// Sentences for the operator.
    pub warnings: Vec<String>,
}
