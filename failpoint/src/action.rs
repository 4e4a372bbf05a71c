//! What an armed failpoint does, and for whom, as data and as text.
//!
//! **Invariant:** an [`Order`] reads as it was written.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use vasto_core::ids::{KeyspaceId, ReplicaId};

use crate::Passer;

/// What a failpoint does to whoever reaches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The process ends as by `kill -9`.
    Exit,
    /// It goes on after this time.
    Sleep(Duration),
    /// The step fails with [`crate::Injected`].
    Error,
    /// It goes on once it is released.
    Pause,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit => f.write_str("exit"),
            Self::Sleep(time) => write!(f, "sleep={}", time.as_millis()),
            Self::Error => f.write_str("error"),
            Self::Pause => f.write_str("pause"),
        }
    }
}

/// An action, for everybody or for one keyspace or replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// What happens.
    pub action: Action,
    /// The only keyspace that is meant.
    pub keyspace: Option<KeyspaceId>,
    /// The only replica that is meant; 0 is the master.
    pub replica: Option<ReplicaId>,
}

impl Order {
    /// Returns true when the order is for this one.
    pub(crate) fn means(&self, passer: Passer) -> bool {
        self.keyspace.is_none_or(|keyspace| keyspace == passer.keyspace)
            && self.replica.is_none_or(|replica| replica == passer.replica)
    }
}

impl From<Action> for Order {
    fn from(action: Action) -> Self {
        Self { action, keyspace: None, replica: None }
    }
}

/// A text that is no order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not the order of a failpoint; write exit, error, pause or sleep=MILLISECONDS, then, if only one is meant, \
     keyspace=ID and replica=ID"
)]
pub struct ActionError(String);

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.action)?;
        if let Some(keyspace) = self.keyspace {
            write!(f, " keyspace={}", keyspace.0)?;
        }
        if let Some(replica) = self.replica {
            write!(f, " replica={}", replica.0)?;
        }
        Ok(())
    }
}

impl FromStr for Order {
    type Err = ActionError;

    fn from_str(text: &str) -> Result<Self, ActionError> {
        let wrong = || ActionError(text.trim().to_owned());
        let number = |text: &str| text.parse::<u64>().map_err(|_| wrong());
        let mut words = text.split_whitespace();
        let action = match words.next().ok_or_else(wrong)? {
            "exit" => Action::Exit,
            "error" => Action::Error,
            "pause" => Action::Pause,
            word => {
                let time = word.strip_prefix("sleep=").ok_or_else(wrong)?;
                Action::Sleep(Duration::from_millis(number(time)?))
            }
        };
        let mut order = Self::from(action);
        for word in words {
            match word.split_once('=').ok_or_else(wrong)? {
                ("keyspace", id) => order.keyspace = Some(KeyspaceId(number(id)?)),
                ("replica", id) => order.replica = Some(ReplicaId(number(id)?)),
                _ => return Err(wrong()),
            }
        }
        Ok(order)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_order_reads_as_it_was_written() {
        for action in
            [Action::Exit, Action::Error, Action::Pause, Action::Sleep(Duration::from_millis(70))]
        {
            for order in [
                Order::from(action),
                Order { keyspace: Some(KeyspaceId(3)), ..Order::from(action) },
                Order { action, keyspace: Some(KeyspaceId(3)), replica: Some(ReplicaId(0)) },
            ] {
                assert_eq!(order.to_string().parse::<Order>(), Ok(order));
            }
        }
        assert_eq!("pause\n".parse::<Order>(), Ok(Order::from(Action::Pause)));
    }

    #[test]
    fn what_is_no_order_is_refused_with_the_words_that_are() {
        for text in
            ["", "stop", "sleep", "sleep=1s", "exit replica", "exit node=3", "exit replica=x"]
        {
            let error = text.parse::<Order>().unwrap_err().to_string();
            assert!(error.contains("exit, error, pause or sleep="), "{text}: {error}");
        }
    }

    #[test]
    fn an_order_means_whom_it_names() {
        let passer = Passer { keyspace: KeyspaceId(1), replica: ReplicaId(2) };
        let all = Order::from(Action::Exit);
        assert!(all.means(passer));
        assert!(Order { replica: Some(ReplicaId(2)), ..all }.means(passer));
        assert!(!Order { replica: Some(ReplicaId(0)), ..all }.means(passer));
        assert!(!Order { keyspace: Some(KeyspaceId(2)), ..all }.means(passer));
    }
}
