//! The data service over a real connection.

use std::sync::Arc;
use std::time::Duration;

use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Server};
use vasto_core::Band;
use vasto_core::catalog::{Catalog, KeyspaceSpec};
use vasto_core::ids::{CatalogVersion, Epoch, NodeId};
use vasto_core::limits::{
    BATCH_OPS_MAX, EPOCH_WAIT, KEY_BYTES_MAX, MESSAGE_BYTES_MAX, VALUE_BYTES_MAX,
};
use vasto_core::record::RangeState;
use vasto_proto::v1;
use vasto_proto::v1::data_client::DataClient;
use vasto_proto::v1::data_server::DataServer;
use vasto_proto::v1::reply::Result as Answer;
use vasto_proto::v1::request::Op;

use super::support::*;
use crate::data::DataService;
use crate::foreground::{Class, FOREGROUND};
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::authority::{Standing, Term};
use crate::replica::command::{Control, Role};

const NODE: NodeId = NodeId(1);

struct Served {
    _rig: Rig,
    replica: Replica,
    registry: Arc<NodeRegistry>,
    client: DataClient<Channel>,
}

fn catalog(version: u64, epoch: u64) -> Arc<Catalog> {
    let mut catalog =
        Catalog::first(KEYSPACE, "ks", KeyspaceSpec::default(), &[vec![NODE]], START_US, 1);
    catalog.version = CatalogVersion(version);
    catalog.epoch = Epoch(epoch);
    Arc::new(catalog)
}

async fn serve() -> Served {
    let rig = Rig::new();
    let replica = rig.create();
    replica
        .control(Control::ApplyCatalog {
            epoch: Epoch(1),
            version: CatalogVersion(1),
            role: Role::Primary,
        })
        .await
        .unwrap();
    let registry = Arc::new(NodeRegistry::new(NODE, rig.clock.clone(), 2));
    registry.set_catalog(catalog(1, 1));
    registry.add_replica(replica.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = DataServer::new(DataService::new(registry.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    // Ends with the test's runtime.
    tokio::spawn(
        Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let client = DataClient::connect(format!("http://{address}")).await.unwrap();
    let client = client
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    Served { _rig: rig, replica, registry, client }
}

impl Served {
    async fn ask_at(&self, epoch: u64, op: Op) -> Answer {
        self.ask_as(epoch, false, op).await
    }

    async fn ask_as(&self, epoch: u64, strict: bool, op: Op) -> Answer {
        let request = v1::Request {
            id: 7,
            keyspace_id: KEYSPACE.0,
            epoch,
            shard: 0,
            deadline_ms: 0,
            strict,
            op: Some(op),
        };
        let reply = self.client.clone().execute(request).await.unwrap().into_inner();
        assert_eq!(reply.id, 7);
        reply.result.unwrap()
    }

    async fn ask(&self, op: Op) -> Answer {
        self.ask_at(1, op).await
    }

    /// Returns the error of a refusal and the epoch of its topology.
    async fn refused_at(&self, epoch: u64, op: Op) -> (v1::Error, Option<u64>) {
        match self.ask_at(epoch, op).await {
            Answer::Error(error) => {
                let topology = error.topology.as_ref().map(|topology| topology.epoch);
                (error, topology)
            }
            other => panic!("{other:?}"),
        }
    }
}

fn key(key: impl Into<Vec<u8>>) -> v1::KeyRef {
    v1::KeyRef { key: key.into().into(), partition_hash: None }
}

fn put_op(name: impl Into<Vec<u8>>, value: Vec<u8>) -> v1::WriteOp {
    let put = v1::Put { value: value.into(), ..Default::default() };
    v1::WriteOp { key: Some(key(name)), event_time: None, op: Some(v1::write_op::Op::Put(put)) }
}

fn write_of(ops: Vec<v1::WriteOp>) -> Op {
    Op::Write(v1::WriteRequest { ops, ..Default::default() })
}

fn get_of(keys: Vec<v1::KeyRef>) -> Op {
    Op::Get(v1::GetRequest { keys })
}

fn scan_of() -> Op {
    Op::Scan(v1::ScanRequest::default())
}

fn is(error: &v1::Error, code: vasto_core::ErrorCode) -> bool {
    error.code
        == vasto_proto::convert::error_to_wire(&vasto_core::VastoError::new(code, ""), None).code
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unary_requests_write_read_and_scan() {
    let served = serve().await;
    let Answer::Write(written) =
        served.ask(write_of(vec![put_op("a", b"1".to_vec()), put_op("b", b"2".to_vec())])).await
    else {
        panic!()
    };
    assert_eq!(written.outcomes.len(), 2);
    assert!(
        written
            .outcomes
            .iter()
            .all(|outcome| outcome.kind == v1::write_outcome::Kind::Applied as i32)
    );
    let Answer::Get(got) = served.ask(get_of(vec![key("b"), key("missing"), key("a")])).await
    else {
        panic!()
    };
    let data: Vec<_> = got
        .values
        .iter()
        .map(|entry| entry.value.as_ref().and_then(|value| value.payload.clone()))
        .collect();
    let bytes = |text: &'static str| Some(v1::value::Payload::Data(text.into()));
    assert_eq!(data, vec![bytes("2"), None, bytes("1")]);
    let Answer::Scan(page) = served.ask(scan_of()).await else { panic!() };
    assert_eq!((page.rows.len(), page.more), (2, false));
    // Lower epochs are served while the data is still owned; scans need exactly the current epoch.
    let Answer::Get(_) = served.ask_at(0, get_of(vec![key("a")])).await else { panic!() };
    assert!(is(&served.refused_at(0, scan_of()).await.0, vasto_core::ErrorCode::WrongEpoch));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_over_a_limit_are_refused_before_anything_is_written() {
    let served = serve().await;
    let before = served.replica.applied_lsn();
    let good = || put_op("good", vec![1]);
    let cases = vec![
        write_of(vec![good(), put_op(vec![1; KEY_BYTES_MAX + 1], vec![])]),
        write_of(vec![good(), put_op("", vec![])]),
        write_of(vec![good(), put_op("k", vec![0; VALUE_BYTES_MAX + 1])]),
        write_of((0..BATCH_OPS_MAX + 1).map(|_| good()).collect()),
        write_of((0..5).map(|i| put_op(vec![i], vec![0; VALUE_BYTES_MAX])).collect()),
        write_of(vec![good(), v1::WriteOp { event_time: Some(START_US + 61_000_000), ..good() }]),
        write_of(vec![good(), v1::WriteOp { event_time: Some(0), ..good() }]),
        write_of(vec![]),
        get_of(vec![key("")]),
        get_of((0..BATCH_OPS_MAX + 1).map(|_| key("k")).collect()),
    ];
    for (at, op) in cases.into_iter().enumerate() {
        let (error, _) = served.refused_at(1, op).await;
        assert!(is(&error, vasto_core::ErrorCode::InvalidArgument), "case {at}: {error:?}");
        assert!(!error.message.is_empty());
    }
    assert_eq!(served.replica.applied_lsn(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_of_too_many_bytes_is_refused() {
    let served = serve().await;
    for i in 0..5u8 {
        let Answer::Write(_) =
            served.ask(write_of(vec![put_op(vec![i], vec![i; VALUE_BYTES_MAX])])).await
        else {
            panic!()
        };
    }
    let Answer::Get(four) = served.ask(get_of((0..3).map(|i| key(vec![i])).collect())).await else {
        panic!()
    };
    assert_eq!(four.values.len(), 3);
    let (error, _) = served.refused_at(1, get_of((0..5).map(|i| key(vec![i])).collect())).await;
    assert!(is(&error, vasto_core::ErrorCode::InvalidArgument), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_moved_is_answered_with_the_topology() {
    let served = serve().await;
    let moving = keys_in(Band(1), "m", 1).remove(0);
    served.registry.set_catalog(catalog(2, 2));
    let range = (Band(1)..=Band(1)).into();
    served
        .replica
        .control(Control::SetRange {
            epoch: Default::default(),
            version: CatalogVersion(2),
            range,
            state: RangeState::Leaving,
        })
        .await
        .unwrap();
    served
        .replica
        .control(Control::ApplyCatalog {
            epoch: Epoch(2),
            version: CatalogVersion(2),
            role: Role::Primary,
        })
        .await
        .unwrap();
    for op in [
        get_of(vec![key(moving.clone())]),
        write_of(vec![put_op(moving.clone(), vec![])]),
        scan_of(),
    ] {
        let (error, topology) = served.refused_at(1, op).await;
        assert!(is(&error, vasto_core::ErrorCode::WrongEpoch), "{error:?}");
        assert_eq!(topology, Some(2));
    }
    // A shard that is not on this node.
    let request = v1::Request {
        id: 1,
        keyspace_id: KEYSPACE.0,
        epoch: 1,
        shard: 9,
        deadline_ms: 0,
        strict: false,
        op: Some(scan_of()),
    };
    let Some(Answer::Error(error)) =
        served.client.clone().execute(request).await.unwrap().into_inner().result
    else {
        panic!()
    };
    assert!(is(&error, vasto_core::ErrorCode::WrongEpoch) && error.topology.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_of_a_higher_epoch_waits_for_the_topology() {
    let served = serve().await;
    let asked = served.ask_at(2, write_of(vec![put_op("k", b"v".to_vec())]));
    tokio::pin!(asked);
    let early = tokio::time::timeout(Duration::from_millis(50), &mut asked).await;
    assert!(early.is_err(), "it waits");
    served.registry.set_catalog(catalog(2, 2));
    served
        .replica
        .control(Control::ApplyCatalog {
            epoch: Epoch(2),
            version: CatalogVersion(2),
            role: Role::Primary,
        })
        .await
        .unwrap();
    let started = tokio::time::Instant::now();
    let Answer::Write(_) = asked.await else { panic!("answered once the topology is here") };
    assert!(started.elapsed() < EPOCH_WAIT / 2);
    // Without the topology the client is asked to retry, and nothing was done.
    let (error, _) = served.refused_at(3, write_of(vec![put_op("never", b"v".to_vec())])).await;
    assert!(is(&error, vasto_core::ErrorCode::NodeBehind) && error.retry_after_ms > 0, "{error:?}");
    assert_eq!(get(&served.replica, "never"), None);
}

/// A network cut heals while a request waits for a probe: no further probe begins, and the client
/// is sent elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_waits_for_a_probe_only_while_authority_rests_on_silence() {
    let served = serve().await;
    let authority = served.replica.authority();
    for (heals, code) in
        [(true, vasto_core::ErrorCode::NotPrimary), (false, vasto_core::ErrorCode::CatchingUp)]
    {
        authority.publish(Standing::Serving(Term {
            number: 1,
            beliefs: Vec::new(),
            probing: true,
        }));
        let asked = served.ask_as(1, true, get_of(vec![key("k")]));
        tokio::pin!(asked);
        let early = tokio::time::timeout(Duration::from_millis(50), &mut asked).await;
        assert!(early.is_err() && authority.wants_probe());
        if heals {
            authority.publish(Standing::Out { elsewhere: true });
        }
        let answer = tokio::time::timeout(DEADLINE, asked).await.expect("nobody answers it");
        let Answer::Error(error) = answer else { panic!("{answer:?}") };
        assert!(is(&error, code), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_answers_every_request_once() {
    let served = serve().await;
    let (requests, receiver) = tokio::sync::mpsc::channel(4);
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut replies = served.client.clone().stream(stream).await.unwrap().into_inner();
    let mut wanted = std::collections::BTreeSet::new();
    for frame in 0..20u64 {
        let of = |i: u64| match i % 3 {
            0 => get_of(vec![key(format!("k{}", i / 3))]),
            1 => write_of(vec![put_op(format!("k{i}"), vec![0; 100])]),
            _ => scan_of(),
        };
        let batch = (0..30).map(|i| frame * 30 + i).inspect(|id| assert!(wanted.insert(*id)));
        let batch = batch.map(|id| v1::Request {
            id,
            keyspace_id: KEYSPACE.0,
            epoch: 1,
            shard: 0,
            deadline_ms: 0,
            strict: false,
            op: Some(of(id)),
        });
        requests.send(v1::RequestFrame { requests: batch.collect(), sent_us: 0 }).await.unwrap();
    }
    while !wanted.is_empty() {
        let frame =
            tokio::time::timeout(DEADLINE, replies.message()).await.unwrap().unwrap().unwrap();
        for reply in frame.replies {
            assert!(wanted.remove(&reply.id), "{} was answered twice", reply.id);
            assert!(!matches!(reply.result, None | Some(Answer::Error(_))), "{reply:?}");
        }
    }
    let written = scan_keys(&served.replica, Default::default()).len();
    assert_eq!(written, 200);
    assert_log_is_whole(&records(&served.replica));
}

/// The first frame of a stream is late by all that has passed since the stream was opened: a time
/// that no other test has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_of_requests_counts_from_when_they_should_have_come() {
    let served = serve().await;
    let before = FOREGROUND.counts();
    let (requests, receiver) = tokio::sync::mpsc::channel(4);
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut replies = served.client.clone().stream(stream).await.unwrap().into_inner();
    tokio::time::sleep(Duration::from_millis(400)).await;
    let durable = v1::WriteRequest { ops: vec![put_op("b", vec![2])], ..Default::default() };
    let durable = Op::Write(v1::WriteRequest { ack: v1::Ack::Fsync as i32, ..durable });
    let ops = [get_of(vec![key("a")]), durable];
    let batch = ops.into_iter().zip(0..).map(|(op, id)| v1::Request {
        id,
        keyspace_id: KEYSPACE.0,
        epoch: 1,
        op: Some(op),
        ..v1::Request::default()
    });
    let frame = v1::RequestFrame { requests: batch.collect(), sent_us: 1 };
    requests.send(frame).await.unwrap();
    let mut answered = 0;
    while answered < 2 {
        let frame =
            tokio::time::timeout(DEADLINE, replies.message()).await.unwrap().unwrap().unwrap();
        answered += frame.replies.len();
    }
    let after = FOREGROUND.counts();
    let late = |class: Class| {
        let at = class as usize;
        after[at].since(&before[at]).above(Duration::from_millis(300))
    };
    assert!(late(Class::Reads) >= 1, "a lookup counts");
    assert!(late(Class::SyncedWrites) >= 1, "a write counts");
}
