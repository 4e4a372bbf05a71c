//! The command line of `vasto-bench-changes`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use super::limit::Limit;

/// What structural changes cost: bytes, speed, latency of clients, and pauses of writers.
///
/// Starts clusters of separate processes in temporary directories, prints a Markdown table for each
/// part and writes all figures to one JSON file. Takes up to an hour and gigabytes of disk; each part
/// ends by itself. What was measured is kept when its time is over or it is stopped with ctrl-c; no
/// process stays behind, and no file but the logs of the servers after a failure.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "vasto-bench-changes",
    max_term_width = 100,
    after_help = "Without a part, all of them are measured, one after the other.\n\n\
        Exit codes: 0 all goals were reached; 1 one was missed, a part did not end in its time, or\n\
        something was lost, and the last lines name it; 2 not used as intended.\n\n\
        Examples:\n  \
        vasto-bench-changes\n  \
        vasto-bench-changes --bytes --gib 0.25\n  \
        vasto-bench-changes --latency --seconds 30 --s3\n  \
        vasto-bench-changes --cutover --changes 5 --writes-per-s 0 --out cutover.json"
)]
pub struct Args {
    /// Bytes that a resize reads from the bucket for each byte that moves
    #[arg(long, help_heading = "Parts")]
    pub bytes: bool,
    /// Bytes a second of a grow, a rebalance and restores, beside a plain download
    #[arg(long, help_heading = "Parts")]
    pub speed: bool,
    /// Latency of clients during each kind of change, while half of the machine is busy and while all of it is
    #[arg(long, help_heading = "Parts")]
    pub latency: bool,
    /// Pauses, errors and losses of writers that write to the moving keys alone
    #[arg(long, help_heading = "Parts")]
    pub cutover: bool,
    /// Rows of the keyspace that changes, incompressible; `--speed` takes at most 1 of it, and
    /// `--latency`, which needs two such clusters, half of one
    #[arg(long, value_name = "GIB", default_value_t = 2.0, value_parser = parse_gib)]
    pub gib: f64,
    /// Minutes that a part has [default: 10, and 25 for `--cutover`]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_440))]
    pub minutes: Option<u64>,
    /// Grows of `--cutover`, and as many shrinks
    #[arg(long, value_name = "N", default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub changes: u32,
    /// Keys that `--cutover` writes in a second, at most; 0: as many as the machine gives
    #[arg(long, value_name = "N", default_value_t = 120_000)]
    pub writes_per_s: u32,
    /// Repetitions of `--speed`, as far as its time reaches
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

    /// Begins a part that has so many minutes unless it was given others.
    pub(super) fn limit(&self, minutes: u64) -> Limit {
        Limit::of_minutes(self.minutes.unwrap_or(minutes))
    }

    /// Returns the file for the logs of the servers of a part that failed.
    pub(super) fn logs(&self) -> PathBuf {
        self.out.with_extension("logs")
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
        assert_eq!((one.changes, one.gib, one.writes_per_s), (5, 0.5, 120_000));
        assert!(one.limit(10).left() > of(&["--minutes", "9"]).unwrap().limit(10).left());
        assert_eq!(one.logs(), PathBuf::from("bench-changes.logs"));
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for args in [
            ["--gib", "0"],
            ["--gib", "nan"],
            ["--changes", "0"],
            ["--seconds", "1"],
            ["--minutes", "0"],
        ] {
            assert!(of(&args).is_err(), "{args:?}");
        }
        assert!(of(&["bytes"]).is_err());
    }
}
