//! The claim of the prefix: which cluster it belongs to.
//!
//! **Invariant:** a prefix that is not empty is never claimed for a new cluster; only the lost
//! claim of the cluster that the nodes belong to is written again.

use serde::{Deserialize, Serialize};

use super::error::CatalogError;
use super::store::{CatalogStore, decode};
use crate::bucket::Create;
use crate::clock::now_us;
use crate::envelope::{self, EnvelopeError};
use crate::layout::{self, CLUSTER_FORMAT};

const CLUSTER: &str = "cluster";

#[derive(Debug, Serialize, Deserialize)]
struct Cluster {
    cluster_id: String,
    format: u64,
    created_at_us: u64,
}

impl CatalogStore {
    /// Claims the prefix for a cluster, once and for all; returns the id in force, which differs
    /// from `new_cluster_id` when the prefix was claimed before.
    ///
    /// # Errors
    /// `Unclaimed` when there is anything in the prefix but no claim; `NewerCluster` when a newer
    /// version claimed it.
    pub async fn claim_cluster(&self, new_cluster_id: String) -> Result<String, CatalogError> {
        // Read first: a start-up that claims nothing should not need a write.
        if let Some(id) = self.cluster_id().await? {
            return Ok(id);
        }
        if let Some(found) = self.bucket().any_object().await? {
            // Another master may have claimed it, and written more, since the first read.
            return match self.cluster_id().await? {
                Some(id) => Ok(id),
                None => Err(CatalogError::Unclaimed { url: self.bucket().url().to_owned(), found }),
            };
        }
        self.claim_for(new_cluster_id).await
    }

    /// Returns the cluster that has claimed the prefix; `None` when it is unclaimed.
    pub async fn cluster_id(&self) -> Result<Option<String>, CatalogError> {
        let found = self.bucket().get(&layout::cluster()).await?;
        found.map(|found| Self::cluster_id_in(&found)).transpose()
    }

    /// Writes the claim, whatever else is in the prefix; returns the cluster whose claim is in
    /// force.
    async fn claim_for(&self, cluster_id: String) -> Result<String, CatalogError> {
        let cluster = Cluster {
            cluster_id: cluster_id.clone(),
            format: CLUSTER_FORMAT,
            created_at_us: now_us(),
        };
        match self.bucket().create(&layout::cluster(), envelope::encode(CLUSTER, &cluster)).await? {
            Create::Created => Ok(cluster_id),
            Create::Exists(found) => Self::cluster_id_in(&found),
        }
    }

    fn cluster_id_in(found: &[u8]) -> Result<String, CatalogError> {
        let key = layout::cluster();
        let cluster: Cluster = decode(CLUSTER, &key, found).map_err(|error| match error {
            CatalogError::Document { source: EnvelopeError::Newer { format, .. }, .. } => {
                CatalogError::NewerCluster(format)
            }
            other => other,
        })?;
        if cluster.format > CLUSTER_FORMAT {
            return Err(CatalogError::NewerCluster(cluster.format));
        }
        Ok(cluster.cluster_id)
    }

    /// Writes the lost claim again, for the cluster that the nodes belong to. A claim of another
    /// cluster without a keyspace is deleted: it was made when the prefix was found empty.
    ///
    /// # Errors
    /// `OtherCluster` when that cluster has keyspaces.
    pub async fn claim_again(&self, cluster_id: &str) -> Result<bool, CatalogError> {
        match self.cluster_id().await? {
            Some(found) if found == cluster_id => return Ok(false),
            Some(found) => {
                let any = self.bucket().list(&layout::catalog_prefix()).await?;
                if any.iter().any(|object| layout::parse_catalog_version(&object.key).is_some()) {
                    let (found, wanted) = (found, cluster_id.to_owned());
                    return Err(CatalogError::OtherCluster { found, wanted });
                }
                self.bucket().delete(&layout::cluster()).await?;
            }
            None => {}
        }
        match self.claim_for(cluster_id.to_owned()).await? {
            found if found == cluster_id => Ok(true),
            found => Err(CatalogError::OtherCluster { found, wanted: cluster_id.to_owned() }),
        }
    }
}
