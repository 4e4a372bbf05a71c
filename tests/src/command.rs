//! Commands of `vasto`: what they answer, and how they refuse.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use vasto_testkit::run;

use crate::binary::vasto_binary;

/// The outcome of a command of `vasto`.
#[derive(Debug, Clone)]
pub struct Ran {
    /// The exit code; -1 when a signal ended it.
    pub code: i32,
    /// Output on stdout.
    pub stdout: String,
    /// Output on stderr.
    pub stderr: String,
}

impl Ran {
    /// Runs `vasto <args>` with only these variables added.
    ///
    /// # Errors
    /// When the command does not end in time.
    pub async fn of(args: &[&str], env: &[(String, String)], deadline: Duration) -> Result<Self> {
        let output = run(vasto_binary(), args, env, deadline).await?;
        Ok(Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Checks for a refusal: this exit code, nothing on stdout, and an `error:` (with its `hint:`)
    /// that contains all these texts.
    ///
    /// # Errors
    /// The difference from such a refusal.
    pub fn refused(&self, code: i32, texts: &[&str]) -> Result<()> {
        ensure!(self.code == code, "the exit code is {}, not {code}: {self:?}", self.code);
        ensure!(self.stdout.is_empty(), "a refused command printed a result: {self:?}");
        ensure!(
            self.stderr.lines().any(|line| line.starts_with("error: ")),
            "there is no error: {self:?}"
        );
        ensure!(!self.stderr.contains("panicked"), "it panicked: {self:?}");
        for text in texts {
            ensure!(
                self.stderr.contains(text),
                "the message does not say {text:?}: {}",
                self.stderr
            );
        }
        Ok(())
    }
}

/// Formats the figures of a resize in one line.
pub fn resized(report: &Value) -> String {
    let number = |name: &str| report[name].as_u64().unwrap_or_default();
    let pause = |name: &str| report["write_pause_ms"][name].as_f64().unwrap_or_default();
    format!(
        "{} -> {}: {} keys, {} bytes moved, {} from the bucket ({} objects), {} from peers, pause {:.1}/{:.1}/{:.1} ms, {} ms",
        number("from"),
        number("to"),
        number("keys_moved"),
        number("bytes_moved"),
        number("bytes_from_bucket"),
        number("objects_read"),
        number("bytes_from_peers"),
        pause("p50"),
        pause("p99"),
        pause("max"),
        number("duration_ms"),
    )
}
