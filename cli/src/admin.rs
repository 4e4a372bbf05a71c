//! The commands that administer a cluster. Each prints the master's document as JSON, or as a table
//! made from the same document: both formats show the same data.

pub(crate) mod bucket;
pub(crate) mod cluster;
pub(crate) mod keyspace;
pub(crate) mod operation;
mod plan;
mod rebalance;
pub(crate) mod resize;

use serde_json::Value;
use vasto_client::Answer;

use crate::output::{self, OutputFormat, format_bytes, format_count};

/// Prints an answer of the master: its document with all fields that came, or as the text that
/// `shown` makes of it.
fn print<T>(
    answer: &Answer<T>,
    format: OutputFormat,
    shown: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    match format {
        OutputFormat::Json => output::print_json(&serde_json::from_str::<Value>(answer.json())?)?,
        OutputFormat::Table => output::print(&shown(answer))?,
    }
    Ok(())
}

/// A value as text, `-` when it has not been reported.
fn text(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// A number with thousands separators.
fn count(value: Option<u64>) -> String {
    text(value.map(format_count))
}

/// A number of bytes with its unit.
fn bytes(value: Option<u64>) -> String {
    text(value.map(format_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_reported_is_a_dash() {
        assert_eq!([text(None::<u64>), count(None), bytes(None)], ["-", "-", "-"]);
        assert_eq!(count(Some(1_234)), "1,234");
        assert_eq!(bytes(Some(2_048)), "2.0 KiB");
        assert_eq!(text(Some("a")), "a");
    }
}
