//! All caps and time-outs, in one table, with the reason beside the number.
//!
//! **Invariant:** a limit is the same number on every path (client, wire, log, replication), and
//! it is checked before anything is written.

use std::time::Duration;

use crate::entry::ENTRY_HEADER_BYTES_MAX;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Longest user key or partition key. A key is copied into every index block it starts.
pub const KEY_BYTES_MAX: usize = 64 * KIB;
/// Longest value. Four of them fit into one batch, one into any message.
pub const VALUE_BYTES_MAX: usize = 4 * MIB;
/// Largest batch, keys and values together.
pub const BATCH_BYTES_MAX: usize = 16 * MIB;
/// Most operations in one batch: bounds the time that one batch holds a replica's writer.
pub const BATCH_OPS_MAX: usize = 10_000;
/// A scan page stops after this many bytes: a reader's memory is bounded by it.
pub const SCAN_PAGE_BYTES_MAX: usize = MIB;
/// A scan page stops after this many rows, also of tiny ones.
pub const SCAN_PAGE_ROWS_MAX: usize = 10_000;
/// A scan page ends after this many stored rows, also when it shows few of them or none: deleted,
/// expired, and of other partitions. About a tenth of a second of a reader when all are in memory.
pub const SCAN_PAGE_EXAMINED_MAX: usize = 50_000;
/// And after this time, when they come from a slow disk: readers are few, and everybody's.
pub const SCAN_PAGE_TIME: Duration = Duration::from_millis(100);
/// Most shards that a keyspace is created with. The formats reach further, and growing does not yet: who
/// began with more could never add one.
pub const SHARDS_SERVED_MAX: u32 = 64;
/// Longest keyspace name (it becomes part of an object name).
pub const KEYSPACE_NAME_MAX: usize = 63;
/// Most replicas of a shard.
pub const REPLICAS_MAX: u32 = 7;
/// Longest record: a whole batch of the largest size plus its framing.
pub const RECORD_BYTES_MAX: usize = 24 * MIB;
/// A writer stops adding to a group commit here, so that one sync covers a bounded write.
pub const GROUP_BYTES_MAX: usize = 4 * MIB;
/// A writer stops adding to a group commit here, too.
pub const GROUP_OPS_MAX: usize = 4_096;
/// What an operation takes in a record beside its key and value, at most: the entry's header, two
/// lengths, and the kept result of a read-modify-write with its name.
const OP_FRAMING_BYTES: usize = ENTRY_HEADER_BYTES_MAX + 8 + 64;
// A group that is almost full takes one more batch, and the record that holds both can be written.
const _: () = assert!(
    GROUP_BYTES_MAX + BATCH_BYTES_MAX + (GROUP_OPS_MAX + BATCH_OPS_MAX) * OP_FRAMING_BYTES + KIB <= RECORD_BYTES_MAX
);
/// Bytes that may wait in one replica's writer queue before writers are pushed back.
pub const WRITE_QUEUE_BYTES_MAX: usize = 64 * MIB;
/// Largest gRPC message: a batch plus framing. Ingress limits keep every message below it.
pub const MESSAGE_BYTES_MAX: usize = 32 * MIB;
/// Bytes of requests that one connection may have in flight at a node.
pub const CONNECTION_BYTES_MAX: usize = 64 * MIB;
/// Bytes of requests that all connections of a node may have in flight together.
pub const NODE_REQUEST_BYTES_MAX: usize = 512 * MIB;
/// Bytes of replies that wait for slow readers, all connections of a node together: above it only a connection for
/// which none waits gets another request begun.
pub const NODE_REPLY_BYTES_MAX: usize = 256 * MIB;
/// While a node is over one of these budgets, a connection whose peer has taken no reply for so long is ended.
pub const REPLY_STALL_MAX: Duration = Duration::from_secs(10);
/// Requests outside a stream that a node answers at a time: they have no budget of bytes, and each
/// may be a batch with its reply.
pub const UNARY_REQUESTS_MAX: usize = 64;
/// Replicas that a node takes by default: each is a RocksDB instance with its own files.
pub const NODE_REPLICAS_MAX: usize = 512;
/// Copies that are made on one node at a time: more share its disk and network and are not done sooner.
pub const COPIES_PER_NODE_MAX: usize = 4;
/// A node attracts nothing when less than one part in so many of its disk is free ...
pub const DISK_RESERVE_PART: u64 = 20;
/// ... but this much is enough on any disk: compactions and the log need room of their own.
pub const DISK_RESERVE_BYTES_MAX: u64 = 1024 * MIB as u64;
/// A target that has begun nothing for so long although its node is there is given up.
pub const TARGET_SILENT_MAX: Duration = Duration::from_secs(60);
/// A node whose loss was accepted is taken for lost when it has been away for so long; until then what it alone
/// holds may still be drained.
pub const ACCEPTED_LOSS_AWAY: Duration = Duration::from_secs(15);

/// A node that is away for so long and has no part in anything is forgotten.
pub const NODE_FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 3_600);
/// Nodes that are kept from getting replicas, at most.
pub const CORDONED_MAX: usize = 1_024;
/// Tables that a replica keeps open, at most ...
pub const TABLES_OPEN_MAX: usize = 4_096;
/// ... and at least: fewer, and every read opens a file.
pub const TABLES_OPEN_MIN: usize = 64;
/// A node whose disk has less free than a fiftieth, between these bounds, refuses clients' writes: what is left
/// belongs to flushes, compactions and what is written already, which without it would fail halfway.
pub const DISK_LOW_BYTES_MIN: u64 = 16 * MIB as u64;
/// See [`DISK_LOW_BYTES_MIN`].
pub const DISK_LOW_BYTES_MAX: u64 = 1024 * MIB as u64;
/// A replica that was closed for want of disk or descriptors is not opened again sooner after it failed.
pub const REOPEN_AFTER: Duration = Duration::from_secs(1);
/// And at the longest, however often that has failed.
pub const REOPEN_AFTER_MAX: Duration = Duration::from_secs(30);
/// A replica that is closed for want of something for longer is replaced like any other that has failed.
pub const PASSING_MAX: Duration = Duration::from_secs(60);
/// A binlog file is closed and a new one begun at this size.
pub const BINLOG_FILE_BYTES: u64 = 64 * MIB as u64;
/// Most bytes of log a replica keeps. At the cap the bucket's cover is given up first.
pub const BINLOG_BYTES_MAX: u64 = 4 * 1024 * MIB as u64;
/// A chunk object holds at most this much log, or one record. A fraction of a second of any link but a slow
/// one, where it takes a minute at a megabit a second; a thousand of them hold 8 GiB for half a cent.
pub const CHUNK_BYTES_MAX: usize = 8 * MIB;
/// And at least so much when there is more, also after attempts that failed.
pub const CHUNK_BYTES_MIN: usize = 256 * KIB;
/// Memory of all chunks that a node ships at once ...
pub const LOG_MEMORY_MAX: u64 = 32 * MIB as u64;
/// ... and of all files of checkpoints: the largest that goes in one request.
pub const UPLOAD_MEMORY_MAX: u64 = 64 * MIB as u64;
/// A checkpoint is due when the log since the last one exceeds this: bounds the replay.
pub const CHECKPOINT_LOG_BYTES: u64 = 512 * MIB as u64;
/// A checkpoint is due when replaying the log since the last one would take longer.
pub const REPLAY_MAX: Duration = Duration::from_secs(60);
/// A checkpoint whose first file was uploaded longer ago starts over: garbage collection does not know of it
/// yet, and deletes what is older than a day and named by nothing.
pub const UPLOAD_STALL_MAX: Duration = Duration::from_secs(12 * 3_600);
/// An SST that no manifest names may be of a checkpoint that is being uploaded until it is older than this:
/// an hour more than the upload may take.
pub const UNNAMED_AGE_MIN: Duration = Duration::from_secs(13 * 3_600);

/// A write that wants the bucket's confirmation and does not get it in this time is `Unknown`.
pub const BUCKET_ACK_TIMEOUT: Duration = Duration::from_secs(8);

/// A replica that ships in the place of the home begins with a checkpoint, which uploads everything, no
/// sooner than this, unless somebody waits for the bucket. Going on behind what is there needs none.
pub const SHIP_INSTEAD_AFTER: Duration = Duration::from_secs(300);
/// A replica that does not ship keeps at least so much of its log, and that of three ship intervals, so that
/// it can go on where the home stopped.
pub const LOG_KEPT_FOR_SHIPPING: Duration = Duration::from_secs(60);
/// What of another replica's log is read in the bucket, at most, to find where to go on behind it.
pub const SHIPPED_READ_BYTES_MAX: u64 = 256 * MIB as u64;

/// A commit time that is further ahead of the time at which the bucket had its record shows a clock that was
/// ahead: a restore to a moment does not go by it. Less is the usual difference between good clocks.
pub const CLOCK_AHEAD_TRUSTED: Duration = Duration::from_secs(5);
/// Event times further ahead of the clock than this are refused when a client sends them.
pub const MAX_CLOCK_AHEAD: Duration = Duration::from_secs(60);
/// Longest time to live, of a value and of a keyspace's default: a thousand years, far from any overflow of
/// the clock.
pub const TTL_MS_MAX: u64 = 1_000 * 365 * 86_400_000;
/// Longest quarantine and longest tombstone grace: ten years.
pub const KEPT_MS_MAX: u64 = 10 * 365 * 86_400_000;
/// Deletes are remembered at least this long before collection may forget them.
pub const TOMBSTONE_GRACE: Duration = Duration::from_secs(24 * 3600);
/// How long a moved range stays on its old shard, unserved, before it is removed.
pub const QUARANTINE: Duration = Duration::from_secs(24 * 3600);
/// A node whose stream is silent for longer counts as dead.
pub const NODE_SILENCE: Duration = Duration::from_secs(10);
/// How often a node reports to the master when nothing changes.
pub const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// HTTP/2 keepalive: finds half-open connections in seconds instead of 15 minutes.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// No answer to a keepalive for this long closes the connection.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Connecting to a server.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// One data operation, retries included, unless the caller says otherwise.
pub const OPERATION_DEADLINE: Duration = Duration::from_secs(10);
/// One administrative call that does not wait for an operation.
pub const ADMIN_DEADLINE: Duration = Duration::from_secs(30);
/// A node that is behind a request's epoch waits this long for the topology.
pub const EPOCH_WAIT: Duration = Duration::from_secs(1);
/// Reads of a sealed range go on for this long without word of the outcome.
pub const SEALED_READS: Duration = Duration::from_secs(2);
/// Writes to a sealed range wait this long for the outcome before they are sent back to retry.
pub const SEALED_WRITES_WAIT: Duration = Duration::from_secs(3);
/// The `sealing` version must be written within this, else the bucket is too slow to seal now.
pub const SEALING_WRITE_MAX: Duration = Duration::from_millis(200);
/// All sources must have sealed and all targets caught up within this, else the plan unseals.
pub const SEAL_TIMEOUT: Duration = Duration::from_secs(1);
/// A tail whose lag is below this is close enough to seal.
pub const TAIL_LAG_LSNS_MAX: u64 = 64;
/// Drains, then exits: the whole of a SIGTERM.
pub const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);
/// What is left of a connection to the master after this much of its stop is closed: what was asked has been
/// answered, and a peer that says nothing must not hold up the stop.
pub const MASTER_DRAIN: Duration = Duration::from_secs(1);
/// How often unsynced log of `os` acknowledgements is synced in the background.
pub const OS_SYNC_INTERVAL: Duration = Duration::from_millis(200);
/// A replica that was opened waits this long for its peers to say what they hold; those that are
/// silent are skipped.
pub const CATCH_UP_PATIENCE: Duration = Duration::from_secs(2);
/// An attempt at a replica that has not answered by now is made at another one.
pub const ATTEMPT_PATIENCE: Duration = Duration::from_secs(1);
/// Between two heartbeats of a lease link.
pub const LEASE_BEAT: Duration = Duration::from_millis(100);
/// A replica believes in what another one granted for so long after it SENT the heartbeat that was echoed.
pub const LEASE_BELIEF: Duration = Duration::from_millis(700);
/// A replica keeps its promise for so long after it RECEIVED the last heartbeat: longer than the holder
/// believes in it, also when the two clocks run a few percent apart, and below [`ATTEMPT_PATIENCE`], so
/// that a client that gave up on a silent primary finds its successor free.
pub const LEASE_PROMISE: Duration = Duration::from_millis(850);
/// A peer that was silent for so long, while this node itself was running, is excused.
pub const LEASE_SILENCE: Duration = Duration::from_millis(600);
/// A node whose own threads were not scheduled for so long was not listening: the silence of others
/// counts from then on.
pub const LEASE_DEAF_GAP: Duration = Duration::from_millis(250);
/// A peer that says that its replica is not open is waited for so long before it is excused.
pub const LEASE_OPENING: Duration = Duration::from_secs(2);
/// What the master said of a node is believed for so long after the question was sent: by then a node that
/// comes back may take over from one that is silent.
pub const MASTER_WORD: Duration = Duration::from_millis(550);
/// A peer is excused for so long from the beginning of the attempt to connect on which that rests.
pub const LEASE_EXCUSE: Duration = Duration::from_millis(550);
/// A strict request waits this long at a replica that is about to have authority.
pub const AUTHORITY_WAIT: Duration = Duration::from_secs(1);
/// A write that is done but not allowed to be acknowledged waits this long for authority before its outcome is
/// unknown.
pub const HELD_ACK_MAX: Duration = Duration::from_secs(5);
/// Connecting to a silent peer to find out whether this node is the one that is cut off takes at least this
/// long, at most the other, and in between four times as long as connecting to it took before.
pub const PROBE_TIMEOUT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// A writer that has not come back from its disk for so long is stalled: another replica serves in its place.
pub const WRITER_STALL: Duration = Duration::from_secs(2);
/// A replica whose writer was stalled does not take its place back before it ran for so long.
pub const WRITER_RECOVERED: Duration = Duration::from_secs(10);
/// A replica that serves in the place of the primary for so long becomes primary.
pub const ACTING_PRIMARY_AFTER: Duration = Duration::from_millis(500);
const _: () = assert!(LEASE_EXCUSE.as_millis() < LEASE_SILENCE.as_millis());
const _: () = assert!(MASTER_WORD.as_millis() < LEASE_SILENCE.as_millis());
const _: () = assert!(LEASE_BELIEF.as_millis() * 11 / 10 < LEASE_PROMISE.as_millis());
const _: () = assert!(LEASE_PROMISE.as_millis() + LEASE_BEAT.as_millis() < ATTEMPT_PATIENCE.as_millis());
/// A write that wants another replica's sync waits this long for it before its outcome is unknown.
pub const REPLICA_ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// A primary whose node is away for longer is replaced by the next replica: long enough for a
/// process that restarts at once, short enough for read-modify-writes to wait.
pub const FAILOVER_AWAY: Duration = Duration::from_millis(500);
/// A planned hand-over that has not ended by now is undone.
pub const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);
/// Results of read-modify-writes are kept this long for retries.
pub const RESULTS_KEPT: Duration = Duration::from_secs(600);
/// And at most this many of them for each replica.
pub const RESULTS_MAX: usize = 100_000;
/// Bytes of records in one replication frame; at most four frames wait for a slow follower.
pub const PULL_FRAME_BYTES: usize = MIB;
/// Data connections that a node takes; each may hold [`CONNECTION_BYTES_MAX`].
pub const CONNECTIONS_MAX: usize = 4_096;
/// Connections that a master takes: a session a node and a few of each client.
pub const MASTER_CONNECTIONS_MAX: usize = 8_192;
/// A peer that connects to a server and says nothing for so long is closed.
pub const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(5);
/// After a connection that could not be accepted, for want of descriptors for example.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How much of a disk of this size stays free.
pub fn disk_reserve(bytes: u64) -> u64 {
    (bytes / DISK_RESERVE_PART).min(DISK_RESERVE_BYTES_MAX)
}

/// Which limit was exceeded, by how much.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// The empty key is not a key.
    #[error("the key is empty; a key has 1 to {KEY_BYTES_MAX} bytes")]
    EmptyKey,
    /// See [`KEY_BYTES_MAX`].
    #[error("the key has {0} bytes, over the limit of {KEY_BYTES_MAX}; use a shorter key")]
    KeyTooLong(usize),
    /// See [`VALUE_BYTES_MAX`].
    #[error("the value has {0} bytes, over the limit of {VALUE_BYTES_MAX}; split it over several keys")]
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
        /// What the caller gave, microseconds.
        event_time: u64,
    },
    /// Zero is reserved.
    #[error("the event time 0 is reserved; leave it out to have the time stamped by the server")]
    EventTimeZero,
    /// A TTL of zero, or see [`TTL_MS_MAX`].
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
    if ttl_ms == 0 || ttl_ms > TTL_MS_MAX { Err(LimitError::BadTtl(ttl_ms / 1_000)) } else { Ok(()) }
}

/// Checks an event time that a client gave, against the clock.
pub fn check_event_time(event_time: u64, now_us: u64) -> Result<(), LimitError> {
    if event_time == 0 {
        Err(LimitError::EventTimeZero)
    } else if event_time > now_us.saturating_add(MAX_CLOCK_AHEAD.as_micros() as u64) {
        Err(LimitError::EventTimeAhead { event_time })
    } else {
        Ok(())
    }
}

/// Why a keyspace name is refused.
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
        for bad in ["", "A", "1a", "..", "a/b", "a.b", "a b", "ä", "a\0", &"a".repeat(64), "-a", "_a"] {
            assert!(check_keyspace_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_values_and_event_times_at_the_boundary() {
        assert!(check_key(&vec![0; KEY_BYTES_MAX]).is_ok());
        assert_eq!(check_key(&vec![0; KEY_BYTES_MAX + 1]), Err(LimitError::KeyTooLong(KEY_BYTES_MAX + 1)));
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
