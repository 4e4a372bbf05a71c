//! Output of the commands: tables and JSON on stdout, progress and errors on stderr, exit codes.
//!
//! Invariant: stdout carries only results, so that it can be piped; a reader that closes the pipe
//! early (`vasto ... | head`) is not an error. User bytes never reach a terminal unescaped.
//!
//! Not here: the content that is printed. Logs belong to `tracing`.

mod progress;

use std::{
    io::{self, Write},
    time::Duration,
};

use bytesize::ByteSize;
use clap::ValueEnum;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

pub(crate) use self::progress::{ProgressLine, Unit};

/// The output format: for people or for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum OutputFormat {
    /// Aligned columns for people.
    #[default]
    Table,
    /// JSON for scripts; its fields are a contract.
    Json,
}

/// Time that writing a failure may take when stderr has no reader.
const REPORT_PATIENCE: Duration = Duration::from_secs(1);

// ---------------------------------------------------------------------------- failures

/// A failure with the message for the user: the problem, and the next step.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    usage: bool,
}

impl Failure {
    /// Creates a failure of a command that was understood: exit code 1.
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), hint: None, usage: false }
    }

    /// Creates a failure of a command that is invalid as given: exit code 2.
    pub(crate) fn usage(message: impl Into<String>) -> Failure {
        Failure { usage: true, ..Failure::new(message) }
    }

    /// Parses a text with the problem and then, after a semicolon, the remedy: the form of the
    /// errors of the servers and of the client library.
    pub(crate) fn with_advice(text: &str) -> Failure {
        match text.split_once("; ") {
            Some((message, hint)) => Failure::new(message).hint(hint),
            None => Failure::new(text),
        }
    }

    /// Changes the exit code to 2.
    pub(crate) fn into_usage(self) -> Failure {
        Failure { usage: true, ..self }
    }

    /// Sets the next step for the user.
    pub(crate) fn hint(self, hint: impl Into<String>) -> Failure {
        Failure { hint: Some(hint.into()), ..self }
    }

    /// Sets the hint when there is none yet.
    pub(crate) fn or_hint(self, hint: &str) -> Failure {
        Failure { hint: self.hint.or_else(|| Some(hint.to_owned())), ..self }
    }
}

/// Prints `error: ...` and, when there is one, `hint: ...` on stderr, and returns the exit code: 1
/// for a failure, 2 for a command or a configuration that cannot be used.
pub(crate) fn report(error: &anyhow::Error) -> u8 {
    let (text, code) = describe(error);
    let (done, written) = std::sync::mpsc::channel();
    // On its own thread: the process must end even when stderr has no reader.
    std::thread::spawn(move || {
        // A failure cannot be reported anywhere: stderr is gone.
        let _ = io::stderr().lock().write_all(text.as_bytes());
        let _ = done.send(());
    });
    let _ = written.recv_timeout(REPORT_PATIENCE);
    code
}

fn describe(error: &anyhow::Error) -> (String, u8) {
    // Many errors repeat their source in their own text; each text is printed once.
    let mut message = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if !message.contains(&cause) {
            let separator = if message.is_empty() { "" } else { ": " };
            message = message + separator + &cause;
        }
    }
    let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
    let hint = failure.and_then(|failure| failure.hint.as_deref());
    let usage = failure.is_some_and(|failure| failure.usage);
    let mut text = format!("error: {message}\n");
    if let Some(hint) = hint {
        text += &format!("hint: {hint}\n");
    }
    (text, if usage { 2 } else { 1 })
}

// ------------------------------------------------------------------------------ stdout

/// Writes to stdout. A pipe that its reader has closed is not an error.
///
/// # Errors
/// Any other error of the operating system.
pub(crate) fn print(text: &str) -> io::Result<()> {
    print_bytes(text.as_bytes()).map(|_| ())
}

/// Writes bytes to stdout; returns false when the reader has closed the pipe, so that a caller with
/// more output can stop.
///
/// # Errors
/// Any other error of the operating system.
pub(crate) fn print_bytes(bytes: &[u8]) -> io::Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error),
    }
}

/// Prints a result as indented JSON.
///
/// # Errors
/// An error of the operating system.
pub(crate) fn print_json(value: &impl Serialize) -> io::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Prints one line of JSON: the form of the readiness line of a server.
///
/// # Errors
/// An error of the operating system.
pub(crate) fn print_json_line(value: &impl Serialize) -> io::Result<()> {
    print(&(serde_json::to_string(value)? + "\n"))
}

/// Formats aligned columns under headings, without lines, so that `awk` can parse them as well. A
/// heading that starts with `>` makes a right-aligned column of figures.
pub(crate) fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(headings.iter().map(|heading| heading.trim_start_matches('>')));
    table.add_rows(rows);
    for (column, heading) in table.column_iter_mut().zip(headings) {
        column.set_padding((0, 2));
        if heading.starts_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Escapes user bytes for display: control characters and bytes that are not UTF-8 become `\xNN`, a
/// backslash `\\`. A key on the command line is parsed by the same rules.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    let escape = |out: &mut String, bytes: &[u8]| {
        bytes.iter().for_each(|byte| *out += &format!("\\x{byte:02x}"))
    };
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                c if c.is_control() => escape(&mut out, c.encode_utf8(&mut [0; 4]).as_bytes()),
                c => out.push(c),
            }
        }
        escape(&mut out, chunk.invalid());
    }
    out
}

// ----------------------------------------------------------------------------- figures

/// Formats bytes as `1.5 MiB`.
pub(crate) fn format_bytes(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// Formats a count as `1,234,567`.
pub(crate) fn format_count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats a duration with three figures and the fitting unit: `350 µs`, `1.24 s`, `2 h 3 min`.
pub(crate) fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match duration.as_secs() {
        0 if duration.is_zero() => "0 s".to_owned(),
        0 if duration.as_micros() == 0 => format!("{} ns", duration.as_nanos()),
        0 if duration.as_millis() == 0 => format!("{:.0} µs", seconds * 1e6),
        0 if duration.as_millis() < 10 => format!("{:.2} ms", seconds * 1e3),
        0 if duration.as_millis() < 100 => format!("{:.1} ms", seconds * 1e3),
        0 => format!("{} ms", duration.as_millis()),
        1..10 => format!("{seconds:.2} s"),
        10..60 => format!("{seconds:.1} s"),
        whole @ 60..3_600 => format!("{} min {} s", whole / 60, whole % 60),
        whole @ 3_600..86_400 => format!("{} h {} min", whole / 3_600, whole % 3_600 / 60),
        whole => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3_600),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use anyhow::Context;

    use super::*;

    #[test]
    fn errors_carry_their_hint_and_code_through_context() {
        let error = Err::<(), _>(Failure::new("no keyspace ks1").hint("see `vasto keyspace list`"))
            .context("cannot describe it")
            .unwrap_err();
        let (text, code) = describe(&error);
        assert_eq!(
            text,
            "error: cannot describe it: no keyspace ks1\nhint: see `vasto keyspace list`\n"
        );
        assert_eq!(code, 1);
        let (text, code) = describe(&Failure::usage("--yes is missing").into());
        assert_eq!((text.as_str(), code), ("error: --yes is missing\n", 2));
    }

    #[test]
    fn advice_becomes_the_hint() {
        let failure = Failure::with_advice(
            "127.0.0.1:1 is in use; stop what listens there; or choose another port",
        );
        let text = describe(&failure.into()).0;
        assert_eq!(
            text,
            "error: 127.0.0.1:1 is in use\nhint: stop what listens there; or choose another port\n"
        );
        assert!(
            describe(&Failure::with_advice("a; b").or_hint("c").into()).0.ends_with("hint: b\n")
        );
        assert!(describe(&Failure::with_advice("a").or_hint("c").into()).0.ends_with("hint: c\n"));
        assert_eq!(
            describe(&Failure::with_advice("gone").into_usage().into()),
            ("error: gone\n".to_owned(), 2)
        );
    }

    #[test]
    fn a_cause_that_the_outer_text_repeats_is_said_once() {
        let inner = anyhow::anyhow!("connection refused");
        let error = inner.context("cannot reach the master: connection refused");
        assert_eq!(describe(&error).0, "error: cannot reach the master: connection refused\n");
    }

    #[test]
    fn tables_align_and_leave_no_blanks_at_the_end() {
        let text = table(
            &["NAME", ">BYTES"],
            [vec!["a".to_owned(), "1".to_owned()], vec!["longer".to_owned(), "1000".to_owned()]],
        );
        assert_eq!(text, "NAME    BYTES\na           1\nlonger   1000\n");
        assert_eq!(table(&["NAME"], []), "NAME\n");
    }

    #[test]
    fn bytes_of_users_cannot_drive_the_terminal() {
        assert_eq!(printable("Ångström 1".as_bytes()), "Ångström 1");
        assert_eq!(printable(b"a\x1b[31m\n\\"), r"a\x1b[31m\x0a\\");
        assert_eq!(printable(b"\xff\x00a"), r"\xff\x00a");
        assert_eq!(printable("ä\u{9b}1m\u{202e}".as_bytes()), "ä\\xc2\\x9b1m\u{202e}");
    }

    #[test]
    fn figures_read_well() {
        assert_eq!(format_bytes(1_572_864), "1.5 MiB");
        for (count, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(format_count(count), text);
        }
        for (micros, text) in [
            (350, "350 µs"),
            (1_240, "1.24 ms"),
            (45_600, "45.6 ms"),
            (456_000, "456 ms"),
            (1_240_000, "1.24 s"),
            (61_000_000, "1 min 1 s"),
            (7_380_000_000, "2 h 3 min"),
            (90_000_000_000, "1 d 1 h"),
        ] {
            assert_eq!(format_duration(Duration::from_micros(micros)), text);
        }
        assert_eq!(format_duration(Duration::from_nanos(12)), "12 ns");
        assert_eq!(format_duration(Duration::ZERO), "0 s");
    }
}
