//! `vasto bucket`.

use vasto_client::answer::{BucketCheck, BucketRepair, GarbageCollection};

use super::print;
use crate::{
    args::{Bucket, BucketCommand},
    connect,
    output::{Failure, OutputFormat, ProgressLine, Unit, format_bytes, format_count, table},
};

/// Lines of a list that the table format prints.
const SHOWN: usize = 20;

/// Runs one command of `vasto bucket`.
///
/// # Errors
/// An error of the cluster; objects that are missing or damaged.
pub(crate) async fn run(args: &Bucket, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    let progress = ProgressLine::start("looking through the bucket", Unit::Items, None);
    let (missing, corrupt, hint) = match args.command {
        BucketCommand::Fsck { deep } => {
            let answer = vasto.check_bucket(deep).await;
            progress.clear();
            let answer = answer.map_err(connect::failure)?;
            print(&answer, format, checked)?;
            let hint = "replicas that serve are not touched by this: run `vasto bucket repair`, which uploads again \
                        what they hold";
            (answer.missing.len(), answer.corrupt.len(), hint)
        }
        BucketCommand::Gc { dry_run } => {
            let answer = vasto.collect_garbage(dry_run).await;
            progress.clear();
            return print(&answer.map_err(connect::failure)?, format, collected);
        }
        BucketCommand::Repair { accept_loss } => {
            let answer = vasto.repair_bucket(accept_loss).await;
            progress.clear();
            let answer = answer.map_err(connect::failure)?;
            print(&answer, format, repaired)?;
            let hint = "what no node holds any more can only come from a copy of the bucket";
            (answer.missing.len(), answer.corrupt.len(), hint)
        }
    };
    if missing + corrupt > 0 {
        let failure =
            Failure::new(format!("{missing} objects are missing and {corrupt} are damaged"));
        return Err(failure.hint(hint).into());
    }
    Ok(())
}

fn checked(found: &BucketCheck) -> String {
    let mut out = format!(
        "{} objects, {}; {} are needed, {} are not\n",
        format_count(found.objects),
        format_bytes(found.bytes),
        format_count(found.referenced),
        found.orphans.len(),
    );
    out += &each("missing", &found.missing);
    out += &each("damaged", &found.corrupt);
    out += &each("warning", &found.warnings);
    if !found.orphans.is_empty() {
        let shown = found.orphans.iter().take(SHOWN);
        let rows = shown.map(|orphan| {
            vec![orphan.key.clone(), format_bytes(orphan.bytes), format!("{} s", orphan.age_s)]
        });
        out += "\n";
        out += &table(&["NEEDED BY NOTHING", ">BYTES", ">AGE"], rows);
        out += &more(found.orphans.len());
    }
    out
}

fn collected(answer: &GarbageCollection) -> String {
    let what = if answer.dry_run { "would delete" } else { "deleted" };
    let mut out = format!(
        "{what} {} objects, {}; {} more are too young, {} stay\n",
        format_count(answer.deleted),
        format_bytes(answer.bytes),
        format_count(answer.young),
        format_count(answer.kept),
    );
    if let Some(reason) = &answer.stopped {
        out += &format!("stopped early: {reason}\n");
    }
    out += &each("warning", &answer.warnings);
    for key in answer.keys.iter().take(SHOWN) {
        out += &format!("  {key}\n");
    }
    out + &more(answer.keys.len())
}

fn repaired(answer: &BucketRepair) -> String {
    let mut out = format!(
        "cluster {}: cluster.json {}, {} versions and names of the catalog put back, {} keyspaces serve\n",
        answer.cluster_id,
        if answer.claimed { "put back" } else { "is there" },
        format_count(answer.written),
        answer.keyspaces.len(),
    );
    out += &each("uploaded again", &answer.shipped_anew);
    out += &each("not asked, because it is away", &answer.away);
    out +=
        &each("in the bucket, but nobody knows its catalog: keyspace", &answer.unknown_keyspaces);
    out += &each("still missing", &answer.missing);
    out += &each("damaged", &answer.corrupt);
    out + &each("warning", &answer.warnings)
}

/// Formats one line for each value.
fn each(what: &str, values: &[impl std::fmt::Display]) -> String {
    values.iter().map(|value| format!("{what}: {value}\n")).collect()
}

fn more(all: usize) -> String {
    if all > SHOWN {
        format!("  … and {} more; --output json lists them\n", all - SHOWN)
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn a_check_names_what_is_wrong_and_what_is_needless() {
        let found = json!({"objects": 1200, "bytes": 4096, "referenced": 1199,
            "orphans": [{"key": "probe/1", "bytes": 9, "age_s": 70}], "missing": ["data/a"], "corrupt": ["data/b"]});
        let text = checked(&from_value(found).unwrap());
        for part in [
            "1,200 objects, 4.0 KiB; 1,199 are needed, 1 are not",
            "missing: data/a",
            "damaged: data/b",
            "70 s",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn a_repair_tells_what_it_put_back_and_what_is_still_missing() {
        let answer = json!({"cluster_id": "c-1", "claimed": true, "written": 12, "keyspaces": ["a", "b"],
            "shipped_anew": ["a"], "away": ["n-1"], "unknown_keyspaces": [7], "missing": ["data/x"], "corrupt": [],
            "warnings": ["odd"]});
        let text = repaired(&from_value(answer).unwrap());
        for part in [
            "cluster c-1: cluster.json put back, 12 versions",
            "2 keyspaces serve",
            "uploaded again: a",
            "is away: n-1",
            "keyspace: 7",
            "still missing: data/x",
            "warning: odd",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn a_collection_tells_what_it_did() {
        let keys: Vec<String> = (0..25).map(|n| format!("data/{n}")).collect();
        let answer = json!({"dry_run": true, "deleted": 25, "bytes": 1024, "young": 3, "kept": 7, "keys": keys});
        let text = collected(&from_value(answer).unwrap());
        for part in [
            "would delete 25 objects, 1.0 KiB; 3 more are too young, 7 stay",
            "  data/19\n",
            "… and 5 more",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }
}
