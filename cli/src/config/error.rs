//! The errors of a configuration, and the advice for each.
//!
//! Invariant: no text here ever holds the value of a secret.

use std::{fmt, io, net::SocketAddr};

use crate::output::Failure;

/// Why no configuration is usable. The text states the problem, [`ConfigError::hint`] the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {file}: {source}")]
    Unreadable {
        /// Path of the file as given.
        file: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{file}:{line}:{column}: not valid TOML: {reason}")]
    Syntax {
        /// Path of the file as given.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// Expectation of the parser.
        reason: String,
    },
    /// Fields that do not exist, or values that do not fit.
    #[error("{}", Lines(.0))]
    Invalid(Vec<Problem>),
    /// A field that this server needs has no value.
    #[error("{path} is not set")]
    Missing {
        /// `section.field`.
        path: &'static str,
        /// The flag that sets it, with a sample value.
        flag: &'static str,
    },
    /// An address that other machines can reach, without protection.
    #[error(
        "{path} is {address}, which other machines can reach, \
         but TLS and authentication are not configured"
    )]
    Unprotected {
        /// `section.field`.
        path: &'static str,
        /// The address in it.
        address: SocketAddr,
    },
    /// The node listens on all addresses, and the address to advertise cannot be derived.
    #[error("node.listen is {0}, which is no address that others can connect to")]
    NotAdvertised(SocketAddr),
}

impl ConfigError {
    /// Returns the remedy for the error.
    pub(crate) fn hint(&self) -> String {
        match self {
            ConfigError::Unreadable { .. } => {
                "give the path of a TOML file that you may read with --config".to_owned()
            }
            ConfigError::Syntax { .. } => "text values stand in double quotes".to_owned(),
            ConfigError::Invalid(_) => {
                "`vasto config show` lists every field with its value".to_owned()
            }
            ConfigError::Missing { path, flag } => {
                format!(
                    "give {flag}, set {}, or write it into the file of --config",
                    variable(path)
                )
            }
            ConfigError::Unprotected { .. } => {
                "bind to 127.0.0.1, or, on a network where everybody is trusted, say --insecure"
                    .to_owned()
            }
            ConfigError::NotAdvertised(address) => format!(
                "say under which name others reach this node: --advertise HOST:{}",
                match address.port() {
                    0 => "PORT, with the same port in --listen".to_owned(),
                    port => port.to_string(),
                }
            ),
        }
    }

    /// Returns the failure of a configuration check that found the error. The command itself
    /// worked, so the exit code is 1, where a server that is started with the same configuration
    /// exits with 2.
    pub(crate) fn finding(&self) -> Failure {
        Failure::new(self.to_string()).hint(self.hint())
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        error.finding().into_usage()
    }
}

/// A problem in one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem(pub(super) String);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

struct Lines<'a>(&'a [Problem]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n       " };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

/// `VASTO_SECTION__FIELD` for `section.field`.
pub(super) fn variable(path: &str) -> String {
    format!("VASTO_{}", path.to_uppercase().replace('.', "__"))
}
