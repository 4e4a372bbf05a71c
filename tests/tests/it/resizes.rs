//! Random walks: keyspaces with one, two and three replicas change their shard counts at random
//! under writers that record what was acknowledged, while every 3 s something fails: a node, the
//! master, a client, the network of one of them, or the bucket.
//!
//! A fault may undo a resize, which is asked for again then. Faults stop a while after each round
//! has begun, and all its resizes end within a bound from then on. After each walk nothing is lost,
//! no delete is undone, replicas are the same, and the bucket is complete and holds no garbage.
//!
//! `VASTO_RESIZES` sets the number of resizes (5), or `VASTO_RESIZES_MINUTES` the time after which
//! no walk begins any more. `VASTO_RESIZES_SEED` repeats the choices of a seed, but not their
//! interleaving with the processes. Each walk prints its seed, and what it was like.

mod events;
mod goal;
mod walk;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vasto_tests::{Numbers, setting};

use walk::{KEYSPACES, walked};

/// Rounds of a walk; each resizes every keyspace once.
const ROUNDS: u64 = 6;

fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let drawn = std::collections::hash_map::RandomState::new().build_hasher().finish();
    setting("VASTO_RESIZES_SEED", drawn)
}

/// Returns the choices of a round, one sequence for each purpose: those of a round do not depend on
/// how many the rounds before it have made.
fn choices(seed: u64, round: u64, purpose: u64) -> Numbers {
    let mut seeds = Numbers::new(seed);
    let mut last = seeds.draw();
    for _ in 0..2 * round + purpose {
        last = seeds.draw();
    }
    Numbers::new(last)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_resizes_under_faults_lose_nothing_and_end() -> Result<()> {
    let resizes: u64 = setting("VASTO_RESIZES", 5);
    let minutes: u64 = setting("VASTO_RESIZES_MINUTES", 0);
    let seed = seed();
    match minutes {
        0 => println!("{resizes} resizes, VASTO_RESIZES_SEED={seed}"),
        _ => println!("resizes for {minutes} minutes, VASTO_RESIZES_SEED={seed}"),
    }
    let (began, keyspaces) = (Instant::now(), KEYSPACES.len() as u64);
    let mut left = resizes.div_ceil(keyspaces);
    for walk in 0u64.. {
        let is_over = began.elapsed() >= Duration::from_secs(60 * minutes);
        let rounds = match minutes {
            0 => left.min(ROUNDS),
            _ if is_over => 0,
            _ => ROUNDS,
        };
        if rounds == 0 {
            break;
        }
        left = left.saturating_sub(rounds);
        let (seed, began) = (seed.wrapping_add(walk), Instant::now());
        let repeat = format!(
            "VASTO_RESIZES_SEED={seed} VASTO_RESIZES={} repeats its choices",
            rounds * keyspaces
        );
        let told = Box::pin(walked(seed, rounds)).await;
        let told = told.with_context(|| format!("walk {walk}: {repeat}"))?;
        println!("walk {walk}: {told}, {:.1} s; {repeat}", began.elapsed().as_secs_f64());
    }
    Ok(())
}

#[test]
fn a_seed_repeats_the_choices_of_its_walk_and_another_one_makes_others() {
    use std::collections::BTreeSet;

    use events::EVENTS;
    use goal::other_than;
    let walk = |seed: u64| {
        let mut shards = vec![3];
        let mut all = Vec::new();
        for round in 0..ROUNDS {
            let [mut of_goals, mut of_events] = [0, 1].map(|purpose| choices(seed, round, purpose));
            let from = shards[round as usize];
            let to = other_than(from, &mut of_goals);
            assert!((1..=16).contains(&to) && to != from, "{from} -> {to}");
            shards.push(to);
            all.extend((0..4).map(|_| of_events.of(&EVENTS)));
        }
        (shards, all)
    };
    let mut seen = BTreeSet::new();
    for seed in 0..300 {
        assert_eq!(walk(seed), walk(seed));
        assert_ne!(walk(seed), walk(seed + 1));
        seen.extend(walk(seed).0);
    }
    assert_eq!(seen, (1..=16).collect::<BTreeSet<u32>>());
}
