//! Reads of whole objects, of their beginnings, and of what the store knows about them.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetResult, ObjectStore, ObjectStoreExt};

use super::attempt::within;
use super::error::BucketError;
use super::failure::{Failure, Kind};
use super::handle::Bucket;
use super::object::{GET_BYTES_MAX, ObjectInfo};

impl Bucket {
    /// Returns the whole object, or `None` when there is none.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, BucketError> {
        let path = self.path(key)?;
        let read = || async {
            let result = within(self.budget.attempt, self.get_once(&path, None)).await?;
            let size = result.meta.size;
            if size > GET_BYTES_MAX {
                return Ok(Err(size));
            }
            let mut body = BytesMut::with_capacity(size as usize);
            let mut stream = result.into_stream();
            // The body may be slow, but must not stall.
            while let Some(part) =
                within(self.budget.attempt, async { stream.next().await.transpose() }).await?
            {
                self.inner.counters.received(part.len() as u64);
                body.extend_from_slice(&part);
            }
            let body = body.freeze();
            if body.len() as u64 != size {
                return Err(Failure::short_body(size, body.len() as u64));
            }
            Ok(Ok(body))
        };
        let limit = self.budget.transfer.max(self.budget.limit_for(GET_BYTES_MAX));
        match self.retrying(limit, read).await {
            Ok(Ok(body)) => Ok(Some(body)),
            Ok(Err(bytes)) => Err(BucketError::TooLarge { key: key.to_owned(), bytes }),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure.into_error(self.url(), key)),
        }
    }

    /// Returns up to `bytes` bytes of the object's beginning and the size of the whole; `None`
    /// without an object.
    pub(crate) async fn beginning(
        &self,
        key: &str,
        bytes: u64,
    ) -> Result<Option<(Bytes, u64)>, BucketError> {
        let path = self.path(key)?;
        let read = || async {
            let result = self.get_once(&path, Some(0..bytes)).await?;
            let size = result.meta.size;
            let body = result.bytes().await?;
            self.inner.counters.received(body.len() as u64);
            Ok((body, size))
        };
        match self.retrying(self.budget.attempt, read).await {
            Ok(found) => Ok(Some(found)),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure.into_error(self.url(), key)),
        }
    }

    /// Returns the object's size, or `None` when there is none.
    pub async fn head(&self, key: &str) -> Result<Option<u64>, BucketError> {
        Ok(self.look_at(key).await?.map(|found| found.bytes))
    }

    /// Returns what a listing would report of the object, or `None` when there is none.
    pub async fn look_at(&self, key: &str) -> Result<Option<ObjectInfo>, BucketError> {
        let path = self.path(key)?;
        let head = || async {
            self.inner.counters.head();
            Ok(self.inner.store.head(&path).await?)
        };
        match self.retrying(self.budget.attempt, head).await {
            Ok(found) => Ok(Some(ObjectInfo::of(key.to_owned(), &found))),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure.into_error(self.url(), key)),
        }
    }

    /// Sends one GET, counted, not retried; the caller counts the body.
    pub(super) async fn get_once(
        &self,
        path: &ObjectPath,
        range: Option<Range<u64>>,
    ) -> Result<GetResult, Failure> {
        self.inner.counters.get();
        let options = GetOptions { range: range.map(Into::into), ..GetOptions::default() };
        Ok(self.inner.store.get_opts(path, options).await?)
    }
}
