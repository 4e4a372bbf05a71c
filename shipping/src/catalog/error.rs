//! Errors of the catalog, with texts that say how to resolve them.

use vasto_core::limits::BadKeyspaceName;

use crate::bucket::BucketError;
use crate::envelope::EnvelopeError;
use crate::layout::CLUSTER_FORMAT;

/// Why the catalog could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// The bucket failed; the outcome of a write is unknown: read the tip before anything else.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// An object cannot be read.
    #[error("{key}: {source}")]
    Document {
        /// The object.
        key: String,
        /// The decoding error.
        source: EnvelopeError,
    },
    /// The content of an object names another key.
    #[error("{key} holds {found}: objects were moved by hand; put them back")]
    Misplaced {
        /// The object.
        key: String,
        /// The object that its content names.
        found: String,
    },
    /// The prefix belongs to a newer version.
    #[error(
        "the bucket's layout has format {0}, newer than {CLUSTER_FORMAT}, the newest that this version uses; upgrade this server"
    )]
    NewerCluster(u64),
    /// The prefix is not empty, and no `cluster.json` names its cluster.
    #[error(
        "the prefix {url} is not empty ({found}) but has no cluster.json, so it is not claimed; for a new cluster choose \
         an empty prefix, such as {url}/vasto; if this cluster's own cluster.json was deleted, `vasto bucket repair` \
         puts it back from what the nodes remember"
    )]
    Unclaimed {
        /// The prefix.
        url: String,
        /// An object in it.
        found: String,
    },
    /// Another cluster has claimed the prefix.
    #[error(
        "the prefix belongs to cluster {found}, which has keyspaces, and not to cluster {wanted}; start the master with \
         the bucket of its own cluster"
    )]
    OtherCluster {
        /// The cluster that claimed it.
        found: String,
        /// The cluster of the caller.
        wanted: String,
    },
    /// A live keyspace has the name.
    #[error("a keyspace named `{0}` exists; choose another name, or delete that one first")]
    NameTaken(String),
    /// The name is not allowed.
    #[error(transparent)]
    BadName(#[from] BadKeyspaceName),
}

impl CatalogError {
    /// Returns true when the error is about one unreadable object, and says nothing about others.
    /// An object of a newer version does not count: the reader must be upgraded first.
    pub fn is_of_one_object(&self) -> bool {
        match self {
            CatalogError::Document { source, .. } => !matches!(source, EnvelopeError::Newer { .. }),
            CatalogError::Misplaced { .. } => true,
            CatalogError::Bucket(error) => {
                matches!(error, BucketError::BadKey { .. } | BucketError::TooLarge { .. })
            }
            _ => false,
        }
    }
}
