//! Settings of a test run in environment variables, such as the seed and the length of a run.

use std::str::FromStr;

/// Returns the value of a variable, or `otherwise` when it is not set.
///
/// # Panics
/// When the variable is set to something that is not such a value.
pub fn setting<T: FromStr>(variable: &str, otherwise: T) -> T {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is {text:?}, which is not a value for it")),
        Err(_) => otherwise,
    }
}
