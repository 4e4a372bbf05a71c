//! The frozen binary formats: entries, keys, log records; and the merge rule that orders entries.
//!
//! **Invariant:** golden vectors in `testdata/v1` fix every format; a change is a new version
//! beside the old one.

pub mod codec;
pub mod entry;
mod file_header;
pub mod merge;
mod range;
pub mod record;
pub mod stored_key;
