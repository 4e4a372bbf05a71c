//! `vasto kv`: single keys, and scans.
//!
//! Invariant: bytes of users reach a terminal escaped, and a pipe or a file as they are. In JSON,
//! what is no UTF-8 stands in a field whose name ends in `_base64`.

use std::io::{self, IsTerminal, Read};

use anyhow::Context;
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};
use vasto_client::{Bytes, Key, Outcome, Payload, Row};

use crate::{
    args::{Kv, KvCommand, KvDelete, KvGet, KvKey, KvPut, KvScan},
    connect,
    output::{self, Failure, OutputFormat, printable},
};

/// Runs one command of `vasto kv`.
///
/// # Errors
/// What the cluster says; a key that is read and is not there.
pub async fn run(args: &Kv, format: OutputFormat) -> anyhow::Result<()> {
    match &args.command {
        KvCommand::Get(get) => self::get(args, get, format).await,
        KvCommand::Put(put) => self::put(args, put, format).await,
        KvCommand::Delete(delete) => self::delete(args, delete, format).await,
        KvCommand::Scan(scan) => self::scan(args, scan, format).await,
    }
}

fn key_of(key: &KvKey) -> Key {
    let name = Key::new(key.key.as_str());
    match &key.partition {
        Some(partition) => name.partition(partition.as_str()),
        None => name,
    }
}

async fn get(args: &Kv, get: &KvGet, format: OutputFormat) -> anyhow::Result<()> {
    let keyspace = connect::keyspace(&args.connect, &get.key.keyspace).await?;
    let Some(value) = keyspace.get(key_of(&get.key)).await.map_err(connect::failure)? else {
        return Err(Failure::new(format!("not found: {}", printable(get.key.key.as_bytes()))).into());
    };
    match format {
        OutputFormat::Json => {
            output::print_json(&row_json(&Row { key: Bytes::from(get.key.key.clone()), value: Some(value) }))?;
        }
        OutputFormat::Table => {
            let bytes = value.bytes();
            let mut line = if io::stdout().is_terminal() { printable(&bytes).into_bytes() } else { bytes.to_vec() };
            line.push(b'\n');
            output::print_bytes(&line)?;
        }
    }
    Ok(())
}

async fn put(args: &Kv, put: &KvPut, format: OutputFormat) -> anyhow::Result<()> {
    let value = match &put.value {
        Some(value) => value.clone().into_bytes(),
        None => from_stdin()?,
    };
    let keyspace = connect::keyspace(&args.connect, &put.key.keyspace).await?;
    let mut request = keyspace.put(key_of(&put.key), value);
    if let Some(ttl) = put.ttl {
        request = request.ttl(ttl);
    }
    if let Some(event_time) = put.write.event_time {
        request = request.event_time(event_time);
    }
    if let Some(ack) = put.write.ack {
        request = request.ack(connect::ack(ack));
    }
    show(request.await.map_err(connect::failure)?, format)
}

fn from_stdin() -> anyhow::Result<Vec<u8>> {
    let mut stdin = io::stdin().lock();
    if stdin.is_terminal() {
        let failure = Failure::usage("there is no value");
        return Err(failure.hint("write it behind the key, or let stdin be a file or a pipe").into());
    }
    let mut value = Vec::new();
    // One byte too many is enough for the typed error of the limit; the rest is not read.
    let most = vasto_core::limits::VALUE_BYTES_MAX as u64 + 1;
    stdin.by_ref().take(most).read_to_end(&mut value).context("cannot read the value from stdin")?;
    Ok(value)
}

async fn delete(args: &Kv, delete: &KvDelete, format: OutputFormat) -> anyhow::Result<()> {
    let keyspace = connect::keyspace(&args.connect, &delete.key.keyspace).await?;
    let mut request = keyspace.delete(key_of(&delete.key));
    if let Some(event_time) = delete.write.event_time {
        request = request.event_time(event_time);
    }
    if let Some(ack) = delete.write.ack {
        request = request.ack(connect::ack(ack));
    }
    show(request.await.map_err(connect::failure)?, format)
}

fn show(outcome: Outcome, format: OutputFormat) -> anyhow::Result<()> {
    match (format, outcome) {
        (OutputFormat::Json, Outcome::Applied { event_time }) => {
            output::print_json(&json!({"outcome": "applied", "event_time": event_time}))?;
        }
        (OutputFormat::Json, Outcome::NotApplied) => output::print_json(&json!({"outcome": "not_applied"}))?,
        (OutputFormat::Table, Outcome::NotApplied) => output::print("not applied: the condition does not hold\n")?,
        (OutputFormat::Json, Outcome::Superseded) => output::print_json(&json!({"outcome": "superseded"}))?,
        (OutputFormat::Table, Outcome::Applied { .. }) => output::print("ok\n")?,
        (OutputFormat::Table, Outcome::Superseded) => {
            output::print("superseded: an entry with a later event time stands\n")?;
        }
    }
    Ok(())
}

async fn scan(args: &Kv, scan: &KvScan, format: OutputFormat) -> anyhow::Result<()> {
    let keyspace = connect::keyspace(&args.connect, &scan.keyspace).await?;
    let mut request = keyspace.scan();
    if let Some(prefix) = &scan.prefix {
        request = request.prefix(prefix.as_str());
    }
    if let Some(partition) = &scan.partition {
        request = request.partition(partition.as_str());
    }
    if let Some(limit) = scan.limit {
        request = request.limit(usize::try_from(limit).unwrap_or(usize::MAX));
    }
    let mut rows = request.stream();
    let mut out = RowPrinter { format, terminal: io::stdout().is_terminal(), buffer: Vec::new(), rows: 0 };
    while let Some(row) = rows.try_next().await.map_err(connect::failure)? {
        if !out.row(&row)? {
            return Ok(());
        }
    }
    out.end()
}

/// Rows as they come; a JSON array is printed element by element.
struct RowPrinter {
    format: OutputFormat,
    terminal: bool,
    buffer: Vec<u8>,
    rows: u64,
}

impl RowPrinter {
    const BUFFER_BYTES: usize = 64 << 10;

    /// False when nobody reads any more.
    fn row(&mut self, row: &Row) -> anyhow::Result<bool> {
        match self.format {
            OutputFormat::Json => {
                self.buffer.extend_from_slice(if self.rows == 0 { b"[\n  " } else { b",\n  " });
                serde_json::to_writer(&mut self.buffer, &row_json(row))?;
            }
            OutputFormat::Table => {
                let value = row.value.as_ref().map(|value| value.bytes()).unwrap_or_default();
                if self.terminal {
                    let line = format!("{}\t{}\n", printable(&row.key), printable(&value));
                    self.buffer.extend_from_slice(line.as_bytes());
                } else {
                    for part in [&row.key[..], b"\t", &value[..], b"\n"] {
                        self.buffer.extend_from_slice(part);
                    }
                }
            }
        }
        self.rows += 1;
        // A person wants to see rows as they come.
        if self.terminal || self.buffer.len() >= Self::BUFFER_BYTES { self.flush() } else { Ok(true) }
    }

    fn end(mut self) -> anyhow::Result<()> {
        if self.format == OutputFormat::Json {
            self.buffer.extend_from_slice(if self.rows == 0 { b"[]\n" } else { b"\n]\n" });
        }
        self.flush().map(|_| ())
    }

    fn flush(&mut self) -> anyhow::Result<bool> {
        let open = output::print_bytes(&self.buffer)?;
        self.buffer.clear();
        Ok(open)
    }
}

fn row_json(row: &Row) -> Value {
    let mut out = Map::new();
    put_bytes(&mut out, "key", &row.key);
    if let Some(value) = &row.value {
        match &value.payload {
            Payload::I64(number) => {
                out.insert("value".to_owned(), json!(number));
            }
            Payload::F64(number) => {
                out.insert("value".to_owned(), json!(number));
            }
            _ => put_bytes(&mut out, "value", &value.bytes()),
        }
        out.insert("event_time".to_owned(), json!(value.event_time));
        out.insert("expires_at".to_owned(), json!(value.expires_at));
        // As text: many readers of JSON lose the last bits of such a number.
        out.insert("version".to_owned(), json!(format!("{:016x}", value.version)));
    }
    Value::Object(out)
}

fn put_bytes(out: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => out.insert(name.to_owned(), json!(text)),
        Err(_) => out.insert(format!("{name}_base64"), json!(BASE64_STANDARD.encode(bytes))),
    };
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn row(key: &'static [u8], value: Payload) -> Row {
        let value = vasto_client::Value { payload: value, event_time: 7, expires_at: None, version: 0xab };
        Row { key: Bytes::from_static(key), value: Some(value) }
    }

    #[test]
    fn text_is_text_and_other_bytes_are_base64() {
        let text = row_json(&row(b"a", Payload::Bytes(Bytes::from_static("ä".as_bytes()))));
        let expected = json!({"key": "a", "value": "ä", "event_time": 7, "expires_at": null,
            "version": "00000000000000ab"});
        assert_eq!(text, expected);
        let bytes = row_json(&row(b"\xff", Payload::Bytes(Bytes::from_static(b"\x00\xff"))));
        assert_eq!((&bytes["key_base64"], &bytes["value_base64"]), (&json!("/w=="), &json!("AP8=")));
        assert!(bytes.get("key").is_none() && bytes.get("value").is_none());
        assert_eq!(row_json(&row(b"n", Payload::I64(-3)))["value"], -3);
        assert!(row_json(&Row { key: Bytes::from_static(b"k"), value: None }).get("value").is_none());
    }

    #[test]
    fn rows_are_one_json_array_or_lines() {
        let rows = [row(b"a", Payload::I64(1)), row(b"b\n", Payload::Bytes(Bytes::from_static(b"\x1b")))];
        let printed = |format, terminal: bool| {
            // The terminal would flush each row.
            let mut out = RowPrinter { format, terminal: false, buffer: Vec::new(), rows: 0 };
            for row in &rows {
                assert!(out.row(row).unwrap());
                out.terminal = terminal;
            }
            out.buffer
        };
        let mut json = printed(OutputFormat::Json, false);
        json.extend_from_slice(b"\n]\n");
        assert_eq!(serde_json::from_slice::<Value>(&json).unwrap()[1]["key"], "b\n");
        assert_eq!(printed(OutputFormat::Table, false), b"a\t1\nb\n\t\x1b\n");
    }
}
