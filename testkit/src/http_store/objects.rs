//! Correct S3 answers: the part of the protocol that Vasto uses, in memory.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Ask, BUCKET, HttpReply, Request, error};

#[derive(Debug, Default)]
pub(super) struct Objects {
    objects: BTreeMap<String, Bytes>,
    uploads: BTreeMap<String, BTreeMap<u32, Bytes>>,
    begun: u32,
    /// Objects on a page of a listing; 0: all of them.
    pub page: usize,
    /// A PUT overwrites, whatever its condition says.
    pub ignores_conditions: bool,
}

fn ok(status: u16, headers: Vec<(&'static str, String)>, body: impl Into<Bytes>) -> HttpReply {
    HttpReply { status, headers, body: body.into() }
}

fn stamps() -> Vec<(&'static str, String)> {
    vec![
        ("ETag", "\"1\"".to_owned()),
        ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT".to_owned()),
    ]
}

impl Objects {
    pub(super) fn object(&self, key: &str) -> Option<Bytes> {
        self.objects.get(key).cloned()
    }

    /// Returns the keys that begin with the prefix, without it.
    pub(super) fn keys_below(&self, prefix: &str) -> Vec<String> {
        self.objects.keys().filter_map(|key| key.strip_prefix(prefix)).map(str::to_owned).collect()
    }

    /// Inserts an object under a foreign name.
    pub(super) fn insert(&mut self, key: &str, body: Bytes) {
        self.objects.insert(key.to_owned(), body);
    }

    pub(super) fn open_uploads(&self) -> usize {
        self.uploads.len()
    }

    pub(super) fn answer(&mut self, request: &Request) -> HttpReply {
        let url = url::Url::parse(&format!("http://x{}", request.target)).unwrap();
        let query: BTreeMap<String, String> = url.query_pairs().into_owned().collect();
        let key = url
            .path()
            .trim_start_matches('/')
            .trim_start_matches(BUCKET)
            .trim_start_matches('/')
            .to_owned();
        let upload = query.get("uploadId").cloned().unwrap_or_default();
        let unknown_upload =
            || error(404, "NoSuchUpload", "The specified upload does not exist.", "");
        match request.ask {
            Ask::Put
                if !self.ignores_conditions
                    && request.headers.contains_key("if-none-match")
                    && self.objects.contains_key(&key) =>
            {
                error(
                    412,
                    "PreconditionFailed",
                    "At least one of the pre-conditions you specified did not hold",
                    "",
                )
            }
            Ask::Put => {
                self.objects.insert(key, request.body.clone());
                ok(200, stamps(), "")
            }
            Ask::Get | Ask::Head => match self.objects.get(&key) {
                Some(body) => part_of(body, request.headers.get("range")),
                None => error(404, "NoSuchKey", "The specified key does not exist.", ""),
            },
            Ask::List => {
                let after = query.get("continuation-token").map_or("", String::as_str);
                self.list(query.get("prefix").map_or("", String::as_str), after)
            }
            Ask::Delete => {
                let text = String::from_utf8(request.body.to_vec()).unwrap();
                let keys =
                    text.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
                let mut deleted = String::new();
                for key in keys {
                    self.objects.remove(key);
                    deleted.push_str(&format!("<Deleted><Key>{key}</Key></Deleted>"));
                }
                ok(200, vec![], format!("<DeleteResult>{deleted}</DeleteResult>"))
            }
            Ask::Begin => {
                self.begun += 1;
                let id = format!("upload-{}", self.begun);
                self.uploads.insert(id.clone(), BTreeMap::new());
                let result = format!(
                    "<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{key}</Key><UploadId>{id}</UploadId>\
                     </InitiateMultipartUploadResult>"
                );
                ok(200, vec![], result)
            }
            Ask::Part => match self.uploads.get_mut(&upload) {
                Some(parts) => {
                    parts.insert(query["partNumber"].parse().unwrap(), request.body.clone());
                    ok(200, stamps(), "")
                }
                None => unknown_upload(),
            },
            Ask::Complete => match self.uploads.remove(&upload) {
                Some(parts) => {
                    let body: Vec<u8> = parts.into_values().flatten().collect();
                    self.objects.insert(key, body.into());
                    let result = "<CompleteMultipartUploadResult><ETag>\"1\"</ETag></CompleteMultipartUploadResult>";
                    ok(200, vec![], result)
                }
                None => unknown_upload(),
            },
            Ask::Abort => match self.uploads.remove(&upload) {
                Some(_) => ok(204, vec![], ""),
                None => unknown_upload(),
            },
        }
    }

    fn list(&self, prefix: &str, after: &str) -> HttpReply {
        let page = if self.page == 0 { usize::MAX } else { self.page };
        let all =
            self.objects.iter().filter(|(key, _)| key.starts_with(prefix) && key.as_str() > after);
        let all: Vec<_> = all.collect();
        let listed = all.iter().take(page).map(|(key, body)| {
            format!(
                "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                 <ETag>&quot;1&quot;</ETag><Size>{}</Size></Contents>",
                body.len()
            )
        });
        let next = all.get(page.saturating_sub(1)).filter(|_| all.len() > page);
        let next = next.map_or(String::new(), |(key, _)| {
            format!("<NextContinuationToken>{key}</NextContinuationToken>")
        });
        ok(
            200,
            vec![],
            format!("<ListBucketResult>{}{next}</ListBucketResult>", listed.collect::<String>()),
        )
    }
}

/// Returns the whole object, or the range `bytes=first-last`.
fn part_of(body: &Bytes, range: Option<&String>) -> HttpReply {
    let Some(range) = range else { return ok(200, stamps(), body.clone()) };
    let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
    let last = last.min(body.len() - 1);
    let mut headers = stamps();
    headers.push(("Content-Range", format!("bytes {first}-{last}/{}", body.len())));
    ok(206, headers, body.slice(first..=last))
}
