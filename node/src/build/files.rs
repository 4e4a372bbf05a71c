//! A file of a checkpoint: how it is downloaded, and how a throw-away database imports it.

use vasto_shipping::download::Wanted;
use vasto_shipping::manifest::ManifestFile;

use crate::engine::ImportFile;

/// Returns the name of the file in a download directory, which is its name in the source database.
fn local_name(file: &ManifestFile) -> String {
    format!("{:06}.sst", file.file_number)
}

/// Returns the object and the name that it is downloaded to.
pub(super) fn wanted(file: &ManifestFile) -> Wanted {
    Wanted {
        key: file.key.clone(),
        bytes: file.bytes,
        crc32c: file.crc32c,
        file_name: local_name(file),
    }
}

/// Describes the downloaded file for an import, with the level and the sequence numbers of its
/// manifest.
pub(super) fn imported(file: &ManifestFile) -> ImportFile {
    ImportFile {
        name: local_name(file),
        bytes: file.bytes,
        level: file.level,
        smallest_seqno: file.smallest_seqno,
        largest_seqno: file.largest_seqno,
        first_key: file.first_key.clone(),
        last_key: file.last_key.clone(),
        entries: file.entries,
    }
}
