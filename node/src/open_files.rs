//! The process's limit of open files, and each replica's share of it.
//!
//! Every SST that a replica reads is an open file. The usual limit of a shell is 1,024, which a few
//! replicas use up; the administrator's limit is the hard limit, and the process raises its own to
//! that.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vasto_core::limits::{CONNECTIONS_MAX, TABLES_OPEN_MAX, TABLES_OPEN_MIN};

/// Limit to request when there is no hard limit: the kernel's own for one process, by default.
const UNLIMITED: u64 = 1 << 20;
/// Files that a replica has open beside its tables: logs, their readers, locks, the database's own.
const OTHERS_EACH: u64 = 16;
/// Connections that are accepted under any limit.
const CONNECTIONS_MIN: usize = 16;

/// Raises the limit as far as this process may; returns the resulting limit.
pub(crate) fn raise() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(UNLIMITED);
    match setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum }) {
        Ok(()) => wanted,
        Err(error) => {
            tracing::info!(%error, wanted, "the limit of open files could not be raised");
            limit.current.unwrap_or(wanted)
        }
    }
}

/// Returns the number of connections that the node accepts under a limit: at most a quarter of a
/// low one, the rest belongs to replicas.
pub(crate) fn connections(limit: u64) -> usize {
    usize::try_from(limit / 4).unwrap_or(CONNECTIONS_MAX).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX)
}

/// Returns the number of tables that each of so many replicas may keep open under a limit.
pub(crate) fn tables_each(limit: u64, replicas: usize) -> usize {
    let replicas = replicas.max(1) as u64;
    let left = limit.saturating_sub(CONNECTIONS_MAX as u64 + replicas * OTHERS_EACH);
    usize::try_from(left / replicas)
        .unwrap_or(TABLES_OPEN_MAX)
        .clamp(TABLES_OPEN_MIN, TABLES_OPEN_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_the_hard_one_afterwards() {
        let hard = getrlimit(Resource::Nofile).maximum;
        let low = Rlimit { current: Some(512), maximum: hard };
        assert!(setrlimit(Resource::Nofile, low).is_ok());
        let raised = raise();
        assert_eq!(getrlimit(Resource::Nofile).current, Some(raised));
        assert_eq!(raised, hard.unwrap_or(UNLIMITED));
    }

    #[test]
    fn connections_leave_most_of_a_low_limit_to_the_replicas() {
        assert_eq!(
            [connections(1 << 20), connections(1_024), connections(256), connections(0)],
            [CONNECTIONS_MAX, 256, 64, CONNECTIONS_MIN]
        );
    }

    #[test]
    fn the_replicas_of_a_full_node_stay_below_the_limit() {
        for (limit, replicas) in
            [(1 << 20, 256), (65_536, 256), (65_536, 16), (20_000, 64), (1 << 30, 1)]
        {
            let each = tables_each(limit, replicas);
            let all = (each as u64 + OTHERS_EACH) * replicas as u64 + CONNECTIONS_MAX as u64;
            assert!(all <= limit, "{each} for each of {replicas} under {limit}");
            assert!((TABLES_OPEN_MIN..=TABLES_OPEN_MAX).contains(&each));
        }
        assert_eq!(tables_each(1 << 20, 256), 4_064);
        // The limit is too low for all of them: a replica works with few tables, and slowly.
        assert_eq!(
            (tables_each(1_024, 256), tables_each(0, 0)),
            (TABLES_OPEN_MIN, TABLES_OPEN_MIN)
        );
    }
}
