//! The source's side of a tail: streams a replica's log to the replica of another shard that takes
//! over some of its keys.
//!
//! **Invariants**
//! - Only settled records are streamed, in order, without a gap; `covered_lsn` is the LSN up to
//!   which everything that concerns the requesting shard has been sent.
//! - A position that the log no longer reaches is an explicit error, never a silent jump.
//! - A frame says that the source is sealed only when it, or an earlier one, covers the seal.
//! - Served in every state of the replica.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use vasto_core::ids::{KeyspaceId, Lsn, ReplicaId, ShardId};
use vasto_core::record::{BandRange, Body, Record};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;
use vasto_proto::v1;

use crate::binlog::{BinlogError, LogReader};
use crate::build::filter::ShardFilter;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::tails::OpenTail;

/// Bytes read from the log for one frame.
const FRAME_BYTES: usize = 1 << 20;
/// Frames that may be buffered for a slow reader. Few: they are behind the position up to which the
/// log counts as sent, and a reader takes them all while the source is sealed.
const FRAMES_AHEAD: usize = 2;
/// Minimum interval of progress frames without records; a seal is not waited for so long.
const QUIET_FRAME: Duration = Duration::from_millis(10);

/// The frames of a tail.
pub(crate) type TailStream = Pin<Box<dyn Stream<Item = Result<v1::TailFrame, Status>> + Send>>;

/// Starts a tail.
// A gRPC status is large, and this is not a hot path.
#[allow(clippy::result_large_err)]
pub(crate) fn serve(
    registry: &NodeRegistry,
    request: &v1::TailRequest,
) -> Result<TailStream, Status> {
    if !vasto_core::band::is_legal_shard_count(request.final_shards)
        || request.final_shard >= request.final_shards
    {
        return Err(status_of(&VastoError::new(
            ErrorCode::InvalidArgument,
            "the tail names no legal shard",
        )));
    }
    let (keyspace, id) = (KeyspaceId(request.keyspace_id), ReplicaId(request.replica_id));
    let replica = registry.replica(keyspace, id).ok_or_else(|| {
        status_of(&VastoError::new(
            ErrorCode::Unavailable,
            format!("replica {id} of keyspace {keyspace} is not open on this node"),
        ))
    })?;
    let after = Lsn(request.after_lsn);
    let reader = replica.log().reader(after).map_err(|error| {
        if matches!(error, BinlogError::TooOld { .. }) {
            replica.tails().came_late();
        }
        status_of(&error.into())
    })?;
    let open = replica.tails().open(after);
    let filter = ShardFilter { shard: ShardId(request.final_shard), shards: request.final_shards };
    let (frames, receiver) = channel(FRAMES_AHEAD);
    // Ends when the reader disconnects: sending fails then, also while the log is idle.
    tokio::spawn(async move {
        if let Err(status) = stream(replica, reader, open, filter, &frames).await {
            let _ = frames.send(Err(status)).await;
        }
    });
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

async fn stream(
    replica: Replica,
    mut reader: LogReader,
    open: OpenTail,
    filter: ShardFilter,
    frames: &Sender<Result<v1::TailFrame, Status>>,
) -> Result<(), Status> {
    let mut synced = replica.log().subscribe();
    let mut changes = replica.changes();
    // What was sealed behind the position is told by the records themselves: the reader sees a seal
    // before the replica shows it.
    let sealed = replica.ranges().seal.filter(|seal| seal.lsn <= reader.position());
    let mut sealed = sealed.map(|seal| seal.range);
    // Reports how far behind the reader is, also when the log is idle.
    let hello = v1::TailFrame {
        records: Vec::new(),
        covered_lsn: reader.position().0,
        head_lsn: replica.log().synced_lsn().0,
        lag_bytes: Some(replica.log().synced_bytes_after(reader.position())),
        sealed: Some(sealed.is_some()),
    };
    if frames.send(Ok(hello)).await.is_err() {
        return Ok(());
    }
    loop {
        synced.borrow_and_update();
        changes.borrow_and_update();
        let head = replica.log().synced_lsn();
        let (back, batch) = tokio::task::spawn_blocking(move || {
            let batch = read_filtered(&mut reader, filter, sealed);
            (reader, batch)
        })
        .await
        .map_err(|error| Status::internal(error.to_string()))?;
        reader = back;
        let batch = batch?;
        if batch.covered > Lsn(0) {
            open.sent(batch.covered);
            sealed = batch.sealed;
            let quiet = batch.records.is_empty() && !batch.control;
            let frame = v1::TailFrame {
                records: batch.records,
                covered_lsn: batch.covered.0,
                head_lsn: head.0.max(batch.covered.0),
                lag_bytes: Some(replica.log().synced_bytes_after(batch.covered)),
                sealed: Some(sealed.is_some()),
            };
            if frames.send(Ok(frame)).await.is_err() {
                return Ok(());
            }
            if quiet {
                // Writers wait for this reader to reach a seal, whose record is synced before the
                // change is published.
                let _ = tokio::time::timeout(QUIET_FRAME, changes.changed()).await;
            }
            continue;
        }
        tokio::select! {
            changed = synced.changed() => if changed.is_err() { return Ok(()) },
            () = frames.closed() => return Ok(()),
        }
    }
}

struct Filtered {
    records: Vec<Bytes>,
    covered: Lsn,
    control: bool,
    /// The range that is sealed at `covered`.
    sealed: Option<BandRange>,
}

/// Returns the range that is sealed behind a record, given the one before it.
fn sealed_behind(sealed: Option<BandRange>, body: &Body) -> Option<BandRange> {
    match body {
        Body::Seal { range, .. } => Some(*range),
        Body::Unseal { .. } => None,
        // The seal of a range whose owner is decided has ended.
        Body::RangeState { range, .. } => sealed.filter(|sealed| !sealed.overlaps(*range)),
        Body::Data { .. } | Body::GcFloor { .. } | Body::Adopt { .. } | Body::Ingest { .. } => {
            sealed
        }
    }
}

// A gRPC status is large, and this is not a hot path: one result per megabyte of log.
#[allow(clippy::result_large_err)]
fn read_filtered(
    reader: &mut LogReader,
    filter: ShardFilter,
    sealed: Option<BandRange>,
) -> Result<Filtered, Status> {
    let mut out = Filtered { records: Vec::new(), covered: Lsn(0), control: false, sealed };
    for (lsn, bytes) in reader.next_batch(FRAME_BYTES).map_err(|error| status_of(&error.into()))? {
        out.covered = lsn;
        let record = Record::decode(&bytes).map_err(|error| {
            status_of(&VastoError::new(
                ErrorCode::Corrupt,
                format!("record {lsn} of the log is damaged: {error}"),
            ))
        })?;
        out.control |= !record.body.is_streamed();
        out.sealed = sealed_behind(out.sealed, &record.body);
        let (head, entries) =
            (Record { body: Body::data(Vec::new()), ..record.clone() }, filter.pick(record));
        if !entries.is_empty() {
            let own_seq = vasto_core::OwnSeq(head.own_seq.0.max(1));
            out.records.push(Record { own_seq, body: Body::data(entries), ..head }.encode().into());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use vasto_core::Band;
    use vasto_core::ids::{CatalogVersion, PlanId};
    use vasto_core::record::RangeState;

    use super::*;

    fn range(first: u8, last: u8) -> BandRange {
        BandRange { first: Band(first), last: Band(last) }
    }

    #[test]
    fn a_source_is_sealed_from_its_seal_until_that_is_decided() {
        let (plan, version) = (PlanId(1), CatalogVersion(5));
        let seal = Body::Seal { plan, version, range: range(2, 5) };
        let becomes =
            |first, last, state| Body::RangeState { version, range: range(first, last), state };
        let sealed = sealed_behind(None, &seal);
        assert_eq!(sealed, Some(range(2, 5)));
        for goes_on in [
            Body::data(Vec::new()),
            Body::GcFloor { floor: 9 },
            // The quarantine of an earlier plan ends.
            becomes(6, 9, RangeState::Clearing),
        ] {
            assert_eq!(sealed_behind(sealed, &goes_on), sealed, "{goes_on:?}");
            assert_eq!(sealed_behind(None, &goes_on), None, "{goes_on:?}");
        }
        assert_eq!(sealed_behind(sealed, &Body::Unseal { plan, version }), None);
        assert_eq!(sealed_behind(sealed, &becomes(5, 9, RangeState::Leaving)), None);
    }
}
