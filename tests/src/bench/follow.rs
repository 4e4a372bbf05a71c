//! A structural change from its start to its end: its progress on stderr, and the time that each
//! step took.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use vasto_client::{Answer, ErrorKind, Operation, OperationState, Vasto};

use super::table::{mib, note};

/// Interval between two looks at an operation: what the times of its steps are good for.
const LOOK: Duration = Duration::from_millis(25);
/// Interval between two lines about the progress of one change.
const TELL: Duration = Duration::from_secs(30);

/// An operation that has ended.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) operation: Operation,
    pub(super) steps: Vec<StepTime>,
    /// Parts that were tried again and seals that were undone, as far as they were seen.
    pub(super) retries: u64,
}

/// How long a step took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct StepTime {
    step: String,
    seconds: f64,
}

/// Follows an operation until it has ended, one way or the other. Whoever calls this bounds its time.
///
/// # Errors
/// When the master does not answer.
pub(super) async fn follow(
    vasto: &Vasto,
    started: Answer<Operation>,
    label: &str,
) -> Result<Ended> {
    let began = Instant::now();
    let (mut looked, mut told) = (began, began);
    let (mut steps, mut retries) = (Vec::new(), 0);
    let mut operation = started.into_document();
    while operation.state.is_under_way() {
        tokio::time::sleep(LOOK).await;
        let step = operation.step.clone().unwrap_or_else(|| "?".to_owned());
        add(&mut steps, step, looked.elapsed());
        retries = retries.max(operation.retries.unwrap_or_default());
        looked = Instant::now();
        if told.elapsed() >= TELL {
            told = looked;
            note(&line(label, &operation));
        }
        match vasto.show_operation(&operation.id).await {
            Ok(now) => operation = now.into_document(),
            // A busy machine; it is asked again.
            Err(error)
                if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::DeadlineExceeded) => {
            }
            Err(error) => return Err(error).context(format!("{label}: {}", operation.id)),
        }
    }
    Ok(Ended { operation, steps, retries })
}

fn add(steps: &mut Vec<StepTime>, step: String, time: Duration) {
    let seconds = time.as_secs_f64();
    match steps.iter_mut().find(|one| one.step == step) {
        Some(one) => one.seconds += seconds,
        None => steps.push(StepTime { step, seconds }),
    }
}

fn line(label: &str, operation: &Operation) -> String {
    let step = operation.step.as_deref().unwrap_or_default();
    let (done, total) = (operation.bytes_done, operation.bytes_total);
    let (done, total) = (mib(done.unwrap_or_default()), mib(total.unwrap_or_default()));
    let waiting = operation.waiting_for.as_deref();
    let waiting = waiting.map_or_else(String::new, |what| format!(", waiting for {what}"));
    let trouble = operation.trouble.as_ref();
    let trouble = trouble.map_or_else(String::new, |trouble| format!(", {}", trouble.what));
    format!("{label}: {step}, {done:.0} of {total:.0} MiB{waiting}{trouble}")
}

impl Ended {
    /// Checks that the operation took effect.
    ///
    /// # Errors
    /// Why it was aborted.
    pub(super) fn done(self) -> Result<Self> {
        match &self.operation.state {
            OperationState::Done => Ok(self),
            state => bail!(
                "operation {} is {state}: {}",
                self.operation.id,
                self.operation.reason.as_deref().unwrap_or("no reason is known")
            ),
        }
    }

    pub(super) fn bytes_moved(&self) -> u64 {
        self.operation.bytes_moved.unwrap_or_default()
    }

    /// Returns the line that names the change, how long it took, and how long writes waited for it.
    pub(super) fn line(&self, what: &str) -> String {
        let pause = self.operation.write_pause_ms.map_or_else(String::new, |pause| {
            format!(", pause {:.0} / {:.0} / {:.0} ms", pause.p50, pause.p99, pause.max)
        });
        let moved = mib(self.bytes_moved());
        format!(
            "{what}: {:.1} s, {moved:.0} MiB{pause}; {}",
            self.seconds(),
            steps_text(&self.steps)
        )
    }

    pub(super) fn bytes_from_bucket(&self) -> u64 {
        self.operation.bytes_from_bucket.unwrap_or_default()
    }

    pub(super) fn bytes_from_peers(&self) -> u64 {
        self.operation.bytes_from_peers.unwrap_or_default()
    }

    /// Returns how long it took by the clock of the master, seconds.
    pub(super) fn seconds(&self) -> f64 {
        self.operation.duration_ms.unwrap_or_default() as f64 / 1_000.0
    }
}

/// Formats the steps of a change and the seconds of each.
pub(super) fn steps_text(steps: &[StepTime]) -> String {
    let all: Vec<String> =
        steps.iter().map(|one| format!("{} {:.1}", one.step, one.seconds)).collect();
    all.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_comes_again_adds_its_time() {
        let mut steps = Vec::new();
        for (step, ms) in [("tail", 200), ("sealing", 100), ("tail", 300)] {
            add(&mut steps, step.to_owned(), Duration::from_millis(ms));
        }
        assert_eq!(steps_text(&steps), "tail 0.5, sealing 0.1");
    }
}
