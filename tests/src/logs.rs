//! The logs of processes under test: an unexpected warning is a failure.

use serde_json::Value;

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
