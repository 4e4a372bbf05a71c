//! How the words on the command line become values, and what to say when they do not.

use std::time::Duration;

use bytesize::ByteSize;

pub(super) fn parse_assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((path, value)) if path.split_once('.').is_some() => Ok((path.trim().to_owned(), value.to_owned())),
        _ => Err("write SECTION.FIELD=VALUE, for example node.cache=1GiB".to_owned()),
    }
}

pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write for example 30s, 1h or 30d"))
}

pub(super) fn parse_ttl(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("nothing would be kept; leave it out to keep it for ever".to_owned()),
        ttl => Ok(ttl),
    }
}

pub(super) fn parse_size(text: &str) -> Result<usize, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}; write for example 100 or 4KiB"))?;
    usize::try_from(size.as_u64()).map_err(|_| "this is more than fits into memory".to_owned())
}

/// Microseconds since 1970; 0 is no event time.
pub(super) fn parse_event_time(text: &str) -> Result<u64, String> {
    let micros = match text.parse::<u64>() {
        Ok(micros) => micros,
        Err(_) => {
            let time: jiff::Timestamp = text
                .parse()
                .map_err(|_| "write microseconds since 1970, or a time such as 2026-01-31T12:00:00Z".to_owned())?;
            u64::try_from(time.as_microsecond()).map_err(|_| "times before 1970 cannot be event times".to_owned())?
        }
    };
    match micros {
        0 => Err("0 is not an event time; leave it out to use the present".to_owned()),
        micros => Ok(micros),
    }
}
