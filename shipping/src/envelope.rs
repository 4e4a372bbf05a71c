//! The JSON envelope around every document in the bucket.
//!
//! `{"format":1,"kind":"manifest","crc32c":"8 hex digits","body":{…}}`: the checksum is over the
//! exact bytes of `body` as they stand in the object.
//!
//! **Invariant:** unknown fields of newer writers are tolerated, a newer `format` is refused with
//! the advice to upgrade, and no altered byte goes unnoticed.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The format that this version writes, and the newest it reads.
pub const FORMAT: u64 = 1;

/// Why a document cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Not the JSON that any version writes.
    #[error("the {kind} is damaged or not ours: {detail}")]
    Malformed {
        /// The expected kind.
        kind: &'static str,
        /// The parser's error.
        detail: String,
    },
    /// Written by a newer version.
    #[error(
        "the {kind} has format {format}, newer than {FORMAT}, the newest that this version reads; upgrade this server"
    )]
    Newer {
        /// The expected kind.
        kind: &'static str,
        /// The format found.
        format: u64,
    },
    /// Another kind of document.
    #[error("expected a {expected}, found a {found}: the object is under a wrong name")]
    WrongKind {
        /// The expected kind.
        expected: &'static str,
        /// The kind that the document names.
        found: String,
    },
    /// The body was altered.
    #[error(
        "the {kind} fails its checksum: it was altered after it was written; restore the object from a backup or use an older one"
    )]
    Checksum {
        /// The expected kind.
        kind: &'static str,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    format: u64,
    kind: std::borrow::Cow<'a, str>,
    crc32c: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// The only field needed of a newer format.
#[derive(Deserialize)]
struct Format {
    format: u64,
}

/// Wraps a document in an envelope.
pub fn encode<T: Serialize>(kind: &'static str, body: &T) -> Bytes {
    let body = serde_json::value::to_raw_value(body)
        .expect("documents hold only strings, numbers and lists of them");
    let crc = checksum(&body);
    let envelope = Envelope { format: FORMAT, kind: kind.into(), crc32c: crc.into(), body: &body };
    Bytes::from(serde_json::to_vec(&envelope).expect("the body is JSON already"))
}

/// Checks the envelope and decodes the document.
///
/// # Errors
/// When the bytes are not a document of this kind that this version reads.
pub fn decode<T: DeserializeOwned>(kind: &'static str, bytes: &[u8]) -> Result<T, EnvelopeError> {
    let malformed =
        |error: serde_json::Error| EnvelopeError::Malformed { kind, detail: error.to_string() };
    let Format { format } = serde_json::from_slice(bytes).map_err(malformed)?;
    match format {
        FORMAT => {}
        0 => {
            return Err(EnvelopeError::Malformed {
                kind,
                detail: "format 0 was never written".to_owned(),
            });
        }
        format => return Err(EnvelopeError::Newer { kind, format }),
    }
    let envelope: Envelope<'_> = serde_json::from_slice(bytes).map_err(malformed)?;
    if envelope.kind != kind {
        return Err(EnvelopeError::WrongKind {
            expected: kind,
            found: envelope.kind.chars().take(40).collect(),
        });
    }
    if envelope.crc32c != checksum(envelope.body) {
        return Err(EnvelopeError::Checksum { kind });
    }
    serde_json::from_str(envelope.body.get()).map_err(malformed)
}

fn checksum(body: &RawValue) -> String {
    format!("{:08x}", crc32c::crc32c(body.get().as_bytes()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Doc {
        text: String,
        number: u64,
    }

    fn any_doc() -> impl Strategy<Value = Doc> {
        (".{0,30}", any::<u64>()).prop_map(|(text, number)| Doc { text, number })
    }

    proptest! {
        #[test]
        fn round_trip(doc in any_doc()) {
            prop_assert_eq!(decode::<Doc>("doc", &encode("doc", &doc)).unwrap(), doc);
        }

        #[test]
        fn any_altered_bit_is_found(doc in any_doc(), position: usize, bit in 0u8..8) {
            let mut bytes = encode("doc", &doc).to_vec();
            let position = position % bytes.len();
            bytes[position] ^= 1 << bit;
            prop_assert!(decode::<Doc>("doc", &bytes).is_err());
        }

        #[test]
        fn decoding_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode::<Doc>("doc", &bytes).is_err());
        }

        #[test]
        fn a_cut_document_is_refused(doc in any_doc(), keep: usize) {
            let bytes = encode("doc", &doc);
            prop_assert!(decode::<Doc>("doc", &bytes[..keep % bytes.len()]).is_err());
        }
    }

    #[test]
    fn the_bytes_are_frozen_and_each_error_says_what_to_do() {
        let doc = Doc { text: "a".into(), number: 1 };
        let text = String::from_utf8(encode("doc", &doc).to_vec()).unwrap();
        assert_eq!(
            text,
            r#"{"format":1,"kind":"doc","crc32c":"71d32631","body":{"text":"a","number":1}}"#
        );
        let newer =
            text.replace("\"format\":1", "\"format\":2,\"shape\":[1]").replace("body", "corpus");
        let error = decode::<Doc>("doc", newer.as_bytes()).unwrap_err();
        assert_eq!(error, EnvelopeError::Newer { kind: "doc", format: 2 });
        assert!(error.to_string().contains("upgrade"));
        let error = decode::<Doc>("manifest", text.as_bytes()).unwrap_err();
        assert_eq!(error, EnvelopeError::WrongKind { expected: "manifest", found: "doc".into() });
        let altered = text.replace("\"number\":1", "\"number\":2");
        assert_eq!(
            decode::<Doc>("doc", altered.as_bytes()),
            Err(EnvelopeError::Checksum { kind: "doc" })
        );
        // A field that a later version added, in the envelope and in the body.
        let body = r#"{"text":"a","number":1,"later":{"x":null}}"#;
        let crc = crc32c::crc32c(body.as_bytes());
        let wider =
            format!(r#"{{"format":1,"later":7,"kind":"doc","crc32c":"{crc:08x}","body":{body}}}"#);
        assert_eq!(decode::<Doc>("doc", wider.as_bytes()).unwrap(), doc);
    }
}
