//! The choice of sources as a file beside the replica, for the next attempt: object keys and LSNs
//! in place of decoded manifests.

use std::path::Path;

use serde::{Deserialize, Serialize};
use vasto_core::ids::{KeyspaceId, Lsn, ReplicaId, ShardId};
use vasto_shipping::archive::{self, Later, Times};
use vasto_shipping::bucket::Bucket;
use vasto_shipping::layout::{self, Owner};

use super::{RestoreSource, RestoreSources};
use crate::build::error::{BuildError, io};
use crate::node_dir::{read_json, write_json};

/// [`RestoreSources`] as stored.
#[derive(Serialize, Deserialize)]
struct StoredSources {
    all: Vec<StoredSource>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    chain: Vec<ReplicaId>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    set_aside: Vec<StoredSource>,
    later_us: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct StoredSource {
    keyspace: KeyspaceId,
    shard: ShardId,
    replica: ReplicaId,
    base: Option<String>,
    chunks: Vec<Lsn>,
    end: Lsn,
    #[serde(default)]
    manifest_times: Vec<(Lsn, u64)>,
    #[serde(default)]
    chunk_times: Vec<(Lsn, u64)>,
    #[serde(default)]
    later: Vec<Lsn>,
}

impl StoredSource {
    fn of(source: &RestoreSource) -> Self {
        Self {
            keyspace: source.owner.keyspace,
            shard: source.owner.shard,
            replica: source.owner.replica,
            base: source.base.as_ref().map(|base| base.key.clone()),
            chunks: source.chunks.clone(),
            end: source.end,
            manifest_times: source.times.manifests.iter().map(|(lsn, at)| (*lsn, *at)).collect(),
            chunk_times: source.times.chunks.iter().map(|(lsn, at)| (*lsn, *at)).collect(),
            later: source.later.iter().map(|later| later.lsn).collect(),
        }
    }

    async fn read(self, bucket: &Bucket) -> Result<RestoreSource, BuildError> {
        let base = match &self.base {
            Some(key) => Some(archive::manifest_at(bucket, key).await?),
            None => None,
        };
        let owner = Owner { keyspace: self.keyspace, shard: self.shard, replica: self.replica };
        let times = Times {
            manifests: self.manifest_times.into_iter().collect(),
            chunks: self.chunk_times.into_iter().collect(),
        };
        let mut later = Vec::with_capacity(self.later.len());
        for lsn in self.later {
            let key = layout::manifest(owner.keyspace, owner.shard, owner.replica, lsn);
            later.push(Later::of(archive::manifest_at(bucket, &key).await?.manifest));
        }
        Ok(RestoreSource { owner, base, chunks: self.chunks, end: self.end, times, later })
    }
}

/// Returns the choice that an earlier attempt stored in `path`; otherwise the one that `choose`
/// makes, and stores it.
pub(crate) async fn chosen(
    bucket: &Bucket,
    path: &Path,
    choose: impl Future<Output = Result<RestoreSources, BuildError>>,
) -> Result<RestoreSources, BuildError> {
    if let Some(stored) = read_json::<StoredSources>(path)? {
        let mut sources = RestoreSources {
            chain: stored.chain,
            later_us: stored.later_us,
            ..RestoreSources::default()
        };
        for source in stored.all {
            sources.all.push(source.read(bucket).await?);
        }
        for source in stored.set_aside {
            sources.set_aside.push(source.read(bucket).await?);
        }
        return Ok(sources);
    }
    let sources = choose.await?;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(io(dir))?;
    }
    let stored = |list: &[RestoreSource]| list.iter().map(StoredSource::of).collect();
    let (all, set_aside) = (stored(&sources.all), stored(&sources.set_aside));
    write_json(
        path,
        &StoredSources { all, chain: sources.chain.clone(), set_aside, later_us: sources.later_us },
    )?;
    Ok(sources)
}
