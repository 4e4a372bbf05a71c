//! Membership: which nodes may join, liveness, and the start and stop of a master.

use std::time::Duration;

use serde_json::json;
use tokio_util::sync::CancellationToken;
use vasto_core::ErrorCode;
use vasto_core::ids::KeyspaceId;
use vasto_master::{Master, MasterConfig, MasterError};
use vasto_proto::v1;

use crate::harness::{TestMaster, config, eventually, within};
use crate::node::{Crew, Session, hello, reports};

async fn rejection(url: &str, hello: v1::Hello) -> v1::Rejected {
    let session = Session::open(url, hello).await.unwrap();
    let seen = session
        .until("the rejection", |seen| seen.rejected.is_some() || seen.welcome.is_some())
        .await;
    let rejected = seen.rejected.expect("the node was welcome");
    session.until("the end of the session", |seen| seen.ended).await;
    rejected
}

#[tokio::test]
async fn nodes_that_must_not_join_are_told_why() {
    let master = TestMaster::start("memory://membership-rejected").await;
    let foreign =
        rejection(&master.url, v1::Hello { cluster_id: "c-other".into(), ..hello(1) }).await;
    assert_eq!(foreign.code, ErrorCode::FailedPrecondition as u32);
    assert!(
        foreign.reason.contains("c-other") && foreign.reason.contains(&master.running.cluster_id),
        "{}",
        foreign.reason
    );
    let newer = rejection(&master.url, v1::Hello { protocol: 99, ..hello(1) }).await;
    assert!(newer.reason.contains("protocol 99"), "{}", newer.reason);
    assert_eq!(
        rejection(&master.url, v1::Hello { node_id: 0, ..hello(1) }).await.code,
        ErrorCode::InvalidArgument as u32
    );
    assert_eq!(master.status().await["nodes"], json!([]));

    let own = Session::join(
        &master.url,
        v1::Hello { cluster_id: master.running.cluster_id.clone(), ..hello(1) },
    )
    .await;
    let welcome = own.seen.borrow().welcome.clone().unwrap();
    assert_eq!(
        (welcome.cluster_id, welcome.bucket_url.as_str()),
        (master.running.cluster_id.clone(), "memory://membership-rejected")
    );
    master.stop().await;
}

#[tokio::test]
async fn a_node_id_belongs_to_one_live_process() {
    let master = TestMaster::start("memory://membership-twice").await;
    let crew = Crew::start(&master.url, [1]);
    eventually("the node", async || {
        (master.status().await["nodes"][0]["state"] == "live").then_some(())
    })
    .await;
    let copied = v1::Hello { address: "127.0.0.1:9".into(), ..hello(1) };
    let rejected = rejection(&master.url, copied.clone()).await;
    assert!(rejected.reason.contains("127.0.0.1:10001"), "{}", rejected.reason);
    assert_eq!(master.status().await["nodes"][0]["address"], "127.0.0.1:10001");

    // A reconnect of the node replaces its session; once that is gone, the id may move.
    let again = Session::join(&master.url, hello(1)).await;
    crew.stop();
    drop(again);
    let moved = Session::join(&master.url, copied).await;
    moved
        .until("its own address", |seen| {
            seen.nodes.iter().any(|node| node.address == "127.0.0.1:9")
        })
        .await;
    master.stop().await;
}

#[tokio::test]
async fn a_silent_node_is_away_and_everything_is_sent_again_when_it_returns() {
    let silence = Duration::from_millis(300);
    let master = TestMaster::with(MasterConfig {
        node_silence: silence,
        ..config("memory://membership-silent")
    })
    .await;
    let node = Session::join(&master.url, hello(1)).await;
    let serve = async {
        let seen = node.until("the keyspace", |seen| !seen.catalogs.is_empty()).await;
        node.report(reports(&seen.catalogs[&KeyspaceId(1)], node.node, None)).await;
    };
    let (created, ()) = tokio::join!(master.create("ks1", 1), serve);
    created.unwrap();

    // The node sends nothing more, although its connection is fine.
    let away = eventually("the silence to be noticed", async || {
        let status = master.status().await;
        (status["nodes"][0]["state"] == "away").then_some(status)
    })
    .await;
    assert!(away["warnings"][0].as_str().unwrap().contains("has been away"), "{away}");
    assert_eq!(
        master.describe("ks1").await.unwrap()["placement"][0]["replicas"][0]["state"],
        "away"
    );
    node.until("the end of its session", |seen| seen.ended).await;

    let back =
        Session::join(&master.url, v1::Hello { address: "127.0.0.1:7".into(), ..hello(1) }).await;
    let seen = back.until("everything again", |seen| !seen.catalogs.is_empty()).await;
    assert_eq!(
        seen.nodes,
        [v1::NodeAddress { node_id: 1, address: "127.0.0.1:7".into(), ..seen.nodes[0].clone() }]
    );
    let mut topologies = master.watch("ks1").await;
    let topology = within("the topology", topologies.message()).await.unwrap().unwrap();
    assert_eq!(topology.shards[0].replicas[0].address, "127.0.0.1:7");
    master.stop().await;
}

#[tokio::test]
async fn a_master_keeps_its_cluster_and_its_keyspaces_over_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = format!("file://{}", dir.path().display());
    let master = TestMaster::start(&bucket).await;
    let crew = Crew::start(&master.url, [1, 2, 3]);
    eventually("three nodes", async || {
        (master.status().await["nodes"].as_array()?.len() == 3).then_some(())
    })
    .await;
    let created = master.create("ks1", 3).await.unwrap();
    let cluster_id = master.running.cluster_id.clone();
    master.stop().await;

    let master = TestMaster::start(&bucket).await;
    assert_eq!(master.running.cluster_id, cluster_id);
    let described = master.describe("ks1").await.unwrap();
    assert_eq!(
        described["placement"][0]["replicas"][0]["state"], "away",
        "nobody has said anything yet"
    );
    assert_eq!(described["placement"][0]["replicas"][0]["lsn"], json!(null));
    crew.follow(&master.url);
    let back = eventually("all to serve again", async || {
        let described = master.describe("ks1").await.unwrap();
        (described == created).then_some(described)
    })
    .await;
    assert_eq!(back["epoch"], 1);
    master.stop().await;
}

#[tokio::test]
async fn a_master_stops_with_open_streams_and_says_what_is_in_its_way() {
    let master = TestMaster::start("memory://membership-stop").await;
    let taken =
        MasterConfig { listen: master.running.listen, ..config("memory://membership-stop") };
    let error = Master::start(taken, CancellationToken::new()).await.unwrap_err();
    assert!(
        matches!(error, MasterError::PortInUse(address) if address == master.running.listen),
        "{error}"
    );
    assert!(error.to_string().contains("--listen"));
    let nowhere = Master::start(config("ftp://x"), CancellationToken::new()).await.unwrap_err();
    assert!(matches!(nowhere, MasterError::Bucket(_)), "{nowhere}");

    let _crew = Crew::start(&master.url, [1]);
    eventually("the node", async || {
        (master.status().await["nodes"][0]["state"] == "live").then_some(())
    })
    .await;
    master.create("ks1", 1).await.unwrap();
    let mut topologies = master.watch("ks1").await;
    within("the topology", topologies.message()).await.unwrap().unwrap();
    let began = tokio::time::Instant::now();
    master.stop().await;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "a stop does not wait for streams to end by themselves"
    );
    while let Ok(Some(_)) = within("the end of the watch", topologies.message()).await {}
}

/// The master connects to the advertised address of a node.
#[tokio::test]
async fn a_node_that_cannot_be_reached_where_it_says_is_refused() {
    let master =
        TestMaster::with(MasterConfig { dial_back: true, ..config("memory://membership-dial") })
            .await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let at = |address: &str| v1::Hello { address: address.into(), ..hello(1) };
    for (address, says) in [
        ("localhost", "has no port"),
        ("a b:1", "has no usable host"),
        ("127.0.0.1:0", "has no usable port"),
        ("0.0.0.0:80", "leads others to themselves"),
        ("no-such-host.invalid:8279", "cannot connect to no-such-host.invalid:8279"),
    ] {
        let refused = rejection(&master.url, at(address)).await;
        assert!(
            refused.reason.contains(says) && refused.reason.contains("--advertise"),
            "{refused:?}"
        );
    }
    let _node = Session::join(&master.url, at(&address)).await;
    // The node reports nothing, so the keyspace exists long before its creation is answered.
    tokio::select! {
        created = master.create("ks", 1) => panic!("{created:?}"),
        _ = eventually("the keyspace", async || master.describe("ks").await.ok()) => {}
    }
    // A node with data continues to serve it; it gets no more replicas, and the status shows a
    // warning.
    let status = master.status().await;
    assert!(!status["warnings"].to_string().contains("cannot be reached"), "{status}");
    drop(listener);
    let again = Session::join(&master.url, at(&address)).await;
    let status = master.status().await;
    assert!(status["warnings"].to_string().contains("cannot be reached at"), "{status}");
    assert!(status["nodes"][0]["unreachable"].is_string(), "{status}");
    let refused = master.create("more", 1).await.unwrap_err();
    assert!(refused.message().contains("no live node"), "{refused:?}");
    drop(again);
    master.stop().await;
}
