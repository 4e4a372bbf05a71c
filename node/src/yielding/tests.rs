//! The controller with a lane of bulk work and requests that it slows down; and a real download
//! that yields.
#![allow(clippy::unwrap_used)]

use object_store::memory::InMemory;
use vasto_core::catalog::{Catalog, KeyspaceSpec};
use vasto_core::ids::{KeyspaceId, NodeId, PlanId};
use vasto_core::reconcile::start_resize;
use vasto_shipping::bucket::Bucket;
use vasto_shipping::download::{DownloadProgress, Wanted, download};

use super::*;
use crate::bulk::{Activity, Lane};

const MIB: u64 = 1 << 20;
/// Steps in which bulk work passes within a tick.
const STEPS: u32 = 25;

/// A machine: requests take twice their calm when bulk work passes at `knee` MiB/s.
struct Machine {
    lane: Lane,
    latencies: Latencies,
    control: Control,
    began: Instant,
    now: Duration,
    random: u64,
    /// Microseconds that 99 of 100 requests do not exceed without bulk work, and how much windows
    /// differ.
    calm_us: f64,
    noise: f64,
    /// Requests in a tick.
    requests: u32,
    knee: f64,
    /// MiB/s of bulk work that nothing holds back, and what has not passed of that.
    full: f64,
    room: f64,
    wants: bool,
    bound: Bound,
}

/// What has happened in some time.
#[derive(Debug, Default)]
struct Seen {
    /// MiB/s.
    rate: f64,
    /// Part of the ticks in which requests took more than twice their calm, and an eighth: so exact
    /// are times.
    slow: f64,
    /// The smallest and the greatest share.
    shares: Option<(f64, f64)>,
    /// Longest time in which nothing has passed.
    stood_still: Duration,
    last: Option<Bound>,
}

impl Machine {
    fn new(knee: f64, full: f64) -> Self {
        let began = Instant::now();
        Self {
            lane: Lane::new(began),
            latencies: Latencies::new(),
            control: Control::new(2.0),
            began,
            now: Duration::ZERO,
            random: 0x9E37_79B9_7F4A_7C15,
            calm_us: 1_000.0,
            noise: 0.15,
            requests: 500,
            knee,
            full,
            room: 0.0,
            wants: false,
            bound: Bound::Free,
        }
    }

    /// The same after so long without bulk work.
    fn rested(mut self) -> Self {
        self.run(20);
        self.wants = true;
        self
    }

    /// Returns a number from 0 to 1.
    fn random(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One tick; returns the MiB that have passed, and the factor of the times of requests.
    fn tick(&mut self) -> (u32, f64) {
        let mut passed = 0;
        for _ in 0..STEPS {
            self.now += TICK / STEPS;
            self.room = (self.room + self.full * (TICK / STEPS).as_secs_f64()).min(self.full * 0.1);
            while self.wants && self.room >= 1.0 {
                if !self.lane.wait(self.began + self.now).is_zero() {
                    break;
                }
                self.lane.add(MIB);
                (passed, self.room) = (passed + 1, self.room - 1.0);
            }
        }
        let load = f64::from(passed) / TICK.as_secs_f64() / self.knee;
        // Close enough to a normal distribution.
        let normal = ((0..4).map(|_| self.random()).sum::<f64>() - 2.0) / 0.577;
        let factor = (normal * self.noise).exp() * (1.0 + load * load);
        for n in 0..self.requests {
            let rank = (f64::from(n) + 0.5) / f64::from(self.requests);
            let us = self.calm_us * factor * -(1.0 - rank).ln() / 100f64.ln();
            let begun = self.now.saturating_sub(Duration::from_secs_f64(us / 1e6));
            self.latencies.note(Class::SyncedWrites, Some(begun), self.now);
        }
        let bulk = self.lane.look(self.began + self.now);
        let sample = Sample { at: self.now, requests: self.latencies.counts(), bulk };
        self.bound = self.control.next(&sample);
        self.lane.set_bound(self.bound, self.began + self.now);
        (passed, factor)
    }

    fn run(&mut self, seconds: u32) -> Seen {
        let ticks = seconds * 4;
        let (mut seen, mut still) = (Seen::default(), Duration::ZERO);
        for _ in 0..ticks {
            let (passed, factor) = self.tick();
            seen.rate += f64::from(passed) / f64::from(seconds);
            seen.slow += if factor > 2.25 { 1.0 / f64::from(ticks) } else { 0.0 };
            still = if passed == 0 { still + TICK } else { Duration::ZERO };
            seen.stood_still = seen.stood_still.max(still);
            if let Bound::Share(share) = self.bound {
                let (least, most) = seen.shares.unwrap_or((share, share));
                seen.shares = Some((least.min(share), most.max(share)));
            }
            seen.last = Some(self.bound);
        }
        seen
    }

    fn calm(&self) -> Duration {
        self.control.classes[Class::SyncedWrites as usize].calm().unwrap()
    }
}

#[test]
fn bulk_work_settles_where_requests_take_twice_their_calm() {
    let mut machine = Machine::new(100.0, 400.0).rested();
    assert_eq!(machine.bound, Bound::Share(1.0 / 8.0), "it does not begin with all there is");
    let first = machine.run(40);
    assert!(first.slow < 0.25, "{first:?}");
    let settled = machine.run(80);
    assert!((50.0..105.0).contains(&settled.rate) && settled.slow < 0.2, "{settled:?}");
    let (least, most) = settled.shares.unwrap();
    assert!(least * 5.0 > most, "it goes up and down: {settled:?}");
    let calm_us = machine.calm().as_micros();
    assert!((800..1_300).contains(&calm_us), "bulk work has no part in it: {calm_us}");
}

#[test]
fn bulk_work_that_harms_nobody_takes_all_there_is() {
    let mut machine = Machine::new(2_000.0, 400.0).rested();
    machine.run(40);
    let seen = machine.run(20);
    assert!(seen.rate > 390.0 && seen.last == Some(Bound::Free), "{seen:?}");
}

#[test]
fn bulk_work_is_free_while_nobody_is_there_and_yields_to_whoever_comes() {
    let mut machine = Machine::new(100.0, 400.0);
    machine.requests = 0;
    let mut machine = machine.rested();
    let seen = machine.run(10);
    assert!(seen.rate > 390.0 && seen.shares.is_none(), "{seen:?}");
    machine.requests = 500;
    machine.run(10);
    let seen = machine.run(60);
    assert!(seen.rate < 105.0 && seen.slow < 0.2, "{seen:?}");
    machine.requests = 0;
    machine.run(6);
    let seen = machine.run(10);
    assert!(seen.rate > 390.0 && seen.shares.is_none(), "{seen:?}");
}

#[test]
fn bulk_work_that_is_never_good_for_anybody_goes_on_all_the_same() {
    let mut machine = Machine::new(0.5, 400.0).rested();
    let first = machine.run(60);
    let later = machine.run(600);
    for seen in [first, later] {
        assert!(seen.rate > 2.0 && seen.rate < 16.0, "{seen:?}");
        assert!(seen.stood_still < Duration::from_millis(2_500), "{seen:?}");
    }
    assert!(machine.calm() < Duration::from_micros(2_000), "{:?}", machine.calm());
}

/// Beside bulk work nobody knows what the calm of another load is; the moments without do.
#[test]
fn another_load_has_another_calm() {
    let mut machine = Machine::new(400.0, 400.0).rested();
    machine.run(40);
    machine.calm_us = 4_000.0;
    machine.run(60);
    let seen = machine.run(60);
    assert!(seen.rate > 150.0, "{seen:?}");
    assert!(machine.calm() > Duration::from_micros(2_500), "{:?}", machine.calm());
    machine.calm_us = 300.0;
    machine.run(60);
    assert!(machine.calm() < Duration::from_micros(1_200), "{:?}", machine.calm());
}

#[test]
fn after_a_restart_the_calm_is_learned_before_bulk_work_goes_on() {
    let mut machine = Machine::new(100.0, 400.0);
    machine.wants = true;
    machine.run(1);
    assert_eq!(machine.bound, Bound::Held);
    machine.run(2);
    assert!((700..1_400).contains(&machine.calm().as_micros()), "{:?}", machine.calm());
    machine.run(40);
    let seen = machine.run(60);
    assert!((40.0..105.0).contains(&seen.rate) && seen.slow < 0.2, "{seen:?}");
}

#[test]
fn requests_that_stood_still_with_the_process_slow_nothing_down() {
    let mut machine = Machine::new(2_000.0, 400.0).rested();
    machine.run(40);
    assert_eq!(machine.bound, Bound::Free);
    machine.now += Duration::from_secs(10);
    for _ in 0..50 {
        let begun = machine.now - Duration::from_secs(10);
        machine.latencies.note(Class::SyncedWrites, Some(begun), machine.now);
    }
    machine.tick();
    assert_eq!(machine.bound, Bound::Free);
}

#[test]
fn without_bulk_work_the_bound_is_ready_for_it() {
    let mut control = Control::new(2.0);
    let latencies = Latencies::new();
    let mut bounds = Vec::new();
    for tick in 1..40u32 {
        let at = TICK * tick;
        for _ in 0..200 {
            latencies.note(Class::Reads, Some(at - Duration::from_millis(1)), at);
        }
        let bulk = Activity::default();
        bounds.push(control.next(&Sample { at, requests: latencies.counts(), bulk }));
    }
    assert_eq!((bounds[0], bounds[38]), (Bound::Free, Bound::Share(1.0 / 8.0)));
}

const KEYSPACE: KeyspaceId = KeyspaceId(1);
/// Objects of a download, and their size.
const OBJECTS: (usize, u64) = (6, 8 * MIB);

async fn bucket_with_objects() -> (Bucket, Vec<Wanted>) {
    let bucket = Bucket::from_store("memory://b", std::sync::Arc::new(InMemory::new()));
    let body = vec![7u8; OBJECTS.1 as usize];
    let crc32c = crc32c::crc32c(&body);
    let mut wanted = Vec::new();
    for n in 0..OBJECTS.0 {
        let (key, file_name) = (format!("data/{n}"), format!("{n}.sst"));
        bucket.create(&key, body.clone().into()).await.unwrap();
        wanted.push(Wanted { key, bytes: OBJECTS.1, crc32c, file_name });
    }
    (bucket, wanted)
}

/// What the node runs: the gate, a plan of its catalog, a download of the plan, and the samples.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_is_slowed_down_while_requests_are_slow_and_free_afterwards() {
    let latencies: &'static Latencies = Box::leak(Box::new(Latencies::new()));
    let gate = Arc::new(BulkGate::default());
    let first = Catalog::first(KEYSPACE, "ks", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 1);
    gate.apply(&start_resize(&first, 2, &[vec![NodeId(2)]], 2, 2).unwrap());
    let mut yielding = Yielding::new(gate.clone(), latencies, 2.0).unwrap();
    let mut tick = |requests: u32, time: Duration| {
        let now = crate::clock::since_boot();
        (0..requests).for_each(|_| latencies.note(Class::Reads, Some(now - time), now));
        yielding.tick(Instant::now());
    };
    let (calm, slow) = (Duration::from_millis(1), Duration::from_millis(30));
    let pause = || tokio::time::sleep(Duration::from_millis(100));
    for _ in 0..10 {
        tick(200, calm);
        pause().await;
    }
    let (open, wanted) = bucket_with_objects().await;
    let bucket = open.with_pacer(gate.of(KEYSPACE, PlanId(1)));
    let (one, two) = (vasto_testkit::memory_dir(), vasto_testkit::memory_dir());
    let (progress, cancel) = (DownloadProgress::default(), CancellationToken::new());
    let began = Instant::now();
    {
        let fetch = download(&bucket, &wanted, one.path(), 4, &progress, &cancel);
        tokio::pin!(fetch);
        while began.elapsed() < Duration::from_secs(3) {
            tick(200, slow);
            tokio::select! {
                ended = &mut fetch => panic!("after {:?}: {ended:?}", began.elapsed()),
                () = pause() => {}
            }
        }
        let bytes = progress.bytes.load(Ordering::Relaxed);
        assert!(bytes > 0 && bytes < OBJECTS.1 * 5, "{bytes}");
        let rate = gate.held_back_to().unwrap();
        assert!(rate < 16 * MIB, "{rate}");
        // Nobody asks for anything any more.
        let ended = loop {
            tick(0, calm);
            tokio::select! {
                ended = &mut fetch => break ended,
                () = pause() => {}
            }
            assert!(began.elapsed() < Duration::from_secs(60), "it starves");
        };
        ended.unwrap();
    }
    while gate.rates_left()[0].1.is_some() {
        tick(0, calm);
        pause().await;
        assert!(began.elapsed() < Duration::from_secs(60), "it is not free again");
    }
    let began = Instant::now();
    download(&bucket, &wanted, two.path(), 4, &progress, &cancel).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    drop(yielding);
    assert_eq!(gate.held_back_to(), None);
}
