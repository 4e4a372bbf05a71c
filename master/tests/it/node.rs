//! Nodes without data: they speak the membership protocol and send scripted messages.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{CatalogVersion, Incarnation, KeyspaceId, Lsn, NodeId, ReplicaId};
use vasto_core::plan::{PinnedManifest, Plan, Step};
use vasto_core::report::{
    ReplicaPhase, ReplicaReport, Sealed, SourceProgress, TargetProgress, TargetStage,
};
use vasto_proto::v1::membership_client::MembershipClient;
use vasto_proto::v1::{self, master_message, node_message};

use crate::harness::within;

/// Messages that a session has received.
#[derive(Default, Clone)]
pub(crate) struct Seen {
    pub welcome: Option<v1::Welcome>,
    pub rejected: Option<v1::Rejected>,
    pub catalogs: BTreeMap<KeyspaceId, Catalog>,
    /// Every version in the order of arrival, with its step.
    pub versions: Vec<(KeyspaceId, CatalogVersion, Option<Step>)>,
    pub nodes: Vec<v1::NodeAddress>,
    pub commands: Vec<v1::Command>,
    pub ended: bool,
}

/// A session, driven by hand.
pub(crate) struct Session {
    pub node: NodeId,
    pub seen: watch::Receiver<Seen>,
    outbound: mpsc::Sender<v1::NodeMessage>,
}

pub(crate) fn hello(node: u64) -> v1::Hello {
    v1::Hello {
        node_id: node,
        cluster_id: String::new(),
        address: format!("127.0.0.1:{}", 10_000 + node),
        zone: String::new(),
        pid: 1,
        protocol: vasto_proto::PROTOCOL,
        max_replicas: 0,
    }
}

impl Session {
    /// Connects and says Hello; fails when the master cannot be reached.
    pub(crate) async fn open(url: &str, hello: v1::Hello) -> Result<Self, tonic::Status> {
        let unreachable =
            |error: tonic::transport::Error| tonic::Status::unavailable(error.to_string());
        let mut client = MembershipClient::connect(url.to_owned()).await.map_err(unreachable)?;
        let (outbound, messages) = mpsc::channel(16);
        let node = NodeId(hello.node_id);
        let first = v1::NodeMessage { message: Some(node_message::Message::Hello(hello)) };
        outbound.send(first).await.unwrap();
        let mut inbound = client.session(ReceiverStream::new(messages)).await?.into_inner();
        let (sender, seen) = watch::channel(Seen::default());
        tokio::spawn(async move {
            while let Ok(Some(message)) = inbound.message().await {
                sender.send_modify(|seen| seen.take(message));
            }
            sender.send_modify(|seen| seen.ended = true);
        });
        Ok(Self { node, seen, outbound })
    }

    /// Opens a session and waits for the welcome.
    pub(crate) async fn join(url: &str, hello: v1::Hello) -> Self {
        let session = Self::open(url, hello).await.unwrap();
        session.until("the welcome", |seen| seen.welcome.is_some()).await;
        session
    }

    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&Seen) -> bool) -> Seen {
        let mut seen = self.seen.clone();
        within(what, seen.wait_for(holds))
            .await
            .unwrap_or_else(|_| panic!("the session died before {what}"))
            .clone()
    }

    pub(crate) async fn report(&self, replicas: Vec<ReplicaReport>) {
        let replicas =
            replicas.iter().map(|report| serde_json::to_string(report).unwrap()).collect();
        let report = v1::Report {
            replicas,
            disk_used: 1 << 40,
            disk_free: 1 << 40,
            ..v1::Report::default()
        };
        self.send(node_message::Message::Report(report)).await;
    }

    /// Carries out a command that asks for catalogs.
    pub(crate) async fn names_catalogs(&self, id: u64, catalogs: &[&Catalog]) {
        let catalogs =
            catalogs.iter().map(|catalog| serde_json::to_string(catalog).unwrap()).collect();
        self.send(node_message::Message::Done(v1::CommandDone {
            id,
            catalogs,
            ..v1::CommandDone::default()
        }))
        .await;
    }

    pub(crate) async fn done(&self, id: u64, error: &str) {
        self.send(node_message::Message::Done(v1::CommandDone {
            id,
            error: error.into(),
            catalogs: Vec::new(),
        }))
        .await;
    }

    async fn send(&self, message: node_message::Message) {
        // A session that has ended takes no message; its test notices that by itself.
        let _ = self.outbound.send(v1::NodeMessage { message: Some(message) }).await;
    }
}

impl Seen {
    fn take(&mut self, message: v1::MasterMessage) {
        match message.message.unwrap() {
            master_message::Message::Welcome(welcome) => self.welcome = Some(welcome),
            master_message::Message::Rejected(rejected) => self.rejected = Some(rejected),
            master_message::Message::Nodes(nodes) => self.nodes = nodes.nodes,
            master_message::Message::Command(command) => self.commands.push(command),
            master_message::Message::Presence(_) => {}
            master_message::Message::Keyspace(version) => {
                assert!(self.welcome.is_some(), "the welcome comes first");
                let catalog: Catalog = serde_json::from_str(&version.catalog_json).unwrap();
                assert_eq!(
                    (catalog.keyspace.0, catalog.version.0),
                    (version.keyspace_id, version.version)
                );
                let step = catalog.plan.as_ref().map(|plan| plan.step);
                self.versions.push((catalog.keyspace, catalog.version, step));
                if let Some(old) = self.catalogs.insert(catalog.keyspace, catalog.clone()) {
                    assert!(old.version < catalog.version, "versions only rise");
                }
            }
        }
    }
}

/// Nodes that execute at once what catalog versions ask for, up to the step they are held at, and
/// that reconnect to the master wherever it restarts.
pub(crate) struct Crew {
    url: watch::Sender<String>,
    held_at: watch::Sender<Option<Step>>,
    stop: CancellationToken,
    _stop_with_me: DropGuard,
}

impl Crew {
    pub(crate) fn start(url: &str, nodes: impl IntoIterator<Item = u64>) -> Self {
        let stop = CancellationToken::new();
        let crew = Self {
            url: watch::Sender::new(url.to_owned()),
            held_at: watch::Sender::new(None),
            _stop_with_me: stop.clone().drop_guard(),
            stop,
        };
        for node in nodes {
            let (url, held_at) = (crew.url.subscribe(), crew.held_at.subscribe());
            tokio::spawn(
                crew.stop.clone().run_until_cancelled_owned(apply_versions(node, url, held_at)),
            );
        }
        crew
    }

    pub(crate) fn hold_at(&self, step: Option<Step>) {
        self.held_at.send_replace(step);
    }

    pub(crate) fn follow(&self, url: &str) {
        self.url.send_replace(url.to_owned());
    }

    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }
}

async fn apply_versions(
    node: u64,
    url: watch::Receiver<String>,
    held_at: watch::Receiver<Option<Step>>,
) {
    let known = Known::default();
    loop {
        let at = url.borrow().clone();
        if let Ok(session) = Session::open(&at, hello(node)).await {
            serve(&session, &known, url.clone(), held_at.clone()).await;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The state that a node keeps over reconnects: the highest version of each keyspace.
type Known = std::sync::Mutex<BTreeMap<KeyspaceId, Catalog>>;

async fn serve(
    session: &Session,
    known: &Known,
    mut url: watch::Receiver<String>,
    mut held_at: watch::Receiver<Option<Step>>,
) {
    let mut seen = session.seen.clone();
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    url.mark_unchanged();
    loop {
        {
            let seen = seen.borrow_and_update();
            if seen.ended || seen.rejected.is_some() {
                return;
            }
            let mut known = known.lock().unwrap();
            for (id, catalog) in &seen.catalogs {
                match known.get(id) {
                    Some(old) if old.version >= catalog.version => {}
                    _ => drop(known.insert(*id, catalog.clone())),
                }
            }
        }
        let hold = *held_at.borrow_and_update();
        let reports = known
            .lock()
            .unwrap()
            .values()
            .flat_map(|catalog| reports(catalog, session.node, hold))
            .collect();
        session.report(reports).await;
        let commands = seen.borrow().commands.clone();
        for command in commands {
            session.done(command.id, "").await;
        }
        tokio::select! {
            changed = seen.changed() => if changed.is_err() { return },
            _ = held_at.changed() => {}
            _ = url.changed() => return,
            _ = tick.tick() => {}
        }
    }
}

pub(crate) const SEAL_LSN: Lsn = Lsn(20);

/// Returns the reports of a perfect node under this version; its work of the held step is not done
/// yet.
pub(crate) fn reports(catalog: &Catalog, node: NodeId, hold: Option<Step>) -> Vec<ReplicaReport> {
    if catalog.state == KeyspaceState::Deleted {
        return Vec::new();
    }
    let members = catalog.members_on(node).into_iter();
    members
        .map(|(shard, replica, placed)| {
            let plan = catalog.plan_of(replica);
            ReplicaReport {
                keyspace: catalog.keyspace,
                shard,
                replica,
                incarnation: Incarnation(1),
                version: catalog.version,
                phase: if placed { ReplicaPhase::Serving } else { ReplicaPhase::Building },
                lsn: Lsn(100),
                shipped_lsn: Lsn(100),
                manifest_lsn: Lsn(100),
                ships_behind: None,
                keys: 1000,
                bytes: 1 << 20,
                load: 0,
                load_unknown: false,
                source: plan.and_then(|plan| source(catalog, plan, replica, hold)),
                target: plan.and_then(|plan| target(plan, replica, hold)),
                cleaned: catalog
                    .quarantines
                    .iter()
                    .filter(|quarantine| quarantine.dropping)
                    .map(|quarantine| quarantine.plan)
                    .collect(),
                replication: vasto_core::report::ReplicationReport {
                    ready: true,
                    floor: plan.and_then(|plan| plan.floor).unwrap_or_default(),
                    ..Default::default()
                },
                stored: None,
            }
        })
        .collect()
}

fn source(
    catalog: &Catalog,
    plan: &Plan,
    replica: ReplicaId,
    hold: Option<Step>,
) -> Option<SourceProgress> {
    let is_source = plan.sources.iter().any(|source| source.replica == replica);
    let of_source = |shard| plan.sources.iter().any(|source| source.shard == shard);
    let gives = catalog.members().iter().any(|(shard, member, _)| {
        member.replica == replica && of_source(*shard) && !plan.adds_member()
    });
    if !is_source && !gives {
        return None;
    }
    let done = |step| plan.step == step && hold != Some(step);
    Some(SourceProgress {
        plan: plan.id,
        manifest: (plan.step != Step::Prepare || done(Step::Prepare))
            .then(|| PinnedManifest { key: format!("manifest-{replica}"), lsn: Lsn(10) }),
        export: (plan.exports() && (plan.step != Step::Prepare || done(Step::Prepare)))
            .then(|| format!("export-{replica}")),
        sealed: done(Step::Sealing).then_some(Sealed { version: catalog.version, lsn: SEAL_LSN }),
        released: done(Step::Committed),
        pauses_us: vec![5_000],
        ..SourceProgress::new(plan.id)
    })
}

fn target(plan: &Plan, replica: ReplicaId, hold: Option<Step>) -> Option<TargetProgress> {
    plan.targets.iter().find(|target| target.replica == replica)?;
    let stage = match plan.step {
        Step::Prepare => TargetStage::Downloading,
        step if hold == Some(step) && step == Step::Tail => TargetStage::Downloading,
        Step::Committed if hold != Some(Step::Committed) => TargetStage::Open,
        Step::Tail | Step::Sealing | Step::Committed => TargetStage::Tailing,
    };
    let reached = if hold == Some(Step::Sealing) { Lsn(SEAL_LSN.0 - 1) } else { SEAL_LSN };
    Some(TargetProgress {
        plan: plan.id,
        stage,
        cursors: plan.sources.iter().map(|source| (source.replica, reached)).collect(),
        lag_lsns: 0,
        lag_bytes: None,
        bytes_total: 100,
        bytes_done: 60,
        keys_moved: 7,
        bytes_moved: 1,
        bytes_from_bucket: 2,
        objects_read: 3,
        bytes_from_peers: 4,
        manifest_shipped: true,
        ..TargetProgress::new(plan.id)
    })
}
