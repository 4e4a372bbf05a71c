//! The path of log lines to stderr: a bounded queue and one writer thread.
//!
//! **Invariant:** a thread that logs never waits. When stderr is not read (a pipe with a stalled
//! reader, a stopped terminal), lines are dropped and counted, and the count is the next line that
//! is written. [`QUEUE_BYTES_MAX`] bounds the memory.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

/// Log lines that wait to be written: seconds of a busy server, and negligible beside its other
/// memory.
const QUEUE_BYTES_MAX: usize = 4 << 20;

/// The destination of log lines. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct LogWriter {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// A line was queued, or written.
    changed: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines dropped since the last line that was written.
    lost: u64,
    /// A line is being written.
    writing: bool,
}

impl LogWriter {
    /// Returns the writer of stderr.
    pub(crate) fn stderr() -> LogWriter {
        static STDERR: OnceLock<LogWriter> = OnceLock::new();
        STDERR.get_or_init(|| LogWriter::over(io::stderr())).clone()
    }

    fn over(out: impl Write + Send + 'static) -> LogWriter {
        let shared = Arc::new(Shared::default());
        let writer = LogWriter { shared: shared.clone() };
        let thread = std::thread::Builder::new().name("log-writer".to_owned());
        // Without the thread lines are queued and then dropped: a missing log must not keep a
        // server from serving.
        drop(thread.spawn(move || write_forever(&shared, out)));
        writer
    }

    /// Queues one line; drops it when the queue is full.
    pub(crate) fn line(&self, line: &[u8]) {
        let mut queue = self.shared.lock();
        if queue.bytes + line.len() > QUEUE_BYTES_MAX {
            queue.lost += 1;
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.bytes += line.len();
        queue.lines.push_back(line.to_vec());
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Returns the number of lines dropped so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Waits until the queued lines are written; returns false at the deadline.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        let queue = self.shared.lock();
        let busy = |queue: &mut Queue| queue.writing || !queue.lines.is_empty();
        let waited = self.shared.changed.wait_timeout_while(queue, patience, busy);
        !waited.is_ok_and(|(_, waited)| waited.timed_out())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn write_forever(shared: &Shared, mut out: impl Write) {
    loop {
        let mut queue = shared.lock();
        queue.writing = false;
        shared.changed.notify_all();
        while queue.lines.is_empty() {
            queue = shared.changed.wait(queue).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        let Some(line) = queue.lines.pop_front() else { continue };
        queue.bytes -= line.len();
        let lost = std::mem::take(&mut queue.lost);
        queue.writing = true;
        drop(queue);
        // A failure cannot be reported anywhere: stderr is gone.
        let _ = out.write_all(&line);
        if lost > 0 {
            let told = format!(
                "{{\"level\":\"INFO\",\"message\":\"log lines were dropped because nobody read stderr\",\"lines\":{lost}}}\n"
            );
            let _ = out.write_all(told.as_bytes());
        }
        let _ = out.flush();
    }
}

/// Writer of one event: the formatting layer writes each event with one call.
pub(crate) struct Line(LogWriter);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.line(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self.clone())
    }
}

/// Waits for the queued log lines to be written, at most `patience`; for the end of a process.
pub fn flush_logs(patience: Duration) {
    LogWriter::stderr().flush(patience);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc;

    use super::*;

    /// A writer that blocks until it is released.
    struct Gate {
        open: mpsc::Receiver<()>,
        seen: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // An error means that all writes may pass.
            let _ = self.open.recv();
            self.seen.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn who_logs_never_waits_and_what_is_dropped_is_counted() {
        let (opener, open) = mpsc::channel();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let writer = LogWriter::over(Gate { open, seen: seen.clone() });
        let line = vec![b'x'; 64 << 10];
        let lines = 4 * QUEUE_BYTES_MAX / line.len();
        for _ in 0..lines {
            writer.line(&line);
        }
        let dropped = writer.dropped();
        assert!(
            dropped as usize >= lines - QUEUE_BYTES_MAX / line.len() - 1,
            "{dropped} of {lines}"
        );
        assert!(!writer.flush(Duration::from_millis(10)), "nobody reads");
        drop(opener);
        assert!(writer.flush(Duration::from_secs(20)), "there is room again");
        writer.line(b"the last\n");
        assert!(writer.flush(Duration::from_secs(20)));
        let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
        // In one sum or in several: the thread may have begun late.
        let counts = seen
            .split("\"lines\":")
            .skip(1)
            .map(|rest| rest.split('}').next().unwrap().parse::<u64>().unwrap());
        assert_eq!(counts.sum::<u64>(), dropped, "the number of dropped lines is written");
        assert!(seen.contains("the last\n"));
    }
}
