//! `vasto bucket`.

use serde_json::Value;

use super::{bytes, count, list, text};
use crate::{
    args::{Bucket, BucketCommand},
    connect,
    output::{self, Failure, OutputFormat, ProgressLine, Unit, table},
};

/// Lines of a list that the table format prints.
const SHOWN: usize = 20;

/// Runs one command of `vasto bucket`.
///
/// # Errors
/// An error of the cluster; objects that are missing or damaged.
pub async fn run(args: &Bucket, format: OutputFormat) -> anyhow::Result<()> {
    let vasto = connect::connect(&args.connect).await?;
    let progress = ProgressLine::start("looking through the bucket", Unit::Items, None);
    let (answer, shown): (_, fn(&Value) -> String) = match args.command {
        BucketCommand::Fsck { deep } => (vasto.check_bucket(deep).await, checked),
        BucketCommand::Gc { dry_run } => (vasto.collect_garbage(dry_run).await, collected),
        BucketCommand::Repair { accept_loss } => (vasto.repair_bucket(accept_loss).await, repaired),
    };
    progress.clear();
    let answer = connect::document(answer)?;
    match format {
        OutputFormat::Json => output::print_json(&answer)?,
        OutputFormat::Table => output::print(&shown(&answer))?,
    }
    let (missing, corrupt) = (list(&answer["missing"]).len(), list(&answer["corrupt"]).len());
    if missing + corrupt > 0 {
        let failure = Failure::new(format!("{missing} objects are missing and {corrupt} are damaged"));
        let hint = match args.command {
            BucketCommand::Repair { .. } => "what no node holds any more can only come from a copy of the bucket",
            _ => {
                "replicas that serve are not touched by this: run `vasto bucket repair`, which uploads again what they hold"
            }
        };
        return Err(failure.hint(hint).into());
    }
    Ok(())
}

fn checked(found: &Value) -> String {
    let mut out = format!(
        "{} objects, {}; {} are needed, {} are not\n",
        count(&found["objects"]),
        bytes(&found["bytes"]),
        count(&found["referenced"]),
        list(&found["orphans"]).len(),
    );
    for (what, keys) in [("missing", &found["missing"]), ("damaged", &found["corrupt"])] {
        for key in list(keys) {
            out += &format!("{what}: {}\n", text(key));
        }
    }
    out += &warnings(found);
    let orphans = list(&found["orphans"]);
    if !orphans.is_empty() {
        let age = |one: &Value| text(&one["age_s"]) + " s";
        let rows = orphans.iter().take(SHOWN).map(|one| vec![text(&one["key"]), bytes(&one["bytes"]), age(one)]);
        out += "\n";
        out += &table(&["NEEDED BY NOTHING", ">BYTES", ">AGE"], rows);
        out += &more(orphans.len());
    }
    out
}

fn collected(answer: &Value) -> String {
    let what = if answer["dry_run"] == true { "would delete" } else { "deleted" };
    let mut out = format!(
        "{what} {} objects, {}; {} more are too young, {} stay\n",
        count(&answer["deleted"]),
        bytes(&answer["bytes"]),
        count(&answer["young"]),
        count(&answer["kept"]),
    );
    if let Some(reason) = answer["stopped"].as_str() {
        out += &format!("stopped early: {reason}\n");
    }
    out += &warnings(answer);
    let keys = list(&answer["keys"]);
    for key in keys.iter().take(SHOWN) {
        out += &format!("  {}\n", text(key));
    }
    out + &more(keys.len())
}

fn repaired(answer: &Value) -> String {
    let mut out = format!(
        "cluster {}: cluster.json {}, {} versions and names of the catalog put back, {} keyspaces serve\n",
        text(&answer["cluster_id"]),
        if answer["claimed"] == true { "put back" } else { "is there" },
        count(&answer["written"]),
        list(&answer["keyspaces"]).len(),
    );
    for (what, names) in [
        ("uploaded again", &answer["shipped_anew"]),
        ("not asked, because it is away", &answer["away"]),
        ("in the bucket, but nobody knows its catalog: keyspace", &answer["unknown_keyspaces"]),
        ("still missing", &answer["missing"]),
        ("damaged", &answer["corrupt"]),
    ] {
        for name in list(names) {
            out += &format!("{what}: {}\n", text(name));
        }
    }
    out + &warnings(answer)
}

/// Formats the warnings of an answer, one per line.
fn warnings(answer: &Value) -> String {
    list(&answer["warnings"]).iter().map(|warning| format!("warning: {}\n", text(warning))).collect()
}

fn more(all: usize) -> String {
    if all > SHOWN { format!("  … and {} more; --output json lists them\n", all - SHOWN) } else { String::new() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_check_names_what_is_wrong_and_what_is_needless() {
        let text = checked(&json!({"objects": 1200, "bytes": 4096, "referenced": 1199,
            "orphans": [{"key": "probe/1", "bytes": 9, "age_s": 70}], "missing": ["data/a"], "corrupt": ["data/b"]}));
        for part in
            ["1,200 objects, 4.0 KiB; 1,199 are needed, 1 are not", "missing: data/a", "damaged: data/b", "70 s"]
        {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn a_repair_tells_what_it_put_back_and_what_is_still_missing() {
        let text = repaired(&json!({"cluster_id": "c-1", "claimed": true, "written": 12, "keyspaces": ["a", "b"],
            "shipped_anew": ["a"], "away": ["n-1"], "unknown_keyspaces": [7], "missing": ["data/x"], "corrupt": [],
            "warnings": ["odd"]}));
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
        let text = collected(&answer);
        for part in ["would delete 25 objects, 1.0 KiB; 3 more are too young, 7 stay", "  data/19\n", "… and 5 more"]
        {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }
}
