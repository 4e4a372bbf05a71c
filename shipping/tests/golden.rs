//! The formats of released versions, byte for byte: `testdata/v1` is read and written identically.
//!
//! A failure here means that objects in existing buckets can no longer be read. Do not change the
//! files: give the format a new number and add `testdata/v2`. With VASTO_WRITE_GOLDEN=1 missing
//! files are written; existing ones never are.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use vasto_core::catalog::{Catalog, KeyspaceSpec, Quarantine};
use vasto_core::ids::Vector;
use vasto_core::record::{BandRange, Body, KeyEntry, Record};
use vasto_core::{
    Band, CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, NodeId, Origin, OwnSeq, PlanId,
    ReplicaId, ShardId,
};
use vasto_shipping::catalog::{decode_catalog, encode_catalog};
use vasto_shipping::{Chunk, ExportManifest, ExportedTable, Manifest, ManifestFile};

fn golden(name: &str, encoded: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/v1").join(name);
    if !path.exists() && std::env::var_os("VASTO_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, encoded).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every flipped bit of the object must be noticed.
fn every_bit_counts(bytes: &[u8], decodes: impl Fn(&[u8]) -> bool) {
    assert!(decodes(bytes));
    let mut altered = bytes.to_vec();
    for position in 0..bytes.len() {
        for bit in 0..8 {
            altered[position] ^= 1 << bit;
            assert!(!decodes(&altered), "bit {bit} of byte {position}");
            altered[position] ^= 1 << bit;
        }
        assert!(!decodes(&bytes[..position]), "cut to {position} bytes");
    }
}

fn origin(replica: u64, incarnation: u64) -> Origin {
    Origin { replica: ReplicaId(replica), incarnation: Incarnation(incarnation) }
}

#[test]
fn manifest() {
    let file = |number: u64, level: i32, first: &[u8], last: &[u8]| ManifestFile {
        key: vasto_shipping::layout::sst(
            KeyspaceId(7),
            ShardId(2),
            ReplicaId(5),
            number,
            "0123456789abcdef",
        ),
        file_number: number,
        bytes: 67_108_864 + number,
        crc32c: 0xdead_beef,
        level,
        smallest_seqno: 10,
        largest_seqno: u64::MAX,
        first_key: first.to_vec(),
        last_key: last.to_vec(),
        entries: 1_000,
    };
    let manifest = Manifest {
        ingested: None,
        database: None,
        keyspace: KeyspaceId(7),
        shard: ShardId(2),
        replica: ReplicaId(5),
        incarnation: Incarnation(3),
        epoch: Epoch(4),
        version: CatalogVersion(9),
        lsn: Lsn(123_456),
        vector: Vector::from([(origin(5, 1), OwnSeq(100)), (origin(5, 3), OwnSeq(u64::MAX))]),
        event_time_max: 1_700_000_000_000_001,
        commit_time_max: 1_700_000_000_000_002,
        floor: 1_600_000_000_000_000,
        created_at_us: 1_700_000_000_000_003,
        nonce: 0xfeed_face_cafe_beef,
        previous: Some("data/x/checkpoint/00000000000000000001.manifest".into()),
        range_states: vec![
            (BandRange { first: Band(1), last: Band(2) }, 0),
            (BandRange { first: Band(3), last: Band(98) }, 1),
        ],
        files: vec![file(11, 0, b"\x03a", b"\x62z\x00\xff"), file(12, 6, b"\xff\x01", b"\xff\x02")],
    };
    let bytes = golden("manifest.json", &manifest.encode());
    assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
    assert_eq!(manifest.encode(), bytes, "this version writes what it has always written");
    every_bit_counts(&bytes, |bytes| Manifest::decode(bytes).is_ok());
    let numbers = |first, last| -> Vec<u64> {
        let range = BandRange { first: Band(first), last: Band(last) };
        manifest.files_overlapping(range).iter().map(|file| file.file_number).collect()
    };
    assert_eq!(numbers(1, 2), [] as [u64; 0]);
    assert_eq!(numbers(3, 3), [11]);
    assert_eq!(numbers(98, 98), [11]);
}

#[test]
fn export() {
    let (keyspace, plan, from) = (KeyspaceId(7), PlanId(12), ShardId(5));
    let table = |to: u32, n: u64, rows: u64| {
        let to = ShardId(to);
        let key =
            vasto_shipping::layout::export_table(keyspace, plan, from, to, n, "0123456789abcdef");
        ExportedTable { to, key, bytes: 33_554_432 + n, crc32c: 0xdead_beef, rows }
    };
    let manifest = ExportManifest {
        keyspace,
        plan,
        shard: from,
        replica: ReplicaId(9),
        lsn: Lsn(123_456),
        floor: 1_600_000_000_000_000,
        event_time_max: u64::MAX,
        files: vec![table(0, 1, 1_000), table(0, 2, 7), table(2, 3, u64::MAX)],
    };
    let bytes = golden("export.json", &manifest.encode());
    assert_eq!(ExportManifest::decode(&bytes).unwrap(), manifest);
    assert_eq!(manifest.encode(), bytes, "this version writes what it has always written");
    every_bit_counts(&bytes, |bytes| ExportManifest::decode(bytes).is_ok());
}

#[test]
fn chunk() {
    let record = |lsn: u64, body: Body| Record {
        lsn: Lsn(lsn),
        synced_lsn: Lsn(lsn - 1),
        commit_time: 1_700_000_000_000_000 + lsn,
        floor: 1_600_000_000_000_000,
        epoch: Epoch(4),
        origin: origin(5, 3),
        own_seq: OwnSeq(if body.is_streamed() { lsn } else { 0 }),
        body,
    };
    let range = BandRange { first: Band(3), last: Band(3) };
    let records: Vec<Record> = vec![
        record(20, Body::Adopt { previous: Incarnation(2), head: OwnSeq(19) }),
        record(21, Body::data(vec![KeyEntry { key: b"user:1".to_vec(), entry: vec![1, 2, 3] }])),
        record(22, Body::Seal { plan: PlanId(1), version: CatalogVersion(9), range }),
    ];
    let chunk = Chunk {
        keyspace: KeyspaceId(7),
        shard: ShardId(2),
        replica: ReplicaId(5),
        first_lsn: Lsn(20),
        last_lsn: Lsn(22),
        previous: Some("data/x/log/00000000000000000001.chunk".into()),
        records: records.iter().flat_map(Record::encode).collect(),
    };
    let bytes = golden("chunk.bin", &chunk.encode());
    let back = Chunk::decode(&bytes).unwrap();
    assert_eq!(back, chunk);
    assert_eq!(back.records().collect::<Result<Vec<_>, _>>().unwrap(), records);
    assert_eq!(chunk.encode(), bytes, "this version writes what it has always written");
    every_bit_counts(&bytes, |bytes| Chunk::decode(bytes).is_ok());
}

#[test]
fn catalog() {
    let nodes = [vec![NodeId(1)], vec![NodeId(2)]];
    let spec = KeyspaceSpec { shards: 2, ttl_ms: Some(60_000), ..KeyspaceSpec::default() };
    let first =
        Catalog::first(KeyspaceId(7), "ks1", spec, &nodes, 1_700_000_000_000_000, 0xfeed_face);
    let mut catalog = vasto_core::reconcile::start_resize(
        &first,
        3,
        &[vec![NodeId(3)]],
        1_700_000_000_000_001,
        u64::MAX,
    )
    .unwrap();
    catalog.pins.push("data/x/checkpoint/00000000000000000001.manifest".into());
    catalog.quarantines.push(Quarantine {
        plan: PlanId(9),
        range: BandRange { first: Band(1), last: Band(1) },
        replicas: vec![ReplicaId(1)],
        targets: vec![(ReplicaId(2), Lsn(55))],
        others: Vec::new(),
        sources: Vec::new(),
        until_us: 1_700_000_000_000_002,
        dropping: false,
    });
    let bytes = golden("catalog.json", &encode_catalog(&catalog));
    // A later version may write more fields, so only the decoded value is compared.
    assert_eq!(decode_catalog(&bytes).unwrap(), catalog);
    every_bit_counts(&bytes, |bytes| decode_catalog(bytes).is_ok());
}
