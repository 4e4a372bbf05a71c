//! Deletion of objects.

use futures::StreamExt;
use object_store::ObjectStore;
use object_store::path::Path as ObjectPath;

use super::directory::staged_for;
use super::disk::blocking;
use super::error::BucketError;
use super::failure::{Failure, Kind};
use super::handle::{Bucket, Source};
use super::retry::Retry;

impl Bucket {
    /// Removes the object; a missing object is no error.
    pub async fn delete(&self, key: &str) -> Result<(), BucketError> {
        self.delete_many(&[key]).await
    }

    /// Removes these objects, on S3 in one request for up to a thousand of them; missing objects
    /// are no error. After an error some of them may be gone.
    pub async fn delete_many(&self, keys: &[&str]) -> Result<(), BucketError> {
        let mut left = Vec::with_capacity(keys.len());
        for key in keys {
            left.push((*key, self.path(key)?));
        }
        let mut retry = Retry::new(self.budget);
        while !left.is_empty() {
            let limit = self
                .budget
                .attempt
                .max(self.budget.transfer.min(self.budget.attempt * left.len() as u32));
            let failure = match self.once(&retry, limit, 0, self.delete_once(&left)).await {
                Ok((_, None)) => return Ok(()),
                Ok((again, Some(failure))) => {
                    left = again.into_iter().map(|at| left[at].clone()).collect();
                    failure
                }
                Err(failure) => failure,
            };
            if !failure.transient || !retry.pause().await {
                let key = left.first().map_or("", |(key, _)| *key);
                return Err(failure.into_error(self.url(), key));
            }
        }
        Ok(())
    }

    /// Deletes once. Returns the indexes of the objects that were not deleted while others were,
    /// and the first failure among them.
    ///
    /// # Errors
    /// When nothing was deleted.
    async fn delete_once(
        &self,
        all: &[(&str, ObjectPath)],
    ) -> Result<(Vec<usize>, Option<Failure>), Failure> {
        let batches = matches!(self.inner.source, Source::Pages(_));
        (0..if batches { 1 } else { all.len() }).for_each(|_| self.inner.counters.delete());
        let paths: Vec<_> = all.iter().map(|(_, path)| Ok(path.clone())).collect();
        let stream = self.inner.store.delete_stream(futures::stream::iter(paths).boxed());
        // The store returns an answer for each key, in order; for a batch that fails whole it
        // returns one.
        let answers: Vec<object_store::Result<ObjectPath>> = stream.collect().await;
        let whole = answers.len() != all.len();
        let mut first = None;
        let mut again = Vec::new();
        for (at, answer) in answers.into_iter().enumerate() {
            match answer.map_err(Failure::from) {
                Ok(_) => {}
                Err(failure) if failure.kind == Kind::NotFound => {}
                Err(failure) => {
                    again.push(at);
                    first.get_or_insert(failure);
                }
            }
        }
        match first {
            Some(failure) if whole || again.len() == all.len() => Err(failure),
            first => Ok((again, first)),
        }
    }

    /// Removes a file that an interrupted write has left in a local directory.
    pub(crate) async fn delete_staged(&self, key: &str) -> Result<(), BucketError> {
        self.path(key)?;
        let Source::Local(root) = &self.inner.source else { return Ok(()) };
        if staged_for(key).is_none() {
            return Err(BucketError::BadKey {
                key: key.to_owned(),
                reason: "it is no staged file".to_owned(),
            });
        }
        let path = root.join(key);
        match blocking(move || std::fs::remove_file(path)).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::of_disk(&error).into_error(self.url(), key))
            }
            _ => Ok(()),
        }
    }
}
