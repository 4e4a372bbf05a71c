//! Creation of an object under an unused name.

use bytes::Bytes;
use object_store::{PutMode, PutOptions, PutPayload};

use super::error::BucketError;
use super::failure::{Failure, Kind};
use super::handle::Bucket;
use super::object::Create;
use super::retry::Retry;

impl Bucket {
    /// Writes the object unless the key is taken.
    ///
    /// When the store reports that the key is taken (also 409 and 412), the object is read back: the same
    /// bytes mean that an earlier attempt of this call succeeded and its reply was lost. So bodies
    /// that decide something must carry a nonce.
    ///
    /// # Errors
    /// After an error the outcome is unknown: read before deciding anything.
    pub async fn create(&self, key: &str, body: Bytes) -> Result<Create, BucketError> {
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
                Ok(_) => return Ok(Create::Created),
                Err(failure) => failure,
            };
            if failure.kind == Kind::Taken {
                match self.get(key).await? {
                    Some(found) if found == body => return Ok(Create::Created),
                    Some(found) => return Ok(Create::Exists(found)),
                    None => failure = Failure::contended(),
                }
            }
            if !failure.transient || !retry.pause().await {
                return Err(failure.into_error(self.url(), key));
            }
        }
    }
}
