//! Parsers from command-line words to values, with the error messages for words that do not parse.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    time::Duration,
};

use bytesize::ByteSize;
use clap::builder::{OsStringValueParser, TypedValueParser};

pub(super) fn parse_assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((path, value)) if path.split_once('.').is_some() => {
            Ok((path.trim().to_owned(), value.to_owned()))
        }
        _ => Err("write SECTION.FIELD=VALUE, for example node.cache=1GiB".to_owned()),
    }
}

pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write for example 30s, 1h or 30d"))
}

pub(super) fn parse_ttl(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("nothing would be kept; leave it out to keep it for ever".to_owned()),
        ttl => Ok(ttl),
    }
}

pub(super) fn parse_size(text: &str) -> Result<usize, String> {
    let size: ByteSize =
        text.parse().map_err(|error| format!("{error}; write for example 100 or 4KiB"))?;
    usize::try_from(size.as_u64()).map_err(|_| "this is more than fits into memory".to_owned())
}

/// Parses a rate: bytes a second, at least 1.
pub(super) fn parse_rate(text: &str) -> Result<u64, String> {
    let bytes = text.strip_suffix("/s").unwrap_or(text);
    match bytes.parse::<ByteSize>().map(|size| size.as_u64()) {
        Ok(0) => Err("nothing moves at 0 bytes a second".to_owned()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(format!("{error}; write bytes a second, for example 500KiB or 20MiB")),
    }
}

/// A bound of a rate, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RateBound(pub Option<u64>);

/// Parses a bound of a rate; `none` lifts it.
pub(super) fn parse_rate_bound(text: &str) -> Result<RateBound, String> {
    match text {
        "none" => Ok(RateBound(None)),
        _ => parse_rate(text)
            .map(|rate| RateBound(Some(rate)))
            .map_err(|error| format!("{error}; `none` lifts the bound")),
    }
}

/// Bytes that were given as escaped text; [`crate::output::printable`] is the inverse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Escaped(pub Vec<u8>);

/// Parses escapes: `\xNN` is the byte NN, `\\` a backslash. Everything else, including bytes that
/// are not UTF-8, is taken literally, and so is a backslash that begins neither escape, as in
/// `C:\dir`.
pub(super) fn escaped_parser() -> impl TypedValueParser<Value = Escaped> {
    OsStringValueParser::new().try_map(|text: OsString| unescape(&text))
}

fn unescape(text: &OsStr) -> Result<Escaped, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        match (byte, behind) {
            (b'\\', [b'\\', behind @ ..]) => {
                bytes.push(b'\\');
                rest = behind;
            }
            (b'\\', [b'x', behind @ ..]) => {
                let digits = behind.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
                let digits =
                    digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
                let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
                bytes.push(byte.ok_or(
                    "behind \\x stand two hexadecimal digits; write \\\\ for a backslash",
                )?);
                rest = &behind[2..];
            }
            _ => bytes.push(byte),
        }
    }
    Ok(Escaped(bytes))
}

pub(super) fn parse_hash(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16)
        .map_err(|_| "write the 16 hexadecimal digits that `vasto kv scan` shows".to_owned())
}

/// Parses microseconds since 1970; 0 is not an event time.
pub(super) fn parse_event_time(text: &str) -> Result<u64, String> {
    let micros = match text.parse::<u64>() {
        Ok(micros) => micros,
        Err(_) => {
            let time: jiff::Timestamp = text.parse().map_err(|_| {
                "write microseconds since 1970, or a time such as 2026-01-31T12:00:00Z".to_owned()
            })?;
            u64::try_from(time.as_microsecond())
                .map_err(|_| "times before 1970 cannot be event times".to_owned())?
        }
    };
    match micros {
        0 => Err("0 is not an event time; leave it out to use the present".to_owned()),
        micros => Ok(micros),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::ffi::OsStringExt;

    use super::*;
    use crate::output::printable;

    #[test]
    fn every_key_can_be_named_as_it_is_printed() {
        let all: Vec<u8> = (0..=255).collect();
        for key in [
            &all[..],
            b"plain",
            "Ångström".as_bytes(),
            b"\\",
            b"\\x41",
            b"a\xff\\xz",
            b"\x00\n\x1b[31m",
            b"C:\\dir",
        ] {
            let printed = printable(key);
            assert!(!printed.chars().any(char::is_control), "{printed:?}");
            assert_eq!(unescape(OsStr::new(&printed)).unwrap(), Escaped(key.to_vec()), "{printed}");
        }
    }

    #[test]
    fn a_rate_is_a_size_and_never_nothing() {
        assert_eq!(parse_rate("20MiB"), Ok(20 << 20));
        assert_eq!((parse_rate("500KiB/s"), parse_rate("1024")), (Ok(500 << 10), Ok(1024)));
        assert!(parse_rate("fast").unwrap_err().contains("20MiB"));
        assert!(parse_rate("0").is_err());
        assert_eq!(parse_rate_bound("none"), Ok(RateBound(None)));
        assert_eq!(parse_rate_bound("1KiB"), Ok(RateBound(Some(1024))));
        assert!(parse_rate_bound("all").unwrap_err().contains("`none`"));
    }

    #[test]
    fn bytes_and_lone_backslashes_stand_for_themselves() {
        let raw = OsString::from_vec(b"\xffa".to_vec());
        assert_eq!(unescape(&raw).unwrap().0, b"\xffa");
        assert_eq!(unescape(OsStr::new(r"C:\dir\")).unwrap().0, br"C:\dir\");
        assert_eq!(unescape(OsStr::new(r"\xfF\x00")).unwrap().0, [0xff, 0]);
        for bad in [r"\x", r"\xf", r"\xgg", r"a\x+1"] {
            assert!(
                unescape(OsStr::new(bad)).unwrap_err().contains("two hexadecimal digits"),
                "{bad}"
            );
        }
        assert_eq!(parse_hash("00000000000000ff"), Ok(255));
        assert!(parse_hash("later").is_err());
    }
}
