//! SIGTERM and SIGINT: the first one asks the servers to stop, the second one ends the process.

use std::{process, time::Duration};

use anyhow::Context;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use vasto_core::limits::SHUTDOWN_DEADLINE;

/// A server that has not stopped by then is ended: a little before the promised time, so that the
/// last telemetry still leaves within it.
pub(super) const DEADLINE: Duration = SHUTDOWN_DEADLINE.saturating_sub(Duration::from_millis(1_500));

/// A server that has not started this long after a signal is ended: it has served nobody yet.
pub(super) const START_DEADLINE: Duration = Duration::from_secs(2);

/// The task that listens.
pub(super) struct Signals(JoinHandle<()>);

impl Signals {
    /// From now on the first signal cancels `stop`.
    pub(super) fn listen(stop: CancellationToken) -> anyhow::Result<Signals> {
        let cannot = "cannot listen for signals";
        let mut terminate = signal(SignalKind::terminate()).context(cannot)?;
        let mut interrupt = signal(SignalKind::interrupt()).context(cannot)?;
        Ok(Signals(tokio::spawn(async move {
            next(&mut terminate, &mut interrupt).await;
            stop.cancel();
            let number = next(&mut terminate, &mut interrupt).await;
            // What a shell shows for a process that a signal has ended.
            process::exit(128 + number.as_raw_value());
        })))
    }

    /// Signals mean nothing any more: the end is near anyway.
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
