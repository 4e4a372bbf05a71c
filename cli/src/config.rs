//! The configuration of the servers: defaults < TOML file < environment < flags.
//!
//! Invariant: every value in force was checked. A field that does not exist, in whichever source,
//! is an error that names the field and the nearest known field. No message and no listing ever
//! shows a secret.
//!
//! Not here: the use of the values. Flags become [`Overrides`] in `args`.

mod error;
mod field;
#[cfg(test)]
mod reference;
mod sections;
mod show;
mod source;
mod values;

use std::{net::SocketAddr, path::Path};

use figment::{Figment, providers::Serialized, value::Value};
use vasto_client::Vasto;
use vasto_observability::Telemetry;
use vasto_shipping::Bucket;

#[cfg(test)]
pub(crate) use self::reference::reference;
use self::{
    error::{ConfigError, Problem, variable},
    field::Kind,
    source::Layer,
};
pub(crate) use self::{
    sections::{Config, NodeSection},
    source::{Overrides, Source},
};
use crate::output::Failure;

/// A configuration in force, and the source of each value.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    /// The values.
    pub config: Config,
    origins: Origins,
}

/// Merges all sources: defaults < `file` < the environment of the process < `flags`.
///
/// # Errors
/// Every problem that can be found at once.
pub(crate) fn load(file: Option<&Path>, flags: Overrides) -> Result<Loaded, Failure> {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    let environment = std::env::vars_os().map(|(name, value)| (text(name), text(value)));
    Ok(load_from(file, environment, flags)?)
}

fn load_from(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: Overrides,
) -> Result<Loaded, ConfigError> {
    let mut layers = Vec::new();
    if let Some(file) = file {
        layers.push(source::file(file)?);
    }
    let environment: Vec<_> = environment.into_iter().collect();
    let mut unknown = misnamed_variables(environment.iter().map(|(name, _)| name.as_str()));
    layers.push(source::environment(environment));
    layers.push(flags.layer());

    unknown.extend(layers.iter().flat_map(unknown_fields));
    if !unknown.is_empty() {
        return Err(ConfigError::Invalid(unknown));
    }
    let figment = Figment::from(Serialized::defaults(Config::default()));
    let figment = layers.iter().cloned().fold(figment, Figment::merge);
    let origins = Origins { figment, layers };
    let config: Config = origins
        .figment
        .extract()
        .map_err(|error| ConfigError::Invalid(origins.bad_values(error)))?;
    let bad_forms = origins.bad_forms(&config);
    match bad_forms.is_empty() {
        true => Ok(Loaded { config, origins }),
        false => Err(ConfigError::Invalid(bad_forms)),
    }
}

/// Likeness from which a variable counts as a misspelling of a field's variable.
const VARIABLE_LIKENESS_MIN: f64 = 0.85;

/// Returns variables that would be read with two underscores after the section. Other variables
/// that begin with `VASTO_` may belong to other programs.
fn misnamed_variables<'a>(names: impl Iterator<Item = &'a str>) -> Vec<Problem> {
    let meant = |name: &str| {
        let rest = name.strip_prefix("VASTO_").filter(|rest| !rest.contains("__"))?;
        let likeness = |field: &field::Field| {
            strsim::normalized_damerau_levenshtein(
                rest,
                &field.path.to_uppercase().replace('.', "_"),
            )
        };
        let nearest = field::FIELDS.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
        (likeness(nearest) >= VARIABLE_LIKENESS_MIN).then(|| variable(nearest.path))
    };
    let problem = |name: &str| {
        let meant = meant(name).filter(|_| !source::is_alias(name))?;
        Some(Problem(format!(
            "the variable {name} is not read; did you mean {meant}, with two underscores?"
        )))
    };
    names.filter_map(problem).collect()
}

fn unknown_fields(layer: &Layer) -> impl Iterator<Item = Problem> + '_ {
    let unknown = layer.entries.iter().filter(|entry| field::find(&entry.path).is_none());
    unknown.map(|entry| {
        let as_written = |path: &str| match layer.source {
            Source::Env => variable(path),
            Source::Flag => format!("--set {path}=..."),
            Source::File | Source::Default => path.to_owned(),
        };
        let advice = match field::nearest(&entry.path) {
            Some(field) => format!("did you mean {}?", as_written(field.path)),
            None => format!("known here: {}", field::neighbours(&entry.path).join(", ")),
        };
        Problem(match layer.source {
            Source::Env => format!("unknown field {} in the environment; {advice}", entry.origin),
            Source::Flag => format!("unknown field {} in a flag; {advice}", entry.path),
            Source::File | Source::Default => {
                format!("unknown field {} in {}; {advice}", entry.path, entry.origin)
            }
        })
    })
}

/// The source of each value.
#[derive(Debug, Clone)]
struct Origins {
    figment: Figment,
    layers: Vec<Layer>,
}

impl Origins {
    fn source(&self, path: &str) -> Source {
        let name = self.figment.find_metadata(path).map(|metadata| metadata.name.as_ref());
        [Source::File, Source::Env, Source::Flag]
            .into_iter()
            .find(|source| name == Some(source.name()))
            .unwrap_or(Source::Default)
    }

    /// Returns the file, the variable or the flag that set a value; `None` for a default.
    fn origin(&self, path: &str) -> Option<&str> {
        let source = self.source(path);
        let layer = self.layers.iter().find(|layer| layer.source == source)?;
        let entry = layer.entries.iter().rev().find(|entry| entry.path == path)?;
        Some(&entry.origin)
    }

    /// Checks texts that have the right type for a form that their use rejects.
    fn bad_forms(&self, config: &Config) -> Vec<Problem> {
        let bucket = config.bucket.url.as_deref().map(Bucket::check_url).transpose();
        let endpoint = config.bucket.endpoint.as_deref().map(check_endpoint).transpose();
        let problems = [
            ("bucket.url", bucket.err().map(|error| error.to_string())),
            ("bucket.endpoint", endpoint.err()),
            (
                "node.master",
                Vasto::check_url(&config.node.master).err().map(|error| error.to_string()),
            ),
            (
                "log.filter",
                Telemetry::check_filter(&config.log.filter).err().map(|error| error.to_string()),
            ),
        ];
        let problem = |(path, why): (&str, Option<String>)| {
            let place = self.origin(path).map(|origin| format!(" in {origin}")).unwrap_or_default();
            why.map(|why| Problem(format!("{path}{place}: {why}")))
        };
        problems.into_iter().filter_map(problem).collect()
    }

    fn bad_values(&self, errors: figment::Error) -> Vec<Problem> {
        let problem = |error: figment::Error| {
            // A whole section may have the wrong type; the error then has no field to name.
            let path = error.path.iter().take(2).map(String::as_str).collect::<Vec<_>>().join(".");
            let place = self.origin(&path).map(|origin| format!(" in {origin}"));
            let place = place.unwrap_or_default();
            match field::find(&path) {
                Some(field) => {
                    let given = match field.kind {
                        Kind::Secret => "the value".to_owned(),
                        _ => self
                            .figment
                            .find_value(&path)
                            .map_or_else(|_| "the value".to_owned(), |value| show(&value)),
                    };
                    Problem(format!("{path}{place}: {given} is not {}", field.kind.expected()))
                }
                None => Problem(format!("{path}{place}: {}", error.kind)),
            }
        };
        errors.into_iter().map(problem).collect()
    }
}

/// Checks an S3 endpoint: `http://` or `https://`, and a host. The message omits the value, which
/// may hold a secret.
fn check_endpoint(url: &str) -> Result<(), String> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
    match host.is_empty() || host.contains(char::is_whitespace) {
        true => {
            Err("it is no address of a server; write for example http://127.0.0.1:9000".to_owned())
        }
        false => Ok(()),
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::String(_, text) => format!("{text:?}"),
        Value::Num(..) | Value::Bool(..) => {
            serde_json::to_string(value).unwrap_or_else(|_| "the value".to_owned())
        }
        Value::Array(..) => "a list".to_owned(),
        Value::Dict(..) => "a table".to_owned(),
        Value::Char(..) | Value::Empty(..) => "the value".to_owned(),
    }
}

// ------------------------------------------------------------------- requirements of the servers

impl Config {
    /// Checks the values that `vasto serve master` needs, and returns the URL of the bucket.
    ///
    /// # Errors
    /// [`ConfigError::Missing`] or [`ConfigError::Unprotected`].
    pub(crate) fn check_master(&self) -> Result<&str, ConfigError> {
        self.check_bind("master.listen", self.master.listen)?;
        self.check_bind("master.admin_listen", self.master.admin_listen)?;
        self.bucket
            .url
            .as_deref()
            .ok_or(ConfigError::Missing { path: "bucket.url", flag: "--bucket s3://NAME/PREFIX" })
    }

    /// Checks the values that `vasto serve node` needs, and returns the data directory.
    ///
    /// # Errors
    /// [`ConfigError::Missing`], [`ConfigError::Unprotected`] or [`ConfigError::NotAdvertised`].
    pub(crate) fn check_node(&self) -> Result<&Path, ConfigError> {
        self.check_bind("node.listen", self.node.listen)?;
        self.check_bind("node.admin_listen", self.node.admin_listen)?;
        if self.node.listen.ip().is_unspecified() && self.node.advertise.is_none() {
            return Err(ConfigError::NotAdvertised(self.node.listen));
        }
        self.node.dir.as_deref().ok_or(ConfigError::Missing { path: "node.dir", flag: "--dir DIR" })
    }

    /// Rejects an address that is not loopback unless `security.insecure` allows it.
    fn check_bind(&self, path: &'static str, address: SocketAddr) -> Result<(), ConfigError> {
        match address.ip().is_loopback() || self.security.insecure {
            true => Ok(()),
            false => Err(ConfigError::Unprotected { path, address }),
        }
    }
}

/// Checks one file by itself: `vasto config check FILE`.
///
/// # Errors
/// [`ConfigError`] with the problems of the file.
pub(crate) fn check_file(file: &Path) -> Result<(), ConfigError> {
    load_from(Some(file), [], Overrides::new()).map(|_| ())
}

#[cfg(test)]
mod tests;
