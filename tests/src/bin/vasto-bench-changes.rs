//! What structural changes cost: the program around [`vasto_tests::bench`].

use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use vasto_tests::bench::{Args, run};

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    // Everything that was started ends with the future that owns it.
    let done = tokio::select! {
        done = run(&args) => done,
        stopped = stopped() => stopped.and_then(|()| {
            let file = args.out.display();
            Err(anyhow!("stopped; everything is cleaned up, and the parts that were done are in {file}"))
        }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Waits for ctrl-c or SIGTERM.
async fn stopped() -> Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    tokio::select! {
        pressed = tokio::signal::ctrl_c() => Ok(pressed?),
        _ = term.recv() => Ok(()),
    }
}
