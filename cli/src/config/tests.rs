//! Tests of all sources together.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, io::Write, time::Duration};

use bytesize::ByteSize;
use vasto_observability::LogFormat;

use super::{sections::PricesSection, show::Row, values::Secret, *};

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Returns the error with its hint: the whole output that a user would see.
fn refusal(text: &str, environment: &[(&str, &str)], flags: Overrides) -> String {
    let file = file(text);
    let error = load_from(Some(file.path()), variables(environment), flags).unwrap_err();
    format!("{error}\n{}", error.hint())
}

fn row<'a>(rows: &'a [Row], name: &str) -> &'a Row {
    rows.iter().find(|row| row.name == name).unwrap()
}

#[test]
fn the_list_of_fields_and_the_sections_agree() {
    let config = serde_json::to_value(Config::default()).unwrap();
    let in_sections: BTreeSet<String> = config
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(section, fields)| {
            fields.as_object().unwrap().keys().map(move |name| format!("{section}.{name}"))
        })
        .collect();
    let in_list: BTreeSet<String> =
        field::FIELDS.iter().map(|field| field.path.to_owned()).collect();
    assert_eq!(in_sections, in_list);
}

#[test]
fn flags_beat_the_environment_beats_the_file_beats_the_defaults() {
    let file = file(
        "[node]\ncache = \"1GiB\"\nwrite_buffer = 1048576\nread_threads = 2\nzone = \"file\"\n",
    );
    let environment = variables(&[
        ("VASTO_NODE__WRITE_BUFFER", "2MiB"),
        ("VASTO_NODE__READ_THREADS", "8"),
        ("VASTO_NODE__ZONE", "7"),
        ("VASTO_NODE__ADVERTISE", ""),
        ("VASTO_HOME", "/not/configuration"),
    ]);
    let flags = Overrides::new()
        .set("node.zone", "--zone", Some("flag"))
        .set("node.dir", "--dir", None::<String>)
        .assign(&[("node.read_threads".to_owned(), "16".to_owned())])
        .switch("security.insecure", "--insecure", true);
    let loaded = load_from(Some(file.path()), environment, flags).unwrap();

    let node = &loaded.config.node;
    assert_eq!(node.cache, ByteSize::gib(1));
    assert_eq!(node.write_buffer, ByteSize::mib(2));
    assert_eq!(node.read_threads, 16);
    assert_eq!(node.zone.as_deref(), Some("flag"));
    assert_eq!(node.advertise, None);
    assert_eq!(node.ship_interval, Duration::from_secs(10));
    assert!(loaded.config.security.insecure);

    let rows = loaded.rows();
    let expected = [
        ("node.cache", "1GiB".into(), Source::File, file.path().to_str()),
        ("node.write_buffer", "2MiB".into(), Source::Env, Some("VASTO_NODE__WRITE_BUFFER")),
        ("node.read_threads", 16.into(), Source::Flag, Some("--set node.read_threads")),
        ("node.zone", "flag".into(), Source::Flag, Some("--zone")),
        ("node.ship_interval", "10s".into(), Source::Default, None),
        ("node.dir", serde_json::Value::Null, Source::Default, None),
        ("security.insecure", true.into(), Source::Flag, Some("--insecure")),
    ];
    for (name, value, source, origin) in expected {
        let row = row(&rows, name);
        assert_eq!((&row.value, row.source, row.origin.as_deref()), (&value, source, origin));
    }
}

#[test]
fn numbers_and_words_in_the_environment_are_read_by_the_field() {
    let environment = variables(&[
        ("VASTO_NODE__ZONE", "7"),
        ("VASTO_BUCKET__SECRET_ACCESS_KEY", "0123456789"),
        ("VASTO_BUCKET__ALLOW_HTTP", "true"),
        ("VASTO_NODE__CACHE", "1048576"),
        ("VASTO_LOG__FORMAT", "json"),
    ]);
    let config = load_from(None, environment, Overrides::new()).unwrap().config;
    assert_eq!(config.node.zone.as_deref(), Some("7"));
    assert_eq!(config.bucket.secret_access_key, Some(Secret::new("0123456789".to_owned())));
    assert!(config.bucket.allow_http);
    assert_eq!(config.node.cache, ByteSize::mib(1));
    assert_eq!(config.log.format, LogFormat::Json);
}

#[test]
fn well_known_variables_are_weaker_than_those_of_the_field() {
    let mut environment =
        variables(&[("VASTO_MASTER", "http://m:1"), ("VASTO_LOG", "debug"), ("RUST_LOG", "trace")]);
    let loaded = load_from(None, environment.clone(), Overrides::new()).unwrap();
    assert_eq!(loaded.config.node.master, "http://m:1");
    assert_eq!(loaded.config.log.filter, "debug");
    assert_eq!(row(&loaded.rows(), "log.filter").origin.as_deref(), Some("VASTO_LOG"));
    environment.extend(variables(&[("VASTO_LOG__FILTER", "warn")]));
    let loaded = load_from(None, environment, Overrides::new()).unwrap();
    assert_eq!(loaded.config.log.filter, "warn");
}

#[test]
fn unknown_fields_are_all_named_with_the_nearest_known_one() {
    let text = refusal(
        "top = 1\n[node]\ncahce = \"1GiB\"\n[mastre]\nlisten = \"127.0.0.1:1\"\n",
        &[("VASTO_NODE__READ_THREAD", "1")],
        Overrides::new().assign(&[("log.fromat".to_owned(), "json".to_owned())]),
    );
    for part in [
        "unknown field node.cahce in /",
        "did you mean node.cache?",
        "unknown field mastre.listen in /",
        "did you mean master.listen?",
        "unknown field VASTO_NODE__READ_THREAD in the environment; \
         did you mean VASTO_NODE__READ_THREADS?",
        "unknown field log.fromat in a flag; did you mean --set log.format=...?",
        "unknown field top in /",
        "vasto config show",
    ] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    let text = refusal("[node]\nqqqqqqqqq = 1\n", &[], Overrides::new());
    assert!(text.contains("known here: master, dir, listen"), "{text}");
    let text = refusal("[weather]\nis_fine = true\n", &[], Overrides::new());
    assert!(text.contains("known here: bucket, master, node, log, security"), "{text}");
}

#[test]
fn bad_values_name_the_field_the_place_and_what_is_expected() {
    for (section, given, parts) in [
        ("node", "cache = \"12 potatoes\"", ["node.cache", "\"12 potatoes\"", "256MiB"]),
        ("node", "cache = true", ["node.cache", "true", "256MiB"]),
        ("node", "cache = { size = 1 }", ["node.cache", "a table", "256MiB"]),
        ("node", "ship_interval = \"0s\"", ["node.ship_interval", "\"0s\"", "above zero"]),
        ("node", "ship_interval = 10", ["node.ship_interval", "10", "\"10s\""]),
        ("node", "read_threads = 0", ["node.read_threads", "0", "from 1"]),
        ("node", "read_threads = -1", ["node.read_threads", "-1", "from 1"]),
        ("node", "listen = \"localhost:1\"", ["node.listen", "\"localhost:1\"", "IP address"]),
        ("node", "zone = 1", ["node.zone", "1", "text in quotes"]),
        (
            "node",
            "background_latency_factor = 0.5",
            ["node.background_latency_factor", "0.5", "from 1 such as 2.0, or 0"],
        ),
        ("log", "format = \"xml\"", ["log.format", "\"xml\"", "human"]),
        ("prices", "put_per_1000 = -0.005", ["prices.put_per_1000", "-0.005", "number from 0"]),
        ("prices", "gib_month = \"free\"", ["prices.gib_month", "\"free\"", "number from 0"]),
        ("security", "insecure = \"yes\"", ["security.insecure", "\"yes\"", "true or false"]),
    ] {
        let text = refusal(&format!("[{section}]\n{given}\n"), &[], Overrides::new());
        for part in parts.into_iter().chain([".toml: "]) {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
    }
    let text = refusal("", &[("VASTO_NODE__READ_THREADS", "many")], Overrides::new());
    assert!(text.contains("node.read_threads in VASTO_NODE__READ_THREADS: \"many\""), "{text}");
    let text = refusal("node = 1\n", &[], Overrides::new());
    assert!(text.contains("unknown field node in /"), "{text}");
}

#[test]
fn prices_are_numbers_from_any_source_and_shown_with_it() {
    let file = file("[prices]\ncurrency = \"EUR\"\nput_per_1000 = 0.0054\negress_gib = 0\n");
    let environment =
        variables(&[("VASTO_PRICES__GIB_MONTH", "0.02"), ("VASTO_PRICES__LIST_PER_1000", "1")]);
    let flags = Overrides::new().assign(&[("prices.get_per_1000".to_owned(), "4e-4".to_owned())]);
    let loaded = load_from(Some(file.path()), environment, flags).unwrap();
    let wanted = PricesSection {
        currency: "EUR".to_owned(),
        put_per_1000: 0.0054,
        get_per_1000: 0.0004,
        list_per_1000: 1.0,
        gib_month: 0.02,
        egress_gib: 0.0,
    };
    assert_eq!(loaded.config.prices, wanted);
    let rows = loaded.rows();
    for (name, value, source) in [
        ("prices.put_per_1000", 0.0054, Source::File),
        ("prices.gib_month", 0.02, Source::Env),
        ("prices.get_per_1000", 0.0004, Source::Flag),
    ] {
        assert_eq!((&row(&rows, name).value, row(&rows, name).source), (&value.into(), source));
    }
    let defaults = load_from(None, [], Overrides::new()).unwrap().rows();
    assert_eq!(
        (&row(&defaults, "prices.gib_month").value, row(&defaults, "prices.gib_month").source),
        (&0.023.into(), Source::Default)
    );
    let text = refusal(
        "[prices]\nput_per_100 = 1\n",
        &[("VASTO_PRICES__PUT_PER_1000", "NaN")],
        Overrides::new(),
    );
    assert!(
        text.contains("unknown field prices.put_per_100 in /") && text.contains("put_per_1000?"),
        "{text}"
    );
    let text = refusal("", &[("VASTO_PRICES__PUT_PER_1000", "NaN")], Overrides::new());
    assert!(text.contains("\"NaN\" is not a number from 0"), "{text}");
}

#[test]
fn a_file_that_is_missing_or_not_toml_is_named() {
    let error = check_file(Path::new("/no/such/vasto.toml")).unwrap_err();
    assert!(matches!(error, ConfigError::Unreadable { .. }));
    assert!(error.to_string().contains("/no/such/vasto.toml"));

    let bad = file("[node]\n\nzone = \"a\ncache = 1\n");
    let error = check_file(bad.path()).unwrap_err();
    assert!(matches!(error, ConfigError::Syntax { line: 3, .. }), "{error:?}");
    check_file(file("[node]\nzone = \"a\"\n").path()).unwrap();
}

#[test]
fn secrets_are_never_printed() {
    const CANARY: &str = "canary-7f3a";
    let good = file(&format!(
        "[bucket]\naccess_key_id = \"{CANARY}\"\nsecret_access_key = \"{CANARY}\"\n\
         endpoint = \"http://user:{CANARY}@127.0.0.1:9000/x\"\n"
    ));
    let loaded = load_from(Some(good.path()), [], Overrides::new()).unwrap();
    let bucket = &loaded.config.bucket;
    assert_eq!(bucket.secret_access_key.as_ref().unwrap().expose(), CANARY);
    let rows = loaded.rows();
    assert_eq!(row(&rows, "bucket.secret_access_key").value, "***");
    assert_eq!(row(&rows, "bucket.endpoint").value, "http://***@127.0.0.1:9000/x");
    let shown = [
        serde_json::to_string(&rows).unwrap(),
        serde_json::to_string(&bucket.secret_access_key).unwrap(),
        format!("{:?} {:?}", bucket.secret_access_key, bucket.access_key_id),
        // Each of these errors could show the line or the value.
        refusal(&format!("[bucket]\nsecret_access_key = [\"{CANARY}\"]\n"), &[], Overrides::new()),
        refusal(&format!("[bucket]\nsecret_access_key = \"{CANARY}\n"), &[], Overrides::new()),
        refusal(&format!("[bucket]\nsecret_acess_key = \"{CANARY}\"\n"), &[], Overrides::new()),
        refusal("", &[("VASTO_BUCKET__SECRET_KEY", CANARY)], Overrides::new()),
    ];
    for text in shown {
        assert!(!text.contains(CANARY), "{text}");
    }
}

#[test]
fn servers_refuse_what_is_missing_or_open_to_everybody() {
    let mut config = Config::default();
    let error = config.check_master().unwrap_err();
    assert!(error.hint().contains("VASTO_BUCKET__URL"), "{error}");
    config.bucket.url = Some("file:///b".to_owned());
    assert_eq!(config.check_master().unwrap(), "file:///b");

    assert!(matches!(config.check_node(), Err(ConfigError::Missing { path: "node.dir", .. })));
    config.node.dir = Some("/d".into());
    config.check_node().unwrap();
    config.node.listen = "0.0.0.0:4000".parse().unwrap();
    let error = config.check_node().unwrap_err();
    assert!(matches!(error, ConfigError::Unprotected { path: "node.listen", .. }));
    assert!(error.hint().contains("--insecure"));
    config.security.insecure = true;
    let error = config.check_node().unwrap_err();
    assert!(error.hint().contains("--advertise HOST:4000"), "{error}");
    config.node.advertise = Some("node-1:4000".to_owned());
    config.check_node().unwrap();
}

#[test]
fn what_show_prints_can_be_read_back() {
    let rows = load_from(None, [], Overrides::new()).unwrap().rows();
    let text = rows.iter().filter(|row| !row.value.is_null()).fold(Overrides::new(), |all, row| {
        let text = row.value.as_str().map_or_else(|| row.value.to_string(), str::to_owned);
        all.set(row.name, "--set", Some(text))
    });
    let again = load_from(None, [], text).unwrap().rows();
    for (row, again) in rows.iter().zip(&again) {
        assert_eq!(row.value, again.value, "{}", row.name);
    }
}

#[test]
fn texts_that_cannot_be_what_they_are_for_are_refused_with_their_place() {
    for (section, given, parts) in [
        ("bucket", "url = \"nonsense\"", ["bucket.url in ", "nonsense"]),
        ("bucket", "url = \"s4://b/p\"", ["bucket.url in ", "s4"]),
        ("bucket", "url = \"s3://\"", ["bucket.url in ", "names no bucket"]),
        ("bucket", "url = \"file://relative\"", ["bucket.url in ", "three slashes"]),
        (
            "bucket",
            "endpoint = \"127.0.0.1:9000\"",
            ["bucket.endpoint in ", "http://127.0.0.1:9000"],
        ),
        ("node", "master = \"localhost\"", ["node.master in ", "http://127.0.0.1:8278"]),
        ("log", "filter = \"vasto_node=loud\"", ["log.filter in ", "info,vasto_node=debug"]),
    ] {
        let text = refusal(&format!("[{section}]\n{given}\n"), &[], Overrides::new());
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
        let wrong = file(&format!("[{section}]\n{given}\n"));
        assert!(check_file(wrong.path()).is_err(), "`vasto config check` says so, too: {given}");
    }
    let text = refusal("", &[("VASTO_BUCKET__URL", "nonsense")], Overrides::new());
    assert!(text.contains("bucket.url in VASTO_BUCKET__URL"), "{text}");
    let secret = refusal("[bucket]\nurl = \"s3://user:canary-1@b\"\n", &[], Overrides::new());
    assert!(!secret.contains("canary-1"), "{secret}");
    check_file(
        file("[bucket]\nurl = \"file:///a/b\"\nendpoint = \"https://s3.example.org\"\n").path(),
    )
    .unwrap();
}

#[test]
fn variables_with_one_underscore_are_told_and_those_of_others_are_not() {
    for (given, meant) in [
        ("VASTO_NODE_CACHE", "VASTO_NODE__CACHE"),
        ("VASTO_NODE_WRITE_BUFER", "VASTO_NODE__WRITE_BUFFER"),
        ("VASTO_BUCKET_URL", "VASTO_BUCKET__URL"),
        ("VASTO_LOG_FORMAT", "VASTO_LOG__FORMAT"),
    ] {
        let error =
            load_from(None, variables(&[(given, "1")]), Overrides::new()).unwrap_err().to_string();
        assert!(error.contains(&format!("{given} is not read; did you mean {meant},")), "{error}");
    }
    let others = [
        ("VASTO_MASTER", "http://127.0.0.1:1"),
        ("VASTO_LOG", "info"),
        ("VASTO_HOME", "/x"),
        ("VASTO_TEST_WEED", "/x"),
        ("VASTO_BIN", "/x"),
        // Variables that Kubernetes sets for a service of that name.
        ("VASTO_MASTER_PORT", "tcp://10.0.0.1:8278"),
        ("VASTO_MASTER_SERVICE_HOST", "10.0.0.1"),
        ("VASTO_NODE_PORT_8279_TCP_ADDR", "10.0.0.1"),
    ];
    load_from(None, variables(&others), Overrides::new()).unwrap();
}
