//! Crashes, power losses and flipped bits at every place of a log, and its recovery from them.

use std::collections::BTreeMap;
use std::ops::Range;

use proptest::prelude::*;

use super::*;

/// The bytes of a log's files by first LSN, and what was written and synced.
#[derive(Debug, Clone)]
struct Image {
    files: BTreeMap<u64, Vec<u8>>,
    records: Vec<Placed>,
    synced: Lsn,
    file_bytes: u64,
}

/// A record and where it stands.
#[derive(Debug, Clone)]
struct Placed {
    file: u64,
    span: Range<usize>,
    says_synced: Lsn,
    bytes: Vec<u8>,
}

impl Image {
    /// Writes a log with these value sizes; `syncs` says after which records it is synced.
    fn build(sizes: &[usize], syncs: impl Fn(u64) -> bool, file_bytes: u64) -> Image {
        let dir = memory_dir();
        let mut log = Binlog::open(config(dir.path(), file_bytes)).unwrap();
        let mut records = Vec::new();
        for size in sizes {
            let says_synced = log.shared().synced_lsn();
            let bytes = append_next(&mut log, *size);
            let active = log.active.as_ref().unwrap();
            let end = active.bytes as usize;
            records.push(Placed {
                file: active.first.0,
                span: end - bytes.len()..end,
                says_synced,
                bytes,
            });
            if syncs(log.last_lsn().0) {
                log.sync().unwrap();
            }
        }
        let (files, synced) = (contents(dir.path()), log.shared().synced_lsn());
        Image { files, records, synced, file_bytes }
    }

    /// About 20 KiB in four files; the last third of the last file is not synced.
    fn standard() -> Image {
        let sizes: Vec<usize> = (0..60).map(|n| (n * 37) % 500).collect();
        let image = Image::build(&sizes, |lsn| lsn % 5 == 0 && lsn < 56, 6 << 10);
        assert_eq!((image.synced, image.files.len()), (Lsn(55), 4));
        assert!(image.bytes() > 18_000, "{}", image.bytes());
        image
    }

    fn bytes(&self) -> usize {
        self.files.values().map(Vec::len).sum()
    }

    fn last_file(&self) -> u64 {
        *self.files.keys().last().unwrap()
    }

    /// Where the last file stops being synced.
    fn synced_bytes_of_last(&self) -> usize {
        let mut synced =
            self.records[..self.synced.0 as usize].iter().filter(|r| r.file == self.last_file());
        synced.next_back().map_or(FILE_HEADER_BYTES, |r| r.span.end)
    }

    /// How many leading records the files still hold unaltered, and nothing else is asked of them.
    fn whole_prefix(&self, files: &BTreeMap<u64, Vec<u8>>) -> usize {
        let whole = |r: &Placed| {
            let original = &self.files[&r.file][..r.span.end];
            let header = ..FILE_HEADER_BYTES;
            files.get(&r.file).is_some_and(|f| {
                f.get(r.span.clone()) == Some(&original[r.span.clone()])
                    && f.get(header) == Some(&original[header])
            })
        };
        self.records.iter().take_while(|r| whole(r)).count()
    }

    /// Opens these files and expects exactly the first `count` records, a log that goes on after
    /// them, and the same when it is opened again.
    fn assert_cut(&self, files: &BTreeMap<u64, Vec<u8>>, count: usize, case: &str) {
        let dir = memory_dir();
        store(dir.path(), files);
        let mut log = Binlog::open(config(dir.path(), self.file_bytes))
            .unwrap_or_else(|error| panic!("{case}: {error}"));
        let mut expected: Vec<_> = self.records[..count].iter().map(|r| r.bytes.clone()).collect();
        assert_eq!(log.last_lsn().0 as usize, count, "{case}");
        assert_eq!(log.shared().synced_lsn(), log.last_lsn(), "{case}");
        assert_eq!(read_all(&log, Lsn(0), 1 << 16), expected, "{case}");
        // Other bytes than the ones that were cut off.
        (0..3).for_each(|n| expected.push(append_next(&mut log, 301 + n)));
        drop(log);
        let log = Binlog::open(config(dir.path(), self.file_bytes))
            .unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(read_all(&log, Lsn(0), 1 << 16), expected, "{case}, second opening");
    }

    /// Opens these files and expects rot at this record, and that they are left as they were.
    fn assert_rot(&self, files: &BTreeMap<u64, Vec<u8>>, lsn: u64, case: &str) {
        let dir = memory_dir();
        store(dir.path(), files);
        match Binlog::open(config(dir.path(), self.file_bytes)) {
            Err(error @ BinlogError::Rot { lsn: named, .. }) => {
                assert_eq!(named.0, lsn, "{case}");
                assert!(error.to_string().contains("must be rebuilt"), "{case}: {error}");
            }
            other => panic!("{case}: {other:?}"),
        }
        assert_eq!(&contents(dir.path()), files, "{case}");
    }
}

fn store(dir: &Path, files: &BTreeMap<u64, Vec<u8>>) {
    for (first, bytes) in files {
        std::fs::write(file::path(dir, Lsn(*first)), bytes).unwrap();
    }
}

fn contents(dir: &Path) -> BTreeMap<u64, Vec<u8>> {
    let names = files(dir).into_iter();
    names
        .map(|name| (name[..20].parse().unwrap(), std::fs::read(dir.join(name)).unwrap()))
        .collect()
}

/// The files as if nothing after the first `bytes` had been written.
fn cut_at(image: &Image, mut bytes: usize) -> BTreeMap<u64, Vec<u8>> {
    let mut files = BTreeMap::new();
    for (first, whole) in &image.files {
        let kept = bytes.min(whole.len());
        files.insert(*first, whole[..kept].to_vec());
        bytes -= kept;
        if kept < whole.len() {
            break;
        }
    }
    files
}

#[test]
fn cut_at_every_byte() {
    let image = Image::standard();
    for bytes in 0..=image.bytes() {
        let files = cut_at(&image, bytes);
        image.assert_cut(&files, image.whole_prefix(&files), &format!("cut at {bytes}"));
    }
}

#[test]
fn flip_every_byte() {
    let image = Image::standard();
    let last_file = image.last_file();
    let (mut rotten, mut cuts) = (0, 0);
    for (first, whole) in &image.files {
        for at in 0..whole.len() {
            let mut files = image.files.clone();
            files.get_mut(first).unwrap()[at] ^= 1 << (at % 8);
            let case = format!("flip in file {first} at {at}");
            let prefix = image.whole_prefix(&files);
            let bad = prefix as u64 + 1;
            let covered = image.records[prefix + 1..].iter().any(|r| r.says_synced.0 >= bad);
            if covered || *first != last_file || at < FILE_HEADER_BYTES {
                image.assert_rot(&files, bad, &case);
                rotten += 1;
            } else {
                assert!(bad > image.synced.0, "{case}: a synced record is never cut off here");
                image.assert_cut(&files, prefix, &case);
                cuts += 1;
            }
        }
    }
    assert!(rotten > 10_000 && cuts > 500, "{rotten} {cuts}");
}

/// The control of [`flip_every_byte`]: without the check for rot, synced records would be lost.
#[test]
fn a_plain_cut_would_lose_synced_records() {
    let image = Image::build(&[10, 20, 30, 40], |lsn| lsn == 3, 1 << 20);
    assert_eq!(image.synced, Lsn(3));
    assert_eq!(image.records[3].says_synced, Lsn(3));
    let mut files = image.files.clone();
    files.get_mut(&1).unwrap()[image.records[1].span.start + 80] ^= 1;

    let bytes = &files[&1];
    let mut offset = FILE_HEADER_BYTES;
    let mut plain_last = 0;
    while let Ok(length) = frame_at(&bytes[offset..]) {
        offset += length;
        plain_last += 1;
    }
    assert_eq!(plain_last, 1, "a cut at the first bad record would keep one of three synced ones");
    image.assert_rot(&files, 2, "record 4 says that 3 was synced");

    // With no record that says so, the same damage is the end of the log.
    let unsynced = Image::build(&[10, 20, 30, 40], |_| false, 1 << 20);
    let mut files = unsynced.files.clone();
    files.get_mut(&1).unwrap()[unsynced.records[1].span.start + 80] ^= 1;
    unsynced.assert_cut(&files, 1, "nothing was synced");
}

/// The last file after a power loss: of the unsynced bytes, those in `lost` pages are zero and
/// those behind `length` are gone.
fn lose_pages(image: &Image, lost: &[bool], length: usize) -> BTreeMap<u64, Vec<u8>> {
    let synced = image.synced_bytes_of_last();
    let mut files = image.files.clone();
    let last = files.get_mut(&image.last_file()).unwrap();
    for (n, _) in lost.iter().enumerate().filter(|(_, lost)| **lost) {
        let page = (synced / 4096 + n) * 4096;
        let end = (page + 4096).min(last.len());
        last[page.max(synced)..end].fill(0);
    }
    last.truncate(length.max(synced));
    files
}

fn unsynced_pages(image: &Image) -> usize {
    image.files[&image.last_file()].len().div_ceil(4096) - image.synced_bytes_of_last() / 4096
}

#[test]
fn lose_every_subset_of_the_unsynced_pages() {
    for synced_until in [0, 3, 9, 20] {
        let sizes: Vec<usize> = (0..45).map(|n| (n * 131) % 1100).collect();
        let image = Image::build(&sizes, |lsn| lsn == synced_until, 1 << 20);
        let pages = unsynced_pages(&image);
        assert!((3..=8).contains(&pages), "{pages}");
        let length = image.files[&image.last_file()].len();
        for subset in 0u32..1 << pages {
            let lost: Vec<bool> = (0..pages).map(|page| subset >> page & 1 == 1).collect();
            for kept in (0..length).step_by(4096).chain([length - 7, length]) {
                let files = lose_pages(&image, &lost, kept);
                let prefix = image.whole_prefix(&files);
                assert!(prefix >= synced_until as usize);
                image.assert_cut(
                    &files,
                    prefix,
                    &format!("synced {synced_until}, lost {subset:b}, kept {kept}"),
                );
            }
        }
    }
}

#[test]
fn a_creation_that_a_crash_interrupted_is_undone() {
    let image = Image::build(&[500; 12], |_| false, 2000);
    let next = image.records.len() as u64 + 1;
    for rest in [&[][..], &[0; 64], &FILE_MAGIC_AND_ZEROS, &[0xff; 63]] {
        let mut files = image.files.clone();
        files.insert(next, rest.to_vec());
        image.assert_cut(&files, 12, &format!("{} bytes of a next file", rest.len()));
        // Alone it is an empty log that goes on where its name says.
        let dir = memory_dir();
        store(dir.path(), &BTreeMap::from([(next, rest.to_vec())]));
        let mut log = Binlog::open(config(dir.path(), 2000)).unwrap();
        assert_eq!((log.last_lsn(), log.shared().first_lsn()), (Lsn(12), Lsn(13)));
        assert!(super::files(dir.path()).is_empty());
        append_next(&mut log, 1);
    }
}

const FILE_MAGIC_AND_ZEROS: [u8; 64] = {
    let mut bytes = [0; 64];
    let magic = b"VASTOLOG";
    let mut at = 0;
    while at < magic.len() {
        bytes[at] = magic[at];
        at += 1;
    }
    // A format number that was written as well.
    bytes[8] = 1;
    bytes
};

#[test]
fn a_missing_or_shortened_file_before_another_is_rot() {
    let image = Image::standard();
    let firsts: Vec<u64> = image.files.keys().copied().collect();
    for (gone, next) in firsts[1..].iter().zip(&firsts[2..]) {
        let mut files = image.files.clone();
        files.remove(gone);
        image.assert_rot(&files, *gone, &format!("without file {gone}"));
        for length in [0, 10, 64, 3000] {
            let mut files = image.files.clone();
            files.get_mut(gone).unwrap().truncate(length);
            let prefix = image.whole_prefix(&files);
            image.assert_rot(
                &files,
                prefix as u64 + 1,
                &format!("file {gone} with {length} bytes before {next}"),
            );
        }
    }
    // Without the front it is a truncated log.
    let mut files = image.files.clone();
    files.remove(&firsts[0]);
    let dir = memory_dir();
    store(dir.path(), &files);
    let log = Binlog::open(config(dir.path(), image.file_bytes)).unwrap();
    assert_eq!((log.shared().first_lsn().0, log.last_lsn()), (firsts[1], Lsn(60)));
}

#[test]
fn strange_and_newer_files_are_refused_and_left_alone() {
    let image = Image::standard();
    let refuse = |files: &BTreeMap<u64, Vec<u8>>, config: BinlogConfig| {
        store(&config.dir, files);
        let error = Binlog::open(config.clone()).unwrap_err();
        assert_eq!(&contents(&config.dir), files);
        error
    };
    let change: [fn(&mut BinlogConfig); 3] =
        [|c| c.keyspace = KeyspaceId(8), |c| c.shard = ShardId(8), |c| c.replica = ReplicaId(8)];
    for change in change {
        let dir = memory_dir();
        let mut config = config(dir.path(), 1000);
        change(&mut config);
        // Also when there is something to cut: nothing is touched.
        let error = refuse(&cut_at(&image, image.bytes() - 5), config);
        assert!(matches!(error, BinlogError::Foreign { .. }), "{error}");
    }
    let dir = memory_dir();
    let renamed = BTreeMap::from([(9, image.files[&1].clone())]);
    assert!(matches!(refuse(&renamed, config(dir.path(), 1000)), BinlogError::Foreign { .. }));

    let dir = memory_dir();
    let mut newer = cut_at(&image, image.bytes() - 5);
    let last = newer.get_mut(&image.last_file()).unwrap();
    last[8] = 2;
    last[60] ^= 0x55;
    let error = refuse(&newer, config(dir.path(), 1000));
    assert!(matches!(error, BinlogError::NewerFormat { format: 2, .. }), "{error}");
}

/// A file with record 1, garbage in the place of record 2, and then `behind`.
fn behind_a_bad_record(behind: &[u8]) -> Result<Binlog, BinlogError> {
    let image = Image::build(&[10, 200], |_| false, 1 << 30);
    let dir = memory_dir();
    let mut files = image.files.clone();
    let file = files.get_mut(&1).unwrap();
    file[image.records[1].span.start + 100] ^= 1;
    file.extend_from_slice(behind);
    store(dir.path(), &files);
    let opened = Binlog::open(config(dir.path(), 1 << 30));
    if let Ok(log) = &opened {
        assert_eq!(log.last_lsn(), Lsn(1));
    }
    opened
}

#[test]
fn only_a_later_record_that_names_the_bad_one_proves_rot() {
    let proves = |behind: Vec<u8>| match behind_a_bad_record(&behind) {
        Ok(_) => false,
        Err(BinlogError::Rot { lsn: Lsn(2), .. }) => true,
        Err(other) => panic!("{other}"),
    };
    assert!(proves(record(Lsn(3), Lsn(2), 5)));
    assert!(!proves(record(Lsn(3), Lsn(1), 5)));
    assert!(!proves(record(Lsn(2), Lsn(1), 5)), "not later");
    assert!(!proves(record(Lsn(3), Lsn(3), 5)), "no record says that of itself");
    // A lost stretch before it, and one that stands where it could not.
    let lost = vec![0; 500];
    assert!(proves([lost.clone(), record(Lsn(8), Lsn(7), 5)].concat()));
    assert!(
        !proves([lost.clone(), record(Lsn(80), Lsn(79), 5)].concat()),
        "no room for records 3 to 79"
    );
    // What users store is not evidence, but what follows it is.
    let nested = record_of(Lsn(3), Lsn(1), record(Lsn(4), Lsn(3), 5));
    assert!(!proves([lost.clone(), nested.clone()].concat()));
    assert!(proves([lost, nested, record(Lsn(4), Lsn(2), 5)].concat()));
}

#[test]
fn a_good_record_in_the_wrong_place_ends_the_log() {
    let image = Image::build(&[10, 200], |_| false, 1 << 30);
    for wrong in [1, 2, 4, 5] {
        let mut files = image.files.clone();
        files.get_mut(&1).unwrap().extend(record(Lsn(wrong), Lsn(0), 300));
        image.assert_cut(&files, 2, &format!("record {wrong} in the place of record 3"));
    }
}

#[test]
fn the_search_for_evidence_is_bounded() {
    let started = Instant::now();
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33).to_le_bytes()
    })
    .take(2 << 20)
    .flatten()
    .collect();
    assert_eq!(noise.len(), 16 << 20);
    assert!(behind_a_bad_record(&noise).is_ok());
    let mut fake = record(Lsn(3), Lsn(2), 0);
    fake[0..4].copy_from_slice(&(8u32 << 20).to_le_bytes());
    let error = behind_a_bad_record(&fake.repeat((16 << 20) / fake.len())).unwrap_err();
    assert!(
        matches!(&error, BinlogError::Rot { evidence, .. } if evidence.contains("given up")),
        "{error}"
    );
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn cut_anywhere(
        sizes in proptest::collection::vec(0usize..3000, 1..60),
        file_bytes in 100u64..20_000,
        every in 1u64..9,
        cut: prop::sample::Index,
    ) {
        let image = Image::build(&sizes, |lsn| lsn % every == 0, file_bytes);
        let files = cut_at(&image, cut.index(image.bytes() + 1));
        image.assert_cut(&files, image.whole_prefix(&files), "");
    }

    #[test]
    fn lose_any_unsynced_pages(
        sizes in proptest::collection::vec(0usize..9000, 1..60),
        file_bytes in 10_000u64..400_000,
        synced_until in 0u64..30,
        lost in proptest::collection::vec(any::<bool>(), 120),
        kept: prop::sample::Index,
        shortened: bool,
    ) {
        let image = Image::build(&sizes, |lsn| lsn == synced_until, file_bytes);
        let length = image.files[&image.last_file()].len();
        let kept = if shortened { kept.index(length) } else { length };
        let files = lose_pages(&image, &lost[..unsynced_pages(&image).min(120)], kept);
        let prefix = image.whole_prefix(&files);
        prop_assert!(prefix as u64 >= image.synced.0);
        image.assert_cut(&files, prefix, "");
    }

    #[test]
    fn flip_any_bits(
        sizes in proptest::collection::vec(0usize..700, 1..40),
        file_bytes in 500u64..9000,
        every in 1u64..9,
        flips in proptest::collection::vec(any::<(prop::sample::Index, prop::sample::Index, u8)>(), 1..4),
    ) {
        // Never a panic, and what is opened is a whole prefix that holds all that is known to be
        // synced.
        let image = Image::build(&sizes, |lsn| lsn % every == 0, file_bytes);
        let mut files = image.files.clone();
        for (file, at, bit) in flips {
            let file = files.values_mut().nth(file.index(image.files.len())).unwrap();
            let at = at.index(file.len());
            file[at] ^= 1 << (bit % 8);
        }
        let prefix = image.whole_prefix(&files);
        let dir = memory_dir();
        store(dir.path(), &files);
        match Binlog::open(config(dir.path(), file_bytes)) {
            Ok(_) => image.assert_cut(&files, prefix, ""),
            Err(BinlogError::Rot { .. }) => image.assert_rot(&files, prefix as u64 + 1, ""),
            // Several flips in one header.
            Err(BinlogError::NewerFormat { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
