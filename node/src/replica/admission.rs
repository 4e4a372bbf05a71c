//! Check of a client's write before it is assigned to a group.
//!
//! **Invariants**
//! - A write that was admitted under a term of authority is assigned only under that term. Every
//!   write is assigned only at a replica that owns its bands; a read-modify-write only under a
//!   term, at the primary, at an epoch that no follower has passed.
//! - A refused write has changed nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use vasto_core::limits::ATTEMPT_PATIENCE;
use vasto_core::record::RangeState;
use vasto_core::{ErrorCode, VastoError};

use super::apply::band_of;
use super::command::{Role, WriteCommand, WriteOp, too_late, wrong_epoch};
use super::store::Store;
use crate::clock::since_boot;

/// Verdict on a write that is not refused.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// The write may be assigned.
    Ready,
    /// The write waits for the outcome of a seal or of a leadership transfer.
    Wait,
}

impl Store {
    /// Decides whether a write may be assigned now; binds a read-modify-write to the current term
    /// of authority.
    ///
    /// # Errors
    /// The reason for the refusal.
    pub(super) fn admit(&self, command: &mut WriteCommand) -> Result<Admission, VastoError> {
        self.shared.check_open()?;
        if self.role == Role::Detached {
            return Err(wrong_epoch());
        }
        let now = since_boot();
        if command.until.is_some_and(|until| now >= until) {
            return Err(too_late());
        }
        let modifies = command.modifies();
        self.check_term(command, modifies, now)?;
        let is_transferring = modifies && self.check_primary()? == Admission::Wait;
        match self.check_bands(&command.ops)? {
            Admission::Ready if !is_transferring => Ok(Admission::Ready),
            Admission::Ready | Admission::Wait => Ok(Admission::Wait),
        }
    }

    fn check_term(
        &self,
        command: &mut WriteCommand,
        modifies: bool,
        now: Duration,
    ) -> Result<(), VastoError> {
        let current = || self.shared.authority.term();
        match (command.term, modifies) {
            // Another replica may have taken over since the admission: applied now, the write would
            // get an event time above those written there since.
            (Some(term), _) if current() != Some(term) => Err(without_authority()),
            (Some(_), _) => Ok(()),
            (None, true) => {
                command.term = Some(current().ok_or_else(without_authority)?);
                Ok(())
            }
            // The sender that chose this replica has long gone to another one.
            (None, false)
                if now.saturating_sub(command.sent) >= ATTEMPT_PATIENCE
                    && self.shared.followers.has_peers() =>
            {
                let message = "the request was under way for too long, its sender has gone to another replica; send it again";
                Err(VastoError::new(ErrorCode::CatchingUp, message).retry_after_ms(50))
            }
            (None, false) => Ok(()),
        }
    }

    /// Decides whether this replica does read-modify-writes.
    fn check_primary(&self) -> Result<Admission, VastoError> {
        let is_current = self.meta.head.version.0
            >= self.shared.primary_from.load(Ordering::Acquire)
            && self.meta.head.epoch.0 >= self.shared.followers_epoch.load(Ordering::Acquire);
        match self.role {
            Role::Primary if is_current => Ok(Admission::Ready),
            Role::TransferringLeadership => Ok(Admission::Wait),
            Role::Primary | Role::Secondary | Role::Detached => Err(not_primary()),
        }
    }

    fn check_bands(&self, ops: &[WriteOp]) -> Result<Admission, VastoError> {
        let mut admission = Admission::Ready;
        for op in ops {
            let band = band_of(self.meta.identity.shard, &op.key, op.partition_hash)
                .ok_or_else(wrong_epoch)?;
            match self.meta.ranges.state(band) {
                RangeState::Owned if self.meta.ranges.is_sealed(band) => {
                    admission = Admission::Wait
                }
                RangeState::Owned => {}
                RangeState::Arriving
                | RangeState::Empty
                | RangeState::Leaving
                | RangeState::Clearing => {
                    return Err(wrong_epoch());
                }
            }
        }
        Ok(admission)
    }
}

fn without_authority() -> VastoError {
    VastoError::new(
        ErrorCode::NotPrimary,
        "this replica does not serve its shard now, another one does or will in a moment; nothing was written, ask again",
    )
    .retry_after_ms(20)
}

fn not_primary() -> VastoError {
    VastoError::new(
        ErrorCode::NotPrimary,
        "only the primary of the shard does this, and this replica is not primary now; fetch the topology",
    )
    .retry_after_ms(20)
}
