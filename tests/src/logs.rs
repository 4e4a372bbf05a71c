//! The logs of processes under test: an unexpected warning is a failure.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Appends these logs to one file, each behind a line with its path.
///
/// # Errors
/// When the file cannot be written; a log that cannot be read is passed over.
pub(crate) fn gather(logs: &[PathBuf], into: &Path) -> io::Result<()> {
    let mut all = OpenOptions::new().create(true).append(true).open(into)?;
    for log in logs {
        io::Write::write_all(&mut all, format!("--- {}\n", log.display()).as_bytes())?;
        if let Ok(mut text) = File::open(log) {
            io::copy(&mut text, &mut all)?;
        }
    }
    Ok(())
}

/// Returns the lines of a JSON log that are warnings, errors or not JSON at all (a panic), unless
/// they contain one of the allowed texts.
pub(crate) fn unexpected(log: &str, allowed: &[String]) -> Vec<String> {
    log.lines()
        .filter(|line| !line.trim().is_empty())
        .filter(|line| match serde_json::from_str::<Value>(line) {
            Ok(event) => !matches!(event["level"].as_str(), Some("INFO" | "DEBUG" | "TRACE")),
            Err(_) => true,
        })
        .filter(|line| !allowed.iter().any(|text| line.contains(text.as_str())))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logs_of_all_clusters_are_gathered_in_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let (log, none) = (dir.path().join("one.log"), dir.path().join("none.log"));
        std::fs::write(&log, "a line\n").unwrap();
        let all = dir.path().join("all");
        gather(&[log.clone(), none], &all).unwrap();
        gather(&[log], &all).unwrap();
        let text = std::fs::read_to_string(&all).unwrap();
        assert_eq!(text.matches("a line").count(), 2, "{text}");
        assert_eq!(text.matches("--- ").count(), 3, "{text}");
    }

    #[test]
    fn warnings_and_panics_are_unexpected_unless_allowed() {
        let log = "{\"level\":\"INFO\",\"message\":\"fine\"}\n\
                   {\"level\":\"WARN\",\"message\":\"node away\"}\n\
                   {\"level\":\"ERROR\",\"message\":\"disk\"}\n\
                   thread 'main' panicked at x.rs:1\n";
        assert_eq!(unexpected(log, &[]).len(), 3);
        let left = unexpected(log, &["node away".to_owned()]);
        assert_eq!(left.len(), 2);
        assert!(left[0].contains("disk") && left[1].contains("panicked"));
    }
}
