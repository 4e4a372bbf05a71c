//! The programs of this crate print a description for `--help`, and do not run.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

#[test]
fn programs_answer_help_and_refuse_what_they_do_not_know() -> Result<()> {
    for program in [
        env!("CARGO_BIN_EXE_vasto-bench-bucket"),
        env!("CARGO_BIN_EXE_vasto-bench-changes"),
        env!("CARGO_BIN_EXE_vasto-demo"),
    ] {
        let began = Instant::now();
        let help = Command::new(program).arg("--help").output()?;
        let text = String::from_utf8_lossy(&help.stdout);
        ensure!(help.status.success() && text.contains("Usage:"), "{program}: {text}");
        let wrong = Command::new(program).args(["--second", "1"]).output()?;
        ensure!(wrong.status.code() == Some(2), "{program}: {:?}", wrong.status);
        ensure!(began.elapsed() < Duration::from_secs(10), "{program} began its work");
    }
    let writer = Command::new(env!("CARGO_BIN_EXE_vasto-test-writer")).arg("--help").output()?;
    ensure!(!writer.status.success() && String::from_utf8_lossy(&writer.stderr).contains("usage:"));
    Ok(())
}
