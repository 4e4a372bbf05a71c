//! Messages that the actor sends to other nodes, and their times.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::lease::event::News;
use crate::lease::may_have_served;
use crate::replica::authority::Refusal;
use crate::replica::command::{Control, Role};
use crate::replica::tests::replicator::{Member, members, shard_on};
use crate::replica::tests::support::{Rig, START_US};
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, Origin, ShardId};
use vasto_core::reconcile::evict;
use vasto_core::record::RangeState;

const KEY: Key = (KeyspaceId(7), ShardId(0));
const LINK: u64 = 5;

/// Returns the states that were sent over the incoming link since the last call.
fn states(
    actor: &mut Actor,
    sent: &mut mpsc::Receiver<Result<v1::LeaseReply, Status>>,
) -> Vec<(State, u64, u64)> {
    actor.flush();
    let mut all = Vec::new();
    while let Ok(Ok(reply)) = sent.try_recv() {
        all.extend(reply.grants.iter().map(|grant| (grant.state(), grant.grant, reply.number)));
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
    let request = v1::LeaseRequest {
        node_id: 2,
        process: 77,
        sent_ms: 1,
        seen_reply,
        unchanged: false,
        claims: vec![claim],
    };
    Event::Request { id: LINK, request }
}

/// The acting primary serves by the preferred primary's promise. When the preferred primary is able
/// again, the acting primary receives its claim and transfers leadership; denied before, its
/// unacknowledged writes would end with an unknown outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_serves_by_a_promise_hears_the_better_claim_before_it_is_denied() {
    let all = members(2).await;
    let (home, catalog) = (&all[0], shard_on(2));
    home.replicator.follow(&catalog);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while home.replicator.lag_behind(ReplicaId(2)).is_none() {
        assert!(std::time::Instant::now() < deadline, "it does not pull");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (events, receiver) = mpsc::channel(64);
    let mut actor = Actor::new(home.registry.clone(), events, receiver, watch::channel(false).0);
    actor.began_ms = 0;
    let order = catalog.shard(ShardId(0)).unwrap().replicas.clone();
    let placement = |primary_version| Event::Placed {
        replica: home.replica.clone(),
        replicator: home.replicator.clone(),
        order: order.clone(),
        primary_version,
        served: false,
    };
    let (replies, mut sent) = mpsc::channel(64);
    let (beats, _claims) = mpsc::channel(64);
    let start = now_ms();
    actor.take(placement(0), start);
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
    // The preferred primary becomes primary.
    actor.take(placement(9), start);
    assert!(actor.leases[&KEY].wants);
    assert_eq!(
        states(&mut actor, &mut sent),
        [],
        "denied before it can have heard the better claim"
    );
    actor.take(heartbeat(grant, number), start + ms(LEASE_BEAT));
    assert_eq!(states(&mut actor, &mut sent), []);
    // The acting primary does not receive the claim: it is denied.
    actor.take(heartbeat(grant, number), start + ms(LEASE_BEAT) * 4);
    actor.tick(start + ms(LEASE_BEAT) * 4);
    assert_eq!(
        states(&mut actor, &mut sent).iter().map(|sent| sent.0).collect::<Vec<_>>(),
        [State::Denied]
    );
}

/// Actor of one of two replicas, with the claims and replies that it sends to the scripted peer.
struct Claimant {
    actor: Actor,
    claims: mpsc::Receiver<v1::LeaseRequest>,
    replies: mpsc::Receiver<Result<v1::LeaseReply, Status>>,
    start: u64,
}

impl Claimant {
    fn new(home: &Member) -> Self {
        let catalog = shard_on(2);
        home.replicator.follow(&catalog);
        let (events, receiver) = mpsc::channel(64);
        let mut actor =
            Actor::new(home.registry.clone(), events, receiver, watch::channel(false).0);
        (actor.began_ms, actor.listening_ms) = (0, 0);
        home.registry.pulse.store(now_ms(), Ordering::Release);
        let (beats, claims) = mpsc::channel(64);
        let start = now_ms();
        let order = catalog.shard(ShardId(0)).unwrap().replicas.clone();
        let (replica, replicator) = (home.replica.clone(), home.replicator.clone());
        actor.take(
            Event::Placed { replica, replicator, order, primary_version: 5, served: false },
            start,
        );
        actor.take(Event::Link { node: NodeId(2), news: News::Up(beats) }, start);
        let (sender, replies) = mpsc::channel(64);
        actor.take(Event::Opened { id: LINK, replies: sender }, start);
        Self { actor, claims, replies, start }
    }

    /// Delivers the peer's promise.
    fn promise(&mut self, grant: u64) {
        let state = State::Granted as i32;
        let (keyspace_id, shard) = (KEY.0.0, KEY.1.0);
        let grant = v1::LeaseGrant {
            keyspace_id,
            shard,
            replica_id: 1,
            state,
            grant,
            ..v1::LeaseGrant::default()
        };
        let reply =
            v1::LeaseReply { process: 77, sent_ms: self.start, number: 1, grants: vec![grant] };
        self.actor.take(Event::Link { node: NodeId(2), news: News::Reply(reply) }, self.start);
    }

    /// Delivers the peer's claim, better than this replica's or not.
    fn claim(&mut self, primary_version: u64) {
        let (keyspace_id, shard) = (KEY.0.0, KEY.1.0);
        let claim = v1::LeaseClaim {
            keyspace_id,
            shard,
            replica_id: 2,
            able: true,
            primary_version,
            ..Default::default()
        };
        let request = v1::LeaseRequest {
            node_id: 2,
            process: 77,
            sent_ms: 1,
            claims: vec![claim],
            ..Default::default()
        };
        self.actor.take(Event::Request { id: LINK, request }, self.start);
    }

    /// Returns the grant that the heartbeat due now names as held.
    fn held(&mut self) -> u64 {
        self.actor.beat(true, self.start);
        let mut held = None;
        while let Ok(request) = self.claims.try_recv() {
            held = request.claims.first().map(|claim| claim.held_grant).or(held);
        }
        held.unwrap()
    }

    /// Returns the origins that the replica names as it promises itself to the peer.
    async fn named(&mut self) -> Vec<Origin> {
        loop {
            match self.actor.receiver.recv().await.unwrap() {
                named @ Event::Named { .. } => {
                    self.actor.take(named, self.start);
                    break;
                }
                other => self.actor.take(other, self.start),
            }
        }
        self.actor.flush();
        loop {
            let reply = self.replies.recv().await.unwrap().unwrap();
            let granted = reply.grants.iter().find(|grant| grant.state() == State::Granted);
            if let Some(granted) = granted {
                return vasto_proto::convert::vector_from_wire(&granted.vector)
                    .into_keys()
                    .collect();
            }
        }
    }

    fn serves(&self) -> bool {
        self.actor.leases[&KEY].has_authority()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promise_that_was_let_go_of_is_not_relied_on_again() {
    let all = members(2).await;
    let mut claimant = Claimant::new(&all[0]);
    claimant.promise(9);
    assert_eq!((claimant.held(), claimant.serves()), (9, true));
    claimant.claim(6);
    // Nothing was sent meanwhile: the promise stands.
    claimant.claim(4);
    assert_eq!((claimant.held(), claimant.serves()), (9, true));
    claimant.claim(6);
    assert_eq!((claimant.held(), claimant.serves()), (0, false));
    // The peer has been free to serve since; its denial is still on its way.
    claimant.claim(4);
    assert_eq!(
        (claimant.held(), claimant.serves()),
        (0, false),
        "it relies on a promise that it has given back"
    );
    claimant.promise(10);
    assert_eq!((claimant.held(), claimant.serves()), (10, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_was_opened_again_says_that_it_has_served() {
    let open = |again: bool| {
        let rig = Rig::of(ShardId(0), ReplicaId(1), 1, RangeState::Owned);
        let mut replica = rig.create();
        if again {
            rig.close(replica);
            replica = rig.open(&rig.path, false).unwrap();
        }
        (rig, replica)
    };
    let placed = shard_on(2);
    let elsewhere = evict(&placed, ReplicaId(1), false, START_US, 2).unwrap();
    for again in [false, true] {
        let (rig, replica) = tokio::task::spawn_blocking(move || open(again)).await.unwrap();
        let member = Member::of(rig, replica);
        // Writes that the previous process acknowledged may be held by no other replica.
        assert_eq!(may_have_served(&member.replica, &placed), again);
        // A replica under construction has acknowledged nothing.
        assert!(!may_have_served(&member.replica, &elsewhere));
        let version = CatalogVersion(elsewhere.version.0 + 1);
        let order = Control::ApplyCatalog { epoch: Epoch(1), version, role: Role::Detached };
        member.replica.control(order).await.unwrap();
        assert_eq!(
            may_have_served(&member.replica, &elsewhere),
            again,
            "that catalog is of before"
        );
    }
}

/// The first record of an incarnation that has not served was acknowledged to no client: the
/// serving replica goes on without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reopened_replica_that_has_not_served_names_no_record_of_this_incarnation() {
    for serves in [false, true] {
        let all = members(2).await;
        let mut claimant = Claimant::new(&all[0]);
        if serves {
            claimant.promise(9);
        }
        assert_eq!(claimant.serves(), serves);
        claimant.claim(6);
        let own = Origin { replica: ReplicaId(1), incarnation: all[0].replica.incarnation() };
        assert_eq!(claimant.named().await.contains(&own), serves);
    }
}

/// The shard loses its other replica and gets a new one: no other replica can have served
/// meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_serves_alone_goes_on_in_the_same_term() {
    let all = members(2).await;
    let mut claimant = Claimant::new(&all[0]);
    let placed = |claimant: &mut Claimant, count| {
        let (replica, replicator) = (all[0].replica.clone(), all[0].replicator.clone());
        let order = shard_on(count).shard(ShardId(0)).unwrap().replicas.clone();
        claimant.actor.take(
            Event::Placed { replica, replicator, order, primary_version: 5, served: false },
            claimant.start,
        );
        all[0].replica.authority().admit().ok()
    };
    claimant.promise(9);
    let term = placed(&mut claimant, 2).unwrap();
    assert_eq!([1, 2, 1].map(|count| placed(&mut claimant, count)), [Some(term); 3]);
    claimant.actor.leases.get_mut(&KEY).unwrap().step_back(false);
    assert_eq!(placed(&mut claimant, 1), Some(term + 1), "another one may have served in between");
}

/// The peer has ended while the network was cut: it may have served until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authority_that_rested_on_silence_is_another_term_once_the_silent_one_is_found_dead() {
    let all = members(2).await;
    let mut claimant = Claimant::new(&all[0]);
    claimant.promise(9);
    let authority = all[0].replica.authority();
    claimant.actor.take(Event::Closed { id: LINK }, claimant.start);
    for news in [News::Lost, News::Reach(Reach::Unreachable, claimant.start)] {
        claimant.actor.take(Event::Link { node: NodeId(2), news }, claimant.start);
    }
    for beat in 1..=20 {
        let now = claimant.start + ms(LEASE_BEAT) * beat;
        all[0].registry.pulse.store(now, Ordering::Release);
        claimant.actor.tick(now);
    }
    assert_eq!(authority.admit(), Err(Refusal::Probe));
    let silent = authority.admit_probed().unwrap();
    let now = claimant.start + ms(LEASE_BEAT) * 20;
    claimant
        .actor
        .take(Event::Link { node: NodeId(2), news: News::Reach(Reach::Refused, now) }, now);
    assert_eq!(authority.admit(), Ok(silent + 1));
}
