//! The way of log lines to stderr: a bounded queue and one thread that writes.
//!
//! **Invariant:** whoever logs never waits. When nobody reads stderr (a pipe whose reader stands still, a
//! terminal that is stopped) lines are dropped and counted, and the count is the next line that gets
//! through. Memory is bounded by [`QUEUE_BYTES_MAX`].

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

/// Log lines that wait to be written: seconds of a busy server, and nothing beside its other memory.
const QUEUE_BYTES_MAX: usize = 4 << 20;

/// Where log lines go. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct LogWriter {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Something was queued, or written.
    changed: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Dropped since the last line that got through.
    lost: u64,
    /// A line is being written.
    writing: bool,
}

impl LogWriter {
    /// The one of stderr.
    pub(crate) fn stderr() -> LogWriter {
        static STDERR: OnceLock<LogWriter> = OnceLock::new();
        STDERR.get_or_init(|| LogWriter::over(io::stderr())).clone()
    }

    fn over(out: impl Write + Send + 'static) -> LogWriter {
        let shared = Arc::new(Shared::default());
        let writer = LogWriter { shared: shared.clone() };
        let thread = std::thread::Builder::new().name("log-writer".to_owned());
        // Without the thread lines are queued and then dropped: that must not keep a server from serving.
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

    /// Lines that were dropped so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Waits until what was queued is written; false when the time is over first.
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
        // Nobody can be told that stderr is gone.
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

/// One event: the formatting layer writes each with one call.
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

/// Gives the log lines that wait a moment to be written; for the end of a process.
pub fn flush_logs(patience: Duration) {
    LogWriter::stderr().flush(patience);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc;

    use super::*;

    /// Writes when it is let.
    struct Gate {
        open: mpsc::Receiver<()>,
        seen: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // An error is that everything may pass.
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
        assert!(dropped as usize >= lines - QUEUE_BYTES_MAX / line.len() - 1, "{dropped} of {lines}");
        assert!(!writer.flush(Duration::from_millis(10)), "nobody reads");
        drop(opener);
        writer.line(b"the last\n");
        assert!(writer.flush(Duration::from_secs(20)));
        let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
        assert!(seen.contains(&format!("\"lines\":{dropped}}}")), "it is told how many");
        assert!(seen.contains("the last\n"));
    }
}
