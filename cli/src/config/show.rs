//! `vasto config show`: every value in force with the source it came from.

use std::io;

use serde::Serialize;

use super::{
    Loaded, Source,
    field::{FIELDS, Field, Kind},
};
use crate::output;

/// A line of `vasto config show`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// `section.field`.
    pub name: &'static str,
    /// The value in force; null when there is none, `***` for a secret.
    pub value: serde_json::Value,
    /// The source of the value.
    pub source: Source,
    /// The file, the variable or the flag; null for a default.
    pub origin: Option<String>,
}

impl Loaded {
    /// Returns every value in force with its source, in the order of the sections.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let config =
            serde_json::to_value(&self.config).expect("a configuration has only text keys");
        let row = |field: &'static Field| {
            let value = &config[field.path.split('.').next().unwrap_or_default()]
                [field.path.split('.').next_back().unwrap_or_default()];
            Row {
                name: field.path,
                value: match (field.kind, value.as_str()) {
                    (Kind::Url, Some(url)) => without_credentials(url).into(),
                    _ => value.clone(),
                },
                source: self.origins.source(field.path),
                origin: self.origins.origin(field.path).map(str::to_owned),
            }
        };
        FIELDS.iter().map(row).collect()
    }

    /// Prints every value in force with its source.
    ///
    /// # Errors
    /// An error of the operating system.
    pub(crate) fn show(&self, format: output::OutputFormat) -> io::Result<()> {
        let rows = self.rows();
        if format == output::OutputFormat::Json {
            return output::print_json(&rows);
        }
        let cells = rows.into_iter().map(|row| {
            let value = match row.value {
                serde_json::Value::Null => "-".to_owned(),
                serde_json::Value::String(text) => output::printable(text.as_bytes()),
                other => other.to_string(),
            };
            let source = match row.origin {
                Some(origin) => format!("{} {origin}", row.source.name()),
                None => row.source.name().to_owned(),
            };
            vec![row.name.to_owned(), value, source]
        });
        output::print(&output::table(&["NAME", "VALUE", "SOURCE"], cells))
    }
}

/// Hides credentials in a URL: `s3://key:secret@bucket` is not supported, and must not be shown
/// when a user tries it.
fn without_credentials(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let authority = rest.split('/').next().unwrap_or_default();
            match authority.rsplit_once('@') {
                Some((credentials, _)) => format!("{scheme}://***{}", &rest[credentials.len()..]),
                None => url.to_owned(),
            }
        }
        None => url.to_owned(),
    }
}
