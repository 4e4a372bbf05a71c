//! The command line of `vasto-bench-changes`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// What structural changes cost: bytes, speed, latency of clients, and pauses of writers.
///
/// Starts clusters of separate processes in temporary directories, prints a Markdown table for each
/// part and writes all figures to one JSON file. Takes minutes to an hour and gigabytes of disk. What
/// was measured is kept when it is stopped with ctrl-c; no process and no file stays behind.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "vasto-bench-changes",
    max_term_width = 100,
    after_help = "Without a part, all of them are measured, one after the other.\n\n\
        Exit codes: 0 measured, whether the goals held or not; 1 a change failed to end, something was\n\
        lost, or it was stopped; 2 not used as intended.\n\n\
        Examples:\n  \
        vasto-bench-changes\n  \
        vasto-bench-changes --bytes --gib 0.25\n  \
        vasto-bench-changes --latency --seconds 30 --s3\n  \
        vasto-bench-changes --cutover --changes 5 --out cutover.json"
)]
pub struct Args {
    /// Bytes that a resize reads from the bucket for each byte that moves
    #[arg(long, help_heading = "Parts")]
    pub bytes: bool,
    /// Bytes a second of a grow, a rebalance and restores, beside a plain download
    #[arg(long, help_heading = "Parts")]
    pub speed: bool,
    /// Latency of clients during each kind of change, at half of the peak load and at all of it
    #[arg(long, help_heading = "Parts")]
    pub latency: bool,
    /// Pauses, errors and losses of writers that write to the moving keys alone, at full speed
    #[arg(long, help_heading = "Parts")]
    pub cutover: bool,
    /// Rows of the keyspace that changes, incompressible
    #[arg(long, value_name = "GIB", default_value_t = 2.0, value_parser = parse_gib)]
    pub gib: f64,
    /// Grows of `--cutover`, and as many shrinks
    #[arg(long, value_name = "N", default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub changes: u32,
    /// Repetitions of `--speed`
    #[arg(long, value_name = "N", default_value_t = 3,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    /// Seconds of `--latency` without a change, before each one
    #[arg(long, value_name = "S", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(2..=3_600))]
    pub seconds: u64,
    /// Decides keys, values and their order
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Keep the bucket on a SeaweedFS server of this machine instead of in a local directory
    #[arg(long)]
    pub s3: bool,
    /// Put the clusters and downloads into this directory [default: that of temporary files]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// The file for all figures
    #[arg(long, value_name = "FILE", default_value = "bench-changes.json")]
    pub out: PathBuf,
}

impl Args {
    /// Returns true when a part is to be measured, given its flag.
    pub(super) fn measures(&self, part: bool) -> bool {
        part || !(self.bytes || self.speed || self.latency || self.cutover)
    }

    pub(super) fn calm(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

fn parse_gib(text: &str) -> Result<f64, String> {
    let gib = text.parse::<f64>().map_err(|error| error.to_string())?;
    match gib {
        gib if (0.01..=1_024.0).contains(&gib) => Ok(gib),
        _ => Err("give 0.01 to 1024".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(args: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["vasto-bench-changes"][..], args].concat())
    }

    #[test]
    fn all_parts_are_measured_unless_some_are_named() {
        let all = of(&[]).unwrap();
        let parts = [all.bytes, all.speed, all.latency, all.cutover];
        assert_eq!(parts.map(|part| all.measures(part)), [true; 4]);
        assert_eq!((all.gib, all.changes, all.seed), (2.0, 100, 1));
        let one = of(&["--cutover", "--changes", "5", "--gib", "0.5"]).unwrap();
        assert!(one.measures(one.cutover) && !one.measures(one.bytes));
        assert_eq!((one.changes, one.gib), (5, 0.5));
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for args in [["--gib", "0"], ["--gib", "nan"], ["--changes", "0"], ["--seconds", "1"]] {
            assert!(of(&args).is_err(), "{args:?}");
        }
        assert!(of(&["bytes"]).is_err());
    }
}
