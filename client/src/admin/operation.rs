//! Calls that start resizes, and that follow, pause, slow down and cancel structural changes of every
//! kind. Those that start other ones are in `relocate`.

use tokio::time::Instant;
use vasto_core::band::check_shard_count;
use vasto_core::limits::{ADMIN_DEADLINE, check_keyspace_name};
use vasto_proto::v1::{self, pace_operation_request::Pace};

use crate::answer::{Answer, ChangePlan, Operation, OperationState, QuarantinesLeft};
use crate::client::Vasto;
use crate::error::{Error, ErrorKind};
use crate::master::Call;
use crate::tuning::OPERATION_POLL;

impl Vasto {
    /// Changes the number of shards, up or down, while reads and writes go on, and waits until the
    /// operation is done, however long that takes. Dropping the future does not stop the operation.
    ///
    /// # Errors
    /// As of [`Vasto::start_resize`]; `FailedPrecondition` with the reason when it was aborted.
    pub async fn resize_keyspace(
        &self,
        name: &str,
        shards: u32,
    ) -> Result<Answer<Operation>, Error> {
        let started = self.start_resize(name, shards).await?;
        self.wait_operation(started).await
    }

    /// Starts to change the number of shards, up or down, and returns the running operation at
    /// once.
    ///
    /// # Errors
    /// `InvalidArgument` for an illegal count (the message names legal ones), `NotFound`,
    /// `FailedPrecondition` while another change runs, when a node is missing or lacks the disk,
    /// and when the shards that stay keep keys of an earlier grow in quarantine (see
    /// [`Vasto::end_quarantine`]).
    pub async fn start_resize(&self, name: &str, shards: u32) -> Result<Answer<Operation>, Error> {
        self.start_resize_at(name, shards, None).await
    }

    /// Starts a resize as [`Vasto::start_resize`] does, with a bound of the bytes that all nodes
    /// together read from the bucket and write to it for the operation, bytes a second.
    ///
    /// # Errors
    /// As of [`Vasto::start_resize`]; `InvalidArgument` for a rate at which nothing would end.
    pub async fn start_resize_at(
        &self,
        name: &str,
        shards: u32,
        max_rate: Option<u64>,
    ) -> Result<Answer<Operation>, Error> {
        let request = v1::ResizeRequest { max_rate, ..resize_request(name, shards, false)? };
        self.master
            .call(Call::Change, |mut master| async move { master.resize_keyspace(request).await })
            .await
    }

    /// Pauses a running operation: it reads and writes no bulk bytes, and changes no ownership,
    /// until [`Vasto::resume_operation`]. A rebalance and the emptying of a node begin nothing
    /// further meanwhile, and all that they move stands still. Returns the operation.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it has ended, is in its cutover or has committed.
    pub async fn pause_operation(&self, id: &str) -> Result<Answer<Operation>, Error> {
        self.pace_operation(id, Pace::Paused(true)).await
    }

    /// Lets a paused operation go on. Returns the operation.
    ///
    /// # Errors
    /// As of [`Vasto::pause_operation`].
    pub async fn resume_operation(&self, id: &str) -> Result<Answer<Operation>, Error> {
        self.pace_operation(id, Pace::Paused(false)).await
    }

    /// Bounds the bytes that all nodes together read from the bucket and write to it for a running
    /// operation, bytes a second; `None` lifts the bound. Returns the operation.
    ///
    /// # Errors
    /// As of [`Vasto::pause_operation`]; `InvalidArgument` for a rate at which nothing would end.
    pub async fn limit_operation(
        &self,
        id: &str,
        max_rate: Option<u64>,
    ) -> Result<Answer<Operation>, Error> {
        if max_rate == Some(0) {
            let message = "nothing moves at 0 bytes a second; pause the operation instead";
            return Err(Error::new(ErrorKind::InvalidArgument, message.to_owned()));
        }
        self.pace_operation(id, Pace::MaxRate(max_rate.unwrap_or(0))).await
    }

    async fn pace_operation(&self, id: &str, pace: Pace) -> Result<Answer<Operation>, Error> {
        let request = v1::PaceOperationRequest { id: id.to_owned(), pace: Some(pace) };
        self.master
            .call(Call::Change, |mut master| async move { master.pace_operation(request).await })
            .await
    }

    /// Returns what a resize would move and take, and whether it would be refused, without starting
    /// it.
    ///
    /// # Errors
    /// `InvalidArgument` for a count that is illegal or that the keyspace has, `NotFound`.
    pub async fn plan_resize(&self, name: &str, shards: u32) -> Result<Answer<ChangePlan>, Error> {
        self.plan_resize_at(name, shards, None).await
    }

    /// Plans a resize as [`Vasto::plan_resize`] does, with the time that it takes within a bound of
    /// its rate, as of [`Vasto::start_resize_at`].
    ///
    /// # Errors
    /// As of [`Vasto::plan_resize`]; `InvalidArgument` for a rate at which nothing would end.
    pub async fn plan_resize_at(
        &self,
        name: &str,
        shards: u32,
        max_rate: Option<u64>,
    ) -> Result<Answer<ChangePlan>, Error> {
        let request = v1::ResizeRequest { max_rate, ..resize_request(name, shards, true)? };
        self.master
            .call(Call::Ask, |mut master| async move { master.resize_keyspace(request).await })
            .await
    }

    /// Ends the quarantines that keep a keyspace from shrinking to `shards` at once, and returns
    /// those that are still there: their keys are removed as soon as that is safe. Call it again
    /// until none is left; then the keyspace can shrink.
    ///
    /// # Errors
    /// `InvalidArgument` for an illegal count, `NotFound`, `FailedPrecondition` while another change
    /// runs.
    pub async fn end_quarantine(
        &self,
        name: &str,
        shards: u32,
    ) -> Result<Answer<QuarantinesLeft>, Error> {
        check_keyspace_name(name)?;
        check_shard_count(shards)?;
        let request = v1::EndQuarantineRequest { name: name.to_owned(), shards };
        self.master
            .call(Call::Change, |mut master| async move { master.end_quarantine(request).await })
            .await
    }

    /// Waits until an operation is finished. Tolerates a master that is away for less than 30 s.
    ///
    /// # Errors
    /// `FailedPrecondition` with the reason when it was aborted; `NotFound` when the master has
    /// forgotten it; `Internal` when it is in a state that only a later version of the master has.
    pub async fn wait_operation(
        &self,
        mut operation: Answer<Operation>,
    ) -> Result<Answer<Operation>, Error> {
        let mut heard = Instant::now();
        while operation.state.is_under_way() {
            tokio::time::sleep(OPERATION_POLL).await;
            match self.show_operation(&operation.id).await {
                Ok(now) => {
                    operation = now;
                    heard = Instant::now();
                }
                Err(error)
                    if error.kind() == ErrorKind::Unavailable
                        && heard.elapsed() < ADMIN_DEADLINE => {}
                Err(error) => return Err(error),
            }
        }
        match &operation.state {
            OperationState::Aborted => {
                let why = operation.reason.as_deref().unwrap_or("no reason is recorded");
                let message = format!("the operation {} was aborted: {why}", operation.id);
                Err(Error::new(ErrorKind::FailedPrecondition, message))
            }
            OperationState::Other(name) => {
                let message = format!(
                    "the operation {} is in the state `{name}`, which this version does not know; see `vasto operation \
                     show {}`",
                    operation.id, operation.id
                );
                Err(Error::new(ErrorKind::Internal, message))
            }
            OperationState::Running | OperationState::Paused | OperationState::Done => {
                Ok(operation)
            }
        }
    }

    /// Returns running and recent operations, the newest first.
    ///
    /// # Errors
    /// When the master does not answer.
    pub async fn list_operations(&self) -> Result<Answer<Vec<Operation>>, Error> {
        self.master
            .call(Call::Ask, |mut master| async move { master.list_operations(v1::Empty {}).await })
            .await
    }

    /// Returns the progress of an operation, or its result.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn show_operation(&self, id: &str) -> Result<Answer<Operation>, Error> {
        let request = v1::OperationRequest { id: id.to_owned() };
        self.master
            .call(Call::Ask, |mut master| async move { master.show_operation(request).await })
            .await
    }

    /// Aborts a running operation.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` once the operation is committed.
    pub async fn cancel_operation(&self, id: &str) -> Result<Answer<Operation>, Error> {
        let request = v1::OperationRequest { id: id.to_owned() };
        self.master
            .call(Call::Change, |mut master| async move { master.cancel_operation(request).await })
            .await
    }
}

fn resize_request(name: &str, shards: u32, plan_only: bool) -> Result<v1::ResizeRequest, Error> {
    check_keyspace_name(name)?;
    check_shard_count(shards)?;
    Ok(v1::ResizeRequest { name: name.to_owned(), shards, plan_only, max_rate: None })
}
