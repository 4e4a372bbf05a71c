//! Every persisted format of this crate, as the bytes of released versions in `testdata/v1`.
//!
//! Each file is read, decoded, compared with the value it was made from, and encoded again. A test
//! that fails here means that data on disks and in buckets cannot be read any more: never change
//! the files; a new format gets a new number and a new directory.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use vasto_core::band::Band;
use vasto_core::catalog::{Ack, Catalog, KeyspaceSpec, Quarantine};
use vasto_core::entry::{Entry, Payload, version_of};
use vasto_core::hash::{jump, next_jump_from, partition_hash};
use vasto_core::ids::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, NodeId, Origin, OwnSeq, PlanId, ReplicaId,
    ShardId,
};
use vasto_core::plan::{PinnedManifest, Plan, PlanKind, Source, Step, Target};
use vasto_core::record::{
    BandRange, Body, FeedProgress, FileHeader, IngestedObject, KeyEntry, OpResult, RangeState,
    Record,
};
use vasto_core::stored_key::{MetaKey, data_key, split_data_key};

fn read(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/v1").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Reads lines of `name value…`; `#` begins a comment.
fn lines(name: &str) -> Vec<Vec<String>> {
    let text = read(name);
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "{text}");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

/// Returns the named bytes of a file; the names must be exactly those that the test knows.
fn named(file: &str, known: &[String]) -> BTreeMap<String, Vec<u8>> {
    let found: BTreeMap<_, _> =
        lines(file).into_iter().map(|line| (line[0].clone(), unhex(&line[1]))).collect();
    let mut names: Vec<_> = known.to_vec();
    names.sort();
    assert_eq!(found.keys().cloned().collect::<Vec<_>>(), names, "{file}");
    found
}

#[test]
fn jump_hash_and_next_jump() {
    let mut beyond = 0;
    let all = lines("jump.txt");
    assert!(all.len() >= 200);
    for line in all {
        let number = |at: usize| line[at].parse::<u64>().unwrap();
        let hash = u64::from_str_radix(&line[0], 16).unwrap();
        let (shards, shard, next) = (number(1) as u32, ShardId(number(2) as u32), number(3));
        let found = jump(hash, shards);
        assert_eq!((found.shard, found.next), (shard, next), "{line:?}");
        assert_eq!(next_jump_from(hash, shard), Some(next));
        assert_eq!(u64::from(Band::of_next_jump(next).0), number(4), "{line:?}");
        beyond += usize::from(next > 1 << 31);
    }
    assert!(beyond >= 10, "next jumps beyond 2^31 are pinned too: {beyond}");
}

#[test]
fn partition_hashes() {
    for line in lines("partition_hash.txt") {
        let key = unhex(line[0].trim_start_matches('x'));
        assert_eq!(format!("{:016x}", partition_hash(&key)), line[1], "{line:?}");
    }
}

#[test]
fn bands_and_their_edges() {
    let all = lines("bands.txt");
    assert_eq!(all.len(), 98);
    for line in all {
        let number = |at: usize| line[at].parse::<u64>().unwrap();
        let band = Band(number(0) as u8);
        assert_eq!(u64::from(band.low_edge()), number(1));
        assert_eq!(Band::of_next_jump(number(1)), band, "its first next jump");
        assert_eq!(Band::of_next_jump(number(2)), band, "its last next jump");
        if band < Band::LAST {
            assert_eq!(Band::of_next_jump(number(2) + 1).0, band.0 + 1);
        }
    }
    for line in lines("leaving.txt") {
        let number = |at: usize| line[at].parse::<u32>().unwrap();
        let leaving = Band::leaving(number(0), number(1));
        assert_eq!(
            (u32::from(leaving.start().0), u32::from(leaving.end().0)),
            (number(2), number(3)),
            "{line:?}"
        );
        assert_eq!(*Band::owned(number(1)).start(), Band(leaving.end().0 + 1));
    }
}

fn entries() -> Vec<(String, Entry<'static>)> {
    let payloads = [
        ("empty", Some(Payload::Bytes(b""))),
        ("bytes", Some(Payload::Bytes(b"\x00value\xff"))),
        ("i64", Some(Payload::I64(-2))),
        ("f64", Some(Payload::F64(-0.5))),
        ("tombstone", None),
    ];
    let mut out = Vec::new();
    for (name, payload) in payloads {
        for expires_at in [None, Some(0x0001_0203_0405_0607)] {
            for partition_hash in [None, Some(0xf0e1_d2c3_b4a5_9687)] {
                if payload.is_none() && expires_at.is_some() {
                    continue;
                }
                let commit_time =
                    (payload.is_none() || expires_at.is_some()).then_some(0x1112_1314_1516_1718);
                let flags = [expires_at.map(|_| "-expires"), partition_hash.map(|_| "-partition")];
                let name =
                    flags.into_iter().flatten().fold(name.to_owned(), |name, flag| name + flag);
                let event_time = 0x2122_2324_2526_2728;
                out.push((
                    name,
                    Entry { event_time, expires_at, partition_hash, commit_time, payload },
                ));
            }
        }
    }
    out
}

#[test]
fn entries_of_every_kind_and_flag() {
    let entries = entries();
    let names: Vec<_> = entries.iter().map(|(name, _)| name.clone()).collect();
    let found = named("entries.txt", &names);
    for (name, entry) in &entries {
        assert_eq!(Entry::decode(&found[name]).unwrap(), *entry, "{name}");
        assert_eq!(entry.encode(), found[name], "{name}");
    }
    for line in lines("versions.txt") {
        assert_eq!(format!("{:016x}", version_of(&found[&line[0]])), line[1], "{line:?}");
    }
}

fn range() -> BandRange {
    BandRange { first: Band(3), last: Band(98) }
}

fn bodies() -> Vec<(String, Body)> {
    let key_entry =
        |key: &[u8], entry: &[u8]| KeyEntry { key: key.to_vec(), entry: entry.to_vec() };
    let progress = vec![
        FeedProgress::Tail(ReplicaId(0x51), Lsn(0x52)),
        FeedProgress::Forward(ShardId(0x53), Lsn(0x54)),
    ];
    let object = |key: &str| IngestedObject {
        key: key.to_owned(),
        bytes: 0x0102_0304_0506_0708,
        crc32c: 0xa1b2_c3d4,
    };
    let mut out = vec![
        ("data-empty", Body::data(Vec::new())),
        (
            "data",
            Body::Data {
                entries: vec![key_entry(b"key", b"entry"), key_entry(b"\x00\xff", b"")],
                results: vec![OpResult {
                    client: 0x61,
                    sequence: 0x62,
                    outcome: b"outcome".to_vec(),
                }],
                progress: progress.clone(),
            },
        ),
        ("gc-floor", Body::GcFloor { floor: 0x71 }),
        ("adopt", Body::Adopt { previous: Incarnation(0x72), head: OwnSeq(0x73) }),
        ("seal", Body::Seal { plan: PlanId(0x74), version: CatalogVersion(0x75), range: range() }),
        ("unseal", Body::Unseal { plan: PlanId(0x76), version: CatalogVersion(0x77) }),
        (
            "ingest",
            Body::Ingest {
                plan: PlanId(0x78),
                range: range(),
                objects: vec![object("data/1/0/1/sst/1-a.sst"), object("ä")],
                event_time_max: 0x79,
                progress,
            },
        ),
    ];
    let states = [
        RangeState::Empty,
        RangeState::Owned,
        RangeState::Arriving,
        RangeState::Leaving,
        RangeState::Clearing,
    ];
    let names = ["range-empty", "range-owned", "range-arriving", "range-leaving", "range-clearing"];
    for (name, state) in names.into_iter().zip(states) {
        out.push((name, Body::RangeState { version: CatalogVersion(0x7a), range: range(), state }));
    }
    out.into_iter().map(|(name, body)| (name.to_owned(), body)).collect()
}

fn record(body: Body) -> Record {
    Record {
        lsn: Lsn(0x0102_0304_0506_0708),
        synced_lsn: Lsn(0x1112_1314_1516_1718),
        commit_time: 0x2122_2324_2526_2728,
        floor: 0x3132_3334_3536_3738,
        epoch: Epoch(0x4142_4344_4546_4748),
        origin: Origin {
            replica: ReplicaId(0x5152_5354_5556_5758),
            incarnation: Incarnation(0x6162_6364_6566_6768),
        },
        own_seq: OwnSeq(if body.is_streamed() { 0x7172_7374_7576_7778 } else { 0 }),
        body,
    }
}

#[test]
fn records_of_every_kind_with_all_fields() {
    let bodies = bodies();
    let names: Vec<_> = bodies.iter().map(|(name, _)| name.clone()).collect();
    let found = named("records.txt", &names);
    for (name, body) in bodies {
        let record = record(body);
        assert_eq!(Record::decode(&found[&name]).unwrap(), record, "{name}");
        assert_eq!(record.encode(), found[&name], "{name}");
    }
}

fn header() -> FileHeader {
    FileHeader {
        keyspace: KeyspaceId(0x0102_0304_0506_0708),
        shard: ShardId(0x1112_1314),
        replica: ReplicaId(0x2122_2324_2526_2728),
        incarnation: Incarnation(0x3132_3334_3536_3738),
        first_lsn: Lsn(0x4142_4344_4546_4748),
    }
}

#[test]
fn the_header_of_a_log_file() {
    let found = named("file_header.txt", &["header".to_owned()]);
    assert_eq!(FileHeader::decode(&found["header"]).unwrap(), header());
    assert_eq!(header().encode(), found["header"]);
}

fn meta_keys() -> Vec<(String, MetaKey)> {
    let origin = Origin {
        replica: ReplicaId(0x0102_0304_0506_0708),
        incarnation: Incarnation(0x1112_1314_1516_1718),
    };
    let all = [
        ("identity", MetaKey::Identity),
        ("head", MetaKey::Head),
        ("vector", MetaKey::Vector(origin)),
        ("range-states", MetaKey::RangeStates),
        ("catalog-version", MetaKey::CatalogVersion),
        ("result", MetaKey::Result(0x2122_2324_2526_2728, 0x3132_3334_3536_3738)),
        ("tail-cursor", MetaKey::TailCursor(ReplicaId(0x4142_4344_4546_4748))),
        ("forward-cursor", MetaKey::ForwardCursor(0x5152_5354)),
    ];
    all.into_iter().map(|(name, key)| (name.to_owned(), key)).collect()
}

fn data_keys() -> Vec<(String, Band, &'static [u8])> {
    let all: [(&str, u8, &'static [u8]); 3] =
        [("data-first", 1, b"k"), ("data-zeros", 64, b"\x00\x00"), ("data-last", 98, b"\xff\xff")];
    all.into_iter().map(|(name, band, key)| (name.to_owned(), Band(band), key)).collect()
}

#[test]
fn stored_keys_of_data_and_metadata() {
    let names = meta_keys()
        .into_iter()
        .map(|(name, _)| name)
        .chain(data_keys().into_iter().map(|(name, _, _)| name));
    let found = named("stored_keys.txt", &names.collect::<Vec<_>>());
    for (name, key) in meta_keys() {
        assert_eq!(MetaKey::decode(&found[&name]).unwrap(), key, "{name}");
        assert_eq!(key.encode(), found[&name], "{name}");
        assert_eq!(split_data_key(&found[&name]), None);
    }
    for (name, band, key) in data_keys() {
        assert_eq!(split_data_key(&found[&name]), Some((band, key)), "{name}");
        assert_eq!(data_key(band, key), found[&name], "{name}");
    }
}

fn catalog() -> Catalog {
    let (one, two) = (NodeId(0x0102_0304_0506_0708), NodeId(0xfff1_f2f3_f4f5_f6f7));
    let spec = KeyspaceSpec {
        shards: 2,
        replicas: 2,
        ack: Ack::Os,
        ttl_ms: Some(86_400_000),
        quarantine_ms: 5_000,
        tombstone_grace_ms: None,
    };
    let mut catalog = Catalog::first(
        KeyspaceId(9),
        "ks-1",
        spec,
        &[vec![one, two], vec![two, one]],
        1_700_000_000_000_000,
        u64::MAX,
    );
    catalog.version = CatalogVersion(12);
    catalog.epoch = Epoch(5);
    let pinned = PinnedManifest { key: "data/9/0/1/checkpoint/7.manifest".to_owned(), lsn: Lsn(7) };
    catalog.plan = Some(Plan {
        id: PlanId(3),
        kind: PlanKind::Grow { from: 2, to: 3 },
        from_epoch: Epoch(5),
        started_at_us: 1_700_000_000_000_001,
        step: Step::Sealing,
        sources: vec![
            Source {
                shard: ShardId(0),
                replica: ReplicaId(1),
                node: one,
                manifest: Some(pinned.clone()),
                export: None,
            },
            Source {
                shard: ShardId(1),
                replica: ReplicaId(3),
                node: two,
                manifest: None,
                export: None,
            },
        ],
        targets: vec![Target { shard: ShardId(2), replica: ReplicaId(5), node: two }],
        seals_undone: 1,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    });
    catalog.quarantines = vec![Quarantine {
        plan: PlanId(2),
        range: BandRange { first: Band(1), last: Band(1) },
        replicas: vec![ReplicaId(1), ReplicaId(2)],
        targets: vec![(ReplicaId(3), Lsn(11))],
        others: Vec::new(),
        sources: Vec::new(),
        until_us: 1_700_000_005_000_000,
        dropping: true,
    }];
    catalog.pins = vec![pinned.key];
    catalog.next_replica = ReplicaId(6);
    catalog.next_plan = PlanId(4);
    catalog
}

#[test]
fn a_catalog_version() {
    let text = read("catalog.json");
    assert_eq!(serde_json::from_str::<Catalog>(&text).unwrap(), catalog());
    assert_eq!(serde_json::to_string_pretty(&catalog()).unwrap() + "\n", text);
    // Fields that a newer version adds are tolerated.
    let newer = text.replacen('{', "{\n  \"of_a_newer_version\": [1, {\"a\": null}],", 1);
    assert_eq!(serde_json::from_str::<Catalog>(&newer).unwrap(), catalog());
}
