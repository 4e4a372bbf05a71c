//! A log in use: appending, rotation, reading beside the writer, truncation, failures.
//! Crashes and damage: see `damage`.

#![allow(clippy::unwrap_used)]

mod damage;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vasto_core::record::{Body, FILE_HEADER_BYTES, KeyEntry, Record, frame_at};
use vasto_core::{Epoch, Origin, OwnSeq};
use vasto_testkit::memory_dir;

use super::*;

fn config(dir: &Path, file_bytes: u64) -> BinlogConfig {
    BinlogConfig {
        dir: dir.to_owned(),
        keyspace: KeyspaceId(7),
        shard: ShardId(3),
        replica: ReplicaId(11),
        file_bytes,
    }
}

/// A record with `value_bytes` bytes of data that differ from record to record.
fn record(lsn: Lsn, synced_lsn: Lsn, value_bytes: usize) -> Vec<u8> {
    let value = (0..value_bytes).map(|at| (lsn.0 as usize * 31 + at * 7) as u8 | 1).collect();
    record_of(lsn, synced_lsn, value)
}

fn record_of(lsn: Lsn, synced_lsn: Lsn, value: Vec<u8>) -> Vec<u8> {
    let entries = vec![KeyEntry { key: lsn.0.to_be_bytes().to_vec(), entry: value }];
    let origin = Origin { replica: ReplicaId(11), incarnation: Incarnation(1) };
    let body = Body::data(entries);
    let commit_time = 1_000_000 + lsn.0;
    Record {
        lsn,
        synced_lsn,
        commit_time,
        floor: 0,
        epoch: Epoch(1),
        origin,
        own_seq: OwnSeq(lsn.0),
        body,
    }
    .encode()
}

/// Appends the next record with the synced LSN of the moment; answers with its bytes.
fn append_next(log: &mut Binlog, value_bytes: usize) -> Vec<u8> {
    let lsn = log.last_lsn().next();
    let bytes = record(lsn, log.shared().synced_lsn(), value_bytes);
    log.append(lsn, &bytes).unwrap();
    bytes
}

/// Everything after `after` that is synced, by batches of about `bytes_max`.
fn read_all(log: &Binlog, after: Lsn, bytes_max: usize) -> Vec<Vec<u8>> {
    let mut reader = log.shared().reader(after).unwrap();
    let mut all = Vec::new();
    loop {
        let batch = reader.next_batch(bytes_max).unwrap();
        if batch.is_empty() {
            return all;
        }
        for (lsn, bytes) in batch {
            assert_eq!(lsn.0, after.0 + all.len() as u64 + 1);
            all.push(bytes);
        }
        assert_eq!(reader.position().0, after.0 + all.len() as u64);
    }
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_empty_directory_is_an_empty_log_and_stays_empty() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(&dir.path().join("made"), 1000)).unwrap();
    assert_eq!((log.last_lsn(), log.sync().unwrap()), (Lsn(0), Lsn(0)));
    let shared = log.shared();
    assert_eq!((shared.first_lsn(), shared.bytes(), shared.bytes_after(Lsn(0))), (Lsn(1), 0, 0));
    assert_eq!(shared.truncate_to(Lsn(9)).unwrap(), 0);
    assert!(read_all(&log, Lsn(0), 1).is_empty());
    assert!(files(&dir.path().join("made")).is_empty());
}

#[test]
fn appends_rotates_reopens_and_reads_back() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 2000)).unwrap();
    log.set_incarnation(Incarnation(5));
    let mut written: Vec<_> = (0..50).map(|n| append_next(&mut log, n * 13)).collect();
    assert_eq!(log.last_lsn(), Lsn(50));
    let before_sync = log.shared().synced_lsn();
    assert!(before_sync < Lsn(50) && before_sync > Lsn(0), "rotation syncs, appending does not");
    assert_eq!(
        read_all(&log, Lsn(0), 500),
        written[..before_sync.0 as usize],
        "only what is synced is read"
    );
    assert_eq!(log.sync().unwrap(), Lsn(50));
    assert_eq!(read_all(&log, Lsn(0), 500), written);

    for name in files(dir.path()) {
        let bytes = std::fs::read(dir.path().join(&name)).unwrap();
        let header = FileHeader::decode(&bytes).unwrap();
        assert_eq!(name, format!("{:020}.log", header.first_lsn.0));
        assert_eq!(header.incarnation, Incarnation(5));
        let one_record =
            frame_at(&bytes[FILE_HEADER_BYTES..]).unwrap() + FILE_HEADER_BYTES == bytes.len();
        assert!(bytes.len() <= 2000 || one_record, "{name} has {} bytes", bytes.len());
    }
    drop(log);
    let mut log = Binlog::open(config(dir.path(), 2000)).unwrap();
    assert_eq!(
        (log.last_lsn(), log.shared().synced_lsn(), log.shared().first_lsn()),
        (Lsn(50), Lsn(50), Lsn(1))
    );
    written.push(append_next(&mut log, 5));
    log.sync().unwrap();
    for after in 0..=51 {
        for bytes_max in [0, 300, 1 << 20] {
            assert_eq!(read_all(&log, Lsn(after), bytes_max), written[after as usize..]);
        }
    }
}

#[test]
fn a_record_larger_than_a_file_has_its_own() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 100)).unwrap();
    let written: Vec<_> = (0..3).map(|_| append_next(&mut log, 5000)).collect();
    log.sync().unwrap();
    assert_eq!(files(dir.path()).len(), 3);
    assert_eq!(read_all(&log, Lsn(0), 1), written);
}

#[test]
fn batches_keep_to_their_size() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 1 << 30)).unwrap();
    let written: Vec<_> = (0..2000).map(|n| append_next(&mut log, n % 3000)).collect();
    log.sync().unwrap();
    let mut reader = log.shared().reader(Lsn(0)).unwrap();
    let mut at = 0;
    while at < written.len() {
        let batch = reader.next_batch(10_000).unwrap();
        let bytes: usize = batch.iter().map(|(_, record)| record.len()).sum();
        assert!(bytes <= 10_000, "a batch of {bytes} bytes");
        let left: usize = written[at..].iter().map(Vec::len).sum();
        assert!(bytes > 6_000 || bytes == left, "a batch of {bytes} bytes");
        at += batch.len();
    }
    // Every start is found through the sparse index.
    for after in (0..2000).step_by(97) {
        let mut reader = log.shared().reader(Lsn(after)).unwrap();
        assert_eq!(
            reader.next_batch(1).unwrap(),
            [(Lsn(after + 1), written[after as usize].clone())]
        );
        let exact: u64 = written[after as usize..].iter().map(|r| r.len() as u64).sum();
        let about = log.shared().bytes_after(Lsn(after));
        assert!(about >= exact && about < exact + (256 << 10) + 4000, "{about} for {exact}");
    }
    assert_eq!(log.shared().bytes_after(Lsn(2000)) / (300 << 10), 0);
}

#[test]
fn readers_and_syncers_beside_the_writer_see_every_record_once() {
    const RECORDS: u64 = 20_000;
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 16 << 10)).unwrap();
    let (shared, done) = (log.shared(), AtomicBool::new(false));
    std::thread::scope(|threads| {
        for bytes_max in [1, 5000] {
            let mut reader = shared.reader(Lsn(0)).unwrap();
            let shared = &shared;
            threads.spawn(move || {
                let (mut next, mut moved) = (Lsn(1), Instant::now());
                while next.0 <= RECORDS {
                    let batch = reader.next_batch(bytes_max).unwrap();
                    if batch.is_empty() {
                        assert!(moved.elapsed() < Duration::from_secs(60), "stuck at {next}");
                        std::thread::yield_now();
                        continue;
                    }
                    for (lsn, bytes) in batch {
                        let read = Record::decode(&bytes).unwrap();
                        assert_eq!((lsn, read.lsn, read.own_seq.0), (next, next, next.0));
                        assert!(lsn <= shared.synced_lsn() && read.synced_lsn < lsn);
                        next = next.next();
                    }
                    moved = Instant::now();
                }
            });
        }
        threads.spawn(|| {
            let mut before = Lsn(0);
            while !done.load(Ordering::Relaxed) {
                let appended = shared.appended_lsn();
                let synced = shared.sync_appended().unwrap();
                assert!(synced >= appended && synced >= before && synced <= shared.appended_lsn());
                before = synced;
                std::thread::yield_now();
            }
        });
        for n in 0..RECORDS {
            append_next(&mut log, (n % 301) as usize);
            if n % 7 == 0 {
                log.sync().unwrap();
            }
        }
        assert_eq!(log.sync().unwrap(), Lsn(RECORDS));
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(*shared.subscribe().borrow(), Lsn(RECORDS));
}

#[test]
fn truncation_keeps_the_active_file_and_readers_of_removed_files_finish() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 1000)).unwrap();
    let written: Vec<_> = (0..30).map(|_| append_next(&mut log, 200)).collect();
    log.sync().unwrap();
    let shared = log.shared();
    let starts: Vec<u64> =
        files(dir.path()).iter().map(|name| name[..20].parse().unwrap()).collect();
    assert!(starts.len() > 5);

    // Nothing goes while its file holds a record that is still wanted.
    assert_eq!(shared.truncate_to(Lsn(starts[1] - 2)).unwrap(), 0);
    let mut slow = shared.reader(Lsn(0)).unwrap();
    assert_eq!(slow.next_batch(1).unwrap()[0].0, Lsn(1));
    let mut not_started = shared.reader(Lsn(0)).unwrap();
    let before = shared.bytes();
    let freed = shared.truncate_to(Lsn(starts[1] - 1)).unwrap();
    assert!(freed > 0);
    assert_eq!((shared.bytes(), shared.first_lsn()), (before - freed, Lsn(starts[1])));

    // It goes on through the removed file and over its end into the next.
    let mut read = vec![written[0].clone()];
    while read.len() < written.len() {
        read.extend(slow.next_batch(1).unwrap().into_iter().map(|(_, bytes)| bytes));
    }
    assert_eq!(read, written);
    assert!(slow.next_batch(1).unwrap().is_empty());
    let first = Lsn(starts[1]);
    let too_old = |error| matches!(error, BinlogError::TooOld { asked, first: f } if asked < first && f == first);
    assert!(too_old(not_started.next_batch(1).unwrap_err()));
    assert!(too_old(shared.reader(Lsn(starts[1] - 2)).unwrap_err()));
    assert_eq!(read_all(&log, Lsn(starts[1] - 1), 1), written[starts[1] as usize - 1..]);

    // Two files removed under a reader: it finishes the first and is told about the second.
    let mut slow = shared.reader(Lsn(starts[1] - 1)).unwrap();
    slow.next_batch(1).unwrap();
    shared.truncate_to(Lsn(starts[3] - 1)).unwrap();
    let last = loop {
        match slow.next_batch(1) {
            Ok(batch) => assert_eq!(batch.len(), 1),
            Err(error) => break error,
        }
    };
    assert_eq!(slow.position(), Lsn(starts[2] - 1));
    assert!(
        matches!(last, BinlogError::TooOld { asked, first } if asked.0 == starts[2] && first.0 == starts[3])
    );

    // The active file stays, whatever is asked, and the log goes on after it.
    shared.truncate_to(Lsn(u64::MAX)).unwrap();
    assert_eq!(files(dir.path()).len(), 1);
    assert_eq!(shared.first_lsn().0, *starts.last().unwrap());
    (0..30).for_each(|_| drop(append_next(&mut log, 200)));
    log.sync().unwrap();
    let kept = files(dir.path()).len();
    drop(log);
    // A truncation that comes late meets no log that may be open again.
    assert_eq!((shared.truncate_to(Lsn(u64::MAX)).unwrap(), files(dir.path()).len()), (0, kept));
    let mut log = Binlog::open(config(dir.path(), 1000)).unwrap();
    assert_eq!((log.last_lsn(), log.shared().first_lsn().0), (Lsn(60), *starts.last().unwrap()));
    append_next(&mut log, 1);
}

#[test]
fn a_reader_ahead_of_the_log_is_refused() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 1000)).unwrap();
    append_next(&mut log, 1);
    assert!(log.shared().reader(Lsn(1)).unwrap().next_batch(1).unwrap().is_empty());
    let error = log.shared().reader(Lsn(2)).unwrap_err();
    assert!(matches!(error, BinlogError::Ahead { after: Lsn(2), last: Lsn(1) }));
}

#[test]
fn a_damaged_record_is_never_returned_to_a_reader() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 1 << 20)).unwrap();
    let written: Vec<_> = (0..5).map(|_| append_next(&mut log, 100)).collect();
    log.sync().unwrap();
    let path = file::path(dir.path(), Lsn(1));
    let mut bytes = std::fs::read(&path).unwrap();
    let third = FILE_HEADER_BYTES + written[0].len() + written[1].len();
    bytes[third + 90] ^= 4;
    std::fs::write(&path, &bytes).unwrap();
    let mut reader = log.shared().reader(Lsn(0)).unwrap();
    assert_eq!(reader.next_batch(written[0].len() * 2).unwrap().len(), 2);
    for _ in 0..2 {
        let error = reader.next_batch(1).unwrap_err();
        assert!(
            matches!(error, BinlogError::Rot { lsn: Lsn(3), offset, .. } if offset == third as u64)
        );
        assert_eq!(reader.position(), Lsn(2));
    }
}

#[test]
fn what_is_not_synced_is_not_read() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 1 << 20)).unwrap();
    let mut written: Vec<_> = (0..3).map(|_| append_next(&mut log, 100)).collect();
    log.sync().unwrap();
    written.extend((0..2).map(|_| append_next(&mut log, 100)));
    let mut reader = log.shared().reader(Lsn(0)).unwrap();
    assert_eq!(reader.next_batch(1 << 20).unwrap().len(), 3);
    assert!(reader.next_batch(1 << 20).unwrap().is_empty());
    log.sync().unwrap();
    let rest: Vec<_> =
        reader.next_batch(1 << 20).unwrap().into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(rest, written[3..]);
}

#[test]
fn a_file_without_records_takes_the_next_one() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 1000)).unwrap();
    append_next(&mut log, 1);
    drop(log);
    let path = file::path(dir.path(), Lsn(1));
    File::options().write(true).open(&path).unwrap().set_len(FILE_HEADER_BYTES as u64).unwrap();
    let mut log = Binlog::open(config(dir.path(), 1000)).unwrap();
    let shared = log.shared();
    assert_eq!((log.last_lsn(), shared.synced_lsn(), shared.first_lsn()), (Lsn(0), Lsn(0), Lsn(1)));
    let mut reader = shared.reader(Lsn(0)).unwrap();
    assert!(reader.next_batch(1).unwrap().is_empty());
    append_next(&mut log, 1);
    log.sync().unwrap();
    assert_eq!(reader.next_batch(1).unwrap()[0].0, Lsn(1));
    assert_eq!(files(dir.path()), ["00000000000000000001.log"]);
    drop(log);
    assert_eq!(Binlog::open(config(dir.path(), 1000)).unwrap().last_lsn(), Lsn(1));
}

#[test]
#[should_panic(expected = "without gaps")]
fn a_gap_is_not_appended() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 1000)).unwrap();
    let _ = log.append(Lsn(2), &record(Lsn(2), Lsn(0), 1));
}

/// Every further call fails, and says why.
fn assert_poisoned(log: &mut Binlog, reason: &str, synced: Lsn) {
    let shared = log.shared();
    let next = log.last_lsn().next();
    let results = [
        log.append(next, &record(next, Lsn(0), 1)),
        log.sync().map(drop),
        shared.sync_appended().map(drop),
    ];
    for result in results {
        let Err(BinlogError::Poisoned { reason: named }) = result else {
            panic!("not refused: {result:?}")
        };
        assert!(named.contains(reason), "{named}");
    }
    assert_eq!((shared.synced_lsn(), *shared.subscribe().borrow()), (synced, synced));
    assert!(shared.failed().unwrap().contains(reason));
}

#[test]
fn a_failed_append_poisons_the_log() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 1 << 20)).unwrap();
    append_next(&mut log, 1);
    log.sync().unwrap();
    append_next(&mut log, 1);
    log.replace_active(File::options().write(true).open("/dev/full").unwrap());
    let error = log.append(Lsn(3), &record(Lsn(3), Lsn(0), 1)).unwrap_err();
    assert!(
        matches!(&error, BinlogError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
    );
    assert_eq!(log.last_lsn(), Lsn(2));
    assert_poisoned(&mut log, "append", Lsn(1));
    drop(log);
    assert_eq!(Binlog::open(config(dir.path(), 1 << 20)).unwrap().last_lsn(), Lsn(2));
}

#[test]
fn a_failed_sync_poisons_the_log_and_a_later_good_one_is_not_tried() {
    let dir = memory_dir();
    for from_another_thread in [false, true] {
        let mut log =
            Binlog::open(config(&dir.path().join(from_another_thread.to_string()), 1 << 20))
                .unwrap();
        append_next(&mut log, 1);
        log.sync().unwrap();
        append_next(&mut log, 1);
        let good = log.active.as_ref().unwrap().file.try_clone().unwrap();
        // A device without syncing: fdatasync answers EINVAL.
        log.replace_active(File::options().write(true).open("/dev/full").unwrap());
        let shared = log.shared();
        let result = if from_another_thread {
            std::thread::spawn(move || shared.sync_appended()).join().unwrap()
        } else {
            log.sync()
        };
        assert!(matches!(result, Err(BinlogError::Io { action: "sync", .. })), "{result:?}");
        log.replace_active(good);
        assert_poisoned(&mut log, "sync", Lsn(1));
    }
}

#[test]
fn a_failed_rotation_poisons_the_log() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 100)).unwrap();
    append_next(&mut log, 100);
    std::fs::create_dir(file::path(dir.path(), Lsn(2))).unwrap();
    let error = log.append(Lsn(2), &record(Lsn(2), Lsn(0), 1)).unwrap_err();
    assert!(matches!(error, BinlogError::Io { action: "create", .. }), "{error}");
    assert_poisoned(&mut log, "create", Lsn(1));
}

#[test]
fn a_file_that_cannot_be_removed_stays_in_the_log() {
    let dir = memory_dir();
    let mut log = Binlog::open(config(dir.path(), 100)).unwrap();
    (0..4).for_each(|_| drop(append_next(&mut log, 100)));
    log.sync().unwrap();
    let (second, away) = (file::path(dir.path(), Lsn(2)), dir.path().join("away"));
    std::fs::rename(&second, &away).unwrap();
    std::fs::create_dir(&second).unwrap();
    assert!(matches!(
        log.shared().truncate_to(Lsn(3)),
        Err(BinlogError::Io { action: "remove", .. })
    ));
    assert_eq!(log.shared().first_lsn(), Lsn(2));
    std::fs::remove_dir(&second).unwrap();
    std::fs::rename(&away, &second).unwrap();
    assert_eq!(read_all(&log, Lsn(1), 1).len(), 3);
    log.shared().truncate_to(Lsn(3)).unwrap();
    assert_eq!(log.shared().first_lsn(), Lsn(4));
}
