//! `vasto kv`: single keys, and scans.
//!
//! Invariant: `get` writes a value to a pipe or a file unchanged. Keys and rows are escaped
//! everywhere, so that a row is a line and a key that a scan prints can be passed to `get`. In
//! JSON, bytes that are not UTF-8 are in a field whose name ends in `_base64`.

use std::{
    io::{self, IsTerminal, Read},
    os::unix::ffi::OsStringExt,
};

use anyhow::Context;
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};
use vasto_client::{Bytes, Key, Outcome, Payload, Row};
use vasto_core::hash::partition_hash as hash_of;

use crate::{
    args::{Kv, KvCommand, KvDelete, KvGet, KvKey, KvPut, KvScan},
    connect,
    output::{self, Failure, OutputFormat, printable},
};

/// Runs one command of `vasto kv`.
///
/// # Errors
/// An error of the cluster; a key to read that does not exist.
pub(crate) async fn run(args: &Kv, format: OutputFormat) -> anyhow::Result<()> {
    match &args.command {
        KvCommand::Get(get) => self::get(args, get, format).await,
        KvCommand::Put(put) => self::put(args, put, format).await,
        KvCommand::Delete(delete) => self::delete(args, delete, format).await,
        KvCommand::Scan(scan) => self::scan(args, scan, format).await,
    }
}

fn key_of(key: &KvKey) -> Key {
    let name = Key::new(&key.key.0);
    match (&key.partition, key.partition_hash) {
        (Some(partition), _) => name.partition(&partition.0),
        (None, Some(hash)) => name.partition_hash(hash),
        (None, None) => name,
    }
}

async fn get(args: &Kv, get: &KvGet, format: OutputFormat) -> anyhow::Result<()> {
    let keyspace = connect::keyspace(&args.connect, &get.key.keyspace).await?;
    let Some(value) = keyspace.get(key_of(&get.key)).await.map_err(connect::failure)? else {
        let failure = Failure::new(format!("not found: {}", printable(&get.key.key.0)));
        let hint = "a key that was written with a partition is read with it; `vasto kv scan` shows which records there are";
        return Err(failure.hint(hint).into());
    };
    match format {
        OutputFormat::Json => {
            let partition_hash = get.key.partition.as_ref().map(|partition| hash_of(&partition.0));
            let partition_hash = partition_hash.or(get.key.partition_hash);
            let partition_hash = partition_hash.filter(|hash| *hash != hash_of(&get.key.key.0));
            let row =
                Row { key: Bytes::from(get.key.key.0.clone()), partition_hash, value: Some(value) };
            output::print_json(&row_json(&row))?;
        }
        OutputFormat::Table => {
            let bytes = value.bytes();
            let mut line = if io::stdout().is_terminal() {
                printable(&bytes).into_bytes()
            } else {
                bytes.to_vec()
            };
            line.push(b'\n');
            output::print_bytes(&line)?;
        }
    }
    Ok(())
}

async fn put(args: &Kv, put: &KvPut, format: OutputFormat) -> anyhow::Result<()> {
    let value = match &put.value {
        Some(value) => value.clone().into_vec(),
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
        return Err(failure
            .hint("write it behind the key, or let stdin be a file or a pipe")
            .into());
    }
    let mut value = Vec::new();
    // One byte above the limit is enough for the typed error; the rest is not read.
    let most = vasto_core::limits::VALUE_BYTES_MAX as u64 + 1;
    stdin
        .by_ref()
        .take(most)
        .read_to_end(&mut value)
        .context("cannot read the value from stdin")?;
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
        (OutputFormat::Json, Outcome::NotApplied) => {
            output::print_json(&json!({"outcome": "not_applied"}))?
        }
        (OutputFormat::Table, Outcome::NotApplied) => {
            output::print("not applied: the condition does not hold\n")?
        }
        (OutputFormat::Json, Outcome::Superseded) => {
            output::print_json(&json!({"outcome": "superseded"}))?
        }
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
        request = request.prefix(&prefix.0);
    }
    if let Some(partition) = &scan.partition {
        request = request.partition(&partition.0);
    }
    if let Some(limit) = scan.limit {
        request = request.limit(usize::try_from(limit).unwrap_or(usize::MAX));
    }
    let mut rows = request.stream();
    let mut out =
        RowPrinter { format, terminal: io::stdout().is_terminal(), buffer: Vec::new(), rows: 0 };
    while let Some(row) = rows.try_next().await.map_err(connect::failure)? {
        if !out.row(&row)? {
            return Ok(());
        }
    }
    out.end()
}

/// Prints rows as they arrive; a JSON array is printed element by element.
struct RowPrinter {
    format: OutputFormat,
    terminal: bool,
    buffer: Vec<u8>,
    rows: u64,
}

impl RowPrinter {
    const BUFFER_BYTES: usize = 64 << 10;

    /// Prints a row; returns false when stdout has no reader any more.
    fn row(&mut self, row: &Row) -> anyhow::Result<bool> {
        match self.format {
            OutputFormat::Json => {
                self.buffer.extend_from_slice(if self.rows == 0 { b"[\n  " } else { b",\n  " });
                serde_json::to_writer(&mut self.buffer, &row_json(row))?;
            }
            OutputFormat::Table => {
                let value = row.value.as_ref().map(|value| value.bytes()).unwrap_or_default();
                let mut line = format!("{}\t{}", printable(&row.key), printable(&value));
                if let Some(hash) = row.partition_hash {
                    line += &format!("\t--partition-hash={hash:016x}");
                }
                line.push('\n');
                self.buffer.extend_from_slice(line.as_bytes());
            }
        }
        self.rows += 1;
        // On a terminal, rows appear as they arrive.
        if self.terminal || self.buffer.len() >= Self::BUFFER_BYTES {
            self.flush()
        } else {
            Ok(true)
        }
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
    if let Some(hash) = row.partition_hash {
        out.insert("partition_hash".to_owned(), json!(format!("{hash:016x}")));
    }
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
        // As text: many JSON parsers lose the low bits of such a number.
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
        let value =
            vasto_client::Value { payload: value, event_time: 7, expires_at: None, version: 0xab };
        Row { key: Bytes::from_static(key), partition_hash: None, value: Some(value) }
    }

    #[test]
    fn text_is_text_and_other_bytes_are_base64() {
        let text = row_json(&row(b"a", Payload::Bytes(Bytes::from_static("ä".as_bytes()))));
        let expected = json!({"key": "a", "value": "ä", "event_time": 7, "expires_at": null,
            "version": "00000000000000ab"});
        assert_eq!(text, expected);
        let bytes = row_json(&row(b"\xff", Payload::Bytes(Bytes::from_static(b"\x00\xff"))));
        assert_eq!(
            (&bytes["key_base64"], &bytes["value_base64"]),
            (&json!("/w=="), &json!("AP8="))
        );
        assert!(bytes.get("key").is_none() && bytes.get("value").is_none());
        assert_eq!(row_json(&row(b"n", Payload::I64(-3)))["value"], -3);
        let partitioned =
            Row { partition_hash: Some(0xab), value: None, ..row(b"k", Payload::I64(0)) };
        assert_eq!(
            row_json(&partitioned),
            json!({"key": "k", "partition_hash": "00000000000000ab"})
        );
    }

    #[test]
    fn rows_are_one_json_array_or_lines() {
        let in_partition = Row { partition_hash: Some(0xab), ..row(b"\xff", Payload::I64(2)) };
        let rows = [
            row(b"a", Payload::I64(1)),
            row(b"b\n", Payload::Bytes(Bytes::from_static(b"\x1b"))),
            in_partition,
        ];
        let printed = |format, terminal: bool| {
            // On a terminal each row would be flushed.
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
        let lines = String::from_utf8(printed(OutputFormat::Table, false)).unwrap();
        assert_eq!(lines, "a\t1\nb\\x0a\t\\x1b\n\\xff\t2\t--partition-hash=00000000000000ab\n");
    }
}
