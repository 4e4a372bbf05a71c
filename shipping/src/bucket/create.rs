//! Creation of an object under an unused name.

use bytes::Bytes;
use object_store::{PutMode, PutOptions, PutPayload};

use super::error::BucketError;
use super::failure::{Failure, Kind};
use super::handle::Bucket;
use super::object::Create;
use super::retry::Retry;

/// Reads of a taken key, of which two must agree.
const READS_BACK: usize = 3;

impl Bucket {
    /// Writes the object unless the key is taken.
    ///
    /// When the store reports that the key is taken (also 409 and 412), the object is read back:
    /// the same bytes mean that an earlier attempt of this call succeeded and its reply was lost.
    /// So bodies that decide something must carry a nonce. Other bytes are returned only when two
    /// reads agree.
    ///
    /// # Errors
    /// After an error the outcome is unknown: read before deciding anything.
    pub async fn create(&self, key: &str, body: Bytes) -> Result<Create, BucketError> {
        self.create_or_find(key, body).await.map(|(outcome, _)| outcome)
    }

    /// Does the same as [`Self::create`], and returns true when the request whose answer arrived has
    /// created the object: there was none before. False when it was found, also when it is the
    /// caller's.
    ///
    /// # Errors
    /// As of [`Self::create`].
    pub async fn create_or_find(
        &self,
        key: &str,
        body: Bytes,
    ) -> Result<(Create, bool), BucketError> {
        let path = self.path(key)?;
        let bytes = body.len() as u64;
        let limit = self.budget.limit_for(bytes);
        let mut retry = Retry::new(self.budget);
        loop {
            let put = async {
                let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
                self.inner.counters.put();
                self.inner.counters.sent(bytes);
                self.inner.store.put_opts(&path, PutPayload::from(body.clone()), options).await
            };
            let mut failure = match self.once(&retry, limit, bytes, put).await {
                Ok(_) => return Ok((Create::Created, true)),
                Err(failure) => failure,
            };
            if failure.kind == Kind::Taken {
                match self.read_back(key, &body).await? {
                    Ok(outcome) => return Ok((outcome, false)),
                    Err(undecided) => failure = undecided,
                }
            }
            if !failure.transient || !retry.pause().await {
                return Err(failure.into_error(self.url(), key));
            }
        }
    }

    /// Reads what is under a taken key. The inner error: nothing is there, or no two reads agree.
    async fn read_back(
        &self,
        key: &str,
        body: &Bytes,
    ) -> Result<Result<Create, Failure>, BucketError> {
        let mut last = None;
        // A body altered on its way would make the caller's own object look like another writer's.
        for _ in 0..READS_BACK {
            match self.get(key).await? {
                None => return Ok(Err(Failure::contended())),
                Some(stored) if stored == *body => return Ok(Ok(Create::Created)),
                Some(stored) if last.as_ref() == Some(&stored) => {
                    return Ok(Ok(Create::Exists(stored)));
                }
                stored => last = stored,
            }
        }
        Ok(Err(Failure::disagreeing_reads()))
    }
}
