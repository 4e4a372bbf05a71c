//! The commands that administer a cluster. Each prints the master's document as JSON, or as a table made from the
//! same document: both formats show the same data.

pub mod bucket;
pub mod cluster;
pub mod keyspace;
pub mod operation;
pub mod resize;

use serde_json::Value;

use crate::output::{format_bytes, format_count};

/// The elements of a JSON array; empty for any other value.
fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A string or a number as text, `-` for a value that has not been reported.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A number with thousands separators.
fn count(value: &Value) -> String {
    value.as_u64().map_or_else(|| text(value), format_count)
}

/// A number of bytes with its unit.
fn bytes(value: &Value) -> String {
    value.as_u64().map_or_else(|| text(value), format_bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nobody_has_reported_is_a_dash() {
        assert_eq!([text(&Value::Null), count(&Value::Null), bytes(&Value::Null)], ["-", "-", "-"]);
        assert_eq!(count(&json!(1_234)), "1,234");
        assert_eq!(bytes(&json!(2_048)), "2.0 KiB");
        assert_eq!(text(&json!("a")), "a");
        assert!(list(&json!({})).is_empty());
    }
}
