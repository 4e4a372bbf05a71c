//! The source's side of a pull: sends a follower every synced record that it lacks.
//!
//! **Invariants**
//! - Records are sent in the order of the log, whatever their origin; only synced and applied ones.
//! - The follower lacks nothing up to `covered_lsn`; only records that it has from another source
//!   are left out.
//! - The first frame shows a follower that it asks too late: it names where the stream begins and
//!   the vector that the follower must hold at the head.
//! - A replica serves pulls in every state.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use vasto_core::ids::{Epoch, Incarnation, KeyspaceId, Lsn, Origin, OwnSeq, ReplicaId, Vector};
use vasto_core::limits::PULL_FRAME_BYTES;
use vasto_core::record::{Peek, peek};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::{status_of, vector_from_wire, vector_to_wire};
use vasto_proto::v1;
use vasto_proto::v1::pull_message::Message;

use crate::binlog::LogReader;
use crate::registry::NodeRegistry;
use crate::replica::Replica;

/// Frames that may wait for a slow follower.
const FRAMES_AHEAD: usize = 4;
/// Delay before a record of a third replica is sent: the follower usually pulls it from there, and
/// reports it in this time.
const THIRD_PARTY_PATIENCE: Duration = Duration::from_millis(50);
/// Shortest interval between two frames without records.
const QUIET_FRAME: Duration = Duration::from_millis(10);

/// Position that the follower has reported.
struct FollowerPosition {
    vector: Mutex<Vector>,
    changed: Notify,
    follower: ReplicaId,
    /// The follower's present incarnation: no other replica has more of it than the follower
    /// itself.
    incarnation: Incarnation,
}

impl FollowerPosition {
    fn lacks(&self, peek: Peek) -> bool {
        let own =
            peek.origin.replica == self.follower && peek.origin.incarnation >= self.incarnation;
        peek.own_seq.0 > 0
            && !own
            && self.vector.lock().get(&peek.origin).is_none_or(|have| *have < peek.own_seq)
    }
}

/// Begins to serve a follower.
pub(super) async fn serve(
    registry: &NodeRegistry,
    mut messages: Streaming<v1::PullMessage>,
) -> Result<ReceiverStream<Result<v1::PullFrame, Status>>, Status> {
    let malformed =
        || status_of(&VastoError::new(ErrorCode::InvalidArgument, "a pull begins with PullStart"));
    let Some(v1::PullMessage { message: Some(Message::Start(start)) }) = messages.message().await?
    else {
        return Err(malformed());
    };
    let (keyspace, id) = (KeyspaceId(start.keyspace_id), ReplicaId(start.replica_id));
    let replica = registry.replica(keyspace, id).ok_or_else(|| {
        let reason = format!("replica {id} of keyspace {keyspace} is not open on this node");
        status_of(&VastoError::new(ErrorCode::Unavailable, reason))
    })?;
    let follower = ReplicaId(start.follower_id);
    let vector = vector_from_wire(&start.vector);
    let incarnation = vector
        .keys()
        .filter(|origin| origin.replica == follower)
        .map(|origin| origin.incarnation)
        .max();
    let reported = Arc::new(FollowerPosition {
        vector: Mutex::new(vector),
        changed: Notify::new(),
        follower,
        incarnation: incarnation.unwrap_or_default(),
    });
    let (frames, receiver) = channel(FRAMES_AHEAD);
    tokio::spawn({
        let (replica, reported, frames) = (replica.clone(), reported.clone(), frames.clone());
        // Ends with the follower's half of the stream.
        async move {
            tokio::select! {
                () = handle(&replica, &reported, messages) => {}
                () = frames.closed() => {}
            }
        }
    });
    let begun = Lsn(start.after_lsn);
    // Ends when the follower is gone: sending fails then, also while the log is idle.
    tokio::spawn(async move {
        if let Err(status) = stream(replica, begun, &reported, &frames).await {
            let _ = frames.send(Err(status)).await;
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// Records the progress that the follower reports.
async fn handle(
    replica: &Replica,
    reported: &FollowerPosition,
    mut messages: Streaming<v1::PullMessage>,
) {
    while let Ok(Some(message)) = messages.message().await {
        let Some(Message::Progress(progress)) = message.message else { continue };
        let own = Origin { replica: replica.id, incarnation: replica.incarnation() };
        let own_seq = {
            let mut vector = reported.vector.lock();
            for (origin, own_seq) in vector_from_wire(&progress.vector) {
                let have = vector.entry(origin).or_default();
                *have = (*have).max(own_seq);
            }
            vector.get(&own).copied().unwrap_or(OwnSeq(0))
        };
        reported.changed.notify_waiters();
        let lost = progress.lost.iter().filter(|lost| {
            (lost.replica_id, lost.incarnation) == (own.replica.0, own.incarnation.0)
        });
        replica.followers().lost(lost.map(|lost| OwnSeq(lost.own_seq)));
        replica.follower_at(Epoch(progress.epoch));
        replica.followers().progress(
            reported.follower,
            Lsn(progress.covered_lsn),
            own_seq,
            Epoch(progress.epoch),
        );
    }
}

async fn stream(
    replica: Replica,
    begun: Lsn,
    reported: &FollowerPosition,
    frames: &Sender<Result<v1::PullFrame, Status>>,
) -> Result<(), Status> {
    let position = replica.position().await.map_err(|error| status_of(&error.into()))?;
    let from = begun.max(Lsn(replica.log().first_lsn().0.saturating_sub(1))).min(position.lsn);
    let hello = v1::PullFrame {
        records: Vec::new(),
        covered_lsn: from.0,
        head_lsn: position.lsn.0,
        from_lsn: from.0,
        vector: vector_to_wire(&position.vector),
        moving_bytes_per_s: None,
    };
    if frames.send(Ok(hello)).await.is_err() {
        return Ok(());
    }
    let mut reader = replica.log().reader(from).map_err(|error| status_of(&error.into()))?;
    let mut synced = replica.log().subscribe();
    loop {
        synced.borrow_and_update();
        let head = replica.log().synced_lsn();
        let (back, batch) = tokio::task::spawn_blocking(move || {
            let batch = read(&mut reader);
            (reader, batch)
        })
        .await
        .map_err(|error| Status::internal(error.to_string()))?;
        reader = back;
        let batch = batch?;
        let Some((covered, _)) = batch.last() else {
            tokio::select! {
                changed = synced.changed() => if changed.is_err() { return Ok(()) },
                () = frames.closed() => return Ok(()),
            }
            continue;
        };
        let covered = *covered;
        let records = lacking(batch, replica.id, reported).await;
        let quiet = records.is_empty();
        let frame = v1::PullFrame {
            records,
            covered_lsn: covered.0,
            head_lsn: head.0.max(covered.0),
            from_lsn: 0,
            vector: Vec::new(),
            moving_bytes_per_s: replica.throttle().bytes_per_s(),
        };
        if frames.send(Ok(frame)).await.is_err() {
            return Ok(());
        }
        if quiet {
            tokio::time::sleep(QUIET_FRAME).await;
        }
    }
}

// One result per megabyte of log.
#[allow(clippy::result_large_err)]
fn read(reader: &mut LogReader) -> Result<Vec<(Lsn, Vec<u8>)>, Status> {
    reader.next_batch(PULL_FRAME_BYTES).map_err(|error| status_of(&error.into()))
}

/// Returns the records of a batch that the follower lacks.
async fn lacking(
    batch: Vec<(Lsn, Vec<u8>)>,
    source: ReplicaId,
    reported: &FollowerPosition,
) -> Vec<bytes::Bytes> {
    let mut records: Vec<(Peek, Vec<u8>)> = batch
        .into_iter()
        .filter_map(|(_, bytes)| Some((peek(&bytes)?, bytes)))
        .filter(|(peek, _)| reported.lacks(*peek))
        .collect();
    let deadline = tokio::time::Instant::now() + THIRD_PARTY_PATIENCE;
    loop {
        let changed = reported.changed.notified();
        tokio::pin!(changed);
        // From here on no progress report is missed.
        changed.as_mut().enable();
        records.retain(|(peek, _)| reported.lacks(*peek));
        let third_party = records.iter().any(|(peek, _)| peek.origin.replica != source);
        if !third_party || tokio::time::timeout_at(deadline, changed).await.is_err() {
            break;
        }
    }
    records.into_iter().map(|(_, bytes)| bytes.into()).collect()
}
