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
