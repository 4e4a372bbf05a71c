//! The sources of values: the file, the environment, the flags. Each becomes one layer of
//! `section.field = value`, with the description of the place where each value was written.
//!
//! Owned by [`super`]: the precedence of the layers, and the checks of the values.

use std::{fs, path::Path};

use figment::{
    Metadata, Profile, Provider,
    value::{Dict, Map, Value},
};
use serde::Serialize;

use super::{error::ConfigError, field};

/// The kinds of sources, from the weakest to the strongest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Source {
    /// No source sets the value.
    Default,
    /// The TOML file of `--config`.
    File,
    /// A `VASTO_SECTION__FIELD` variable.
    Env,
    /// A flag of the command.
    Flag,
}

impl Source {
    pub(super) fn name(self) -> &'static str {
        match self {
            Source::Default => "default",
            Source::File => "file",
            Source::Env => "env",
            Source::Flag => "flag",
        }
    }
}

/// A value as it was given.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// `section.field`, known or not.
    pub(super) path: String,
    pub(super) value: Value,
    /// The file, the variable or the flag.
    pub(super) origin: String,
}

/// All values of one source; the last of several values for the same path counts.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) source: Source,
    pub(super) entries: Vec<Entry>,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.source.name())
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        let mut sections = Dict::new();
        for entry in &self.entries {
            let nested = figment::util::nest(&entry.path, entry.value.clone());
            for (section, value) in nested.into_dict().unwrap_or_default() {
                let merged = match (sections.remove(&section), value) {
                    (Some(Value::Dict(tag, mut fields)), Value::Dict(_, more)) => {
                        fields.extend(more);
                        Value::Dict(tag, fields)
                    }
                    (_, value) => value,
                };
                sections.insert(section, merged);
            }
        }
        Ok(Profile::Default.collect(sections))
    }
}

/// Values of flags as text; parsed by the kind of their field.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overrides(Vec<(String, String, String)>);

impl Overrides {
    /// Creates an empty set of overrides.
    pub(crate) fn new() -> Overrides {
        Overrides::default()
    }

    /// Sets `path` to the value of `flag`, if the flag was given.
    pub(crate) fn set(mut self, path: &str, flag: &str, value: Option<impl ToString>) -> Overrides {
        if let Some(value) = value {
            self.0.push((path.to_owned(), value.to_string(), flag.to_owned()));
        }
        self
    }

    /// Sets `path` to true if the flag was given; a flag that is absent sets nothing.
    pub(crate) fn switch(self, path: &str, flag: &str, given: bool) -> Overrides {
        self.set(path, flag, given.then_some(true))
    }

    /// Adds the `SECTION.FIELD=VALUE` assignments of `--set`.
    pub(crate) fn assign(self, assignments: &[(String, String)]) -> Overrides {
        assignments.iter().fold(self, |overrides, (path, value)| {
            overrides.set(path, &format!("--set {path}"), Some(value))
        })
    }

    pub(super) fn layer(self) -> Layer {
        let entry = |(path, text, origin): (String, String, String)| entry(path, &text, origin);
        Layer { source: Source::Flag, entries: self.0.into_iter().map(entry).collect() }
    }
}

/// Variables of other tools and commands that set a field as well.
const ALIASES: [(&str, &str); 3] =
    [("RUST_LOG", "log.filter"), ("VASTO_LOG", "log.filter"), ("VASTO_MASTER", "node.master")];

/// Returns whether the variable is an alias.
pub(super) fn is_alias(name: &str) -> bool {
    ALIASES.iter().any(|(alias, _)| *alias == name)
}

/// Builds the layer of the environment. Empty variables count as not set; variables without the
/// double underscore are not configuration.
pub(super) fn environment(variables: impl IntoIterator<Item = (String, String)>) -> Layer {
    let variables: Vec<_> = variables.into_iter().filter(|(_, text)| !text.is_empty()).collect();
    let aliases = ALIASES.into_iter().filter_map(|(alias, path)| {
        let (name, text) = variables.iter().find(|(name, _)| name == alias)?;
        Some(entry(path.to_owned(), text, name.clone()))
    });
    let sections = variables.iter().filter_map(|(name, text)| {
        let (section, field) = name.strip_prefix("VASTO_")?.split_once("__")?;
        let path = format!("{}.{}", section.to_lowercase(), field.to_lowercase());
        Some(entry(path, text, name.clone()))
    });
    Layer { source: Source::Env, entries: aliases.chain(sections).collect() }
}

fn entry(path: String, text: &str, origin: String) -> Entry {
    let value = match field::find(&path) {
        Some(field) => field.kind.value_of(text),
        None => Value::from(text),
    };
    Entry { path, value, origin }
}

/// Reads the layer of a TOML file. Parse errors name line and column and omit the text of the line,
/// which may hold a secret.
pub(super) fn file(path: &Path) -> Result<Layer, ConfigError> {
    let origin = path.display().to_string();
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Unreadable { file: origin.clone(), source })?;
    let document: toml::Table = toml::from_str(&text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        let before = text.get(..offset).unwrap_or_default();
        ConfigError::Syntax {
            file: origin.clone(),
            line: before.matches('\n').count() + 1,
            column: before.chars().rev().take_while(|c| *c != '\n').count() + 1,
            reason: error.message().to_owned(),
        }
    })?;
    let mut entries = Vec::new();
    for (section, content) in document {
        match content {
            toml::Value::Table(fields) => {
                for (name, value) in fields {
                    let value = value_of(&value);
                    entries.push(Entry {
                        path: format!("{section}.{name}"),
                        value,
                        origin: origin.clone(),
                    });
                }
            }
            other => {
                let value = value_of(&other);
                entries.push(Entry { path: section, value, origin: origin.clone() });
            }
        }
    }
    Ok(Layer { source: Source::File, entries })
}

fn value_of(value: &toml::Value) -> Value {
    Value::serialize(value).expect("every TOML value has a counterpart")
}
