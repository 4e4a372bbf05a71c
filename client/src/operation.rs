//! A structural change as the master reports it.

use crate::error::{Error, ErrorKind};

/// The state of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationState {
    /// The operation is in progress.
    Running,
    /// The operation is done.
    Done,
    /// The operation was aborted; nothing has changed.
    Aborted,
}

/// A snapshot of a structural change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// For [`Vasto::show_operation`](crate::Vasto::show_operation) and
    /// [`Vasto::cancel_operation`](crate::Vasto::cancel_operation).
    pub id: String,
    /// Its state.
    pub state: OperationState,
    /// Why it was aborted.
    pub reason: Option<String>,
    /// The whole report of the master, a JSON object: while the operation runs `{id, kind, keyspace,
    /// from, to, state, step, bytes_done, bytes_total, …}`, afterwards also its figures.
    pub json: String,
}

impl Operation {
    /// Parses the master's document.
    pub(crate) fn from_json(json: String) -> Result<Self, Error> {
        let strange =
            || Error::new(ErrorKind::Internal, format!("the master described an operation in an unknown way: {json}"));
        let document: serde_json::Value = serde_json::from_str(&json).map_err(|_| strange())?;
        let text = |name: &str| document.get(name).and_then(serde_json::Value::as_str);
        let id = text("id").ok_or_else(strange)?.to_owned();
        let state = match text("state").ok_or_else(strange)? {
            "running" => OperationState::Running,
            "done" => OperationState::Done,
            "aborted" => OperationState::Aborted,
            _ => return Err(strange()),
        };
        let reason = text("reason").map(str::to_owned);
        Ok(Self { id, state, reason, json })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn documents_of_the_master() {
        let read = |json: &str| Operation::from_json(json.to_owned());
        let aborted = read(r#"{"id":"op-1-1","state":"aborted","reason":"cancelled","more":[1]}"#).unwrap();
        assert_eq!((aborted.id.as_str(), aborted.state), ("op-1-1", OperationState::Aborted));
        assert_eq!(aborted.reason.as_deref(), Some("cancelled"));
        for bad in ["", "{}", r#"{"id":"a"}"#, r#"{"id":"a","state":"odd"}"#, "[]"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
