//! Tests of admission and acknowledgement under terms that end.

#![allow(clippy::unwrap_used)]

use std::sync::mpsc::channel;

use super::*;

#[test]
fn what_rests_on_silence_is_acknowledged_after_a_probe_that_began_later() {
    for modifies in [false, true] {
        let authority = Authority::default();
        authority.publish(Standing::Serving(Term {
            number: 4,
            beliefs: Vec::new(),
            probing: true,
        }));
        let running = authority.begin_round();
        let (sender, answers) = channel();
        authority.acknowledge(4, modifies, move |answer| sender.send(answer.is_ok()).unwrap());
        assert!(authority.wants_probe());
        authority.end_round(running);
        assert!(
            answers.try_recv().is_err(),
            "that probe may have failed before the write was done"
        );
        let next = authority.begin_round();
        assert!(answers.try_recv().is_err());
        authority.end_round(next);
        assert!(answers.try_recv().unwrap());
        assert!(!authority.wants_probe());
        // The silent peer was there: another term has begun, or none.
        let (sender, answers) = channel();
        authority.acknowledge(4, modifies, move |answer| sender.send(answer.is_ok()).unwrap());
        let next = authority.begin_round();
        authority.publish(Standing::Out { elsewhere: true });
        authority.end_round(next);
        assert!(answers.try_recv().is_err());
    }
}

/// The term ended before all writes were listed: a put is only ordered, a counter has another
/// basis.
#[test]
fn once_a_term_has_ended_a_put_waits_for_the_successor_to_hold_it_and_a_modification_is_given_up() {
    let authority = Authority::default();
    authority.publish(Standing::Serving(Term { number: 4, beliefs: Vec::new(), probing: true }));
    let (sender, answers) = channel();
    for (name, modifies) in [("put", false), ("add", true)] {
        let sender = sender.clone();
        authority
            .acknowledge(4, modifies, move |verdict| sender.send((name, verdict.is_ok())).unwrap());
    }
    authority.publish(Standing::Out { elsewhere: false });
    authority.lapse(4);
    assert_eq!(answers.try_recv().unwrap(), ("add", false));
    assert!(answers.try_recv().is_err());
    authority.handed_over(4, false);
    assert_eq!(answers.try_recv().unwrap(), ("put", true));
    // A write just before the transfer, whose acknowledgement is requested after it.
    let late = sender.clone();
    authority.acknowledge(4, true, move |verdict| late.send(("late", verdict.is_ok())).unwrap());
    assert_eq!(answers.try_recv().unwrap(), ("late", false));
    authority.acknowledge(5, false, move |verdict| sender.send(("next", verdict.is_ok())).unwrap());
    assert!(answers.try_recv().is_err(), "what was written after that was not named");
    authority.abandon();
}

fn serving(number: u64, for_ms: i64) -> Standing {
    let until = Arc::new(AtomicU64::new(now_ms().saturating_add_signed(for_ms)));
    Standing::Serving(Term { number, beliefs: vec![until], probing: false })
}

#[test]
fn authority_that_is_not_renewed_ends_by_itself() {
    let authority = Authority::default();
    assert_eq!(authority.admit(), Ok(0), "without leases nobody else serves");
    authority.publish(serving(1, 60_000));
    assert_eq!(authority.admit(), Ok(1));
    assert!(authority.holds(1) && !authority.holds(2));
    authority.publish(serving(1, -1));
    assert_eq!(authority.admit(), Err(Refusal::Wait));
    assert!(!authority.holds(1));
    authority.publish(Standing::Out { elsewhere: true });
    assert_eq!(authority.admit(), Err(Refusal::Elsewhere));
}

#[test]
fn a_write_without_authority_waits_and_a_modification_is_bound_to_its_term() {
    let authority = Authority::default();
    authority.publish(serving(1, -1));
    let (sender, answers) = channel();
    for (name, modifies) in [("put", false), ("add", true)] {
        let sender = sender.clone();
        authority
            .acknowledge(1, modifies, move |verdict| sender.send((name, verdict.is_ok())).unwrap());
    }
    authority.settle();
    assert!(answers.try_recv().is_err(), "both wait");
    authority.publish(serving(2, 60_000));
    let mut both = [answers.try_recv().unwrap(), answers.try_recv().unwrap()];
    both.sort_unstable();
    assert_eq!(
        both,
        [("add", false), ("put", true)],
        "what was done on an older state is not acknowledged"
    );
}

#[test]
fn a_write_that_the_successor_holds_is_acknowledged_after_the_hand_over() {
    let authority = Authority::default();
    authority.publish(Standing::Out { elsewhere: true });
    let (sender, answers) = channel();
    for term in [3, 4] {
        let sender = sender.clone();
        authority
            .acknowledge(term, true, move |verdict| sender.send((term, verdict.is_ok())).unwrap());
    }
    authority.handed_over(4, true);
    assert_eq!(answers.try_recv().unwrap(), (4, true));
    assert!(answers.try_recv().is_err());
    authority.abandon();
}

#[tokio::test]
async fn a_request_waits_for_a_round_of_probes_that_began_after_it() {
    let authority = Arc::new(Authority::default());
    let running = authority.begin_round();
    let asking = authority.clone();
    let asked = tokio::spawn(async move { asking.probed().await });
    while !authority.wants_probe() {
        tokio::task::yield_now().await;
    }
    authority.end_round(running);
    tokio::task::yield_now().await;
    assert!(!asked.is_finished(), "that round may have begun before the network was whole again");
    let next = authority.begin_round();
    authority.end_round(next);
    asked.await.unwrap();
}
