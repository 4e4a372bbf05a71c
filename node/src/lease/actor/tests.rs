//! What the others are told, and when.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::replica::tests::duties::{members, shard_on};

const KEY: Key = (KeyspaceId(7), ShardId(0));
const LINK: u64 = 5;

/// What was sent over the incoming link since the last look.
fn states(actor: &mut Actor, sent: &mut mpsc::Receiver<Result<v1::LeaseReply, Status>>) -> Vec<(State, u64, u64)> {
    actor.flush();
    let mut all = Vec::new();
    while let Ok(Ok(reply)) = sent.try_recv() {
        all.extend(reply.grants.iter().map(|one| (one.state(), one.grant, reply.number)));
    }
    all
}

fn heartbeat(held_grant: u64, seen_reply: u64) -> Event {
    let claim = v1::LeaseClaim {
        keyspace_id: KEY.0.0,
        shard: KEY.1.0,
        replica_id: 2,
        able: true,
        primary_version: 1,
        serving: true,
        held_grant,
        covered: held_grant != 0,
    };
    let request =
        v1::LeaseRequest { node_id: 2, process: 77, sent_ms: 1, seen_reply, unchanged: false, claims: vec![claim] };
    Event::Request { id: LINK, request }
}

/// Who acts for the home serves by the home's promise. The home is able again: the other one hears its claim and
/// hands over; if it were denied before, what it has not acknowledged yet would end with an unknown outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_serves_by_a_promise_hears_the_better_claim_before_it_is_denied() {
    let all = members(2).await;
    let (home, catalog) = (&all[0], shard_on(2));
    home.duties.follow(&catalog);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while home.duties.lag_behind(ReplicaId(2)).is_none() {
        assert!(std::time::Instant::now() < deadline, "it does not pull");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (events, receiver) = mpsc::channel(64);
    let mut actor = Actor::new(home.core.clone(), events, receiver);
    actor.began_ms = 0;
    let order = catalog.shard(ShardId(0)).unwrap().replicas.clone();
    let seat = |primary_version| Event::Seat {
        replica: home.replica.clone(),
        duties: home.duties.clone(),
        order: order.clone(),
        primary_version,
    };
    let (replies, mut sent) = mpsc::channel(64);
    let (beats, _claims) = mpsc::channel(64);
    let start = now_ms();
    actor.take(seat(0), start);
    actor.take(Event::Link { node: NodeId(2), news: News::Up(beats) }, start);
    actor.take(Event::Opened { id: LINK, replies }, start);
    actor.take(heartbeat(0, 0), start);
    let named = loop {
        match actor.receiver.recv().await.unwrap() {
            named @ Event::Named { .. } => break named,
            other => actor.take(other, start),
        }
    };
    actor.take(named, start);
    let (state, grant, number) = *states(&mut actor, &mut sent).last().unwrap();
    assert_eq!(state, State::Granted);
    actor.take(heartbeat(grant, number), start);
    assert_eq!(states(&mut actor, &mut sent), []);
    // It is primary.
    actor.take(seat(9), start);
    assert!(actor.seats[&KEY].wants);
    assert_eq!(states(&mut actor, &mut sent), [], "denied before it can have heard the better claim");
    actor.take(heartbeat(grant, number), start + ms(LEASE_BEAT));
    assert_eq!(states(&mut actor, &mut sent), []);
    // It does not hear it: it is denied.
    actor.take(heartbeat(grant, number), start + ms(LEASE_BEAT) * 4);
    actor.tick(start + ms(LEASE_BEAT) * 4);
    assert_eq!(states(&mut actor, &mut sent).iter().map(|one| one.0).collect::<Vec<_>>(), [State::Denied]);
}
