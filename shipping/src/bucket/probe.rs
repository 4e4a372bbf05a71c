//! The start-up probe: whether the bucket can be used at all.

use std::time::Duration;

use bytes::Bytes;

use super::error::BucketError;
use super::failure::Failure;
use super::handle::Bucket;
use super::object::Create;
use super::retry::RetryBudget;
use crate::layout;

impl Bucket {
    /// Checks, with five small requests, that the bucket can be reached, read and written, and that
    /// it honours create-if-absent. Returns within about 5 s, also when the bucket does not answer.
    ///
    /// # Errors
    /// `Unreachable`, `NoCredentials`, `AccessDenied`, `UnknownBucket`, `IgnoresConditions`.
    pub async fn probe(&self) -> Result<(), BucketError> {
        let budget = RetryBudget::probe();
        let deadline = budget.total + Duration::from_secs(2);
        let probe = self.with_retry(budget);
        match tokio::time::timeout(deadline, probe.probe_now()).await {
            Ok(result) => result,
            Err(_) => Err(Failure::timed_out(deadline).into_error(self.url(), "probe")),
        }
    }

    async fn probe_now(&self) -> Result<(), BucketError> {
        let nonce: u128 = rand::random();
        let key = layout::probe(nonce);
        let first = Bytes::from(format!("vasto probe {nonce:032x}, first"));
        let second = Bytes::from(format!("vasto probe {nonce:032x}, second"));
        let refuse = |detail: &str| {
            Err(BucketError::IgnoresConditions {
                url: self.url().to_owned(),
                detail: detail.to_owned(),
            })
        };
        let written = match self.create(&key, first.clone()).await {
            Err(BucketError::Unsupported { detail, .. }) => return refuse(&detail),
            other => other?,
        };
        if written != Create::Created {
            return refuse("a fresh name held an object");
        }
        let again = self.create(&key, second).await;
        // Write permission need not include delete; gc removes a probe that remains.
        if let Err(error) = self.delete(&key).await {
            tracing::debug!(%error, key, "the probe could not be removed");
        }
        match again? {
            Create::Exists(found) if found == first => Ok(()),
            Create::Exists(_) => refuse("the second create of a name altered the object"),
            Create::Created => refuse("the second create of a name succeeded"),
        }
    }
}
