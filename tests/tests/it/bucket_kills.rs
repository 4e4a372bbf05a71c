//! `kill -9` right before and right after a request to the bucket, in every activity that makes
//! requests: checkpoints, chunks of the log, garbage collection, restores and replicas under
//! construction.
//!
//! The bucket is on a real S3 server; a [`Relay`] in front of it for each process kills that
//! process at a random request. Afterwards the bucket is complete, and all writes that it had
//! confirmed can be restored from it alone.
//!
//! `VASTO_BUCKET_KILLS` sets the number of kills, `VASTO_BUCKET_SEED` the random choices.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vasto_tests::{
    Cluster, DEADLINE, History, KillPoint, KillTime, Load, LoadSpec, Numbers, Port, Ran, Relay,
    S3Kind, S3Server, preload, setting, until, verify,
};

/// Kills in a run of all tests, which leaves time for few.
const KILLS: u64 = 16;
/// Rounds between two checks of the bucket and of every key.
const CHECK_EVERY: u64 = 4;
/// Time limit of a command while its server is killed and restarted.
const PATIENCE: Duration = Duration::from_secs(90);
/// The keyspace that must never lose a confirmed write.
const KEPT: &str = "kept";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Checkpoint,
    Chunk,
    Collection,
    Restore,
    Bootstrap,
}

const PHASES: [Phase; 5] =
    [Phase::Checkpoint, Phase::Chunk, Phase::Collection, Phase::Restore, Phase::Bootstrap];

impl Phase {
    /// Returns requests to kill at by kind, identified by a part of their first line: drawn by
    /// number alone these would be rare.
    fn requests(self, victim: Victim) -> &'static [&'static str] {
        match (self, victim) {
            (Self::Checkpoint, _) => {
                &[".sst", "/db/", "PUT /vasto-test/kills/data", "/checkpoint/"]
            }
            (Self::Chunk, _) => &["PUT ", "HEAD "],
            (Self::Collection, _) => &["?delete", "/gc-term/", "list-type=", "/checkpoint/"],
            (Self::Restore, Victim::Master) => &["/gc-term/", "/names/", "/catalog/", "PUT "],
            (Self::Restore | Self::Bootstrap, Victim::Node(_)) => {
                &[".sst", "/db/", "PUT ", "/checkpoint/", ".chunk"]
            }
            (Self::Bootstrap, Victim::Master) => &["/catalog/", "PUT "],
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Master,
    Node(usize),
}

/// The request at which the victim is killed.
#[derive(Debug, Clone, Copy)]
struct Aim {
    call: u64,
    of: &'static str,
    moment: KillTime,
}

/// Kills of every run, whatever is drawn: the phase, whether the victim is the master, and the
/// request.
const WANTED: [(Phase, bool, Aim); 5] = [
    (
        Phase::Restore,
        true,
        Aim { call: 1, of: "PUT /vasto-test/kills/names/", moment: KillTime::Before },
    ),
    (Phase::Checkpoint, false, Aim { call: 1, of: "/checkpoint/", moment: KillTime::Before }),
    (Phase::Chunk, false, Aim { call: 1, of: "PUT ", moment: KillTime::After }),
    (Phase::Collection, true, Aim { call: 2, of: "?delete", moment: KillTime::After }),
    (
        Phase::Bootstrap,
        false,
        Aim { call: 1, of: "PUT /vasto-test/kills/data/", moment: KillTime::After },
    ),
];

struct Rig {
    server: String,
    cluster: Cluster,
    of_master: Arc<Relay>,
    of_nodes: Vec<Arc<Relay>>,
    /// Nodes that are not lost.
    live: Vec<usize>,
    numbers: Numbers,
    history: Arc<History>,
    bursts: u64,
    /// The part of [`WANTED`] that is still to do.
    wanted: Vec<(Phase, bool, Aim)>,
    /// Number of requests of a kind, where fewer came than were drawn.
    few: BTreeMap<(Phase, bool, &'static str), u64>,
    kills: BTreeMap<(Phase, KillTime), u64>,
    requests: BTreeMap<String, [u64; 2]>,
    aborted: BTreeSet<String>,
}

impl Rig {
    async fn start(s3: &S3Server, seed: u64) -> Result<Self> {
        let of_master = Arc::new(Relay::start(&s3.address()).await?);
        // Each node has its own endpoint, which takes precedence.
        let builder = Cluster::builder()
            .nodes(0)
            .s3(s3, "kills")
            .env("AWS_ENDPOINT_URL", &of_master.endpoint())
            .set("node.ship_interval=200ms")
            .keeps_no_garbage();
        let mut rig = Self {
            server: s3.address(),
            cluster: builder.start().await?,
            of_master,
            of_nodes: Vec::new(),
            live: Vec::new(),
            numbers: Numbers::new(seed),
            history: Arc::default(),
            bursts: 0,
            wanted: WANTED.to_vec(),
            few: BTreeMap::new(),
            kills: BTreeMap::new(),
            requests: BTreeMap::new(),
            aborted: BTreeSet::new(),
        };
        for _ in 0..2 {
            rig.add_node().await?;
        }
        rig.cluster.create(KEPT, 2, &["--ack", "bucket"]).await?;
        Ok(rig)
    }

    async fn add_node(&mut self) -> Result<usize> {
        let relay = Relay::start(&self.server).await?;
        let index =
            self.cluster.add_node_with(&format!("bucket.endpoint={}", relay.endpoint())).await?;
        self.of_nodes.push(Arc::new(relay));
        self.live.push(index);
        Ok(index)
    }

    async fn lose_node(&mut self, index: usize) -> Result<String> {
        self.cluster.kill9_node(index).await?;
        std::fs::remove_dir_all(self.cluster.node_dir(index))?;
        self.live.retain(|live| *live != index);
        self.cluster.node_id(index).context("it has an id")
    }

    fn any_live(&mut self) -> usize {
        self.live[self.numbers.below(self.live.len() as u64) as usize]
    }

    /// Returns, at random, the phase with the fewest kills or any phase.
    fn next_phase(&mut self) -> Phase {
        let drawn = PHASES[self.numbers.below(PHASES.len() as u64) as usize];
        let kills = |phase: &Phase| {
            self.kills.iter().filter(|((one, _), _)| one == phase).map(|(_, n)| n).sum::<u64>()
        };
        let fewest = PHASES.into_iter().min_by_key(kills).unwrap_or(drawn);
        if self.numbers.below(2) == 0 { fewest } else { drawn }
    }

    fn all_kills(&self) -> u64 {
        self.kills.values().sum()
    }

    // -------------------------------------------------------------------------------- killing

    /// Draws one of the first twelve requests, or one of the first of a kind; remaining wanted
    /// kills come first.
    fn draw(&mut self, phase: Phase, victim: Victim) -> Aim {
        let master = victim == Victim::Master;
        if let Some(at) = self
            .wanted
            .iter()
            .position(|(wanted, of_master, _)| (*wanted, *of_master) == (phase, master))
        {
            return self.wanted.remove(at).2;
        }
        let moment = if self.numbers.below(2) == 0 { KillTime::Before } else { KillTime::After };
        let kinds = phase.requests(victim);
        let kind = kinds.get(self.numbers.below(2 * kinds.len() as u64) as usize).copied();
        let (of, most) = kind.map_or(("", 12), |of| (of, 4));
        let few = self.few.get(&(phase, master, of)).map_or(most, |few| most.min(*few));
        Aim { call: 1 + self.numbers.below(few.max(1)), of, moment }
    }

    fn arm(&mut self, victim: Victim, aim: Aim) -> Result<Arc<Relay>> {
        let (relay, process) = match victim {
            Victim::Master => (&self.of_master, self.cluster.master_process()?),
            Victim::Node(index) => (&self.of_nodes[index], self.cluster.node_process(index)?),
        };
        relay.kill_at(KillPoint {
            pid: process.pid(),
            call: aim.call,
            of: aim.of,
            moment: aim.moment,
        });
        Ok(Arc::clone(relay))
    }

    /// Counts a kill, and restarts the victim.
    async fn revive(&mut self, phase: Phase, victim: Victim, aim: Aim, line: &str) -> Result<()> {
        println!("  {phase:?}: {victim:?} killed {:?} {}", aim.moment, kind_of(line));
        *self.kills.entry((phase, aim.moment)).or_default() += 1;
        self.requests.entry(kind_of(line)).or_default()
            [usize::from(aim.moment == KillTime::After)] += 1;
        match victim {
            Victim::Master => {
                self.cluster.kill9_master().await?;
                self.cluster.start_master(Port::Same).await
            }
            Victim::Node(index) => {
                self.cluster.kill9_node(index).await?;
                self.cluster.start_node(index, Port::Same).await
            }
        }
    }

    /// Runs a command of `vasto` while the victim is killed, once or several times in a row.
    /// Returns the outcome of the command, and whether the victim was killed.
    async fn under_fire(
        &mut self,
        phase: Phase,
        victim: Victim,
        command: &[&str],
    ) -> Result<(Ran, bool)> {
        let mut aim = self.draw(phase, victim);
        let env = [("VASTO_MASTER".to_owned(), self.cluster.master())];
        let args: Vec<String> = command.iter().map(|&arg| arg.to_owned()).collect();
        let relay = self.arm(victim, aim)?;
        let mut running = tokio::spawn(async move {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            Ran::of(&args, &env, PATIENCE).await
        });
        let (mut killed, mut armed) = (false, true);
        loop {
            tokio::select! {
                line = relay.killed(), if armed => {
                    self.revive(phase, victim, aim, &line).await?;
                    killed = true;
                    // An operation that resumes after the restart is sometimes killed again.
                    armed = self.numbers.below(3) == 0;
                    if armed {
                        aim = self.draw(phase, victim);
                        self.arm(victim, aim)?;
                    }
                }
                ran = &mut running => {
                    match relay.disarm() {
                        Ok(line) if armed => {
                            self.revive(phase, victim, aim, &line).await?;
                            killed = true;
                        }
                        Err(counted) if !killed => {
                            self.few.insert((phase, victim == Victim::Master, aim.of), counted);
                        }
                        _ => {}
                    }
                    let ran = ran??;
                    ensure!(ran.code == 0 || killed, "{command:?} failed and nobody was killed: {ran:?}");
                    return Ok((ran, killed));
                }
            }
        }
    }

    /// Repeats a command until it succeeds.
    async fn insist(&self, command: &[&str]) -> Result<Value> {
        let mut last = String::new();
        until(&format!("{command:?} to succeed"), DEADLINE, async || {
            self.cluster.json(command).await.map_err(|error| last = format!("{error:#}")).ok()
        })
        .await
        .with_context(|| last.clone())
    }

    /// Runs a command that is safe to repeat, until the victim was killed and the command has
    /// succeeded.
    async fn repeatable(&mut self, phase: Phase, victim: Victim, command: &[&str]) -> Result<()> {
        for _ in 0..4 {
            let (ran, killed) = self.under_fire(phase, victim, command).await?;
            if ran.code != 0 {
                self.insist(command).await?;
            }
            if killed {
                break;
            }
        }
        Ok(())
    }

    // -------------------------------------------------------------------------------- checks

    /// Waits until every keyspace serves, is idle, and is completely in the bucket.
    async fn at_rest(&self) -> Result<()> {
        let mut last = Value::Null;
        until("everything to be at rest", PATIENCE, async || {
            for one in self.cluster.json(&["keyspace", "list"]).await.ok()?.as_array()? {
                let described = self
                    .cluster
                    .json(&["keyspace", "describe", one["name"].as_str()?])
                    .await
                    .ok()?;
                last = described.clone();
                let shipped = |one: &Value| one["lsn"].is_u64() && one["lsn"] == one["shipped_lsn"];
                (placed(&described).all(|one| one["state"] == "serving" && shipped(one))
                    && described["operation"].is_null())
                .then_some(())?;
            }
            Some(())
        })
        .await
        .with_context(|| format!("{last}"))
    }

    /// Checks that no object is missing or damaged, that every confirmed write exists, and that
    /// garbage collection deletes the leftovers of interrupted work.
    async fn check(&self) -> Result<()> {
        self.at_rest().await?;
        let found = self.cluster.fsck().await?;
        let verified = verify(&self.cluster.master(), KEPT, &self.history).await?;
        let collected = self.insist(&["bucket", "gc"]).await?;
        ensure!(collected["stopped"].is_null(), "{collected}");
        println!(
            "  {} objects, {} of them orphans, {} collected; {verified:?}",
            found["objects"],
            orphans(&found),
            collected["deleted"],
        );
        let found = self.cluster.fsck().await?;
        ensure!(
            orphans(&found) == 0,
            "{} of {} stay: {}",
            orphans(&found),
            found["objects"],
            found["orphans"]
        );
        Ok(())
    }

    /// Checks that every operation that was undone has a reason.
    async fn reasons(&mut self) -> Result<()> {
        let operations = self.insist(&["operation", "list"]).await?;
        for one in
            operations.as_array().context("no list")?.iter().filter(|one| one["state"] == "aborted")
        {
            let reason = one["reason"].as_str().unwrap_or_default();
            ensure!(!reason.is_empty(), "an operation was undone without a reason: {one}");
            let line = format!("{} {}: {reason}", one["kind"], one["keyspace"]);
            if self.aborted.insert(line.clone()) {
                println!("  undone: {line}");
            }
        }
        Ok(())
    }

    // -------------------------------------------------------------------------------- phases

    /// Writes a batch of new keys, confirmed by the bucket.
    async fn burst(&mut self) -> Result<()> {
        self.bursts += 1;
        let prefix = format!("b{}:", self.bursts);
        preload(&self.cluster.keyspace(KEPT).await?, &self.history, &prefix, 200)
            .await
            .context("a burst of writes")
    }

    async fn load(&self) -> Result<Load> {
        let pace = Duration::from_millis(5);
        let spec =
            LoadSpec { writers: 3, readers: 0, overwritten: 20, pace, ..LoadSpec::default() };
        Load::start(&self.cluster.master(), KEPT, &self.history, spec).await
    }

    async fn round(&mut self, phase: Phase) -> Result<()> {
        self.burst().await?;
        if phase == Phase::Collection {
            // A checkpoint, and the next checkpoint, which makes the first obsolete.
            for _ in 0..2 {
                self.insist(&["keyspace", "compact", KEPT]).await?;
                self.insist(&["keyspace", "checkpoint", KEPT]).await?;
                self.burst().await?;
            }
            self.at_rest().await?;
        }
        let busy = phase == Phase::Chunk || (phase != Phase::Restore && self.numbers.below(2) == 0);
        let load = if busy { Some(self.load().await?) } else { None };
        match phase {
            Phase::Checkpoint => {
                let victim = Victim::Node(self.any_live());
                self.repeatable(phase, victim, &["keyspace", "checkpoint", KEPT]).await?;
            }
            Phase::Chunk => self.chunk(load.as_ref().context("there is a load")?).await?,
            Phase::Collection => self.repeatable(phase, Victim::Master, &["bucket", "gc"]).await?,
            Phase::Restore => self.restore().await?,
            Phase::Bootstrap => self.bootstrap().await?,
        }
        if let Some(load) = load {
            load.goes_on(3).await.context("after the kill")?;
            load.stop().await?;
        }
        self.reasons().await
    }

    async fn chunk(&mut self, load: &Load) -> Result<()> {
        let described = self.insist(&["keyspace", "describe", KEPT]).await?;
        let holders: Vec<String> = placed(&described)
            .filter_map(|one| one["node_id"].as_str().map(str::to_owned))
            .collect();
        let holder = &holders[self.numbers.below(holders.len() as u64) as usize];
        let victim = Victim::Node(self.cluster.node_of(holder)?);
        let aim = self.draw(Phase::Chunk, victim);
        let relay = self.arm(victim, aim)?;
        let line = tokio::time::timeout(DEADLINE, relay.killed()).await;
        let line = line.with_context(|| format!("no request under load: {:?}", load.summary()))?;
        self.revive(Phase::Chunk, victim, aim, &line).await
    }

    /// Restores into a keyspace that is deleted afterwards.
    async fn restore(&mut self) -> Result<()> {
        let name = format!("copy{}", self.bursts);
        let master = self.numbers.below(2) == 0;
        let victim = if master { Victim::Master } else { Victim::Node(self.any_live()) };
        let command = ["keyspace", "restore", KEPT, "--into", &name];
        let mut ran = self.under_fire(Phase::Restore, victim, &command).await?.0;
        let start = Instant::now();
        while !self.is_there(&name).await? {
            ensure!(start.elapsed() < PATIENCE, "{name} is not there: {ran:?}");
            ensure!(ran.code != 0, "{name} was restored and is not there: {ran:?}");
            // The restore was not begun, or undone: repeated without a kill.
            ran = self.cluster.vasto(&command).await?;
        }
        verify(&self.cluster.master(), &name, &self.history)
            .await
            .with_context(|| format!("in {name}"))?;
        self.at_rest().await?;
        self.insist(&["keyspace", "delete", &name, "--yes"]).await.map(drop)
    }

    /// Waits for the end of a restore; returns false when the keyspace does not exist.
    async fn is_there(&self, name: &str) -> Result<bool> {
        let mut last = Value::Null;
        until(&format!("the end of the restore of {name}"), PATIENCE, async || {
            let listed = self.cluster.json(&["keyspace", "list"]).await.ok()?;
            if !listed.as_array()?.iter().any(|one| one["name"] == name) {
                return Some(false);
            }
            last = self.cluster.json(&["keyspace", "describe", name]).await.ok()?;
            let serves = placed(&last).all(|one| one["state"] == "serving");
            (serves && last["operation"].is_null()).then_some(true)
        })
        .await
        .with_context(|| format!("{last}"))
    }

    /// Loses a node with its disk; a new node takes its replicas from the bucket.
    async fn bootstrap(&mut self) -> Result<()> {
        let lost = self.any_live();
        let new = self.add_node().await?;
        let id = self.lose_node(lost).await?;
        let new_id = self.cluster.node_id(new).context("it has an id")?;
        let master = self.numbers.below(3) == 0;
        let victim = if master { Victim::Master } else { Victim::Node(new) };
        let command = ["node", "replace", &id, "--with", &new_id];
        let described = self.insist(&["keyspace", "describe", KEPT]).await?;
        if placed(&described).all(|one| one["node_id"] != id.as_str()) {
            return Ok(()); // it held nothing
        }
        let mut ran = self.under_fire(Phase::Bootstrap, victim, &command).await?.0;
        let start = Instant::now();
        let left = loop {
            let described = self.insist(&["keyspace", "describe", KEPT]).await?;
            if placed(&described)
                .all(|one| one["node_id"] != id.as_str() && one["state"] == "serving")
                && described["operation"].is_null()
            {
                break leaving(&described);
            }
            ensure!(start.elapsed() < PATIENCE, "{id} is not replaced: {ran:?}, {described}");
            if described["operation"].is_null() {
                ran = self.cluster.vasto(&command).await?;
            }
        };
        // The lost node does not return.
        for replica in left {
            self.insist(&[
                "keyspace",
                "evict",
                KEPT,
                "--replica",
                &replica,
                "--accept-loss",
                "--yes",
            ])
            .await?;
        }
        Ok(())
    }

    /// Loses all nodes, and restores from the bucket alone.
    async fn restore_from_the_bucket_alone(&mut self) -> Result<()> {
        for node in self.live.clone() {
            self.lose_node(node).await?;
        }
        self.add_node().await?;
        self.insist(&["keyspace", "restore", KEPT, "--into", "again"]).await?;
        let verified = verify(&self.cluster.master(), "again", &self.history).await?;
        println!("from the bucket alone: {verified:?}");
        self.cluster.fsck().await.map(drop)
    }

    fn figures(&self) {
        for phase in PHASES {
            let count = |moment| self.kills.get(&(phase, moment)).copied().unwrap_or_default();
            println!(
                "{phase:?}: killed {} times before, {} after",
                count(KillTime::Before),
                count(KillTime::After)
            );
        }
        for (kind, [before, after]) in &self.requests {
            println!("{kind}: killed {before} times before, {after} after");
        }
        println!("undone operations: {:?}", self.aborted);
    }
}

/// Returns the placed replicas.
fn placed(described: &Value) -> impl Iterator<Item = &Value> {
    replicas(described).filter(|one| one["role"] != "leaving")
}

/// Returns the ids of the draining replicas.
fn leaving(described: &Value) -> Vec<String> {
    replicas(described)
        .filter(|one| one["role"] == "leaving")
        .map(|one| one["replica_id"].to_string())
        .collect()
}

fn replicas(described: &Value) -> impl Iterator<Item = &Value> {
    let shards = described["placement"].as_array().into_iter().flatten();
    shards.flat_map(|shard| shard["replicas"].as_array().into_iter().flatten())
}

fn orphans(found: &Value) -> usize {
    found["orphans"].as_array().map_or(0, Vec::len)
}

/// Returns the kind of a request: its method, and the kind of object.
fn kind_of(line: &str) -> String {
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if target.contains("list-type=") {
        return "LIST".to_owned();
    }
    if target.contains("?delete") {
        return "DELETE".to_owned();
    }
    let kinds = [
        (".sst", "SST"),
        ("/db/", "file list"),
        (".chunk", "chunk"),
        ("/checkpoint/", "manifest"),
        ("/catalog/", "catalog"),
        ("/names/", "name"),
        ("/gc-term/", "term"),
        ("/probe/", "probe"),
    ];
    let kind =
        kinds.iter().find(|(part, _)| target.contains(part)).map_or("other", |(_, kind)| kind);
    format!("{method} {kind}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bucket_kills_lose_nothing_that_was_confirmed() -> Result<()> {
    let (kills, seed) = (setting("VASTO_BUCKET_KILLS", KILLS), setting("VASTO_BUCKET_SEED", 4));
    let s3 = S3Server::start(S3Kind::SeaweedFs).await?;
    let mut rig = Rig::start(&s3, seed).await?;
    let start = Instant::now();
    for round in 0.. {
        if rig.all_kills() >= kills {
            break;
        }
        if round > kills * 3 {
            bail!("too few kills: {:?}", rig.kills);
        }
        let phase = rig.next_phase();
        println!("{:.1} s: round {round}, {phase:?}", start.elapsed().as_secs_f64());
        rig.round(phase).await.with_context(|| format!("round {round}, {phase:?}"))?;
        if round % CHECK_EVERY == CHECK_EVERY - 1 {
            rig.check().await.with_context(|| format!("after round {round}, {phase:?}"))?;
        }
    }
    rig.check().await?;
    rig.restore_from_the_bucket_alone().await?;
    println!("{} kills in {:.1} s", rig.all_kills(), start.elapsed().as_secs_f64());
    rig.figures();
    for phase in PHASES {
        ensure!(
            rig.kills.keys().any(|(killed, _)| *killed == phase),
            "nobody was killed in {phase:?}"
        );
    }
    rig.cluster.finish().await?;
    s3.stop().await
}
