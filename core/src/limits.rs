//! All limits and timeouts in one table, with the reason beside each number.
//!
//! **Invariant:** a limit is the same number on every path (client, wire, log, replication), and
//! it is checked before anything is written.

use std::time::Duration;

use crate::entry::ENTRY_HEADER_BYTES_MAX;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Longest user key or partition key. A key is copied into every index block it starts.
pub const KEY_BYTES_MAX: usize = 64 * KIB;
/// Longest value. Four values fit into one batch, one into any message.
pub const VALUE_BYTES_MAX: usize = 4 * MIB;
/// Largest batch, keys and values together.
pub const BATCH_BYTES_MAX: usize = 16 * MIB;
/// Most operations in one batch: bounds the time that one batch holds a replica's writer.
pub const BATCH_OPS_MAX: usize = 10_000;
/// Bytes after which a scan page stops: bounds a reader's memory.
pub const SCAN_PAGE_BYTES_MAX: usize = MIB;
/// Rows after which a scan page stops, even of tiny rows.
pub const SCAN_PAGE_ROWS_MAX: usize = 10_000;
/// Stored rows after which a scan page ends, even when few or none are returned: deleted rows,
/// expired rows, and rows of other partitions. About a tenth of a second of a reader when all are
/// in memory.
pub const SCAN_PAGE_EXAMINED_MAX: usize = 50_000;
/// Time after which a scan page ends, for rows from a slow disk: readers are few and shared by all
/// requests.
pub const SCAN_PAGE_TIME: Duration = Duration::from_millis(100);
/// Most shards that a keyspace is created with. The formats allow more, growing does not yet: a
/// keyspace created with more could never add a shard.
pub const SHARDS_SERVED_MAX: u32 = 64;
/// Longest keyspace name (it becomes part of an object name).
pub const KEYSPACE_NAME_MAX: usize = 63;
/// Most replicas of a shard.
pub const REPLICAS_MAX: u32 = 7;
/// Longest record: a whole batch of the largest size plus its framing.
pub const RECORD_BYTES_MAX: usize = 24 * MIB;
/// Bytes at which a writer stops adding to a group commit, so that one sync covers a bounded write.
pub const GROUP_BYTES_MAX: usize = 4 * MIB;
/// Operations at which a writer stops adding to a group commit.
pub const GROUP_OPS_MAX: usize = 4_096;
/// Most bytes that an operation takes in a record beside its key and value: the entry's header, two
/// lengths, and the stored result of a read-modify-write with its name.
const OP_FRAMING_BYTES: usize = ENTRY_HEADER_BYTES_MAX + 8 + 64;
// An almost full group takes one more batch, and the record that holds both can still be written.
const _: () = assert!(
    GROUP_BYTES_MAX + BATCH_BYTES_MAX + (GROUP_OPS_MAX + BATCH_OPS_MAX) * OP_FRAMING_BYTES + KIB
        <= RECORD_BYTES_MAX
);
/// Bytes that may wait in one replica's writer queue before backpressure begins.
pub const WRITE_QUEUE_BYTES_MAX: usize = 64 * MIB;
/// Largest gRPC message: a batch plus framing. Ingress limits keep every message below it.
pub const MESSAGE_BYTES_MAX: usize = 32 * MIB;
/// Bytes of requests that one connection may have in flight at a node.
pub const CONNECTION_BYTES_MAX: usize = 64 * MIB;
/// Bytes of requests that all connections of a node may have in flight together.
pub const NODE_REQUEST_BYTES_MAX: usize = 512 * MIB;
/// Bytes of replies that wait for slow readers, over all connections of a node: above it a node
/// begins a request only for a connection that has no reply waiting.
pub const NODE_REPLY_BYTES_MAX: usize = 256 * MIB;
/// Time without taking a reply after which a peer is disconnected while its node is over one of
/// these budgets.
pub const REPLY_STALL_MAX: Duration = Duration::from_secs(10);
/// Unary requests that a node answers at a time: they have no byte budget, and each may be a batch
/// with its reply.
pub const UNARY_REQUESTS_MAX: usize = 64;
/// Default limit of replicas on a node: each is a RocksDB instance with its own files.
pub const NODE_REPLICAS_MAX: usize = 512;
/// Replicas under construction on one node at a time: more would share its disk and network and
/// finish no sooner.
pub const COPIES_PER_NODE_MAX: usize = 4;
/// Replicas that a rebalance moves at a time, unless `master.moves_at_once` says otherwise.
pub const MOVES_AT_ONCE: usize = 4;
/// A node gets no new replicas when less than one part in this many of its disk is free ...
pub const DISK_RESERVE_PART: u64 = 20;
/// ... but this much is enough on any disk: compactions and the log need room of their own.
pub const DISK_RESERVE_BYTES_MAX: u64 = 1024 * MIB as u64;
/// Time after which a target that has begun nothing, although its node is there, is given up.
pub const TARGET_SILENT_MAX: Duration = Duration::from_secs(60);
/// Time away after which a node whose loss was accepted counts as lost; until then data that it
/// alone holds may still be drained.
pub const ACCEPTED_LOSS_AWAY: Duration = Duration::from_secs(15);

/// Time after which a node that is away and has no part in anything is forgotten.
pub const NODE_FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 3_600);
/// Most nodes that can be cordoned, that is kept from getting replicas.
pub const CORDONED_MAX: usize = 1_024;
/// Most tables that a replica keeps open ...
pub const TABLES_OPEN_MAX: usize = 4_096;
/// ... and fewest: with fewer, every read opens a file.
pub const TABLES_OPEN_MIN: usize = 64;
/// A node whose disk has less than a fiftieth free, between these bounds, refuses client writes:
/// the rest is reserved for flushes, compactions and data already written, which would otherwise
/// fail halfway.
pub const DISK_LOW_BYTES_MIN: u64 = 16 * MIB as u64;
/// See [`DISK_LOW_BYTES_MIN`].
pub const DISK_LOW_BYTES_MAX: u64 = 1024 * MIB as u64;
/// Pause between the failure of a replica for lack of disk or descriptors and the first attempt to
/// reopen it; doubled for each further one.
pub const REOPEN_AFTER: Duration = Duration::from_secs(1);
/// Longest such pause, however often the attempt has failed.
pub const REOPEN_AFTER_MAX: Duration = Duration::from_secs(30);
/// Time after which a replica that stays closed for lack of a resource is replaced like any other
/// failed replica.
pub const PASSING_MAX: Duration = Duration::from_secs(60);
/// Size at which a binlog file is closed and a new one begun.
pub const BINLOG_FILE_BYTES: u64 = 64 * MIB as u64;
/// Most bytes of log that a replica keeps. At the cap, cover by the bucket is given up first.
pub const BINLOG_BYTES_MAX: u64 = 4 * 1024 * MIB as u64;
/// Most log in a chunk, unless a single record is longer. A fraction of a second of any link but a
/// slow one, where it takes a minute at a megabit a second; a thousand chunks hold 8 GiB for half a
/// cent.
pub const CHUNK_BYTES_MAX: usize = 8 * MIB;
/// Least log in a chunk when there is more to ship, even after failed attempts.
pub const CHUNK_BYTES_MIN: usize = 256 * KIB;
/// Memory of all chunks that a node ships at the same time ...
pub const LOG_MEMORY_MAX: u64 = 32 * MIB as u64;
/// ... and of all checkpoint files: the largest that is uploaded in one request.
pub const UPLOAD_MEMORY_MAX: u64 = 64 * MIB as u64;
/// Log size since the last checkpoint above which the next one is due: bounds the replay.
pub const CHECKPOINT_LOG_BYTES: u64 = 512 * MIB as u64;
/// Replay time of the log since the last checkpoint above which the next one is due.
pub const REPLAY_MAX: Duration = Duration::from_secs(60);
/// Age of its first uploaded file at which a checkpoint starts over: garbage collection does not
/// know of it yet, and deletes objects that are older than a day and named by nothing.
pub const UPLOAD_STALL_MAX: Duration = Duration::from_secs(12 * 3_600);
/// Age up to which an SST that no manifest names may belong to a checkpoint that is being uploaded:
/// an hour more than the upload may take.
pub const UNNAMED_AGE_MIN: Duration = Duration::from_secs(13 * 3_600);

/// Time after which a write that waits for the bucket's acknowledgement is `Unknown`.
pub const BUCKET_ACK_TIMEOUT: Duration = Duration::from_secs(8);

/// Delay before a replica that ships in place of the preferred primary begins with a checkpoint,
/// which uploads everything; none if a request waits for the bucket. Continuing behind the existing
/// archive needs no checkpoint.
pub const SHIP_INSTEAD_AFTER: Duration = Duration::from_secs(300);
/// Least log, in time, that a replica keeps while it does not ship (three ship intervals where that
/// is longer), so that it can continue where the preferred primary stopped.
pub const LOG_KEPT_FOR_SHIPPING: Duration = Duration::from_secs(60);
/// Most bytes of another replica's log that are read from the bucket to find where to continue
/// behind it.
pub const SHIPPED_READ_BYTES_MAX: u64 = 256 * MIB as u64;

/// A commit time further ahead than this of the time at which the bucket had its record shows a
/// clock that was ahead: a point-in-time restore does not rely on it. The usual difference between
/// good clocks is less.
pub const CLOCK_AHEAD_TRUSTED: Duration = Duration::from_secs(5);
/// Event times further ahead of the clock than this are refused when a client sends them.
pub const MAX_CLOCK_AHEAD: Duration = Duration::from_secs(60);
/// Longest time to live, of a value and of a keyspace's default: a thousand years, far from any
/// overflow of the clock.
pub const TTL_MS_MAX: u64 = 1_000 * 365 * 86_400_000;
/// Longest quarantine and longest tombstone grace: ten years.
pub const KEPT_MS_MAX: u64 = 10 * 365 * 86_400_000;
/// Minimum time for which tombstones are kept before collection may drop them.
pub const TOMBSTONE_GRACE: Duration = Duration::from_secs(24 * 3600);
/// Time for which a moved range stays on its old shard, unserved, before it is removed.
pub const QUARANTINE: Duration = Duration::from_secs(24 * 3600);
/// Silence of its stream after which a node counts as dead.
pub const NODE_SILENCE: Duration = Duration::from_secs(10);
/// Least bound of the bulk bytes of an operation, bytes a second.
pub const BULK_RATE_MIN: u64 = 1 << 10;
/// Bytes a second that requests always leave to each lane of bulk work of a node: a change ends,
/// however slow they are.
pub const BULK_YIELD_RATE_MIN: u64 = 1 << 20;
/// Interval of a node's reports to the master when nothing changes.
pub const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// HTTP/2 keepalive interval: finds half-open connections in seconds instead of 15 minutes.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Time without an answer to a keepalive after which the connection is closed.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout of connecting to a server.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Deadline of one data operation, retries included, unless the caller sets another.
pub const OPERATION_DEADLINE: Duration = Duration::from_secs(10);
/// Deadline of one administrative call that does not wait for an operation.
pub const ADMIN_DEADLINE: Duration = Duration::from_secs(30);
/// Time for which a node that is behind a request's epoch waits for the topology.
pub const EPOCH_WAIT: Duration = Duration::from_secs(1);
/// Time for which reads of a sealed range continue without a report of the outcome.
pub const SEALED_READS: Duration = Duration::from_secs(2);
/// Time for which writes to a sealed range wait for the outcome before they are returned for a
/// retry.
pub const SEALED_WRITES_WAIT: Duration = Duration::from_secs(3);
/// Time within which the `sealing` version must be written, else the bucket is too slow to seal
/// now: the commit, which writers wait for, would take as long. 300 ms for a request
/// is usual for some. A plan whose seals were undone waits longer, see
/// [`crate::reconcile::sealing_write_max`] ...
pub const SEALING_WRITE_MAX: Duration = Duration::from_secs(1);
/// ... and in the end for this long: less than [`SEALED_WRITES_WAIT`], so that the writers that wait
/// meanwhile are sent on by the commit, and [`SEALED_READS`] at most.
pub const SEALING_WRITE_MAX_LAST: Duration = Duration::from_secs(2);
const _: () = assert!(SEALING_WRITE_MAX_LAST.as_millis() < SEALED_WRITES_WAIT.as_millis());
const _: () = assert!(SEALING_WRITE_MAX_LAST.as_millis() <= SEALED_READS.as_millis());
/// Time within which all sources must have sealed and all targets caught up, else the plan unseals;
/// counted from the moment at which the nodes are told to seal.
pub const SEAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Time after which the nodes of a plan look for themselves whether a seal was decided, and those
/// that are sealed undo it. Longer than a master needs to decide, also at a bucket that takes 300 ms
/// for each request: until [`SEAL_TIMEOUT`], then a write and a read. Shorter than writes wait, so
/// that those which waited go on.
pub const SEAL_UNDECIDED: Duration = Duration::from_secs(2);
/// Pause after a node looked in vain for the decision of a seal, and the longest: each pause is
/// twice as long as the one before.
pub const SEAL_LOOK_AGAIN: (Duration, Duration) =
    (Duration::from_millis(500), Duration::from_secs(5));
const _: () = assert!(SEAL_TIMEOUT.as_millis() + 2 * 300 < SEAL_UNDECIDED.as_millis());
const _: () = assert!(SEAL_UNDECIDED.as_millis() < SEALED_WRITES_WAIT.as_millis());
/// Greatest lag at which a tail is close enough to seal, in records, of a source that does not tell
/// bytes; and of a follower that is close enough to take over.
pub const TAIL_LAG_LSNS_MAX: u64 = 64;
/// Greatest lag at which the tails of a target are close enough to seal, in bytes of log for each
/// of its sources: half a frame, which is some milliseconds of work.
pub const TAIL_LAG_BYTES_MAX: u64 = 512 * KIB as u64;
/// Bytes of log that a tail may be behind without writers being slowed down for it: less than one
/// frame is sent at once.
pub const TAIL_BACKLOG_BYTES: u64 = MIB as u64;
/// Longest time for which a write of a moving key is held back so that a tail catches up: shorter
/// than [`ATTEMPT_PATIENCE`], after which a write by choice has gone to another replica.
pub const THROTTLED_WRITE_MAX: Duration = Duration::from_millis(500);
const _: () = assert!(THROTTLED_WRITE_MAX.as_millis() * 2 <= ATTEMPT_PATIENCE.as_millis());
/// Least rate to which the writers of moving keys are slowed down, bytes of keys and values a
/// second.
pub const THROTTLED_BYTES_PER_S_MIN: u64 = 256 * KIB as u64;
/// Deadline of a whole SIGTERM shutdown: drain, then exit.
pub const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);
/// Time into a stop of the master after which its remaining connections are closed: all requests
/// have been answered, and a silent peer must not delay the stop.
pub const MASTER_DRAIN: Duration = Duration::from_secs(1);
/// Interval of the background sync of log that was acknowledged as `os`.
pub const OS_SYNC_INTERVAL: Duration = Duration::from_millis(200);
/// The same while another shard reads the log: only what is synced is streamed, and what is not when
/// a source seals lengthens the pause of its writers.
pub const TAILED_SYNC_INTERVAL: Duration = Duration::from_millis(40);
/// Time for which an opened replica waits for its peers to report what they hold; silent peers are
/// skipped.
pub const CATCH_UP_PATIENCE: Duration = Duration::from_secs(2);
/// Time without an answer after which an attempt is repeated at another replica.
pub const ATTEMPT_PATIENCE: Duration = Duration::from_secs(1);
/// Interval between two heartbeats of a lease link.
pub const LEASE_BEAT: Duration = Duration::from_millis(100);
/// Time for which a replica believes in a peer's promise after it SENT the heartbeat that was
/// echoed.
pub const LEASE_BELIEF: Duration = Duration::from_millis(700);
/// Time for which a replica keeps its promise after it RECEIVED the last heartbeat: longer than the
/// holder believes in it, even when the two clocks run a few percent apart, and below
/// [`ATTEMPT_PATIENCE`], so that a client that gave up on a silent primary finds its successor
/// free.
pub const LEASE_PROMISE: Duration = Duration::from_millis(850);
/// Silence after which a peer is excused, provided that this node itself was running.
pub const LEASE_SILENCE: Duration = Duration::from_millis(600);
/// Time without scheduling of its own threads after which a node counts as not having listened: the
/// silence of others is counted from then on.
pub const LEASE_DEAF_GAP: Duration = Duration::from_millis(250);
/// Time for which a peer that reports its replica as not open is waited for before it is excused.
pub const LEASE_OPENING: Duration = Duration::from_secs(2);
/// Time for which the master's report on a node is believed after the question was sent: by then a
/// node that comes back may take over from a silent one.
pub const MASTER_WORD: Duration = Duration::from_millis(550);
/// Time for which a peer is excused, from the beginning of the attempt to connect on which the
/// excuse rests.
pub const LEASE_EXCUSE: Duration = Duration::from_millis(550);
/// Time for which a strict request waits at a replica that is about to have authority.
pub const AUTHORITY_WAIT: Duration = Duration::from_secs(1);
/// Time for which a write that is done but may not be acknowledged waits for authority before its
/// outcome is unknown.
pub const HELD_ACK_MAX: Duration = Duration::from_secs(5);
/// Shortest and longest timeout of a probe, which connects to a silent peer to find out whether
/// this node is the isolated one. In between, the timeout is four times as long as connecting to
/// the peer took before.
pub const PROBE_TIMEOUT: (Duration, Duration) =
    (Duration::from_millis(50), Duration::from_millis(500));
/// Time at its disk after which a writer is stalled: another replica serves in its place.
pub const WRITER_STALL: Duration = Duration::from_secs(2);
/// Time that a once stalled writer must run before its replica takes its place back.
pub const WRITER_RECOVERED: Duration = Duration::from_secs(10);
/// Time after which a replica that serves in place of the primary becomes primary.
pub const ACTING_PRIMARY_AFTER: Duration = Duration::from_millis(500);
const _: () = assert!(LEASE_EXCUSE.as_millis() < LEASE_SILENCE.as_millis());
const _: () = assert!(MASTER_WORD.as_millis() < LEASE_SILENCE.as_millis());
const _: () = assert!(LEASE_BELIEF.as_millis() * 11 / 10 < LEASE_PROMISE.as_millis());
const _: () =
    assert!(LEASE_PROMISE.as_millis() + LEASE_BEAT.as_millis() < ATTEMPT_PATIENCE.as_millis());
/// Time for which a write that needs another replica's sync waits for it before its outcome is
/// unknown.
pub const REPLICA_ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// Time away after which a primary is replaced by the next replica: long enough for a process that
/// restarts at once, short enough for read-modify-writes to wait.
pub const FAILOVER_AWAY: Duration = Duration::from_millis(500);
/// Time after which a leadership transfer that has not ended is undone.
pub const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for which results of read-modify-writes are kept for retries.
pub const RESULTS_KEPT: Duration = Duration::from_secs(600);
/// Most of these results that are kept for each replica.
pub const RESULTS_MAX: usize = 100_000;
/// Bytes of records in one replication frame; at most four frames wait for a slow follower.
pub const PULL_FRAME_BYTES: usize = MIB;
/// Data connections that a node accepts; each may hold [`CONNECTION_BYTES_MAX`].
pub const CONNECTIONS_MAX: usize = 4_096;
/// Connections that a master accepts: one session per node and a few of each client.
pub const MASTER_CONNECTIONS_MAX: usize = 8_192;
/// Time after which a peer that connects to a server and sends nothing is disconnected.
pub const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a connection could not be accepted, for lack of descriptors for example.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Returns how much of a disk of this size stays free.
pub fn disk_reserve(bytes: u64) -> u64 {
    (bytes / DISK_RESERVE_PART).min(DISK_RESERVE_BYTES_MAX)
}

/// The limit that was exceeded, and by how much.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// The empty key.
    #[error("the key is empty; a key has 1 to {KEY_BYTES_MAX} bytes")]
    EmptyKey,
    /// See [`KEY_BYTES_MAX`].
    #[error("the key has {0} bytes, over the limit of {KEY_BYTES_MAX}; use a shorter key")]
    KeyTooLong(usize),
    /// See [`VALUE_BYTES_MAX`].
    #[error(
        "the value has {0} bytes, over the limit of {VALUE_BYTES_MAX}; split it over several keys"
    )]
    ValueTooLong(usize),
    /// See [`BATCH_BYTES_MAX`].
    #[error("the batch has {0} bytes, over the limit of {BATCH_BYTES_MAX}; send it in parts")]
    BatchTooLong(usize),
    /// See [`BATCH_OPS_MAX`].
    #[error("the batch has {0} operations, over the limit of {BATCH_OPS_MAX}; send it in parts")]
    BatchTooMany(usize),
    /// See [`MAX_CLOCK_AHEAD`].
    #[error("the event time {event_time} is more than {} s ahead of the clock; is it in microseconds since 1970?", MAX_CLOCK_AHEAD.as_secs())]
    EventTimeAhead {
        /// Event time that the caller gave, microseconds.
        event_time: u64,
    },
    /// Event time 0, which is reserved.
    #[error("the event time 0 is reserved; leave it out to have the time stamped by the server")]
    EventTimeZero,
    /// A TTL of zero, or above [`TTL_MS_MAX`].
    #[error("the time to live of {0} s is not usable; it must be at least 1 ms and at most {days} days", days = TTL_MS_MAX / 86_400_000)]
    BadTtl(u64),
}

/// Checks a user key or partition key.
pub fn check_key(key: &[u8]) -> Result<(), LimitError> {
    match key.len() {
        0 => Err(LimitError::EmptyKey),
        n if n > KEY_BYTES_MAX => Err(LimitError::KeyTooLong(n)),
        _ => Ok(()),
    }
}

/// Checks a value.
pub fn check_value(value: &[u8]) -> Result<(), LimitError> {
    if value.len() > VALUE_BYTES_MAX { Err(LimitError::ValueTooLong(value.len())) } else { Ok(()) }
}

/// Checks a time to live.
pub fn check_ttl_ms(ttl_ms: u64) -> Result<(), LimitError> {
    if ttl_ms == 0 || ttl_ms > TTL_MS_MAX {
        Err(LimitError::BadTtl(ttl_ms / 1_000))
    } else {
        Ok(())
    }
}

/// Checks an event time that a client gave against the clock.
pub fn check_event_time(event_time: u64, now_us: u64) -> Result<(), LimitError> {
    if event_time == 0 {
        Err(LimitError::EventTimeZero)
    } else if event_time > now_us.saturating_add(MAX_CLOCK_AHEAD.as_micros() as u64) {
        Err(LimitError::EventTimeAhead { event_time })
    } else {
        Ok(())
    }
}

/// Error for a refused keyspace name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a keyspace name: use a letter a-z first, then a-z, 0-9, _ or -, at most {KEYSPACE_NAME_MAX} characters"
)]
pub struct BadKeyspaceName(pub String);

/// Checks a keyspace name: `^[a-z][a-z0-9_-]{0,62}$`.
pub fn check_keyspace_name(name: &str) -> Result<(), BadKeyspaceName> {
    let mut chars = name.bytes();
    let good = chars.next().is_some_and(|c| c.is_ascii_lowercase())
        && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_' || c == b'-')
        && name.len() <= KEYSPACE_NAME_MAX;
    if good { Ok(()) } else { Err(BadKeyspaceName(name.chars().take(80).collect())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_place_are_refused() {
        for good in ["a", "ks1", "a_b-c9", &"a".repeat(63)] {
            assert!(check_keyspace_name(good).is_ok(), "{good}");
        }
        for bad in
            ["", "A", "1a", "..", "a/b", "a.b", "a b", "ä", "a\0", &"a".repeat(64), "-a", "_a"]
        {
            assert!(check_keyspace_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_values_and_event_times_at_the_boundary() {
        assert!(check_key(&vec![0; KEY_BYTES_MAX]).is_ok());
        assert_eq!(
            check_key(&vec![0; KEY_BYTES_MAX + 1]),
            Err(LimitError::KeyTooLong(KEY_BYTES_MAX + 1))
        );
        assert_eq!(check_key(b""), Err(LimitError::EmptyKey));
        assert!(check_value(&vec![0; VALUE_BYTES_MAX]).is_ok());
        assert!(check_value(&vec![0; VALUE_BYTES_MAX + 1]).is_err());
        let now = 1_000_000_000;
        assert!(check_event_time(now + 60_000_000, now).is_ok());
        assert!(check_event_time(now + 60_000_001, now).is_err());
        assert!(check_event_time(u64::MAX, now).is_err());
        assert_eq!(check_event_time(0, now), Err(LimitError::EventTimeZero));
        assert!(check_ttl_ms(1).is_ok() && check_ttl_ms(TTL_MS_MAX).is_ok());
        assert_eq!(check_ttl_ms(0), Err(LimitError::BadTtl(0)));
        let too_long = check_ttl_ms(TTL_MS_MAX + 1).unwrap_err().to_string();
        assert!(too_long.contains("at most 365000 days"), "{too_long}");
    }
}
