//! The gc term: the right to collect garbage.
//!
//! **Invariant:** terms are created under ascending numbers; before each batch of deletions a
//! collection checks that its term is still the last.

use bytes::Bytes;

use crate::bucket::{Bucket, BucketError, Create};
use crate::layout;

/// Stops every running collection, at the latest after its next few deletions: for a caller that
/// is about to read what may be garbage.
///
/// # Errors
/// When the bucket does not answer.
pub async fn interrupt(bucket: &Bucket) -> Result<(), BucketError> {
    Term::take(bucket).await.map(drop)
}

/// The right to collect, until the next gc term is taken.
pub(super) struct Term {
    bucket: Bucket,
    n: u64,
}

impl Term {
    pub(super) async fn take(bucket: &Bucket) -> Result<Self, BucketError> {
        let taken = bucket.list("gc-term/").await?;
        let number = |key: &str| key.strip_prefix("gc-term/").and_then(|n| n.parse::<u64>().ok());
        // A foreign object beside the terms must not use up the numbers.
        let sane = |n: &u64| *n < u64::MAX / 2;
        let mut n =
            taken.iter().filter_map(|object| number(&object.key)).filter(sane).max().unwrap_or(0)
                + 1;
        loop {
            let body = Bytes::from(format!(
                "vasto garbage collection, nonce {:032x}",
                rand::random::<u128>()
            ));
            match bucket.create(&layout::gc_term(n), body).await? {
                Create::Created => return Ok(Self { bucket: bucket.clone(), n }),
                Create::Exists(_) => n += 1,
            }
        }
    }

    pub(super) async fn is_the_last(&self) -> Result<bool, BucketError> {
        Ok(self.bucket.head(&layout::gc_term(self.n + 1)).await?.is_none())
    }

    /// Key of the object that holds the term.
    pub(super) fn key(&self) -> String {
        layout::gc_term(self.n)
    }
}
