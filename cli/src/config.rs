//! The configuration of the servers: defaults < TOML file < environment < flags.
//!
//! Invariant: every value in force was checked. A field that does not exist, in whichever source, is an error that
//! names the field and the nearest known field. No message and no listing ever shows a secret.
//!
//! Not here: the use of the values. Flags become [`Overrides`] in `args`.

mod error;
mod field;
#[cfg(test)]
mod reference;
mod show;
mod source;
mod values;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use bytesize::ByteSize;
use figment::{Figment, providers::Serialized, value::Value};
use serde::{Deserialize, Serialize};
use vasto_client::Vasto;
use vasto_observability::{LogFormat, Telemetry};
use vasto_shipping::{Bucket, Prices};

#[cfg(test)]
pub(crate) use self::reference::reference;
use self::{error::variable, field::Kind, source::Layer, values::Secret};
pub use self::{
    error::{ConfigError, Problem},
    source::{Overrides, Source},
};

/// All configuration sections.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[bucket]`
    pub bucket: BucketSection,
    /// `[master]`
    pub master: MasterSection,
    /// `[node]`
    pub node: NodeSection,
    /// `[log]`
    pub log: LogSection,
    /// `[security]`
    pub security: SecuritySection,
    /// `[prices]`
    pub prices: PricesSection,
}

/// The object store. Values that are not set come from the standard variables of the cloud.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BucketSection {
    /// `file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…`
    pub url: Option<String>,
    /// The address of an S3-compatible server.
    pub endpoint: Option<String>,
    /// The region of the bucket.
    pub region: Option<String>,
    /// The id of the access key.
    pub access_key_id: Option<Secret<String>>,
    /// The access key.
    pub secret_access_key: Option<Secret<String>>,
    /// Whether the endpoint may be reached without TLS.
    pub allow_http: bool,
    /// Checkpoints of each replica that are always kept.
    #[serde(with = "values::count")]
    pub keep_checkpoints: usize,
    /// Length of the window in which every point in time can be restored.
    #[serde(with = "values::period")]
    pub keep_for: Duration,
    /// Objects younger than this are never deleted.
    #[serde(with = "values::period")]
    pub min_age: Duration,
    /// Interval between two garbage collections; 0s: never.
    #[serde(with = "values::period")]
    pub gc_interval: Duration,
}

impl Default for BucketSection {
    fn default() -> BucketSection {
        let day = Duration::from_secs(24 * 3600);
        BucketSection {
            url: None,
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_access_key: None,
            allow_http: false,
            keep_checkpoints: 2,
            keep_for: 7 * day,
            min_age: day,
            gc_interval: day,
        }
    }
}

/// The master.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MasterSection {
    /// Address on which the master serves.
    pub listen: SocketAddr,
    /// Address of `/healthz`, `/readyz` and `/metrics`.
    pub admin_listen: SocketAddr,
    /// Silence after which a node counts as dead.
    #[serde(with = "values::duration")]
    pub node_silence: Duration,
    /// Absence of a node after which other nodes rebuild its replicas; 0s: never.
    #[serde(with = "values::period")]
    pub replace_after: Duration,
}

impl Default for MasterSection {
    fn default() -> MasterSection {
        MasterSection {
            listen: loopback(8278),
            admin_listen: loopback(0),
            node_silence: Duration::from_secs(10),
            replace_after: Duration::from_secs(600),
        }
    }
}

/// A node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeSection {
    /// The URL of the master.
    pub master: String,
    /// The data directory.
    pub dir: Option<PathBuf>,
    /// Address on which the node serves.
    pub listen: SocketAddr,
    /// HOST:PORT under which other servers reach the node, when that is not `listen`.
    pub advertise: Option<String>,
    /// The failure domain; replicas of a shard go to distinct zones.
    pub zone: Option<String>,
    /// Address of `/healthz`, `/readyz` and `/metrics`.
    pub admin_listen: SocketAddr,
    /// The block cache that all replicas share.
    #[serde(with = "values::size")]
    pub cache: ByteSize,
    /// The memory for unflushed writes that all replicas share.
    #[serde(with = "values::size")]
    pub write_buffer: ByteSize,
    /// Flushes and compactions that run concurrently.
    #[serde(with = "values::count")]
    pub background_jobs: usize,
    /// Bytes a second that background work may write; 0 sets no limit.
    #[serde(with = "values::size")]
    pub rate_limit: ByteSize,
    /// Interval at which new log records are shipped to the bucket.
    #[serde(with = "values::duration")]
    pub ship_interval: Duration,
    /// Bytes a second that uploads of checkpoints take, all replicas of the node together; 0 sets no limit.
    #[serde(with = "values::size")]
    pub ship_rate: ByteSize,
    /// Threads for reads that wait for the disk.
    #[serde(with = "values::count")]
    pub read_threads: usize,
    /// Maximum number of replicas on the node.
    #[serde(with = "values::count")]
    pub max_replicas: usize,
    /// Maximum bytes of log that a replica keeps for peers that have not read it.
    #[serde(with = "values::size")]
    pub max_log: ByteSize,
    /// Milliseconds added to the machine's clock, to test wrong clocks; 0 otherwise.
    pub clock_shift_ms: i64,
}

impl Default for NodeSection {
    fn default() -> NodeSection {
        NodeSection {
            master: "http://127.0.0.1:8278".to_owned(),
            dir: None,
            listen: loopback(0),
            advertise: None,
            zone: None,
            admin_listen: loopback(0),
            cache: ByteSize::mib(256),
            write_buffer: ByteSize::mib(128),
            background_jobs: 2,
            rate_limit: ByteSize::b(0),
            ship_interval: Duration::from_secs(10),
            ship_rate: ByteSize::b(0),
            read_threads: 4,
            max_replicas: vasto_core::limits::NODE_REPLICAS_MAX,
            max_log: ByteSize::b(vasto_core::limits::BINLOG_BYTES_MAX),
            clock_shift_ms: 0,
        }
    }
}

/// Logs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSection {
    /// A filter such as `info,vasto_node=debug`.
    pub filter: String,
    /// The form of log lines.
    #[serde(with = "values::word")]
    pub format: LogFormat,
}

impl Default for LogSection {
    fn default() -> LogSection {
        LogSection { filter: "info".to_owned(), format: LogFormat::Auto }
    }
}

/// Permissions.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SecuritySection {
    /// Serve on other addresses than loopback without TLS and authentication.
    pub insecure: bool,
}

/// Prices of the bucket's provider; `vasto cluster status` estimates the bill from these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PricesSection {
    /// The currency of all prices.
    pub currency: String,
    /// Price of 1,000 PUT requests.
    #[serde(with = "values::price")]
    pub put_per_1000: f64,
    /// Price of 1,000 GET or HEAD requests.
    #[serde(with = "values::price")]
    pub get_per_1000: f64,
    /// Price of 1,000 LIST requests.
    #[serde(with = "values::price")]
    pub list_per_1000: f64,
    /// Price of one GiB stored for a month.
    #[serde(with = "values::price")]
    pub gib_month: f64,
    /// Price of one GiB read from the bucket.
    #[serde(with = "values::price")]
    pub egress_gib: f64,
}

impl Default for PricesSection {
    fn default() -> PricesSection {
        let prices = Prices::default();
        PricesSection {
            currency: prices.currency,
            put_per_1000: prices.put_per_1000,
            get_per_1000: prices.get_per_1000,
            list_per_1000: prices.list_per_1000,
            gib_month: prices.gib_month,
            egress_gib: prices.egress_gib,
        }
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// A configuration in force, and the source of each value.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    origins: Origins,
}

/// Merges all sources: defaults < `file` < the environment of the process < `flags`.
///
/// # Errors
/// [`ConfigError`] with every problem that can be found at once.
pub fn load(file: Option<&Path>, flags: Overrides) -> Result<Loaded, ConfigError> {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    load_from(file, std::env::vars_os().map(|(name, value)| (text(name), text(value))), flags)
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
    let config: Config = origins.figment.extract().map_err(|error| ConfigError::Invalid(origins.bad_values(error)))?;
    let bad_forms = origins.bad_forms(&config);
    match bad_forms.is_empty() {
        true => Ok(Loaded { config, origins }),
        false => Err(ConfigError::Invalid(bad_forms)),
    }
}

/// Likeness from which a variable counts as a misspelling of a field's variable.
const VARIABLE_LIKENESS_MIN: f64 = 0.85;

/// Returns variables that would be read with two underscores after the section. Other variables that begin with
/// `VASTO_` may belong to other programs.
fn misnamed_variables<'a>(names: impl Iterator<Item = &'a str>) -> Vec<Problem> {
    let meant = |name: &str| {
        let rest = name.strip_prefix("VASTO_").filter(|rest| !rest.contains("__"))?;
        let likeness = |field: &field::Field| {
            strsim::normalized_damerau_levenshtein(rest, &field.path.to_uppercase().replace('.', "_"))
        };
        let nearest = field::FIELDS.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
        (likeness(nearest) >= VARIABLE_LIKENESS_MIN).then(|| variable(nearest.path))
    };
    let problem = |name: &str| {
        let meant = meant(name).filter(|_| !source::is_alias(name))?;
        Some(Problem(format!("the variable {name} is not read; did you mean {meant}, with two underscores?")))
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
            ("node.master", Vasto::check_url(&config.node.master).err().map(|error| error.to_string())),
            ("log.filter", Telemetry::check_filter(&config.log.filter).err().map(|error| error.to_string())),
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
                        _ => {
                            self.figment.find_value(&path).map_or_else(|_| "the value".to_owned(), |value| show(&value))
                        }
                    };
                    Problem(format!("{path}{place}: {given} is not {}", field.kind.expected()))
                }
                None => Problem(format!("{path}{place}: {}", error.kind)),
            }
        };
        errors.into_iter().map(problem).collect()
    }
}

/// Checks an S3 endpoint: `http://` or `https://`, and a host. The message omits the value, which may hold a secret.
fn check_endpoint(url: &str) -> Result<(), String> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
    match host.is_empty() || host.contains(char::is_whitespace) {
        true => Err("it is no address of a server; write for example http://127.0.0.1:9000".to_owned()),
        false => Ok(()),
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::String(_, text) => format!("{text:?}"),
        Value::Num(..) | Value::Bool(..) => serde_json::to_string(value).unwrap_or_else(|_| "the value".to_owned()),
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
    pub fn check_master(&self) -> Result<&str, ConfigError> {
        self.check_bind("master.listen", self.master.listen)?;
        self.check_bind("master.admin_listen", self.master.admin_listen)?;
        self.bucket.url.as_deref().ok_or(ConfigError::Missing { path: "bucket.url", flag: "--bucket s3://NAME/PREFIX" })
    }

    /// Checks the values that `vasto serve node` needs, and returns the data directory.
    ///
    /// # Errors
    /// [`ConfigError::Missing`], [`ConfigError::Unprotected`] or [`ConfigError::NotAdvertised`].
    pub fn check_node(&self) -> Result<&Path, ConfigError> {
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
pub fn check_file(file: &Path) -> Result<(), ConfigError> {
    load_from(Some(file), [], Overrides::new()).map(|_| ())
}

#[cfg(test)]
mod tests;
