//! The choice between log lines for people and log lines for machines.

use std::{fmt, str::FromStr};

/// How log lines are written to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people when stderr is a terminal, JSON otherwise.
    #[default]
    Auto,
    /// One line of text per event.
    Human,
    /// One JSON object per event.
    Json,
}

impl LogFormat {
    /// Returns true when lines are JSON, given whether stderr is a terminal.
    pub fn is_json(self, stderr_is_terminal: bool) -> bool {
        match self {
            LogFormat::Auto => !stderr_is_terminal,
            LogFormat::Human => false,
            LogFormat::Json => true,
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LogFormat::Auto => "auto",
            LogFormat::Human => "human",
            LogFormat::Json => "json",
        })
    }
}

/// A word that is not a log format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a log format; write auto, human or json")]
pub struct UnknownLogFormat(pub String);

impl FromStr for LogFormat {
    type Err = UnknownLogFormat;

    fn from_str(word: &str) -> Result<LogFormat, UnknownLogFormat> {
        match word {
            "auto" => Ok(LogFormat::Auto),
            "human" => Ok(LogFormat::Human),
            "json" => Ok(LogFormat::Json),
            other => Err(UnknownLogFormat(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn auto_follows_the_terminal_and_the_others_do_not() {
        assert!(!LogFormat::Auto.is_json(true));
        assert!(LogFormat::Auto.is_json(false));
        assert!(!LogFormat::Human.is_json(false));
        assert!(LogFormat::Json.is_json(true));
    }

    #[test]
    fn words_round_trip_and_others_are_refused_with_the_choices() {
        for format in [LogFormat::Auto, LogFormat::Human, LogFormat::Json] {
            assert_eq!(format.to_string().parse::<LogFormat>().unwrap(), format);
        }
        let error = "jsno".parse::<LogFormat>().unwrap_err().to_string();
        assert!(error.contains("jsno") && error.contains("auto, human or json"));
    }
}
