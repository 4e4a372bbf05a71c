//! Every object key, in one place. Keys are relative to `<root>`, the prefix in the bucket's URL.
//!
//! **Invariant:** keys are persisted and never change: numbers have 20 digits, so that the order of
//! names is the order of numbers, and ids (never names that people choose, except in `names/`) make
//! up the path.

use vasto_core::{CatalogVersion, KeyspaceId, Lsn, PlanId, ReplicaId, ShardId};

/// The layout format of the prefix that this version writes, and the newest that it uses.
pub const CLUSTER_FORMAT: u64 = 1;

/// Key of the cluster's claim.
pub fn cluster() -> String {
    "cluster.json".to_owned()
}

/// Key of the `n`th version of the node settings, from 1.
pub fn cluster_settings(n: u64) -> String {
    format!("cluster/{n:020}")
}

/// Key of the gc term `n`.
pub fn gc_term(n: u64) -> String {
    format!("gc-term/{n:020}")
}

/// Key of the `n`th binding of a keyspace name, from 1.
pub fn name_version(name: &str, n: u64) -> String {
    format!("names/{name}/{n:020}")
}

/// Prefix of all name bindings.
pub fn names_prefix() -> String {
    "names/".to_owned()
}

/// Key of one version of a keyspace's catalog.
pub fn catalog_version(keyspace: KeyspaceId, version: CatalogVersion) -> String {
    format!("catalog/{:020}/{:020}", keyspace.0, version.0)
}

/// Prefix of all catalog versions.
pub fn catalog_prefix() -> String {
    "catalog/".to_owned()
}

/// Parses a key of [`catalog_version`].
pub fn parse_catalog_version(key: &str) -> Option<(KeyspaceId, CatalogVersion)> {
    let (keyspace, version) = key.strip_prefix("catalog/")?.split_once('/')?;
    Some((KeyspaceId(number(keyspace)?), CatalogVersion(number(version)?)))
}

/// Prefix of a keyspace's data.
pub fn keyspace_prefix(keyspace: KeyspaceId) -> String {
    format!("data/{:020}/", keyspace.0)
}

/// Prefix of one replica's archive.
pub fn replica_prefix(keyspace: KeyspaceId, shard: ShardId, replica: ReplicaId) -> String {
    format!("data/{:020}/{:020}/{:020}/", keyspace.0, shard.0, replica.0)
}

/// Prefix of the archives of one shard's replicas.
pub fn shard_prefix(keyspace: KeyspaceId, shard: ShardId) -> String {
    format!("data/{:020}/{:020}/", keyspace.0, shard.0)
}

/// Key of the database's own list of files, of the checkpoint at `lsn`.
pub fn database(
    keyspace: KeyspaceId,
    shard: ShardId,
    replica: ReplicaId,
    lsn: Lsn,
    attempt: &str,
) -> String {
    format!("{}db/{:020}-{attempt}.manifest", replica_prefix(keyspace, shard, replica), lsn.0)
}

/// Key of an SST. `attempt` is drawn for every upload, because a restore reuses file numbers.
pub fn sst(
    keyspace: KeyspaceId,
    shard: ShardId,
    replica: ReplicaId,
    file_number: u64,
    attempt: &str,
) -> String {
    format!("{}sst/{file_number:020}-{attempt}.sst", replica_prefix(keyspace, shard, replica))
}

/// Key of the log chunk that starts with `first`.
pub fn chunk(keyspace: KeyspaceId, shard: ShardId, replica: ReplicaId, first: Lsn) -> String {
    format!("{}log/{:020}.chunk", replica_prefix(keyspace, shard, replica), first.0)
}

/// Key of the manifest of the checkpoint at `lsn`.
pub fn manifest(keyspace: KeyspaceId, shard: ShardId, replica: ReplicaId, lsn: Lsn) -> String {
    format!("{}{:020}.manifest", checkpoint_prefix(keyspace, shard, replica), lsn.0)
}

/// Prefix of one replica's manifests.
pub fn checkpoint_prefix(keyspace: KeyspaceId, shard: ShardId, replica: ReplicaId) -> String {
    format!("{}checkpoint/", replica_prefix(keyspace, shard, replica))
}

/// Parses the LSN out of a key of [`manifest`].
pub fn parse_manifest_lsn(key: &str) -> Option<Lsn> {
    number(key.rsplit('/').next()?.strip_suffix(".manifest")?).map(Lsn)
}

/// The replica that owns a key under `data/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The shard.
    pub shard: ShardId,
    /// The replica that shipped the object.
    pub replica: ReplicaId,
}

impl Owner {
    /// Key of the manifest of the replica's checkpoint at `lsn`.
    pub fn manifest(&self, lsn: Lsn) -> String {
        manifest(self.keyspace, self.shard, self.replica, lsn)
    }

    /// Key of the replica's log chunk that starts with `first`.
    pub fn chunk(&self, first: Lsn) -> String {
        chunk(self.keyspace, self.shard, self.replica, first)
    }
}

/// The kind of a replica's object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shipped {
    /// An SST.
    Sst,
    /// A database's list of its files.
    Database,
    /// The chunk that starts with this record.
    Chunk(Lsn),
    /// The manifest of the checkpoint at this record.
    Manifest(Lsn),
}

/// Parses the key of a replica's object; `None` for any other key.
pub fn parse_shipped(key: &str) -> Option<(Owner, Shipped)> {
    let mut parts = key.strip_prefix("data/")?.splitn(5, '/');
    let keyspace = KeyspaceId(number(parts.next()?)?);
    let shard = shard(parts.next()?)?;
    let replica = ReplicaId(number(parts.next()?)?);
    let (folder, name) = (parts.next()?, parts.next()?);
    let shipped = match folder {
        "sst" => name.strip_suffix(".sst").map(|_| Shipped::Sst)?,
        "db" => name.strip_suffix(".manifest").map(|_| Shipped::Database)?,
        "log" => Shipped::Chunk(Lsn(number(name.strip_suffix(".chunk")?)?)),
        "checkpoint" => Shipped::Manifest(Lsn(number(name.strip_suffix(".manifest")?)?)),
        _ => return None,
    };
    Some((Owner { keyspace, shard, replica }, shipped))
}

/// Returns true for keys of the claim, catalogs, names, node settings and gc terms.
pub(crate) fn is_of_the_cluster(key: &str) -> bool {
    let of_name = |rest: &str| {
        rest.split_once('/').is_some_and(|(name, n)| !name.is_empty() && number(n).is_some())
    };
    key == cluster()
        || parse_catalog_version(key).is_some()
        || key.strip_prefix("names/").is_some_and(of_name)
        || ["gc-term/", "cluster/"]
            .iter()
            .any(|folder| key.strip_prefix(folder).is_some_and(|n| number(n).is_some()))
}

/// Returns true for a key of any object that Vasto writes.
pub fn is_known(key: &str) -> bool {
    is_of_the_cluster(key) || keyspace_of(key).is_some() || key.starts_with("probe/")
}

/// Prefix of what the sources of a plan export.
pub fn export_prefix(keyspace: KeyspaceId, plan: PlanId) -> String {
    format!("{}export/{:020}/", keyspace_prefix(keyspace), plan.0)
}

/// Key of the `n`th SST that a plan exports from one shard for another. `attempt` is drawn anew
/// when a source exports again.
pub fn export_table(
    keyspace: KeyspaceId,
    plan: PlanId,
    from: ShardId,
    to: ShardId,
    n: u64,
    attempt: &str,
) -> String {
    let folder = export_prefix(keyspace, plan);
    format!("{folder}{:020}-{:020}/{n:020}-{attempt}.sst", from.0, to.0)
}

/// Key of the manifest of what a plan exports from one shard.
pub fn export_manifest(keyspace: KeyspaceId, plan: PlanId, from: ShardId, attempt: &str) -> String {
    format!("{}{:020}-{attempt}.manifest", export_prefix(keyspace, plan), from.0)
}

/// Parses a key of [`export_table`] or [`export_manifest`]; `None` for any other key.
pub fn parse_export(key: &str) -> Option<(KeyspaceId, PlanId)> {
    parse_exported(key).map(|(keyspace, plan, _)| (keyspace, plan))
}

/// The kind of an object of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exported {
    /// An SST that holds rows of `from` for `to`.
    Table { from: ShardId, to: ShardId },
    /// The manifest of the export of `from`.
    Manifest { from: ShardId },
}

/// Parses the key of an object of an export; `None` for any other key.
pub(crate) fn parse_exported(key: &str) -> Option<(KeyspaceId, PlanId, Exported)> {
    let (keyspace, rest) = key.strip_prefix("data/")?.split_once("/export/")?;
    let (plan, rest) = rest.split_once('/')?;
    let exported = match rest.split_once('/') {
        Some((shards, name)) => {
            let (from, to) = shards.split_once('-')?;
            let (n, attempt) = name.strip_suffix(".sst")?.split_once('-')?;
            (number(n).is_some() && is_attempt(attempt))
                .then_some(Exported::Table { from: shard(from)?, to: shard(to)? })?
        }
        None => {
            let (from, attempt) = rest.strip_suffix(".manifest")?.split_once('-')?;
            is_attempt(attempt).then_some(Exported::Manifest { from: shard(from)? })?
        }
    };
    Some((KeyspaceId(number(keyspace)?), PlanId(number(plan)?), exported))
}

/// Returns the keyspace whose data an object holds; `None` for a key of no such object.
pub fn keyspace_of(key: &str) -> Option<KeyspaceId> {
    let shipped = parse_shipped(key).map(|(owner, _)| owner.keyspace);
    shipped.or_else(|| parse_export(key).map(|(keyspace, _)| keyspace))
}

/// Key of the object that the start-up probe writes and removes.
pub fn probe(nonce: u128) -> String {
    format!("probe/{nonce:032x}")
}

fn number(text: &str) -> Option<u64> {
    (text.len() == 20 && text.bytes().all(|c| c.is_ascii_digit())).then(|| text.parse().ok())?
}

fn shard(text: &str) -> Option<ShardId> {
    Some(ShardId(u32::try_from(number(text)?).ok()?))
}

fn is_attempt(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_are_frozen() {
        let (k, s, r) = (KeyspaceId(1), ShardId(2), ReplicaId(3));
        assert_eq!(cluster(), "cluster.json");
        assert_eq!(gc_term(7), "gc-term/00000000000000000007");
        assert_eq!(name_version("ks1", 1), "names/ks1/00000000000000000001");
        assert_eq!(
            catalog_version(k, CatalogVersion(u64::MAX)),
            "catalog/00000000000000000001/18446744073709551615"
        );
        let data = "data/00000000000000000001/00000000000000000002/00000000000000000003";
        assert_eq!(sst(k, s, r, 9, "ab12"), format!("{data}/sst/00000000000000000009-ab12.sst"));
        assert_eq!(chunk(k, s, r, Lsn(5)), format!("{data}/log/00000000000000000005.chunk"));
        assert_eq!(
            manifest(k, s, r, Lsn(6)),
            format!("{data}/checkpoint/00000000000000000006.manifest")
        );
        let export = "data/00000000000000000001/export/00000000000000000004/";
        assert_eq!(export_prefix(k, PlanId(4)), export);
        assert_eq!(
            export_table(k, PlanId(4), s, ShardId(5), 6, "ab12"),
            format!(
                "{export}00000000000000000002-00000000000000000005/00000000000000000006-ab12.sst"
            )
        );
        assert_eq!(
            export_manifest(k, PlanId(4), s, "ab12"),
            format!("{export}00000000000000000002-ab12.manifest")
        );
    }

    #[test]
    fn what_was_made_is_read_and_nothing_else() {
        let key = catalog_version(KeyspaceId(3), CatalogVersion(u64::MAX));
        assert_eq!(parse_catalog_version(&key), Some((KeyspaceId(3), CatalogVersion(u64::MAX))));
        let key = manifest(KeyspaceId(1), ShardId(0), ReplicaId(1), Lsn(77));
        assert_eq!(parse_manifest_lsn(&key), Some(Lsn(77)));
        for bad in [
            "",
            "catalog/",
            "catalog/1/2",
            "catalog/00000000000000000001/99999999999999999999",
            "x/y/z",
        ] {
            assert_eq!(parse_catalog_version(bad), None, "{bad}");
            assert_eq!(parse_manifest_lsn(bad), None, "{bad}");
        }
        assert_eq!(parse_manifest_lsn("checkpoint/+0000000000000000001.manifest"), None);
    }
    fn any_attempt() -> impl Strategy<Value = String> {
        "[0-9a-f]{1,16}"
    }

    proptest! {
        #[test]
        fn every_export_key_is_read_and_none_of_its_alterations(
            (k, plan, n) in any::<(u64, u64, u64)>(),
            (from, to) in any::<(u32, u32)>(),
            attempt in any_attempt(),
            at: usize,
            other in any::<char>(),
        ) {
            let (k, plan, from, to) = (KeyspaceId(k), PlanId(plan), ShardId(from), ShardId(to));
            let table = export_table(k, plan, from, to, n, &attempt);
            let manifest = export_manifest(k, plan, from, &attempt);
            prop_assert_eq!(parse_exported(&table), Some((k, plan, Exported::Table { from, to })));
            prop_assert_eq!(parse_exported(&manifest), Some((k, plan, Exported::Manifest { from })));
            for key in [table, manifest] {
                prop_assert_eq!(parse_export(&key), Some((k, plan)));
                prop_assert_eq!(keyspace_of(&key), Some(k));
                prop_assert!(is_known(&key) && parse_shipped(&key).is_none());
                prop_assert!(key.starts_with(&export_prefix(k, plan)));
                // An inserted character is part of the attempt, or the key is of no export.
                let at = at % (key.len() + 1);
                let altered = format!("{}{other}{}", &key[..at], &key[at..]);
                let end = key.len() - if key.ends_with(".sst") { 4 } else { 9 };
                let in_attempt = (end - attempt.len()..=end).contains(&at);
                let is_read = in_attempt && other.is_ascii_alphanumeric();
                prop_assert_eq!(parse_export(&altered).is_some(), is_read, "{}", altered);
            }
        }

        #[test]
        fn reading_an_export_key_is_total(key in "data/[0-9]{19,21}/export/[0-9]{19,21}/[-0-9a-z./é]{0,60}") {
            if let Some((k, plan)) = parse_export(&key) {
                prop_assert!(key.starts_with(&export_prefix(k, plan)), "{}", key);
            }
        }
    }

    #[test]
    fn what_is_no_export_is_not_read_as_one() {
        let at = "data/00000000000000000001/export/00000000000000000004/";
        let (two, five) = ("00000000000000000002", "00000000000000000005");
        for bad in [
            at.to_owned(),
            format!("{at}{two}-{five}/{two}.sst"),
            format!("{at}{two}-{five}/{two}-.sst"),
            format!("{at}{two}-{five}/{two}-ab/c.sst"),
            format!("{at}{two}-{five}/{two}-ab.manifest"),
            format!("{at}{two}-{five}/x/{two}-ab.sst"),
            format!("{at}{two}-00000000004294967296/{two}-ab.sst"),
            format!("{at}{two}.manifest"),
            format!("{at}{two}-.manifest"),
            format!("{at}{two}-ab-cd.manifest"),
            format!("x/{at}{two}-ab.manifest"),
        ] {
            assert_eq!((parse_export(&bad), keyspace_of(&bad)), (None, None), "{bad}");
        }
    }
}
