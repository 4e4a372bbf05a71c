//! Errors of shipping.

use std::time::Duration;

use vasto_shipping::bucket::BucketError;

use crate::binlog::BinlogError;
use crate::engine::EngineError;
use crate::node_dir::DirError;
use crate::replica::command::ReplicaError;

/// Why shipping failed; it is retried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShipError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The database failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The log failed.
    #[error(transparent)]
    Log(#[from] BinlogError),
    /// A local file failed.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// An object with other content is in the bucket under this replica's name.
    #[error(
        "object {0} exists with other content: does another process use a copy of this data directory? Stop one of them"
    )]
    Foreign(String),
    /// An object is in the way that says nothing about this replica.
    #[error(
        "object {key} is in the way and not what this replica ships: {what}; `vasto bucket fsck` names what else is \
         damaged, and `vasto keyspace checkpoint` goes on behind it"
    )]
    InTheWay {
        /// The object.
        key: String,
        /// Its content.
        what: String,
    },
    /// A file of the checkpoint cannot be interpreted.
    #[error("the checkpoint cannot be described: {0}")]
    Checkpoint(String),
    /// The replica refused a request.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The replica is still being filled.
    #[error("the replica is still being filled; it has a checkpoint once it is")]
    Filling,
    /// The upload stalled; its first objects may be garbage collected by now.
    #[error("the upload of a checkpoint took {} s, longer than garbage collection can be trusted to wait; it starts over", .0.as_secs())]
    Stalled(Duration),
    /// The bucket has lost objects that this replica has shipped.
    #[error(
        "object {0} is not in the bucket any more: what was shipped is shipped again; run `vasto bucket fsck` to see \
         what else is missing, and `vasto bucket repair`"
    )]
    Lost(String),
    /// The bucket has lost the catalog.
    #[error(
        "object {0} is not in the bucket any more; run `vasto bucket repair` to put the catalog back"
    )]
    NoCatalog(String),
    /// The shipper has ended.
    #[error("the node is stopping")]
    Stopped,
}

/// Runs blocking work off the async threads.
pub(crate) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, ShipError>
where
    T: Send + 'static,
    E: Send + 'static,
    ShipError: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ShipError::Checkpoint(format!("a background task failed: {error}"))),
    }
}
