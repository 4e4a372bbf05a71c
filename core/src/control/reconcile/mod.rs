//! The rules: which catalog version comes next.
//!
//! **Invariant:** every rule is a pure function of the last version, the reports, the presence of
//! the nodes and the time.

mod advance;
mod commit;
mod copy;
mod drain;
mod evict;
mod failover;
mod grow;
mod members;
#[cfg(test)]
mod members_tests;
mod moves;
#[cfg(test)]
mod moves_tests;
mod outcome;
mod pace;
#[cfg(test)]
mod pace_tests;
mod placement;
#[cfg(test)]
mod plan_tests;
mod progress;
mod quarantine;
mod refusal;
mod repair;
mod resize;
#[cfg(test)]
mod resize_tests;
mod seal;
mod shrink;
#[cfg(test)]
mod shrink_tests;
mod trim;
#[cfg(test)]
mod trim_tests;
mod undecided;
mod view;
mod waits;

pub use advance::{advance, advance_shown};
pub use copy::give_up_on;
pub use drain::{cancel_drain, concerns, drain_node, so_far};
pub use evict::{EvictError, evict, evict_on_request};
pub use failover::{
    HOME_FOR_US, LeadershipChanges, Presence, QUIET_US, advance_primaries, is_unsettled,
    leadership_changes_between, successor, transfer_leadership,
};
pub use members::{advance_members, is_incomplete};
pub use moves::{
    MoveError, MoveOrder, advance_moves, cancel_move, cancel_moves, give_up_moves_to,
    in_the_way_of_moves, move_not_before, prefer, start_moves,
};
pub use outcome::{abort, report_of};
pub use pace::{
    Pace, Whole, WholePace, check_part, check_rate, drain_of_plan, follow_wholes, pace_drain,
    pace_moves, parts_of_wholes, set_pace,
};
pub use progress::Advance;
pub use quarantine::{end_quarantines, in_the_way};
pub use refusal::{PaceError, PlanError};
pub use repair::{AVOID_NODE_US, COPY_AGAIN_MAX_US, COPY_AGAIN_US, nodes_to_avoid};
pub use resize::{start_resize, undo_seal};
pub use seal::sealing_write_max;
pub use undecided::{Look, Undecided, is_decided, look, undo_undecided};
pub use view::{Around, Site};
pub use waits::waits_for;
