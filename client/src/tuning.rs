//! Caps and times of the client alone. Limits that servers must agree with are in
//! `vasto_core::limits`.
//!
//! A frame is one message of the gRPC stream between a client and a node: a batch of requests.

use std::time::Duration;

/// Bytes of requests in flight to one node. Half of what a node admits per connection, because the
/// node counts twice the overhead per request: the client queues requests before the node stops
/// reading the connection.
pub(crate) const IN_FLIGHT_BYTES_MAX: usize = vasto_core::limits::CONNECTION_BYTES_MAX / 2;
/// Cost of a request beyond its keys and values; bounds the number of tiny requests in flight.
pub(crate) const REQUEST_OVERHEAD_BYTES: usize = 128;
/// A frame is closed once it holds this much: large enough to make framing cheap, small enough that
/// the first request of the next frame does not wait long.
pub(crate) const FRAME_BYTES: usize = 256 << 10;
/// Most requests in a frame: the bound for tiny ones.
pub(crate) const FRAME_REQUESTS_MAX: usize = 2_048;
/// Frames queued in the transport. Few, because a request that expires in the client's own queue is
/// never sent, and one in a queued frame cannot be withdrawn.
pub(crate) const FRAMES_AHEAD: usize = 2;
/// HTTP/2 windows: a whole scan page or many small replies fit without a round trip.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// See [`STREAM_WINDOW_BYTES`]; shared by the streams of a connection.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Keys in one get request. A node that cannot fit the values into one message refuses it, and the
/// client retries with half as many keys.
pub(crate) const GET_KEYS_MAX: usize = 256;
/// Bytes of keys in one get request.
pub(crate) const GET_KEY_BYTES_MAX: usize = 1 << 20;

/// The longest time limit of an operation, a year. Longer ones are clamped, so that `Instant` +
/// `Duration` cannot overflow.
pub(crate) const DEADLINE_MAX: Duration = Duration::from_secs(365 * 86_400);
/// The first pause before a retry; doubled for each further one.
pub(crate) const BACKOFF_FIRST: Duration = Duration::from_millis(5);
/// The longest pause between retries of an operation.
pub(crate) const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// The longest pause between two attempts to subscribe to a topology again.
pub(crate) const WATCH_BACKOFF_MAX: Duration = Duration::from_secs(2);
/// The interval at which a waiting `resize_keyspace` polls its operation.
pub(crate) const OPERATION_POLL: Duration = Duration::from_millis(200);
/// Retries that a client handle may make in a burst, before its successes earn more
/// ([`RETRY_SHARE`]).
pub(crate) const RETRY_BUDGET: u32 = 1_000;
/// Number of successes that earn one retry: retries add at most a tenth to a sustained load.
pub(crate) const RETRY_SHARE: u32 = 10;
/// Most shards of a scan (which merges the sorted pages of all shards) for which it prefetches the
/// next pages; a scan over more shards requests pages on demand.
pub(crate) const PREFETCH_SHARDS_MAX: usize = 64;
/// Least rows in a page limit. A scan divides `SCAN_PAGE_ROWS_MAX` by the number of shards, so that
/// a scan over many shards holds no more rows than one over few.
pub(crate) const SCAN_ROWS_MIN: usize = 64;
