//! Uploads of whole files; to a local directory they are copied ([`super::copied`]).
//!
//! Up to [`SINGLE_PUT_BYTES_MAX`] a file is uploaded in one create-only request. A larger file is
//! uploaded in parts: no store can make that create-only, so the name is checked first, and it
//! carries an attempt id that no other upload draws. An upload that could not be begun or completed
//! is repeated whole. Either way the size is verified at the end; objects that a crash leaves are
//! named by no manifest and are collected.

use std::path::Path;
use std::sync::Arc;

use futures::StreamExt;
use object_store::{MultipartUpload, ObjectStore, PutMultipartOptions, PutPayload};

use super::attempt::within;
use super::disk::LocalFile;
use super::error::BucketError;
use super::failure::Failure;
use super::handle::{Bucket, Source};
use super::object::{Create, Uploaded};
use super::retry::{PartRetry, Retry};

/// Largest file that is uploaded in one request, and held in memory for it.
pub(super) const SINGLE_PUT_BYTES_MAX: u64 = 64 << 20;
/// Part size of larger files. 10,000 parts, S3's limit, make 160 GB.
const PART_BYTES: usize = 16 << 20;
/// Parts of one file in flight: bounds the memory to 64 MiB, as much as one request.
const PARTS_IN_FLIGHT: usize = 4;

impl Bucket {
    /// Uploads a file under an unused name, and verifies the size in the bucket.
    /// Holds up to 64 MiB in memory.
    ///
    /// # Errors
    /// `Exists` when other bytes are under the key; `LocalFile`; `WrongSize` when the bucket holds
    /// something else than was sent. After any error the key must not be used again with other
    /// bytes.
    pub async fn upload_file(&self, key: &str, path: &Path) -> Result<Uploaded, BucketError> {
        let file = LocalFile::open(path).await?;
        let uploaded = match &self.inner.source {
            Source::Local(root) => Box::pin(self.upload_copy(key, file, root)).await?,
            _ if file.bytes <= SINGLE_PUT_BYTES_MAX => {
                self.paced.while_under_way(Box::pin(self.upload_whole(key, file))).await?
            }
            _ => self.paced.while_under_way(Box::pin(self.upload_in_parts(key, file))).await?,
        };
        match self.head(key).await? {
            Some(found) if found == uploaded.bytes => Ok(uploaded),
            found => Err(BucketError::WrongSize {
                key: key.to_owned(),
                expected: uploaded.bytes,
                found: found.unwrap_or(0),
            }),
        }
    }

    async fn upload_whole(&self, key: &str, mut file: LocalFile) -> Result<Uploaded, BucketError> {
        let length = file.bytes as usize;
        let body = file.next(length).await?;
        // One more byte means that the file grew: not a finished SST.
        let more = file.next(1).await?;
        if body.len() != length || !more.is_empty() {
            return Err(file.changed());
        }
        let uploaded = Uploaded { bytes: body.len() as u64, crc32c: crc32c::crc32c(&body) };
        match self.create(key, body).await? {
            Create::Created => Ok(uploaded),
            Create::Exists(_) => Err(BucketError::Exists { key: key.to_owned() }),
        }
    }

    async fn upload_in_parts(
        &self,
        key: &str,
        mut file: LocalFile,
    ) -> Result<Uploaded, BucketError> {
        if self.head(key).await?.is_some() {
            return Err(BucketError::Exists { key: key.to_owned() });
        }
        let mut retry = None;
        loop {
            let failure = match self.try_in_parts(key, &mut file).await? {
                Ok(uploaded) => return Ok(uploaded),
                Err(failure) => failure,
            };
            // The budget begins with the first failure: sending the parts may have taken longer.
            let retry = retry.get_or_insert_with(|| Retry::new(self.budget));
            if !failure.transient || !retry.pause().await {
                return Err(failure.into_error(self.url(), key));
            }
            file.rewind().await?;
        }
    }

    /// Uploads from the first part to the last. The inner error: the upload could not be begun or
    /// not be completed, and no object is under the key.
    async fn try_in_parts(
        &self,
        key: &str,
        file: &mut LocalFile,
    ) -> Result<Result<Uploaded, Failure>, BucketError> {
        let path = self.path(key)?;
        let retry = PartRetry { budget: self.budget, counts: self.inner.counters.clone() };
        let options = PutMultipartOptions::default().with_retry_policy(Arc::new(retry));
        let begun = async {
            self.inner.counters.put();
            self.inner.store.put_multipart_opts(&path, options).await
        };
        let mut upload =
            match self.once(&Retry::new(self.budget), self.budget.attempt, 0, begun).await {
                Ok(upload) => upload,
                Err(failure) => return Ok(Err(failure)),
            };
        let outcome = match self.send_parts(key, file, upload.as_mut()).await {
            Ok(uploaded) => self.complete(key, uploaded, upload.as_mut()).await,
            Err(error) => Err(error),
        };
        if !matches!(outcome, Ok(Ok(_))) {
            // Parts that remain cost money until the bucket's lifecycle rule removes them.
            self.inner.counters.delete();
            if let Err(failure) = within(self.budget.attempt, upload.abort()).await {
                tracing::debug!(
                    error = failure.detail,
                    key,
                    "the parts of a failed upload could not be removed"
                );
            }
        }
        outcome
    }

    /// Makes the parts an object. The inner error: no object is under the key.
    async fn complete(
        &self,
        key: &str,
        uploaded: Uploaded,
        upload: &mut dyn MultipartUpload,
    ) -> Result<Result<Uploaded, Failure>, BucketError> {
        self.inner.counters.put();
        let Err(failure) = within(self.budget.transfer, upload.complete()).await else {
            return Ok(Ok(uploaded));
        };
        // The reply may be lost: the object is whole or absent, as its size shows.
        match self.head(key).await {
            Ok(Some(found)) if found == uploaded.bytes => Ok(Ok(uploaded)),
            // object_store discards the parts with the first attempt to complete them.
            Ok(None) => Ok(Err(failure)),
            _ => Err(failure.into_error(self.url(), key)),
        }
    }

    async fn send_parts(
        &self,
        key: &str,
        file: &mut LocalFile,
        upload: &mut dyn MultipartUpload,
    ) -> Result<Uploaded, BucketError> {
        let mut crc = 0;
        let mut sent = 0u64;
        let mut in_flight = futures::stream::FuturesUnordered::new();
        loop {
            let part = file.next(PART_BYTES).await?;
            if part.is_empty() {
                break;
            }
            crc = crc32c::crc32c_append(crc, &part);
            sent += part.len() as u64;
            if in_flight.len() >= PARTS_IN_FLIGHT {
                let done: Option<Result<(), Failure>> = in_flight.next().await;
                done.transpose().map_err(|failure| failure.into_error(self.url(), key))?;
            }
            self.inner.counters.put();
            self.inner.counters.sent(part.len() as u64);
            // The limit includes the retries of the part.
            let limit = self.budget.total
                + self.budget.limit_for(PARTS_IN_FLIGHT as u64 * part.len() as u64);
            in_flight.push(within(limit, upload.put_part(PutPayload::from(part))));
        }
        while let Some(done) = in_flight.next().await {
            done.map_err(|failure| failure.into_error(self.url(), key))?;
        }
        if sent != file.bytes {
            return Err(file.changed());
        }
        Ok(Uploaded { bytes: sent, crc32c: crc })
    }
}
