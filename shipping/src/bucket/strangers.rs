//! Foreign objects under the prefix: those whose names Vasto cannot have written.
//!
//! **Invariant:** such a name causes one warning and no error.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use object_store::path::Path as ObjectPath;

/// Foreign names that are remembered; more would add no information.
const STRANGERS_MAX: usize = 100;
/// Longest shown part of a foreign name.
const STRANGER_CHARS: usize = 200;

/// Names of foreign objects, each with the reason why it is foreign.
#[derive(Debug, Default)]
pub(super) struct Strangers(Mutex<BTreeMap<String, String>>);

impl Strangers {
    fn names(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a name; logs it the first time.
    pub(super) fn add(&self, name: &str, why: &str) {
        let name: String = name.chars().take(STRANGER_CHARS).flat_map(char::escape_debug).collect();
        let mut names = self.names();
        if names.len() < STRANGERS_MAX && !names.contains_key(&name) {
            tracing::warn!(
                name,
                why,
                "something in the bucket is not an object of Vasto; it is passed by"
            );
            names.insert(name, why.to_owned());
        }
    }

    /// Returns the remembered names, each on a line of its own, and forgets them.
    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.names())
            .into_iter()
            .map(|(name, why)| format!("{name}: {why}"))
            .collect()
    }
}

/// Returns why a key of the store cannot be one of Vasto's; `None` when it can.
pub(super) fn oddity(key: &str) -> Option<String> {
    if key.is_empty() {
        return Some("it has no name".to_owned());
    }
    // Parsing keeps the text except slashes at its ends, without which no read finds the object.
    match ObjectPath::parse(key) {
        Ok(path) if path.as_ref() == key => None,
        Ok(_) => Some("its name begins or ends with a slash".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}
