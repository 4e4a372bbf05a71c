//! The reference of `docs/reference`: commands, settings, metrics and error codes, made from the
//! code.
//!
//! **Invariant:** the files are what this renders; the test fails when one is not, and writes them
//! when `VASTO_UPDATE_REFERENCE=1` is set.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;

use clap::CommandFactory;
use vasto_core::error::{Effect, ErrorCode, Retry};
use vasto_testkit::sources;

use crate::args::Cli;
use crate::config;

const HEAD: &str = "<!-- Made from the code by `cli/src/reference.rs`; do not edit. -->\n\n";

/// The doc comment above the line that begins with `item`, on one line.
fn doc_above(source: &str, item: &str) -> String {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let at = lines
        .iter()
        .position(|line| line.starts_with(item))
        .unwrap_or_else(|| panic!("no `{item}`"));
    let before = lines[..at]
        .iter()
        .rev()
        .take_while(|line| line.starts_with("///") || line.starts_with("#["));
    let mut doc: Vec<&str> =
        before.filter_map(|line| line.strip_prefix("///")).map(str::trim).collect();
    doc.reverse();
    doc.join(" ")
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn command(out: &mut String, path: &str, mut command: clap::Command) {
    if command.is_hide_set() {
        return;
    }
    let help = command.render_long_help().to_string();
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    writeln!(out, "## `{path}`\n```text\n{}\n```\n", lines.join("\n").trim()).unwrap();
    for below in command.get_subcommands().cloned().collect::<Vec<_>>() {
        if below.get_name() != "help" {
            let path = format!("{path} {}", below.get_name());
            self::command(out, &path, below.bin_name(path.clone()));
        }
    }
}

fn commands() -> String {
    let mut out = format!("# Commands\n{HEAD}");
    let mut cli = Cli::command().term_width(100);
    cli.build();
    command(&mut out, "vasto", cli);
    out
}

fn settings() -> String {
    let mut out = format!("# Settings\n{HEAD}");
    out += "Defaults < TOML file (`--config`) < environment (`VASTO_SECTION__FIELD`) < flags (`--set section.field=VALUE`).\n\
            `vasto config show` prints what is in force and where it came from.\n\n\
            | setting | meaning | expects | default |\n|---|---|---|---|\n";
    let source = include_str!("config/sections.rs");
    for field in config::reference() {
        let name = field.path.rsplit('.').next().unwrap();
        let section = field.path.split('.').next().unwrap();
        let of_section = format!("struct {}{}Section", section[..1].to_uppercase(), &section[1..]);
        let from = source.find(&of_section).unwrap_or_else(|| panic!("no `{of_section}`"));
        let meaning = doc_above(&source[from..], &format!("pub {name}:"));
        writeln!(
            out,
            "| `{}` | {} | {} | {} |",
            field.path,
            cell(&meaning),
            cell(field.expected),
            cell(&field.default)
        )
        .unwrap();
    }
    out
}

fn errors() -> String {
    let mut out = format!("# Error codes\n{HEAD}");
    out += "The codes at the wire. \"Nothing\" means that nothing was changed for certain.\n\n\
            | number | code | meaning | changed | a retry |\n|---|---|---|---|---|\n";
    let source = include_str!("../../core/src/error.rs");
    let codes = &source[source.find("pub enum ErrorCode").unwrap()..];
    for code in ErrorCode::ALL {
        let changed = match code.effect() {
            Effect::None => "nothing",
            Effect::Unknown => "perhaps: read it back",
        };
        let retry = match code.retry() {
            Retry::Never => "fails again",
            Retry::Later => "may succeed after a pause",
            Retry::WithNewTopology => "may succeed with a newer topology; the client does it",
            Retry::Elsewhere => "may succeed at another replica; the client does it",
        };
        let meaning = doc_above(codes, &format!("{code:?} ="));
        writeln!(
            out,
            "| {} | `{code:?}` | {} | {changed} | {retry} |",
            code as u32,
            cell(&meaning)
        )
        .unwrap();
    }
    out
}

/// The text of the string literal that follows `call(` in `text`.
fn literal<'a>(text: &'a str, call: &str) -> Option<&'a str> {
    let rest = &text[text.find(call)? + call.len()..];
    let rest = &rest[rest.find('"')? + 1..];
    Some(&rest[..rest.find('"')?])
}

/// Where the chain of calls that `text` begins with ends: at a `;`, or a `,` outside of parentheses
/// and strings.
fn builder_end(text: &str) -> usize {
    let (mut depth, mut in_string) = (0i32, false);
    let ends = |(_, char): &(usize, char)| {
        match char {
            '"' => in_string = !in_string,
            '(' if !in_string => depth += 1,
            ')' if !in_string => depth -= 1,
            ';' | ',' if !in_string && depth <= 0 => return true,
            _ => {}
        }
        false
    };
    text.char_indices().find(ends).map_or(text.len(), |(at, _)| at)
}

fn metrics() -> String {
    let mut rows = Vec::new();
    for member in ["client", "master", "node", "observability", "shipping", "cli"] {
        for (_, text) in sources::below(&format!("{member}/src"))
            .iter()
            .filter(|(path, _)| !path.ends_with("reference.rs"))
        {
            for (at, _) in text.match_indices("(\"vasto") {
                let kind = text[..at].rsplit('.').next().unwrap();
                let instrument = ["counter", "gauge", "histogram"]
                    .into_iter()
                    .find(|instrument| kind.ends_with(instrument));
                let Some(instrument) = instrument else { continue };
                let built = &text[at..at + builder_end(&text[at..])];
                let name = literal(built, "(").unwrap().replace('.', "_");
                let unit = literal(built, ".with_unit(");
                let suffix = match unit {
                    Some("By") => "_bytes",
                    Some("s") => "_seconds",
                    Some("ms") => "_milliseconds",
                    Some(other) => panic!("no suffix for the unit {other} of {name}"),
                    None => "",
                };
                let total = if instrument == "counter" { "_total" } else { "" };
                let what = literal(built, ".with_description(")
                    .unwrap_or_else(|| panic!("{name} has no description"));
                rows.push(format!(
                    "| `{name}{suffix}{total}` | {instrument} | {member} | {} |\n",
                    cell(what)
                ));
            }
        }
    }
    rows.sort();
    rows.dedup();
    let mut out = format!("# Metrics\n{HEAD}");
    out += "As `/metrics` of the admin port names them; over OTLP without the suffixes.\n\n| metric | kind | from | meaning |\n|---|---|---|---|\n";
    out.extend(rows);
    out
}

#[test]
fn the_reference_in_docs_is_what_the_code_says() {
    let dir = sources::checkout().join("docs/reference");
    let update = std::env::var_os("VASTO_UPDATE_REFERENCE").is_some();
    let documents = [
        ("cli.md", commands()),
        ("config.md", settings()),
        ("errors.md", errors()),
        ("metrics.md", metrics()),
    ];
    for (name, wanted) in documents {
        let wanted = format!("{}\n", wanted.trim_end());
        let path = dir.join(name);
        if update {
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(&path, &wanted).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        let differs = wanted.lines().zip(found.lines()).find(|(wanted, found)| wanted != found);
        assert!(
            wanted == found,
            "docs/reference/{name} is not current ({differs:?}); run \
             `VASTO_UPDATE_REFERENCE=1 cargo nextest run --release --workspace the_reference_in_docs`"
        );
    }
    assert!(metrics().lines().count() > 20 && commands().lines().count() > 300);
}
