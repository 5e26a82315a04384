//! nats-servers of a tier, run with the configuration that is shipped.

use std::{
    collections::BTreeMap,
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{clock, octobus::free_port, process::Process, relay::TcpRelay};

const START: Duration = Duration::from_secs(20);
const HUBS_PASSWORD: &str = "hubs-only";
const USERS_PASSWORD: &str = "everybody";

/// One or several nats-servers with JetStream, as one cluster, on a folder of their own.
#[derive(Debug)]
pub struct NatsServers {
    folder: tempfile::TempDir,
    servers: Vec<Server>,
    /// Between (from, to), where the cluster can be cut.
    routes: BTreeMap<(usize, usize), TcpRelay>,
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    cluster: SocketAddr,
    folder: PathBuf,
    process: Option<Process>,
}

impl NatsServers {
    /// Starts so many.
    ///
    /// # Panics
    /// If one does not start.
    #[must_use]
    pub fn start(count: usize) -> Self {
        Self::start_with(count, |conf| conf)
    }

    /// Starts so many, each reaching each other one through a relay that can be cut ([`cut`](Self::cut)).
    ///
    /// # Panics
    /// If one does not start.
    #[must_use]
    pub fn start_cuttable(count: usize) -> Self {
        Self::build(count, true, |conf| conf)
    }

    /// The same with a changed configuration: for what a hub must refuse.
    ///
    /// # Panics
    /// If one does not start.
    #[must_use]
    pub fn start_with(count: usize, change: impl Fn(String) -> String) -> Self {
        Self::build(count, false, change)
    }

    fn build(count: usize, cuttable: bool, change: impl Fn(String) -> String) -> Self {
        let folder = crate::octobus::folder();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/nats/nats-server.conf");
        let shipped = change(fs::read_to_string(shipped).expect("the shipped configuration"));
        let servers: Vec<Server> = (0..count)
            .map(|number| Server {
                address: free_port(),
                cluster: free_port(),
                folder: folder.path().join(format!("nats-{number}")),
                process: None,
            })
            .collect();
        let pairs = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
        let pairs = pairs.filter(|(from, to)| cuttable && from != to);
        let routes = pairs.map(|(from, to)| ((from, to), TcpRelay::new(servers[to].cluster))).collect();
        let mut servers = Self { folder, servers, routes };
        fs::write(servers.password_file(), HUBS_PASSWORD).expect("a file of this test");
        for number in 0..count {
            let server = &servers.servers[number];
            fs::create_dir(&server.folder).expect("a folder of this test");
            fs::write(server.folder.join("nats-server.conf"), &shipped).expect("a file of this test");
            fs::write(server.folder.join("server.conf"), servers.own(number)).expect("a file of this test");
        }
        for number in 0..count {
            servers.run(number);
        }
        servers
    }

    /// What differs between servers.
    fn own(&self, number: usize) -> String {
        let server = &self.servers[number];
        let mut text = format!(
            "server_name: nats-{number}\nlisten: \"{}\"\nJETSTREAM_DIR: \"{}\"\nJETSTREAM_ROOM: 8GB\n\
             OCTOBUS_PASSWORD: \"{HUBS_PASSWORD}\"\nUSERS_PASSWORD: \"{USERS_PASSWORD}\"\n",
            server.address,
            server.folder.join("store").display()
        );
        if self.servers.len() > 1 {
            let others = (0..self.servers.len()).filter(|other| *other != number);
            let address = |other| {
                let relay = self.routes.get(&(number, other));
                relay.map_or(self.servers[other].cluster, TcpRelay::address)
            };
            let routes: Vec<String> = others.map(|other| format!("nats://{}", address(other))).collect();
            text += &format!(
                "cluster {{ name: octobus, listen: \"{}\", routes: [{}]",
                server.cluster,
                routes.join(", ")
            );
            // Servers tell each other and clients of third ones; nobody is at the address that they tell, so that what
            // was cut stays so.
            if !self.routes.is_empty() {
                text += &format!(", no_advertise: true, advertise: \"{}\"", free_port());
            }
            text += " }\n";
        }
        text
    }

    /// Starts a server that does not run, on what it left.
    ///
    /// # Panics
    /// If it does not start.
    pub fn run(&mut self, number: usize) {
        let server = &mut self.servers[number];
        let mut command = Command::new("nats-server");
        command.arg("-c").arg(server.folder.join("nats-server.conf"));
        let process = Process::spawn(&format!("nats-{number}"), &mut command);
        server.process = Some(process);
        let address = server.address;
        clock::wait_for("nats-server", START, || TcpStream::connect(address).ok());
    }

    /// Ends a server as a crash would.
    pub fn kill(&mut self, number: usize) {
        drop(self.servers[number].process.take()); // dropping kills it
    }

    /// Cuts the routes between two servers, or lets them be made again. The others' stay.
    pub fn cut(&self, one: usize, other: usize, cut: bool) {
        for relay in self.between(one, other) {
            relay.refuse(cut);
            if cut {
                relay.cut();
            }
        }
    }

    /// Lets nothing pass between two servers while their connections stay open, or lets it pass again.
    pub fn stall(&self, one: usize, other: usize, stall: bool) {
        self.between(one, other).for_each(|relay| relay.stall(stall));
    }

    fn between(&self, one: usize, other: usize) -> impl Iterator<Item = &TcpRelay> {
        [(one, other), (other, one)].into_iter().filter_map(|pair| self.routes.get(&pair))
    }

    /// Where a server keeps what it acknowledged.
    #[must_use]
    pub fn store(&self, number: usize) -> PathBuf {
        self.servers[number].folder.join("store")
    }

    /// Whether a server runs.
    #[must_use]
    pub fn runs(&self, number: usize) -> bool {
        self.servers[number].process.is_some()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.servers.len()
    }

    /// All addresses, as `--fabric` takes them.
    #[must_use]
    pub fn list(&self) -> String {
        let urls: Vec<String> =
            self.servers.iter().map(|server| format!("nats://{}", server.address)).collect();
        urls.join(",")
    }

    /// Address of one.
    #[must_use]
    pub fn address(&self, number: usize) -> SocketAddr {
        self.servers[number].address
    }

    /// Name and password of account USERS.
    #[must_use]
    pub fn user(&self) -> (&'static str, &'static str) {
        ("user", USERS_PASSWORD)
    }

    /// Name and password of account OCTOBUS.
    #[must_use]
    pub fn hub_user(&self) -> (&'static str, &'static str) {
        ("octobus", HUBS_PASSWORD)
    }

    /// File with the password of user `octobus`.
    #[must_use]
    pub fn password_file(&self) -> PathBuf {
        self.folder.path().join("password")
    }
}
