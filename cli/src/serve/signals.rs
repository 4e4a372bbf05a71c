//! SIGTERM and SIGINT: the first stops the servers, the second ends the process.

use std::{process, time::Duration};

use anyhow::Context;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use vasto_core::limits::SHUTDOWN_DEADLINE;

/// Deadline after which a server that has not stopped is ended: shortly before the promised time,
/// so that the last telemetry is still sent within it.
pub(super) const DEADLINE: Duration =
    SHUTDOWN_DEADLINE.saturating_sub(Duration::from_millis(1_500));

/// Deadline after a signal for a server that is still starting: it has served no request yet.
pub(super) const START_DEADLINE: Duration = Duration::from_secs(2);

/// The task that receives signals.
pub(super) struct Signals(JoinHandle<()>);

impl Signals {
    /// Makes the first signal cancel `stop` from now on.
    pub(super) fn listen(stop: CancellationToken) -> anyhow::Result<Signals> {
        let cannot = "cannot listen for signals";
        let mut terminate = signal(SignalKind::terminate()).context(cannot)?;
        let mut interrupt = signal(SignalKind::interrupt()).context(cannot)?;
        Ok(Signals(tokio::spawn(async move {
            next(&mut terminate, &mut interrupt).await;
            stop.cancel();
            let number = next(&mut terminate, &mut interrupt).await;
            // The exit code that a shell shows for a process ended by a signal.
            process::exit(128 + number.as_raw_value());
        })))
    }

    /// Stops handling signals: the process is about to end.
    pub(super) fn end(self) {
        self.0.abort();
    }
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> SignalKind {
    tokio::select! {
        _ = terminate.recv() => SignalKind::terminate(),
        _ = interrupt.recv() => SignalKind::interrupt(),
    }
}
