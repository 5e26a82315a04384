//! nats-servers of a tier, run with the configuration that is shipped.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{clock, octobus::free_port, process::Process};

const START: Duration = Duration::from_secs(20);
const HUBS_PASSWORD: &str = "hubs-only";
const USERS_PASSWORD: &str = "everybody";

/// One or several nats-servers with JetStream, as one cluster, on a folder of their own.
#[derive(Debug)]
pub struct NatsServers {
    folder: tempfile::TempDir,
    servers: Vec<Server>,
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

    /// The same with a changed configuration: for what a hub must refuse.
    ///
    /// # Panics
    /// If one does not start.
    #[must_use]
    pub fn start_with(count: usize, change: impl Fn(String) -> String) -> Self {
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
        let mut servers = Self { folder, servers };
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
            let routes: Vec<String> =
                self.servers.iter().map(|server| format!("nats://{}", server.cluster)).collect();
            text += &format!(
                "cluster {{ name: octobus, listen: \"{}\", routes: [{}] }}\n",
                server.cluster,
                routes.join(", ")
            );
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
