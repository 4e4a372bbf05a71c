//! A process under test: its output in files, signals by its own id, and no survivors.
//!
//! **Invariant:** a process dies with the [`Process`] that owns it, and also when the test is
//! killed: the kernel ensures that through `setpriv --pdeathsig` (util-linux).

use std::ffi::OsStr;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::wait::until;

/// A running or ended process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: u32,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts `program` in its own process group, with its output in `<dir>/<name>.out` and
    /// `<dir>/<name>.log`.
    ///
    /// # Errors
    /// When the files cannot be made or the program cannot be started.
    pub fn spawn<A: AsRef<OsStr>>(
        name: &str,
        program: &Path,
        args: impl IntoIterator<Item = A>,
        env: &[(String, String)],
        dir: &Path,
    ) -> Result<Self> {
        let stdout = dir.join(format!("{name}.out"));
        let stderr = dir.join(format!("{name}.log"));
        let child = command(program)
            .args(args)
            .envs(env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let pid = child.id().context("the process ended before it began")?;
        Ok(Self { name: name.to_owned(), child, pid, stdout, stderr })
    }

    /// Returns the name under which the process was started.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the path of the log.
    pub fn log(&self) -> &Path {
        &self.stderr
    }

    /// Returns the last lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.stderr, lines)
    }

    /// Returns the output so far.
    pub fn printed(&self) -> String {
        std::fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    /// Returns the first line of output, as JSON.
    ///
    /// # Errors
    /// When the process ends first or the deadline passes; the text ends with its log.
    pub async fn ready_line(&mut self, deadline: Duration) -> Result<Value> {
        let line = until(&format!("{} to be ready", self.name), deadline, async || {
            if let Some((line, _)) = self.printed().split_once('\n') {
                return Some(Ok(line.to_owned()));
            }
            let status = self.child.try_wait().ok().flatten()?;
            Some(Err(format!("{} ended with {status} before it was ready", self.name)))
        })
        .await
        .map_err(|error| error.to_string())
        .and_then(|line| line);
        match line {
            Ok(line) => serde_json::from_str(&line)
                .with_context(|| format!("{} printed {line:?}, which is not JSON", self.name)),
            Err(error) => bail!("{error}; its log ends with:\n{}", self.log_tail(20)),
        }
    }

    /// Sends a signal. A process that has ended already is not an error.
    pub fn signal(&self, signal: Signal) {
        // The process was not waited for, so its id cannot have been reused.
        if self.child.id().is_some()
            && let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// Kills the process with `kill -9`, and waits until it has ended.
    ///
    /// # Errors
    /// When the operating system does not end the process.
    pub async fn kill9(&mut self) -> Result<()> {
        self.signal(Signal::KILL);
        self.ended(crate::DEADLINE).await.map(|_| ())
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// When the deadline passes first.
    pub async fn ended(&mut self, deadline: Duration) -> Result<ExitStatus> {
        match tokio::time::timeout(deadline, self.child.wait()).await {
            Ok(status) => Ok(status?),
            Err(_) => bail!("{} (pid {}) did not end within {deadline:?}", self.name, self.pid),
        }
    }

    /// Returns whether the process has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

/// Runs a program to its end.
///
/// # Errors
/// When the program cannot be started, or the deadline passes (the program is killed then).
pub async fn run<A: AsRef<OsStr>>(
    program: &Path,
    args: impl IntoIterator<Item = A>,
    env: &[(String, String)],
    deadline: Duration,
) -> Result<std::process::Output> {
    let mut command = command(program);
    command.args(args).envs(env.iter().map(|(key, value)| (key, value)));
    command.stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(deadline, command.output()).await {
        Ok(output) => output.with_context(|| format!("cannot run {}", program.display())),
        Err(_) => bail!("{:?} did not end within {deadline:?}", command.as_std()),
    }
}

/// Returns the seconds of CPU that a process has used.
///
/// # Errors
/// When there is no such process.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> =
        stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
}

/// Returns the last lines of a file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn command(program: &Path) -> Command {
    let setpriv = Path::new("/usr/bin/setpriv");
    if setpriv.exists() {
        let mut command = Command::new(setpriv);
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        command
    } else {
        Command::new(program)
    }
}

/// Returns a port without a listener. The port is below the range for outgoing connections, so that
/// a killed server can bind it again.
///
/// # Panics
/// When no port is free.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 12_000;
    const COUNT: u16 = 18_000;
    let start = (std::process::id().wrapping_mul(97) % u32::from(COUNT)) as u16;
    (0..COUNT)
        .map(|_| FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a machine has a free port")
}
