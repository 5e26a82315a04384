//! The binaries under test, started as a user starts them.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    time::Duration,
};

use serde_json::Value;

use crate::{
    clock,
    process::{Finished, Process, run_command},
    stock::Place,
};

/// Longest start that is not measured: a busy machine, a debug build.
const START: Duration = Duration::from_secs(30);
/// Longest run of a command.
const COMMAND: Duration = Duration::from_secs(60);

/// The binary of this name, built with the same profile as the running test.
///
/// # Panics
/// If it was not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    // target/<profile>/deps/<test>
    let folder = test.parent().and_then(Path::parent).expect("tests run from the target folder");
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: cargo build --workspace --bins", path.display());
    path
}

/// A port of the loopback interface that was free a moment ago, over TCP and UDP, and that this test was not given before. Below the range from which
/// the kernel gives ports to outgoing connections, so that none of those takes it during a restart.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn free_port() -> SocketAddr {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().expect("no panic under this lock");
    for _attempt in 0..1000 {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, rand::random_range(15_000..32_000)));
        let free = TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok();
        if free && given.insert(address.port()) {
            return address;
        }
    }
    drop(given);
    panic!("no port is free over TCP and UDP");
}

/// A folder of this test, removed at its end.
///
/// # Panics
/// If it cannot be created.
#[must_use]
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("octobus-test-").tempdir().expect("a temporary folder")
}

/// Which of the long-running commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A node and a hub in one process.
    Dev,
    /// A hub.
    Cloud,
    /// A node.
    Edge,
}

/// How to start one of them. The same again is a restart on the same data and ports.
#[derive(Debug, Clone)]
pub struct Octobus {
    role: Role,
    data: PathBuf,
    args: Vec<String>,
    machine: Option<String>,
    pods: bool,
}

impl Octobus {
    /// With every listener on a free port of the loopback interface, which a restart keeps.
    #[must_use]
    pub fn new(role: Role, data: &Path) -> Self {
        let mut octobus = Self { role, data: data.to_owned(), args: Vec::new(), machine: None, pods: false };
        for flag in Self::listeners(role) {
            let address = free_port();
            octobus.args.extend([(*flag).to_owned(), address.to_string()]);
        }
        if role == Role::Dev {
            // Tests of it ask for it.
            octobus.args.extend(["--kubernetes", "off"].map(str::to_owned));
        }
        octobus
    }

    /// With the default ports, on a machine of its own.
    #[must_use]
    pub fn on_machine(role: Role, data: &Path, machine: &crate::netns::Machine) -> Self {
        Self {
            role,
            data: data.to_owned(),
            args: Vec::new(),
            machine: Some(machine.name.clone()),
            pods: false,
        }
    }

    fn listeners(role: Role) -> &'static [&'static str] {
        match role {
            Role::Dev => &["--mqtt", "--nats", "--quic", "--websocket", "--bootstrap", "--api", "--metrics"],
            Role::Cloud => &["--nats", "--quic", "--websocket", "--bootstrap", "--metrics"],
            Role::Edge => &["--mqtt", "--nats", "--api", "--metrics"],
        }
    }

    /// The same on another data folder.
    #[must_use]
    pub fn on(&self, data: &Path) -> Self {
        Self { data: data.to_owned(), ..self.clone() }
    }

    /// With whatever container runtime it finds.
    #[must_use]
    pub fn with_pods(mut self) -> Self {
        self.pods = true;
        self
    }

    /// With more arguments; a later one of the same name takes the place of an earlier one.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        for pair in args.chunks(2) {
            if let Some(at) = self.args.iter().position(|arg| arg == pair[0]) {
                self.args.drain(at..(at + pair.len()).min(self.args.len()));
            }
            self.args.extend(pair.iter().map(|arg| (*arg).to_owned()));
        }
        self
    }

    /// Its data folder.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The address given for a listener.
    ///
    /// # Panics
    /// If there is no such flag.
    #[must_use]
    pub fn address(&self, flag: &str) -> SocketAddr {
        let at = self.args.iter().position(|arg| arg == flag).expect("a flag that was given");
        self.args[at + 1].parse().expect("an address")
    }

    /// Starts it and waits until all of it serves.
    ///
    /// # Panics
    /// If it does not within 30 s.
    #[must_use]
    pub fn start(&self) -> Running {
        let ready = self.data.with_extension(format!("ready-{}.json", rand::random::<u32>()));
        let began = clock::now();
        let mut process = self.spawn(&ready);
        let what = format!("octobus {} to be ready", self.verb());
        let endpoints = clock::wait_for(&what, START, || {
            if let Some(status) = process.exited() {
                clock::pause(Duration::from_millis(100)); // its last words
                panic!("octobus {} ended with {status}:\n{}", self.verb(), process.output());
            }
            // One write, then a rename: what can be read is complete.
            serde_json::from_slice(&fs::read(&ready).ok()?).ok()
        });
        drop(fs::remove_file(&ready));
        Running { took: began.elapsed(), process, endpoints }
    }

    /// Starts it and leaves the waiting to the caller.
    #[must_use]
    pub fn spawn(&self, ready: &Path) -> Process {
        let mut command = match &self.machine {
            None => Command::new(binary("octobus")),
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(binary("octobus"));
                command
            }
        };
        command
            .arg(self.verb())
            .arg("--data")
            .arg(&self.data)
            .arg("--ready-file")
            .arg(ready)
            .args(&self.args);
        if self.role != Role::Dev {
            command.arg("--anonymous"); // what dev does by itself
        }
        command.env_remove("RUST_LOG");
        // A container runtime is for the tests that are about one.
        command.env("OCTOBUS_EDGED_RUNTIME", if self.pods { "auto" } else { "off" });
        Process::spawn(&format!("octobus {}", self.verb()), &mut command)
    }

    fn verb(&self) -> &'static str {
        match self.role {
            Role::Dev => "dev",
            Role::Cloud => "cloud",
            Role::Edge => "edge",
        }
    }
}

/// A running process and where it serves.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub process: Process,
    /// From start to ready.
    pub took: Duration,
    endpoints: Value,
}

impl Running {
    /// Where this part serves.
    ///
    /// # Panics
    /// If the ready file does not say.
    #[must_use]
    pub fn endpoint(&self, part: &str) -> SocketAddr {
        let text = self.text(part);
        let address: SocketAddr = text.parse().unwrap_or_else(|_| panic!("{part}: {text:?} is no address"));
        match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => {
                SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port())
            }
            _ => address,
        }
    }

    /// The admin socket.
    #[must_use]
    pub fn admin(&self) -> PathBuf {
        self.text("admin").into()
    }

    /// All of the ready file.
    #[must_use]
    pub fn endpoints(&self) -> &Value {
        &self.endpoints
    }

    /// A part of what the ready file says.
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    pub fn text(&self, part: &str) -> String {
        match &self.endpoints[part] {
            Value::String(text) => text.clone(),
            _ => panic!("the ready file names no {part}: {}", self.endpoints),
        }
    }

    /// Ctrl-C.
    ///
    /// # Panics
    /// If it does not end by itself, with success.
    pub fn stop(mut self) {
        let status = self.process.interrupt();
        assert!(status.success(), "ended with {status} on Ctrl-C:\n{}", self.process.output());
    }
}

/// Runs `octobus` with these arguments to its end.
#[must_use]
pub fn octobus(args: &[&str]) -> Finished {
    octobus_at(Place::Here, args)
}

/// Runs `octobus` with these arguments somewhere to its end.
#[must_use]
pub fn octobus_at(place: Place<'_>, args: &[&str]) -> Finished {
    let mut command = place.command(binary("octobus").to_str().expect("a UTF-8 path"));
    run_command(COMMAND, command.args(args))
}

/// A hub and one joined node, as two processes; the link may go through something.
#[derive(Debug)]
pub struct Pair {
    /// How to start the hub.
    pub hub: Octobus,
    /// How to start the node.
    pub node: Octobus,
}

/// Name of the node everywhere in the tests.
pub const NODE: &str = "edge-1";

impl Pair {
    /// A hub, started for a moment, and a node that has joined it. `link` gives the address that the node
    /// dials, from the one on which the hub listens.
    ///
    /// # Panics
    /// If joining fails.
    #[must_use]
    pub fn joined(folder: &Path, link: impl FnOnce(SocketAddr) -> SocketAddr) -> Self {
        let hub = Octobus::new(Role::Cloud, &folder.join("hub"));
        let running = hub.start();
        let data = folder.join("node");
        join(Place::Here, &running, &hub, NODE, &data);
        running.stop();
        let dialled = link(hub.address("--quic"));
        let node = Octobus::new(Role::Edge, &data).args(&["--hub", &format!("quic://{dialled}")]);
        Self { hub, node }
    }
}

/// Makes a token at a running hub and lets a node join with it.
///
/// # Panics
/// If either is refused.
pub fn join(place: Place<'_>, running: &Running, hub: &Octobus, node: &str, data: &Path) {
    join_with(place, running, hub, node, &[], data);
}

/// As [`join`], with more arguments for the token.
///
/// # Panics
/// If either is refused.
pub fn join_with(
    place: Place<'_>,
    running: &Running,
    hub: &Octobus,
    node: &str,
    token: &[&str],
    data: &Path,
) {
    let token = create_token_with(&running.admin(), node, token);
    let bootstrap = format!("https://{}", hub.address("--bootstrap"));
    let data = data.to_str().expect("a UTF-8 path");
    let joined = octobus_at(place, &["join", "--hub", &bootstrap, "--token", &token, "--data", data]);
    joined.ok();
}

/// Makes a token.
///
/// # Panics
/// If the hub refuses.
#[must_use]
pub fn create_token(admin: &Path, node: &str) -> String {
    create_token_with(admin, node, &[])
}

fn create_token_with(admin: &Path, node: &str, more: &[&str]) -> String {
    let admin = admin.to_str().expect("a UTF-8 path");
    let lines = octobus(&[&["token", "create", "--admin", admin, "--node", node], more].concat()).ok();
    let token = lines.iter().flat_map(|line| line.split_whitespace()).find(|word| word.starts_with("ob1."));
    token.unwrap_or_else(|| panic!("no token in {lines:?}")).to_owned()
}
