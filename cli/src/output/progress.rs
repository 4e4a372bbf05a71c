//! The progress of long operations, on stderr.

use std::{
    fmt,
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use super::{format_bytes, format_count, format_duration};

/// The unit that a progress line counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Bytes, shown as KiB, MiB, ...
    Bytes,
    /// Keys, operations, objects.
    Items,
}

impl Unit {
    fn show(self, amount: u64) -> String {
        match self {
            Unit::Bytes => format_bytes(amount),
            Unit::Items => format_count(amount),
        }
    }
}

/// Minimum interval between plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// The progress of a long operation on stderr: a bar with amount, rate and time left when stderr
/// is a terminal, a plain line every two seconds otherwise.
#[derive(Debug)]
pub(crate) struct ProgressLine {
    label: String,
    unit: Unit,
    started: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl ProgressLine {
    /// Starts the clock. The total may be set later.
    pub(crate) fn start(label: impl Into<String>, unit: Unit, total: Option<u64>) -> ProgressLine {
        let label = label.into();
        let started = Instant::now();
        let bar = io::stderr().is_terminal().then(|| bar(&label, unit, total));
        ProgressLine { label, unit, started, last_line: started, bar }
    }

    /// Sets the amount done, and the total.
    pub(crate) fn set(&mut self, done: u64, total: Option<u64>) {
        if let Some(bar) = &self.bar {
            if let (Some(total), true) = (total, bar.length() != total) {
                bar.set_length(total);
                bar.set_style(style(self.unit, true));
            }
            bar.set_position(done);
            return;
        }
        let now = Instant::now();
        if now.duration_since(self.last_line) >= LINE_INTERVAL {
            self.last_line = now;
            let elapsed = now.duration_since(self.started);
            eprintln!("{}", progress_line(&self.label, self.unit, done, total, elapsed));
        }
    }

    /// Changes the label before the figures: the current step.
    pub(crate) fn label(&mut self, label: impl Into<String>) {
        self.label = label.into();
        match &self.bar {
            Some(bar) => bar.set_message(self.label.clone()),
            None => eprintln!("{}", self.label),
        }
    }

    /// Removes the bar and leaves one line with the outcome.
    pub(crate) fn finish(self, summary: &str) {
        self.clear();
        eprintln!("{summary}");
    }

    /// Removes the bar without a trace.
    pub(crate) fn clear(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(label: &str, unit: Unit, total: Option<u64>) -> ProgressBar {
    let bar = match total {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::new_spinner(),
    };
    bar.set_style(style(unit, total.is_some()));
    bar.set_message(label.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn style(unit: Unit, total_known: bool) -> ProgressStyle {
    let template = match (unit, total_known) {
        (Unit::Bytes, true) => {
            "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left"
        }
        (Unit::Items, true) => "{msg} [{bar:30}] {human_pos}/{human_len}  {rate}  {eta} left",
        (Unit::Bytes, false) => "{spinner} {msg} {binary_bytes}  {binary_bytes_per_sec}",
        (Unit::Items, false) => "{spinner} {msg} {human_pos}  {rate}",
    };
    ProgressStyle::with_template(template)
        .expect("the templates are constants that a test builds")
        .with_key("rate", |state: &ProgressState, out: &mut dyn fmt::Write| {
            // A figure that cannot be written leaves a gap in a line that is redrawn soon.
            let _ = write!(out, "{}/s", format_count(state.per_sec() as u64));
        })
        .progress_chars("=> ")
}

fn progress_line(
    label: &str,
    unit: Unit,
    done: u64,
    total: Option<u64>,
    elapsed: Duration,
) -> String {
    let rate = done as f64 / elapsed.as_secs_f64().max(1e-9);
    let mut line = format!("{label} {}", unit.show(done));
    if let Some(total) = total {
        let percent = if total == 0 { 100.0 } else { done as f64 * 100.0 / total as f64 };
        line += &format!(" of {} ({percent:.0} %)", unit.show(total));
    }
    line += &format!(", {}/s", unit.show(rate as u64));
    if let Some(rest) = total.and_then(|total| total.checked_sub(done))
        && rate > 0.0
        && let Ok(left) = Duration::try_from_secs_f64(rest as f64 / rate)
    {
        line += &format!(", {} left", format_duration(Duration::from_secs(left.as_secs())));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_lines_tell_amount_rate_and_time_left() {
        let second = Duration::from_secs(1);
        let mib = 1 << 20;
        assert_eq!(
            progress_line("resize", Unit::Bytes, mib, Some(4 * mib), second),
            "resize 1.0 MiB of 4.0 MiB (25 %), 1.0 MiB/s, 3.00 s left"
        );
        assert_eq!(progress_line("load", Unit::Items, 5_000, None, second), "load 5,000, 5,000/s");
        assert_eq!(
            progress_line("load", Unit::Items, 0, Some(0), Duration::ZERO),
            "load 0 of 0 (100 %), 0/s"
        );
    }

    #[test]
    fn every_style_builds() {
        for unit in [Unit::Bytes, Unit::Items] {
            for has_total in [true, false] {
                style(unit, has_total);
            }
        }
    }
}
