//! `vasto serve` and the code that it shares with `vasto dev`: from configuration to a running
//! server, its readiness line, and its shutdown.
//!
//! Invariant: stdout gets exactly one line, after the server serves. The first SIGTERM or SIGINT
//! stops the server gracefully (exit code 0), the second ends the process at once.
//!
//! Not here: all the work of a server.

mod dev;
mod signals;

use std::{future::Future, net::SocketAddr, path::Path};

use futures::{StreamExt, stream::FuturesUnordered};
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use vasto_master::{Master, MasterConfig};
use vasto_node::{EngineBudget, Node, NodeConfig};
use vasto_observability::{AdminServer, Readiness, Telemetry, TelemetryConfig};
use vasto_shipping::{BucketOptions, Prices, gc::Retention};

pub(crate) use self::dev::dev;
use self::signals::Signals;
use crate::{
    args::{ServeMaster, ServeNode},
    config::{self, Config},
    output::{self, Failure},
};

/// The failure domain of nodes that set none.
const ZONE: &str = "default";

/// The readiness line that a server prints when it serves; its fields are a contract.
#[derive(Debug, Serialize)]
struct Ready<'a> {
    ready: bool,
    role: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_id: Option<String>,
    listen: SocketAddr,
    master: String,
    admin_listen: SocketAddr,
    cluster_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes: Option<Vec<ReadyNode>>,
    pid: u32,
}

/// A node of `vasto dev`.
#[derive(Debug, Serialize)]
struct ReadyNode {
    node_id: String,
    listen: SocketAddr,
}

/// `vasto serve master`.
///
/// # Errors
/// A configuration that cannot be used, or the error that keeps the master from starting.
pub(crate) async fn master(args: &ServeMaster, file: Option<&Path>) -> anyhow::Result<()> {
    keep_files_private();
    let config = config::load(file, args.overrides())?.config;
    let settings = master_config(&config)?;
    let server = Server::start("master", &config, config.master.admin_listen).await?;
    let Some(running) = server.starting(Master::start(settings, server.stop.clone())).await? else {
        return server.end().await;
    };
    let cluster_id = running.cluster_id.clone();
    let ready = Ready {
        ready: true,
        role: "master",
        node_id: None,
        listen: running.listen,
        master: format!("http://{}", running.listen),
        admin_listen: server.admin.addr(),
        cluster_id: &cluster_id,
        nodes: None,
        pid: std::process::id(),
    };
    let trouble = vec![running.trouble.clone()];
    server
        .serve(&ready, trouble, async {
            running.stopped().await;
            Ok(())
        })
        .await
}

/// `vasto serve node`.
///
/// # Errors
/// A configuration that cannot be used, or the error that keeps the node from starting.
pub(crate) async fn node(args: &ServeNode, file: Option<&Path>) -> anyhow::Result<()> {
    keep_files_private();
    let mut config = config::load(file, args.overrides())?.config;
    if let Some(dir) = &args.dir {
        // Unconverted: not every path can be represented as text.
        config.node.dir = Some(dir.clone());
    }
    let settings = node_config(&config, config.check_node().map_err(Failure::from)?);
    let master = settings.master.clone();
    let server = Server::start("node", &config, config.node.admin_listen).await?;
    let Some(running) = server.starting(Node::start(settings, server.stop.clone())).await? else {
        return server.end().await;
    };
    let cluster_id = running.cluster_id.clone();
    let ready = Ready {
        ready: true,
        role: "node",
        node_id: Some(running.node_id.to_string()),
        listen: running.listen,
        master,
        admin_listen: server.admin.addr(),
        cluster_id: &cluster_id,
        nodes: None,
        pid: std::process::id(),
    };
    let trouble = vec![running.trouble.clone()];
    server.serve(&ready, trouble, async { running.stopped().await.map_err(advice) }).await
}

/// Restricts every file that this process creates from now on, including RocksDB's files and a
/// bucket in a directory, to its own user: the files hold user data.
fn keep_files_private() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
}

// ------------------------------------------------------------ from configuration to settings

fn master_config(config: &Config) -> Result<MasterConfig, Failure> {
    Ok(MasterConfig {
        bucket_url: config.check_master()?.to_owned(),
        bucket_options: bucket_options(config),
        listen: config.master.listen,
        node_silence: config.master.node_silence,
        dial_back: true,
        replace_after: config.master.replace_after,
        rebalance: config.master.rebalance.is_on(),
        moves_at_once: config.master.moves_at_once,
        retention: Retention {
            keep_checkpoints: config.bucket.keep_checkpoints,
            keep_for: config.bucket.keep_for,
            min_age: config.bucket.min_age,
        },
        gc_interval: config.bucket.gc_interval,
        prices: Prices {
            currency: config.prices.currency.clone(),
            put_per_1000: config.prices.put_per_1000,
            get_per_1000: config.prices.get_per_1000,
            list_per_1000: config.prices.list_per_1000,
            gib_month: config.prices.gib_month,
            egress_gib: config.prices.egress_gib,
        },
    })
}

fn node_config(config: &Config, dir: &Path) -> NodeConfig {
    let node = &config.node;
    NodeConfig {
        master: node.master.clone(),
        dir: dir.to_owned(),
        listen: node.listen,
        advertise: node.advertise.clone(),
        zone: node.zone.clone().unwrap_or_else(|| ZONE.to_owned()),
        budget: EngineBudget {
            cache_bytes: usize::try_from(node.cache.as_u64()).unwrap_or(usize::MAX),
            write_buffer_bytes: usize::try_from(node.write_buffer.as_u64()).unwrap_or(usize::MAX),
            background_jobs: u32::try_from(node.background_jobs).unwrap_or(u32::MAX),
            rate_limit: node.rate_limit.as_u64(),
        },
        ship_interval: node.ship_interval,
        read_threads: node.read_threads,
        max_replicas: node.max_replicas,
        log_cap: node.max_log.as_u64(),
        ship_rate: node.ship_rate.as_u64(),
        bulk_rate: node.bulk_rate.as_u64(),
        background_latency_factor: node.background_latency_factor,
        clock_shift_ms: node.clock_shift_ms,
        bucket_options: bucket_options(config),
    }
}

fn bucket_options(config: &Config) -> BucketOptions {
    let bucket = &config.bucket;
    BucketOptions {
        endpoint: bucket.endpoint.clone(),
        region: bucket.region.clone(),
        access_key_id: bucket.access_key_id.as_ref().map(|secret| secret.expose().clone()),
        secret_access_key: bucket.secret_access_key.as_ref().map(|secret| secret.expose().clone()),
        allow_http: bucket.allow_http,
    }
}

// ------------------------------------------------------------------------ the lifecycle of a
// server

/// The parts around every server: telemetry, the admin port, signals.
struct Server {
    role: &'static str,
    telemetry: Telemetry,
    readiness: Readiness,
    admin: AdminServer,
    /// Cancelled by the first signal: the servers stop.
    stop: CancellationToken,
    /// Cancelled when the servers have stopped: the admin port closes last.
    stopped: CancellationToken,
    signals: Signals,
}

impl Server {
    async fn start(
        role: &'static str,
        config: &Config,
        admin_listen: SocketAddr,
    ) -> anyhow::Result<Server> {
        let stop = CancellationToken::new();
        // Before any slow step, so that a signal is never lost.
        let signals = Signals::listen(stop.clone())?;
        let telemetry = Telemetry::init(TelemetryConfig {
            role: role.to_owned(),
            instance: None,
            filter: Some(config.log.filter.clone()),
            format: config.log.format,
            otlp_endpoint: None,
        })
        .map_err(advice)?;
        vasto_failpoint::watch_environment();
        if config.security.insecure {
            tracing::warn!(
                "--insecure: whoever reaches these ports can read and change everything"
            );
        }
        let readiness = Readiness::new();
        let stopped = CancellationToken::new();
        let admin = AdminServer::start(
            admin_listen,
            telemetry.registry(),
            readiness.clone(),
            stopped.clone(),
        );
        let admin = admin.await.map_err(advice)?;
        Ok(Server { role, telemetry, readiness, admin, stop, stopped, signals })
    }

    /// Waits for a start; returns `None` when a signal came first and the start failed or did not
    /// end in time.
    async fn starting<T, E: std::error::Error>(
        &self,
        start: impl Future<Output = Result<T, E>>,
    ) -> anyhow::Result<Option<T>> {
        tokio::pin!(start);
        let started = tokio::select! {
            started = &mut start => started,
            () = self.stop.cancelled() => match tokio::time::timeout(signals::START_DEADLINE, start).await {
                Ok(Ok(started)) => Ok(started),
                Ok(Err(_)) | Err(_) => return Ok(None),
            },
        };
        started.map(Some).map_err(|error| advice(error).into())
    }

    /// Prints the readiness line, and serves until a signal; then waits for `stopped`. A server
    /// that stops by itself, because its cluster refuses it, is a failure with its reason.
    async fn serve(
        self,
        ready: &Ready<'_>,
        trouble: Vec<watch::Receiver<Option<String>>>,
        stopped: impl Future<Output = Result<(), Failure>>,
    ) -> anyhow::Result<()> {
        if !self.stop.is_cancelled() {
            self.readiness.set_ready();
            output::print_json_line(ready)?;
        }
        let watching =
            AbortOnDropHandle::new(tokio::spawn(watch_trouble(self.readiness.clone(), trouble)));
        tokio::pin!(stopped);
        let result = tokio::select! {
            result = &mut stopped => {
                let by_itself = || {
                    let failure = Failure::new(format!("the {} stopped by itself", self.role));
                    failure.hint("the last lines of its log above say why")
                };
                if self.stop.is_cancelled() { result } else { result.and_then(|()| Err(by_itself())) }
            }
            () = self.stop.cancelled() => {
                watching.abort();
                self.readiness.set_not_ready("stopping");
                tracing::info!("stopping; a second signal ends the process at once");
                match tokio::time::timeout(signals::DEADLINE, stopped).await {
                    Ok(result) => result,
                    Err(_) => {
                        let waited = signals::DEADLINE.as_millis();
                        let failure = Failure::new(format!("the {} did not stop within {waited} ms", self.role));
                        // The rest is not shut down gracefully: the deadline has passed.
                        return Err(failure.hint("nothing acknowledged is lost: the next start replays the log").into());
                    }
                }
            }
        };
        drop(watching);
        self.readiness.set_not_ready("stopped");
        self.end().await?;
        Ok(result?)
    }

    async fn end(self) -> anyhow::Result<()> {
        self.stopped.cancel();
        self.admin.join().await;
        self.telemetry.shutdown().await;
        self.signals.end();
        Ok(())
    }
}

/// Makes `/readyz` report the warning of any server of this process that cannot do all of its work.
async fn watch_trouble(readiness: Readiness, mut servers: Vec<watch::Receiver<Option<String>>>) {
    loop {
        // Marks all values as seen: an unseen value would count as a change for ever.
        let troubles: Vec<Option<String>> =
            servers.iter_mut().map(|server| server.borrow_and_update().clone()).collect();
        match troubles.into_iter().flatten().next() {
            Some(reason) => readiness.set_not_ready(reason),
            None => readiness.set_ready(),
        }
        let mut changes: FuturesUnordered<_> =
            servers.iter_mut().map(|server| server.changed()).collect();
        // A server that has ended sends no more changes.
        if !matches!(changes.next().await, Some(Ok(()))) {
            return;
        }
    }
}

/// Converts an error of a server, whose text is the problem and then, after a semicolon, the
/// remedy.
fn advice(error: impl std::error::Error) -> Failure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    Failure::with_advice(&text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::Overrides;

    #[test]
    fn ready_lines_are_those_of_the_contract() {
        let listen = "127.0.0.1:40123".parse().unwrap();
        let ready = Ready {
            ready: true,
            role: "node",
            node_id: Some("n-0000000000000001".to_owned()),
            listen,
            master: "http://127.0.0.1:8278".to_owned(),
            admin_listen: "127.0.0.1:1".parse().unwrap(),
            cluster_id: "c-1",
            nodes: None,
            pid: 123,
        };
        assert_eq!(
            serde_json::to_string(&ready).unwrap(),
            r#"{"ready":true,"role":"node","node_id":"n-0000000000000001","listen":"127.0.0.1:40123","master":"http://127.0.0.1:8278","admin_listen":"127.0.0.1:1","cluster_id":"c-1","pid":123}"#
        );
    }

    #[test]
    fn the_configuration_reaches_the_node() {
        let flags = Overrides::new()
            .set("node.cache", "--set", Some("1GiB"))
            .set("node.rate_limit", "--set", Some("5MiB"))
            .set("node.background_latency_factor", "--set", Some("3.5"))
            .set("bucket.secret_access_key", "--set", Some("hidden"));
        let config = config::load(None, flags).unwrap().config;
        let node = node_config(&config, Path::new("/d"));
        assert_eq!((node.budget.cache_bytes, node.budget.rate_limit), (1 << 30, 5 << 20));
        assert_eq!(node.background_latency_factor, 3.5);
        assert_eq!((node.dir.as_path(), node.zone.as_str()), (Path::new("/d"), ZONE));
        assert_eq!(node.bucket_options.secret_access_key.as_deref(), Some("hidden"));
    }

    #[test]
    fn the_prices_reach_the_master() {
        let flags = Overrides::new().assign(
            &[
                "currency=EUR",
                "put_per_1000=1",
                "get_per_1000=2",
                "list_per_1000=3",
                "gib_month=4",
                "egress_gib=5",
            ]
            .map(|given| given.split_once('=').unwrap())
            .map(|(field, value)| (format!("prices.{field}"), value.to_owned())),
        );
        let mut config = config::load(None, flags).unwrap().config;
        config.bucket.url = Some("file:///b".to_owned());
        let wanted = Prices {
            currency: "EUR".to_owned(),
            put_per_1000: 1.0,
            get_per_1000: 2.0,
            list_per_1000: 3.0,
            gib_month: 4.0,
            egress_gib: 5.0,
        };
        assert_eq!(master_config(&config).unwrap().prices, wanted);
        config.prices = Default::default();
        assert_eq!(master_config(&config).unwrap().prices, Prices::default());
    }
}
