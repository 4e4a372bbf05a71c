//! Calls that start, or plan, what takes replicas elsewhere: restores, the emptying of nodes,
//! rebalances.

use vasto_proto::v1;

use crate::answer::{Answer, ChangePlan, Operation, RebalancePlan};
use crate::client::Vasto;
use crate::error::Error;
use crate::master::Call;

/// How a keyspace is restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RestoreOptions {
    /// The state at this time, microseconds since 1970; `None` restores everything.
    pub at_us: Option<u64>,
    /// No node is asked to ship what it holds first: the bucket alone is used.
    pub from_bucket: bool,
    /// Upper bound of the bytes that all nodes together read from the bucket and write to it for the
    /// restore, bytes a second.
    pub max_rate: Option<u64>,
}

/// How a node is emptied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EmptyOptions {
    /// The node that takes its replicas; `None` for any node with room.
    pub to: Option<String>,
    /// The node may be lost: data that it alone held comes from the bucket.
    pub replace: bool,
    /// Together with `replace`: data that is not even in the bucket is given up, and nothing waits
    /// for the node any more.
    pub accept_loss: bool,
    /// Upper bound of the bytes that all nodes together read from the bucket for it, bytes a second.
    pub max_rate: Option<u64>,
}

impl RestoreOptions {
    fn request(self, name: &str, into: &str, plan_only: bool) -> v1::RestoreRequest {
        let Self { at_us, from_bucket, max_rate } = self;
        let (name, into) = (name.to_owned(), into.to_owned());
        v1::RestoreRequest { name, into, at_us, from_bucket, plan_only, max_rate }
    }
}

impl EmptyOptions {
    fn request(self, node: &str, plan_only: bool) -> v1::EmptyNodeRequest {
        let Self { to, replace, accept_loss, max_rate } = self;
        v1::EmptyNodeRequest {
            node_id: node.to_owned(),
            to_node_id: to.unwrap_or_default(),
            replace,
            accept_loss,
            plan_only,
            max_rate,
        }
    }
}

impl Vasto {
    /// Starts to restore the new keyspace `into` from the archive of another one, which may be
    /// deleted, and whose nodes may all be lost: everything, or the state at a time, microseconds
    /// since 1970. Returns the running operation at once.
    ///
    /// # Errors
    /// `NotFound` when there is no such keyspace, or was none at that time; `AlreadyExists`;
    /// `FailedPrecondition` without nodes to hold it; `Unavailable` when a shard that serves cannot
    /// ship the acknowledged writes, or has no live replica while other shards have.
    pub async fn start_restore(
        &self,
        name: &str,
        into: &str,
        at_us: Option<u64>,
    ) -> Result<Answer<Operation>, Error> {
        self.start_restore_with(name, into, RestoreOptions { at_us, ..Default::default() }).await
    }

    /// Starts a restore without asking nodes to ship what they hold first: the bucket alone is
    /// used.
    ///
    /// # Errors
    /// As of [`Vasto::start_restore`].
    pub async fn start_restore_from_bucket(
        &self,
        name: &str,
        into: &str,
        at_us: Option<u64>,
    ) -> Result<Answer<Operation>, Error> {
        let options = RestoreOptions { at_us, from_bucket: true, max_rate: None };
        self.start_restore_with(name, into, options).await
    }

    /// Starts a restore as [`Vasto::start_restore`] does.
    ///
    /// # Errors
    /// As of [`Vasto::start_restore`]; `InvalidArgument` for a rate at which nothing would end.
    pub async fn start_restore_with(
        &self,
        name: &str,
        into: &str,
        options: RestoreOptions,
    ) -> Result<Answer<Operation>, Error> {
        let request = options.request(name, into, false);
        self.master
            .call(
                Call::ChangeLong,
                |mut master| async move { master.restore_keyspace(request).await },
            )
            .await
    }

    /// Returns what a restore would move and take, and whether it would be refused, without
    /// starting it; with `from_bucket` that of [`Vasto::start_restore_from_bucket`].
    ///
    /// # Errors
    /// `NotFound` and `AlreadyExists` as of [`Vasto::start_restore`]; `Unavailable` when the bucket
    /// does not answer.
    pub async fn plan_restore(
        &self,
        name: &str,
        into: &str,
        at_us: Option<u64>,
        from_bucket: bool,
    ) -> Result<Answer<ChangePlan>, Error> {
        let options = RestoreOptions { at_us, from_bucket, max_rate: None };
        self.plan_restore_with(name, into, options).await
    }

    /// Plans a restore as [`Vasto::plan_restore`] does.
    ///
    /// # Errors
    /// As of [`Vasto::plan_restore`]; `InvalidArgument` for a rate at which nothing would end.
    pub async fn plan_restore_with(
        &self,
        name: &str,
        into: &str,
        options: RestoreOptions,
    ) -> Result<Answer<ChangePlan>, Error> {
        let request = options.request(name, into, true);
        self.master
            .call(Call::AskLong, |mut master| async move { master.restore_keyspace(request).await })
            .await
    }

    /// Starts to move all replicas of a node elsewhere: to node `to`, or to any node with room.
    /// With `replace` the node may be lost: data that it alone held comes from the bucket. Returns
    /// the running operation at once.
    ///
    /// # Errors
    /// `NotFound` when the node has no replicas; `FailedPrecondition` when the node is away and not
    /// to be replaced, or no node has room.
    pub async fn start_emptying_node(
        &self,
        node: &str,
        to: Option<&str>,
        replace: bool,
    ) -> Result<Answer<Operation>, Error> {
        let to = to.map(str::to_owned);
        self.start_emptying_node_with(node, EmptyOptions { to, replace, ..Default::default() })
            .await
    }

    /// As [`Self::start_emptying_node`] with `replace`, for a node that is lost for good: data that
    /// is not even in the bucket is given up, and nothing waits for the node any more.
    ///
    /// # Errors
    /// As [`Self::start_emptying_node`].
    pub async fn start_giving_up_node(
        &self,
        node: &str,
        to: Option<&str>,
    ) -> Result<Answer<Operation>, Error> {
        let to = to.map(str::to_owned);
        let options = EmptyOptions { to, replace: true, accept_loss: true, max_rate: None };
        self.start_emptying_node_with(node, options).await
    }

    /// Starts to empty a node as [`Vasto::start_emptying_node`] does.
    ///
    /// # Errors
    /// As of [`Vasto::start_emptying_node`]; `InvalidArgument` for a rate at which nothing would end.
    pub async fn start_emptying_node_with(
        &self,
        node: &str,
        options: EmptyOptions,
    ) -> Result<Answer<Operation>, Error> {
        let request = options.request(node, false);
        self.master
            .call(Call::Change, |mut master| async move { master.empty_node(request).await })
            .await
    }

    /// Returns what [`Vasto::start_emptying_node`] would move and take, and whether it would be
    /// refused, without starting it.
    ///
    /// # Errors
    /// `NotFound` when the node has no replicas; `InvalidArgument` for what is no id of a node.
    pub async fn plan_emptying_node(
        &self,
        node: &str,
        to: Option<&str>,
        replace: bool,
    ) -> Result<Answer<ChangePlan>, Error> {
        let to = to.map(str::to_owned);
        self.plan_emptying_node_with(node, EmptyOptions { to, replace, ..Default::default() }).await
    }

    /// Plans the emptying of a node as [`Vasto::plan_emptying_node`] does.
    ///
    /// # Errors
    /// As of [`Vasto::plan_emptying_node`]; `InvalidArgument` for a rate at which nothing would end.
    pub async fn plan_emptying_node_with(
        &self,
        node: &str,
        options: EmptyOptions,
    ) -> Result<Answer<ChangePlan>, Error> {
        let request = options.request(node, true);
        self.master
            .call(Call::Ask, |mut master| async move { master.empty_node(request).await })
            .await
    }

    /// Starts to move replicas, and the roles of primaries, until the nodes hold and do alike, and
    /// returns the running operation at once; the one that runs already, if one does. A cluster that
    /// is in balance answers an operation that is done.
    ///
    /// # Errors
    /// `Unavailable` while not all nodes have reported to the master.
    pub async fn start_rebalance(&self) -> Result<Answer<Operation>, Error> {
        self.start_rebalance_at(None).await
    }

    /// Starts a rebalance as [`Vasto::start_rebalance`] does, with a bound of the bytes that all its
    /// moves together read from the bucket and write to it, bytes a second. It becomes that of a
    /// rebalance which runs already.
    ///
    /// # Errors
    /// As of [`Vasto::start_rebalance`]; `InvalidArgument` for a rate at which nothing would end.
    pub async fn start_rebalance_at(
        &self,
        max_rate: Option<u64>,
    ) -> Result<Answer<Operation>, Error> {
        let request = v1::RebalanceRequest { plan_only: false, max_rate };
        self.master
            .call(Call::Change, |mut master| async move { master.rebalance(request).await })
            .await
    }

    /// Returns what a rebalance would move and take, without starting it.
    ///
    /// # Errors
    /// As of [`Vasto::start_rebalance`].
    pub async fn plan_rebalance(&self) -> Result<Answer<RebalancePlan>, Error> {
        self.plan_rebalance_at(None).await
    }

    /// Plans a rebalance as [`Vasto::plan_rebalance`] does, with the time that it takes within a
    /// bound of its rate, as of [`Vasto::start_rebalance_at`].
    ///
    /// # Errors
    /// As of [`Vasto::start_rebalance_at`].
    pub async fn plan_rebalance_at(
        &self,
        max_rate: Option<u64>,
    ) -> Result<Answer<RebalancePlan>, Error> {
        let request = v1::RebalanceRequest { plan_only: true, max_rate };
        self.master
            .call(Call::Ask, |mut master| async move { master.rebalance(request).await })
            .await
    }
}
