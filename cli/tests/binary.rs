//! The binary itself: exit codes, help, configuration. Having these tests also makes cargo build
//! the binary, beside which the end-to-end tests look for it.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn vasto(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vasto"));
    command.env_remove("VASTO_MASTER").args(args).output().unwrap()
}

#[test]
fn help_shows_every_command_of_the_contract() {
    let shown = vasto(&["--help"]);
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.status.success());
    for command in ["dev", "serve", "keyspace", "node", "cluster", "operation", "kv", "bench", "config"] {
        assert!(text.contains(command), "{command} is missing in:\n{text}");
    }
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_is_wrong() {
    let refused = vasto(&["keyspace", "resize"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--shards"));
}

#[test]
fn the_configuration_in_force_is_shown_with_its_sources() {
    let shown = vasto(&["config", "show", "--output", "json"]);
    assert!(shown.status.success());
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(text.contains("node.ship_interval") && text.contains("default"), "{text}");
}
