//! The benchmark of structural changes: what they read, how fast they are, and what clients feel of
//! them, on real processes.
//!
//! **Invariant:** the load generator shares the machine with the cluster; every table of what clients
//! saw says which part of the processors each of them took. What was measured is written to the file
//! after each part, which ends by itself when its time is over.

mod args;
mod cpu;
mod cutover;
mod follow;
mod foreground;
mod latency;
mod limit;
mod phase;
mod speed;
mod stage;
mod table;
mod traffic;
mod values;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vasto_testkit::{S3Kind, S3Server};

pub use self::args::Args;
use self::table::note;

/// All figures of a run.
#[derive(Debug, Serialize)]
struct Document {
    version: &'static str,
    cores: usize,
    processor: String,
    /// `directory` or `seaweedfs`.
    bucket: &'static str,
    gib: f64,
    seed: u64,
    /// The goals that were missed, and the parts that ended early.
    missed: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<traffic::Traffic>,
    #[serde(skip_serializing_if = "Option::is_none")]
    speed: Option<speed::Speed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency: Option<latency::Latency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cutover: Option<cutover::Cutover>,
}

/// What a part of a run has measured, also when it ended early.
trait Part: Serialize {
    /// Formats the tables of the part.
    fn text(&self) -> String;

    /// Returns a line for each goal that was missed, and for an early end.
    fn missed(&self) -> Vec<String>;
}

/// Returns the line for a part that ended early.
fn early(stopped: Option<&str>) -> Option<String> {
    stopped.map(|why| format!("it ended early: {why}"))
}

/// Measures what the arguments ask for, prints the tables and writes the file.
///
/// # Errors
/// When the file cannot be written; all goals that were missed, and why parts ended early.
pub async fn run(args: &Args) -> Result<()> {
    let mut document = Document::of(args);
    // Learn now that the file cannot be written, not in an hour.
    document.save(&args.out)?;
    // What earlier runs have left is not of this one.
    let _ = std::fs::remove_file(args.logs());
    let s3 = match args.s3 {
        true => Some(S3Server::start(S3Kind::SeaweedFs).await?),
        false => None,
    };
    let s3 = s3.as_ref();
    println!("{}", document.head());
    if args.measures(args.bytes) {
        let part = Box::pin(traffic::measure(args, s3)).await;
        document.tell("--bytes", &part);
        document.bytes = Some(part);
        document.save(&args.out)?;
    }
    if args.measures(args.speed) {
        let part = Box::pin(speed::measure(args, s3)).await;
        document.tell("--speed", &part);
        document.speed = Some(part);
        document.save(&args.out)?;
    }
    if args.measures(args.latency) {
        let part = Box::pin(latency::measure(args, s3)).await;
        document.tell("--latency", &part);
        document.latency = Some(part);
        document.save(&args.out)?;
    }
    if args.measures(args.cutover) {
        let part = Box::pin(cutover::measure(args, s3)).await;
        document.tell("--cutover", &part);
        document.cutover = Some(part);
        document.save(&args.out)?;
    }
    note(&format!("all figures are in {}", args.out.display()));
    let missed = &document.missed;
    ensure!(missed.is_empty(), "{} goals were missed:\n  {}", missed.len(), missed.join("\n  "));
    Ok(())
}

impl Document {
    fn of(args: &Args) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            processor: processor(),
            bucket: if args.s3 { "seaweedfs" } else { "directory" },
            gib: args.gib,
            seed: args.seed,
            missed: Vec::new(),
            bytes: None,
            speed: None,
            latency: None,
            cutover: None,
        }
    }

    fn head(&self) -> String {
        let Self { version, cores, processor, gib, seed, .. } = self;
        let bucket = match self.bucket {
            "directory" => "a local directory",
            _ => "SeaweedFS on this machine",
        };
        format!(
            "# Structural changes\n\nVasto {version} on {cores} processors ({processor}), bucket: {bucket}, {gib} GiB of \
             rows, seed {seed}. Master, nodes and the load generator share the machine.\n"
        )
    }

    /// Prints the tables of a part, and keeps which of its goals were missed.
    fn tell(&mut self, name: &str, part: &impl Part) {
        println!("{}", part.text());
        for missed in part.missed() {
            note(&format!("{name}: MISSED {missed}"));
            self.missed.push(format!("{name}: {missed}"));
        }
    }

    fn save(&self, file: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }
}

/// Returns the name of the processor.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = info.lines().find(|line| line.starts_with("model name"));
    let name = named.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or("unknown").to_owned()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn the_file_says_what_was_measured_on_and_leaves_out_what_was_not() {
        let args = Args::parse_from(["vasto-bench-changes", "--gib", "0.5", "--seed", "7"]);
        let json = serde_json::to_value(Document::of(&args)).unwrap();
        assert_eq!(json["gib"], 0.5);
        assert_eq!(json["seed"], 7);
        assert_eq!(json["bucket"], "directory");
        assert!(json["cores"].as_u64() > Some(0) && json.get("latency").is_none());
        assert!(Document::of(&args).head().contains("0.5 GiB"));
    }

    #[test]
    fn what_was_missed_is_named_with_its_part() {
        #[derive(Serialize)]
        struct Half;
        impl Part for Half {
            fn text(&self) -> String {
                "a table".to_owned()
            }

            fn missed(&self) -> Vec<String> {
                early(Some("its time is over")).into_iter().collect()
            }
        }
        let mut document = Document::of(&Args::parse_from(["vasto-bench-changes"]));
        document.tell("--speed", &Half);
        assert_eq!(document.missed, ["--speed: it ended early: its time is over"]);
    }
}
