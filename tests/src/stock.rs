//! Stock clients and servers: what users have.

use std::{
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use crate::{
    clock,
    netns::Machine,
    octobus::free_port,
    process::{Finished, Process, run_command},
};

/// Longest run of a stock client.
const CLIENT: Duration = Duration::from_secs(30);

/// Where a command runs: here, or on a machine of its own.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// In this process's network.
    Here,
    /// In a network namespace.
    On(&'a Machine),
}

impl Place<'_> {
    /// A command there.
    #[must_use]
    pub fn command(self, program: &str) -> Command {
        match self {
            Self::Here => Command::new(program),
            Self::On(machine) => machine.command(program),
        }
    }
}

/// `mosquitto_pub` with these arguments; it has ended when this returns.
#[must_use]
pub fn mosquitto_pub(place: Place<'_>, to: SocketAddr, args: &[&str]) -> Finished {
    let mut command = place.command("mosquitto_pub");
    command.args(["-h", &to.ip().to_string(), "-p", &to.port().to_string()]).args(args);
    run_command(CLIENT, &mut command)
}

/// A running `mosquitto_sub`: its messages are printed as `topic payload`.
#[derive(Debug)]
pub struct MosquittoSub(Process);

impl MosquittoSub {
    /// Starts it and waits until the broker has taken its subscription.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start(place: Place<'_>, to: SocketAddr, args: &[&str]) -> Self {
        // It prints through a buffer unless told otherwise, and only its debug output says "Subscribed".
        let mut command = place.command("stdbuf");
        command.args(["-oL", "mosquitto_sub", "-d", "-F", "got %t %p"]);
        command.args(["-h", &to.ip().to_string(), "-p", &to.port().to_string()]).args(args);
        let process = Process::spawn("mosquitto_sub", &mut command);
        process.wait_line("Subscribed", CLIENT, |line| line.starts_with("Subscribed").then_some(()));
        Self(process)
    }

    /// Waits for this message.
    ///
    /// # Panics
    /// If it does not come.
    pub fn expect(&self, topic: &str, payload: &str) {
        let wanted = format!("got {topic} {payload}");
        self.0.wait_line(&wanted, CLIENT, |line| (line == wanted).then_some(()));
    }

    /// Messages so far, as `topic payload`.
    #[must_use]
    pub fn messages(&self) -> Vec<String> {
        self.0.stdout().iter().filter_map(|line| line.strip_prefix("got ").map(str::to_owned)).collect()
    }

    /// Ctrl-C: it disconnects properly.
    pub fn stop(mut self) {
        self.0.interrupt();
    }
}

/// A command for a script in `tests/py`, run by the Python that has nats-py and paho.
///
/// # Panics
/// If there is no such Python.
#[must_use]
pub fn python(place: Place<'_>, script: &str) -> Command {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("TEST_PYTHON")
        .map_or_else(|| tests.join("../target/venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{} is missing: make venv creates it", python.display());
    let mut command = place.command(python.to_str().expect("a UTF-8 path"));
    command.arg("-u").arg(tests.join("py").join(script));
    command
}

/// A running nats-py subscriber: prints one line per message.
#[derive(Debug)]
pub struct NatsSub(Process);

impl NatsSub {
    /// Starts it and waits until the server has taken its subscription.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start(place: Place<'_>, to: SocketAddr, subject: &str) -> Self {
        let mut command = python(place, "nats_sub.py");
        command.args([&format!("nats://{to}"), subject]);
        let process = Process::spawn("nats_sub.py", &mut command);
        process.wait_line("ready", CLIENT, |line| (line == "ready").then_some(()));
        Self(process)
    }

    /// Waits for this message.
    ///
    /// # Panics
    /// If it does not come.
    pub fn expect(&self, subject: &str, payload: &str) {
        let wanted = format!("{subject} {payload}");
        self.0.wait_line(&wanted, CLIENT, |line| (line == wanted).then_some(()));
    }

    /// Messages so far, as `subject payload`.
    #[must_use]
    pub fn messages(&self) -> Vec<String> {
        self.0.stdout().into_iter().filter(|line| line != "ready").collect()
    }
}

/// Publishes with nats-py; the server has it when this returns.
///
/// # Panics
/// If that fails.
pub fn nats_pub(place: Place<'_>, to: SocketAddr, subject: &str, payload: &str) {
    let mut command = python(place, "nats_pub.py");
    command.args([&format!("nats://{to}"), subject, payload]);
    run_command(CLIENT, &mut command).ok();
}

/// Starts a real nats-server.
///
/// # Panics
/// If it does not start.
#[must_use]
pub fn nats_server() -> (Process, SocketAddr) {
    let address = free_port();
    let mut command = Command::new("nats-server");
    command.args(["-a", "127.0.0.1", "-p", &address.port().to_string()]);
    let process = Process::spawn("nats-server", &mut command);
    clock::wait_for("nats-server", Duration::from_secs(10), || TcpStream::connect(address).ok());
    (process, address)
}
