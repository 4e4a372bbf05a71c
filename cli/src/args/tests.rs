//! Tests of the command line as scripts use it.
#![allow(clippy::unwrap_used)]

use std::{ffi::OsStr, time::Duration};

use clap::{CommandFactory, error::ErrorKind};

use super::{
    parse::{parse_event_time, parse_ttl},
    *,
};
use crate::config;

/// Splits a line into words like a shell, as far as the examples need it.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    words
}

fn command_of(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(words(line))
}

fn bench(line: &str) -> Bench {
    match command_of(line).unwrap().command {
        Command::Bench(bench) => bench,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_tree_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_example_in_a_help_text_parses() {
    fn examples(command: &clap::Command, lines: &mut Vec<String>) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let of_command = help.lines().map(str::trim).filter(|line| line.starts_with("vasto "));
        lines.extend(of_command.map(str::to_owned));
        command.get_subcommands().for_each(|command| examples(command, lines));
    }
    let mut lines = Vec::new();
    examples(&Cli::command(), &mut lines);
    assert!(lines.len() > 20, "{lines:?}");
    for line in lines {
        // The shell consumes the redirection.
        let line = line.split(" <").next().unwrap();
        command_of(line).unwrap_or_else(|error| panic!("{line}\n{error}"));
    }
}

#[test]
fn every_command_of_the_contract_parses() {
    for line in [
        "vasto dev --nodes 3 --dir ./vasto-data --bucket file:///b --master-listen 127.0.0.1:8278",
        "vasto serve master --bucket s3://b/p --listen 127.0.0.1:8278 --admin-listen 127.0.0.1:0",
        "vasto serve node --master http://m:1 --dir D --listen 127.0.0.1:0 --advertise h:1 --zone z",
        "vasto keyspace create ks --shards 3 --replicas 2 --ack replica --ttl 30d --quarantine 2s",
        "vasto keyspace list --master http://m:1 --output json",
        "vasto keyspace --master http://m:1 list",
        "vasto --output json keyspace describe ks",
        "vasto keyspace delete ks --yes",
        "vasto keyspace checkpoint ks",
        "vasto keyspace compact ks",
        "vasto keyspace resize ks --shards 4 --plan",
        "vasto keyspace resize ks --shards 4 --no-wait",
        "vasto keyspace resize ks --shards 1 --end-quarantine --no-wait",
        "vasto keyspace restore ks --into copy --at 2026-01-31T12:00:00Z --from-bucket --plan",
        "vasto node drain n-1 --plan",
        "vasto node replace n-1 --with n-2 --plan",
        "vasto keyspace resize ks --shards 4 --plan --max-rate 20MiB",
        "vasto keyspace restore ks --into copy --max-rate 1MiB --no-wait",
        "vasto node drain n-1 --max-rate 500KiB/s",
        "vasto node replace n-1 --plan --max-rate 1GiB",
        "vasto cluster rebalance --max-rate 20MiB --no-wait",
        "vasto cluster rebalance --plan --max-rate 20MiB",
        "vasto operation pause rebalance-7",
        "vasto operation rate node-n-1-2 none",
        "vasto node list",
        "vasto cluster status",
        "vasto operation list",
        "vasto operation show 7",
        "vasto operation cancel 7",
        "vasto kv get ks k --partition p",
        "vasto kv put ks k v --partition p --ttl 1h --event-time 5 --ack bucket",
        "vasto kv delete ks k --event-time 2026-01-31T12:00:00Z --ack os",
        "vasto kv scan ks --prefix p --limit 10 --partition p",
        "vasto kv get ks k --partition-hash 00000000000000ff",
        "vasto bench ks --workload put --keep",
        "vasto bench ks --workload ycsb-a --clients 16 --requests 10 --value-size 100 --keys 10",
        "vasto bench ks --workload mixed --seconds 5 --master http://m:1",
        "vasto config show --config f.toml --set node.zone=a",
        "vasto config check f.toml",
    ] {
        command_of(line).unwrap_or_else(|error| panic!("{line}\n{error}"));
    }
}

#[test]
fn missing_bad_and_contradicting_arguments_are_usage_errors() {
    for line in [
        "vasto",
        "vasto keyspace",
        "vasto keyspace delete ks",
        "vasto keyspace create ks --replicas 0",
        "vasto keyspace create ks --replicas 8",
        "vasto keyspace create ks --ack maybe",
        "vasto keyspace create ks --ttl 0s",
        "vasto keyspace create ks --quarantine soon",
        "vasto keyspace resize ks",
        "vasto keyspace resize ks --shards 3 --plan --no-wait",
        "vasto keyspace resize ks --shards 3 --plan --end-quarantine",
        "vasto keyspace restore ks --into copy --plan --no-wait",
        "vasto node drain n-1 --plan --no-wait",
        "vasto node drain n-1 --max-rate 0",
        "vasto cluster rebalance --max-rate none",
        "vasto node replace n-1 --accept-loss --yes --plan",
        "vasto serve node --listen localhost",
        "vasto serve node --set cache=1GiB",
        "vasto serve node --set node.cache",
        "vasto kv put ks k v --event-time 0",
        "vasto kv put ks k v --event-time yesterday",
        "vasto kv scan ks --limit 0",
        "vasto kv get ks \\xzz",
        "vasto kv get ks k --partition p --partition-hash 1",
        "vasto bench --workload put --embedded d --keep",
        "vasto bench --workload put",
        "vasto bench ks",
        "vasto bench ks --workload put --embedded d",
        "vasto bench ks --workload put --requests 1 --seconds 1",
        "vasto bench ks --workload put --value-size large",
    ] {
        let error = command_of(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
    }
    let help = command_of("vasto --help").unwrap_err();
    assert_eq!((help.kind(), help.exit_code()), (ErrorKind::DisplayHelp, 0));
}

#[test]
fn values_may_look_like_flags() {
    match command_of("vasto kv put ks counter -1 --ttl 1h").unwrap().command {
        Command::Kv(Kv { command: KvCommand::Put(put), .. }) => {
            assert_eq!(
                (&put.key.key.0[..], put.value.as_deref()),
                (&b"counter"[..], Some(OsStr::new("-1")))
            );
            assert_eq!(put.ttl, Some(Duration::from_secs(3600)));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn values_have_their_units() {
    assert_eq!(parse_event_time("1970-01-01T00:00:01Z"), Ok(1_000_000));
    assert_eq!(parse_event_time("1970-01-01T01:00:01+01:00"), Ok(1_000_000));
    assert_eq!(parse_event_time("7"), Ok(7));
    assert!(parse_event_time("1960-01-01T00:00:00Z").unwrap_err().contains("1970"));
    assert_eq!(parse_ttl("30d"), Ok(Duration::from_secs(30 * 86_400)));
    assert_eq!(bench("vasto bench ks --workload put --value-size 4KiB").value_size, 4096);
    let defaults = bench("vasto bench ks --workload put");
    assert_eq!((defaults.value_size, defaults.clients), (100, 16));
}

#[test]
fn flags_that_are_given_override_and_others_do_not() {
    let line = "vasto serve node --dir /d --zone a --insecure --set node.cache=1GiB";
    let Command::Serve(Serve::Node(node)) = command_of(line).unwrap().command else {
        panic!("{line}")
    };
    let loaded = config::load(None, node.overrides()).unwrap();
    let given: Vec<_> = loaded
        .rows()
        .into_iter()
        .filter(|row| row.source == config::Source::Flag)
        .map(|row| (row.name, row.origin.unwrap()))
        .collect();
    let expected = [
        ("node.dir", "--dir"),
        ("node.zone", "--zone"),
        ("node.cache", "--set node.cache"),
        ("security.insecure", "--insecure"),
    ];
    assert_eq!(given, expected.map(|(name, flag)| (name, flag.to_owned())));
}

#[test]
fn keys_may_hold_any_bytes_and_values_stay_as_they_are() {
    let line = r"vasto kv put ks \xff\x00\\ v\x41 --partition p\x01";
    match command_of(line).unwrap().command {
        Command::Kv(Kv { command: KvCommand::Put(put), .. }) => {
            assert_eq!(put.key.key.0, b"\xff\x00\\");
            assert_eq!(put.key.partition.unwrap().0, b"p\x01");
            assert_eq!(put.value.as_deref(), Some(OsStr::new(r"v\x41")));
        }
        other => panic!("{other:?}"),
    }
}
