//! The model of one key: what an operation may do to it and see of it.

use porcupine_rs::Model;

/// The content of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Held {
    /// The value with this number; no two writes put the same value.
    Value(u64),
    /// A counter.
    Count(i64),
}

/// An operation with its outcome; no outcome means unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Did {
    /// A read: the content seen, with its event time.
    Get(Option<(Held, u64)>),
    /// A put, with its assigned event time.
    Put(u64, Option<u64>),
    /// A delete, with its assigned event time.
    Delete(Option<u64>),
    /// A put if the key is absent: whether it was applied, and its event time.
    IfAbsent(u64, Option<Option<u64>>),
    /// A put if the content read with this event time is still current.
    IfVersion((Held, u64), u64, Option<Option<u64>>),
    /// An increment, and the resulting sum.
    Add(i64, Option<i64>),
    /// An effect of a put that took effect more often than it was acknowledged.
    Effect(u64, u64),
}

impl Did {
    /// Returns the same operation with an unknown outcome.
    pub(super) fn unanswered(self) -> Self {
        match self {
            Did::Put(value, _) => Did::Put(value, None),
            Did::Delete(_) => Did::Delete(None),
            Did::IfAbsent(value, _) => Did::IfAbsent(value, None),
            Did::IfVersion(seen, value, _) => Did::IfVersion(seen, value, None),
            Did::Add(by, _) => Did::Add(by, None),
            Did::Get(_) | Did::Effect(..) => self,
        }
    }
}

/// The state of a key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct State {
    held: Option<Held>,
    /// The event time of the current content, or a time that is certainly earlier.
    time: u64,
    exact: bool,
}

/// The model of one key.
#[derive(Debug, Clone)]
pub(super) struct OneKey;

impl State {
    fn becomes(&self, held: Option<Held>, time: Option<u64>) -> (bool, Self) {
        match time {
            Some(time) => (time > self.time, Self { held, time, exact: true }),
            None => (true, Self { held, time: self.time, exact: false }),
        }
    }

    /// Returns whether this content is current; `None` when that is unknown.
    fn stands(&self, (held, time): (Held, u64)) -> Option<bool> {
        if self.held != Some(held) || time < self.time {
            Some(false)
        } else if self.exact {
            Some(time == self.time)
        } else {
            None
        }
    }
}

impl Model for OneKey {
    type State = State;
    type Op = Did;
    type Metadata = ();

    fn init() -> State {
        State { held: None, time: 0, exact: true }
    }

    fn step(state: &State, did: &Did) -> (bool, State) {
        let same = |legal| (legal, state.clone());
        match *did {
            Did::Get(None) => same(state.held.is_none()),
            // The reply to an increment does not carry its event time.
            Did::Get(Some(seen)) => match state.stands(seen) {
                Some(stands) => same(stands),
                None => (true, State { held: Some(seen.0), time: seen.1, exact: true }),
            },
            Did::Put(value, time) => state.becomes(Some(Held::Value(value)), time),
            Did::Effect(value, time) => state.becomes(Some(Held::Value(value)), Some(time)),
            Did::Delete(time) => state.becomes(None, time),
            Did::IfAbsent(value, outcome) => match outcome {
                Some(Some(time)) if state.held.is_none() => {
                    state.becomes(Some(Held::Value(value)), Some(time))
                }
                Some(Some(_)) => same(false),
                Some(None) => same(state.held.is_some()),
                None if state.held.is_none() => state.becomes(Some(Held::Value(value)), None),
                None => same(true),
            },
            Did::IfVersion(expected, value, outcome) => {
                let stands = state.stands(expected);
                match outcome {
                    Some(Some(_)) if stands == Some(false) => same(false),
                    Some(Some(time)) => state.becomes(Some(Held::Value(value)), Some(time)),
                    Some(None) => same(stands != Some(true)),
                    None if stands == Some(false) => same(true),
                    None => state.becomes(Some(Held::Value(value)), None),
                }
            }
            Did::Add(by, sum) => {
                let before = match state.held {
                    None => 0,
                    Some(Held::Count(count)) => count,
                    Some(Held::Value(_)) => return same(false),
                };
                let legal = sum.is_none_or(|sum| sum == before + by);
                (
                    legal,
                    State { held: Some(Held::Count(before + by)), time: state.time, exact: false },
                )
            }
        }
    }
}
