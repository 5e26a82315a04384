//! A process that the test started, and only such a process is ever signalled.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::clock;

/// Lines kept for failure messages and for waiting on; older ones are forgotten.
const LINES_KEPT: usize = 200_000;
/// How long what a process wrote last may take to be read once it has ended.
const REST_READ: Duration = Duration::from_secs(2);
/// Lines shown of a process when its test fails.
const LINES_SHOWN: usize = 80;

/// A running process. Dropping it kills it; if the test is failing, the end of its output is printed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: Arc<Output>,
    ended: Option<ExitStatus>,
}

#[derive(Debug, Default)]
struct Output {
    lines: Mutex<Lines>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    /// (whether it came from stdout, the line)
    all: Vec<(bool, String)>,
    open: usize,
}

impl Process {
    /// Starts `command` with both outputs captured.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        Self::spawn_with_input(name, command, &[])
    }

    /// Starts `command` and writes `input` to it.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn spawn_with_input(name: &str, command: &mut Command, input: &[u8]) -> Self {
        let mut child = command
            .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name} ({command:?}): {error}"));
        let output = Arc::new(Output::default());
        output.lines.lock().expect("no panic under this lock").open = 2;
        capture(&output, true, child.stdout.take().expect("piped"));
        capture(&output, false, child.stderr.take().expect("piped"));
        if let Some(mut stdin) = child.stdin.take() {
            let input = input.to_vec();
            // A process that does not read its input must not block the test.
            std::thread::spawn(move || drop(stdin.write_all(&input)));
        }
        Self { name: name.to_owned(), child, output, ended: None }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, if it still runs.
    pub fn signal(&mut self, signal: Signal) {
        if self.exited().is_none() {
            let pid = Pid::from_raw(i32::try_from(self.pid()).expect("a pid")).expect("not 0");
            kill_process(pid, signal).ok(); // it may have ended just now
        }
    }

    /// Its exit status, once it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("our own child");
        }
        self.ended
    }

    /// Waits for its end, and until all that it wrote has been read.
    ///
    /// # Panics
    /// If it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        let status = clock::wait_for(&what, limit, || self.exited());
        let lines = self.output.lines.lock().expect("no panic under this lock");
        // Bounded: a child of its own may outlive it and hold the pipe.
        let read = self.output.more.wait_timeout_while(lines, REST_READ, |lines| lines.open > 0);
        drop(read.expect("no panic under this lock"));
        status
    }

    /// As a power cut would: SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        if self.exited().is_none() {
            drop(self.child.kill());
            self.ended = self.child.wait().ok();
        }
    }

    /// As Ctrl-C: SIGINT, and waits for its end.
    ///
    /// # Panics
    /// If it still runs after 15 s.
    pub fn interrupt(&mut self) -> ExitStatus {
        self.signal(Signal::INT);
        self.wait(Duration::from_secs(15))
    }

    /// What it has written to stdout so far.
    #[must_use]
    pub fn stdout(&self) -> Vec<String> {
        let lines = self.output.lines.lock().expect("no panic under this lock");
        lines.all.iter().filter(|(stdout, _)| *stdout).map(|(_, line)| line.clone()).collect()
    }

    /// Everything it has written so far.
    #[must_use]
    pub fn output(&self) -> String {
        let lines = self.output.lines.lock().expect("no panic under this lock");
        let from = lines.all.len().saturating_sub(LINES_SHOWN);
        lines.all[from..].iter().map(|(_, line)| format!("    {line}\n")).collect()
    }

    /// Waits for the first line of either output that `pick` takes.
    ///
    /// # Panics
    /// If it ends or `limit` passes before.
    pub fn wait_line<T>(&self, what: &str, limit: Duration, mut pick: impl FnMut(&str) -> Option<T>) -> T {
        let began = clock::now();
        let mut seen = 0;
        let mut lines = self.output.lines.lock().expect("no panic under this lock");
        loop {
            while seen < lines.all.len() {
                if let Some(found) = pick(&lines.all[seen].1) {
                    return found;
                }
                seen += 1;
            }
            let left = limit.saturating_sub(began.elapsed());
            if left.is_zero() || lines.open == 0 {
                let why = if lines.open == 0 { "it has ended" } else { "too late" };
                drop(lines);
                panic!("{} did not say {what} ({why}); it said:\n{}", self.name, self.output());
            }
            lines = self.output.more.wait_timeout(lines, left).expect("no panic under this lock").0;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let was = self.exited();
        self.kill();
        if std::thread::panicking() {
            let state = was.map_or_else(|| "still ran".to_owned(), |status| status.to_string());
            eprintln!("--- {} ({state}), end of its output:\n{}", self.name, self.output());
        }
    }
}

fn capture(output: &Arc<Output>, stdout: bool, from: impl Read + Send + 'static) {
    let output = Arc::clone(output);
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        loop {
            line.clear();
            let ended = !matches!(from.read_until(b'\n', &mut line), Ok(1..));
            let mut lines = output.lines.lock().expect("no panic under this lock");
            if ended {
                lines.open -= 1;
            } else {
                if lines.all.len() >= LINES_KEPT {
                    lines.all.drain(..LINES_KEPT / 2);
                }
                let text = String::from_utf8_lossy(&line);
                lines.all.push((stdout, text.trim_end_matches(['\r', '\n']).to_owned()));
            }
            output.more.notify_all();
            if ended {
                return;
            }
        }
    });
}

/// Runs a command to its end.
///
/// # Panics
/// If it cannot be started or takes longer than `limit`.
pub fn run(limit: Duration, program: impl AsRef<OsStr>, args: &[&str]) -> Finished {
    run_command(limit, Command::new(program).args(args))
}

/// Runs a command to its end.
///
/// # Panics
/// If it cannot be started or takes longer than `limit`.
pub fn run_command(limit: Duration, command: &mut Command) -> Finished {
    let said = format!("{command:?}");
    let mut child = Process::spawn(&said, command);
    let status = child.wait(limit);
    let output = clock::wait_for("the rest of the output", Duration::from_secs(5), || {
        let lines = child.output.lines.lock().expect("no panic under this lock");
        (lines.open == 0).then(|| lines.all.clone())
    });
    let of = |stdout: bool| -> Vec<String> {
        output.iter().filter(|(from, _)| *from == stdout).map(|(_, line)| line.clone()).collect()
    };
    Finished { command: said, status, stdout: of(true), stderr: of(false) }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Finished {
    /// What was run.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Lines of stdout.
    pub stdout: Vec<String>,
    /// Lines of stderr.
    pub stderr: Vec<String>,
}

impl Finished {
    /// Its stdout, if it succeeded.
    ///
    /// # Panics
    /// If it did not.
    pub fn ok(self) -> Vec<String> {
        assert!(self.status.success(), "{}", self.describe());
        self.stdout
    }

    /// Everything about it, for a failure message.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "{} ended with {}\nstdout:\n{}\nstderr:\n{}",
            self.command,
            self.status,
            self.stdout.join("\n"),
            self.stderr.join("\n")
        )
    }
}
