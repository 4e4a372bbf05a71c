//! Listings of a bucket, page by page.
//!
//! **Invariant:** a page that fails is requested again; the pages before it are not.

use std::path::PathBuf;

use futures::TryStreamExt;
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectMeta, ObjectStore};

use super::directory;
use super::disk::blocking;
use super::error::BucketError;
use super::failure::Failure;
use super::handle::{Bucket, Source, parse_path};
use super::object::{Listing, ObjectInfo};

/// Objects in one page of a listing, on every store; used to count requests.
const LIST_PAGE: u64 = 1000;

impl Bucket {
    /// Lists all objects in the folder `prefix` (which ends with `/`; the empty prefix is
    /// everything), in no particular order. For start-up and fsck only: no decision is based on a
    /// listing. Foreign objects, whose names Vasto cannot use, are skipped;
    /// [`Bucket::take_strangers`] returns them.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, BucketError> {
        Ok(self.list_all(prefix).await?.objects)
    }

    /// Lists the same, with the files that interrupted writes have left beside the objects.
    pub async fn list_all(&self, prefix: &str) -> Result<Listing, BucketError> {
        self.list_until(prefix, |_| false).await
    }

    /// Returns the first object other than a start-up probe; `None` when nothing was ever written
    /// here.
    pub async fn any_object(&self) -> Result<Option<String>, BucketError> {
        let is_other = |object: &ObjectInfo| !object.key.starts_with("probe/");
        let found = self.list_until("", |page| page.iter().any(is_other)).await?;
        Ok(found.objects.into_iter().find(is_other).map(|object| object.key))
    }

    /// Lists page by page until `will_do` accepts a page.
    async fn list_until(
        &self,
        prefix: &str,
        will_do: impl Fn(&[ObjectInfo]) -> bool,
    ) -> Result<Listing, BucketError> {
        let folder = match (self.inner.root.as_str(), prefix.trim_end_matches('/')) {
            ("", folder) => folder.to_owned(),
            (root, "") => root.to_owned(),
            (root, folder) => format!("{root}/{folder}"),
        };
        let path = (!folder.is_empty()).then(|| parse_path(&folder)).transpose()?;
        let listed = match &self.inner.source {
            Source::Local(root) => self.list_directory(root.clone(), folder).await,
            Source::Stream => self.list_stream(path.as_ref()).await,
            Source::Pages(store) => self.list_pages(store.as_ref(), &folder, will_do).await,
        };
        listed.map_err(|failure| failure.into_error(self.url(), prefix))
    }

    async fn list_directory(&self, root: PathBuf, folder: String) -> Result<Listing, Failure> {
        let learned = self.inner.learned.clone();
        let walked = blocking(move || directory::walk(&root, &folder, &learned.strangers)).await;
        let found = walked.map_err(|error| Failure::of_disk(&error))?;
        self.inner.counters.list((found.objects.len() as u64).div_ceil(LIST_PAGE).max(1));
        Ok(found)
    }

    async fn list_stream(&self, path: Option<&ObjectPath>) -> Result<Listing, Failure> {
        let list = || async {
            self.inner.counters.list(1);
            Ok(self.inner.store.list(path).try_collect::<Vec<_>>().await?)
        };
        let found = self.retrying(self.budget.transfer, list).await?;
        self.inner.counters.list((found.len() as u64).div_ceil(LIST_PAGE).saturating_sub(1));
        Ok(Listing { objects: self.objects_of(&found), staged: Vec::new() })
    }

    async fn list_pages(
        &self,
        store: &dyn PaginatedListStore,
        folder: &str,
        will_do: impl Fn(&[ObjectInfo]) -> bool,
    ) -> Result<Listing, Failure> {
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let mut objects = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let list = || async {
                self.inner.counters.list(1);
                Ok(page(store, &prefix, token.clone()).await?)
            };
            let (found, next) = self.retrying(self.budget.transfer, list).await?;
            let found = self.objects_of(&found);
            let enough = will_do(&found);
            objects.extend(found);
            token = next;
            if enough || token.is_none() {
                return Ok(Listing { objects, staged: Vec::new() });
            }
        }
    }

    /// Returns the objects of a page, under keys relative to the root.
    fn objects_of(&self, page: &[ObjectMeta]) -> Vec<ObjectInfo> {
        let skip = if self.inner.root.is_empty() { 0 } else { self.inner.root.len() + 1 };
        let key = |meta: &ObjectMeta| Some(meta.location.as_ref().get(skip..)?.to_owned());
        page.iter().filter_map(|meta| Some(ObjectInfo::of(key(meta)?, meta))).collect()
    }
}

/// Reads the next page of a listing; the last has no token.
async fn page(
    store: &dyn PaginatedListStore,
    prefix: &str,
    token: Option<String>,
) -> object_store::Result<(Vec<ObjectMeta>, Option<String>)> {
    let options = PaginatedListOptions { page_token: token, ..PaginatedListOptions::default() };
    let prefix = (!prefix.is_empty()).then_some(prefix);
    let found = store.list_paginated(prefix, options).await?;
    Ok((found.result.objects, found.page_token))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::{ObjectStoreExt, PutPayload};

    use super::*;

    #[tokio::test]
    async fn a_listing_counts_its_pages() {
        let store = Arc::new(object_store::memory::InMemory::new());
        for n in 0..2_001 {
            store
                .put(&ObjectPath::from(format!("some/{n}")), PutPayload::default())
                .await
                .expect("memory takes all");
        }
        let bucket = Bucket::from_store("memory://pages", store);
        for (folder, objects, pages) in [("none/", 0, 1), ("some/", 2_001, 3)] {
            let before = bucket.counts().list;
            assert_eq!(bucket.list(folder).await.expect("memory answers").len(), objects);
            assert_eq!(bucket.counts().list - before, pages, "{folder}");
        }
    }
}
