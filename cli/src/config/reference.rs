//! The settings as the reference in `docs/reference` lists them.

use super::{Overrides, field::FIELDS, load_from};

/// One row of the reference.
pub(crate) struct Setting {
    /// `section.field`.
    pub(crate) path: &'static str,
    /// Description of a valid value.
    pub(crate) expected: &'static str,
    /// The value without any source.
    pub(crate) default: String,
}

/// Every setting, in the order of `vasto config show`.
pub(crate) fn reference() -> Vec<Setting> {
    let defaults = load_from(None, [], Overrides::new()).expect("the defaults are good").rows();
    let setting = |(field, row): (&'static super::field::Field, super::show::Row)| Setting {
        path: field.path,
        expected: field.kind.expected(),
        default: match row.value {
            serde_json::Value::Null => "–".to_owned(),
            serde_json::Value::String(text) => format!("`{text}`"),
            other => format!("`{other}`"),
        },
    };
    FIELDS.iter().zip(defaults).map(setting).collect()
}
