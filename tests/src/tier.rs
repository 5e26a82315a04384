//! A tier: hub replicas on nats-servers of their own, all on this machine.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    octobus::{Octobus, Role, Running, join},
    relay::TcpRelay,
    servers::NatsServers,
    stock::Place,
};

/// How to start the replicas of one tier.
#[derive(Debug)]
pub struct Tier {
    /// The servers that they share.
    pub servers: NatsServers,
    /// Each replica. The same again is a restart.
    pub hubs: Vec<Octobus>,
    /// From each replica to each server, where those can be cut.
    lines: Vec<Vec<TcpRelay>>,
    authority: PathBuf,
}

impl Tier {
    /// So many replicas on so many nats-servers. The first made the tier's CA; none runs.
    ///
    /// # Panics
    /// If a server or the first replica does not start.
    #[must_use]
    pub fn new(folder: &Path, hubs: usize, servers: usize) -> Self {
        Self::build(folder, hubs, NatsServers::start(servers), false, "1s")
    }

    /// The same with this heartbeat, where servers can be cut from each other, and replicas from all servers.
    ///
    /// # Panics
    /// If a server or the first replica does not start.
    #[must_use]
    pub fn cuttable(folder: &Path, hubs: usize, servers: usize, heartbeat: &str) -> Self {
        Self::build(folder, hubs, NatsServers::start_cuttable(servers), true, heartbeat)
    }

    fn build(folder: &Path, hubs: usize, servers: NatsServers, cuttable: bool, heartbeat: &str) -> Self {
        let authority = folder.join("alone/tier");
        let copies = servers.count();
        let lines: Vec<Vec<TcpRelay>> = (0..if cuttable { hubs } else { 0 })
            .map(|_hub| (0..copies).map(|server| TcpRelay::new(servers.address(server))).collect())
            .collect();
        let hubs: Vec<Octobus> = (0..hubs)
            .map(|number| {
                let name = format!("hub-{number}");
                let data = folder.join(&name);
                let file = folder.join(format!("{name}.toml"));
                let text = format!(
                    "[fabric]\nuser = 'octobus'\npassword_file = '{}'\nauthority = '{}'\ncopies = {copies}\n\
                     shards = 2\nlog_bytes = '1GiB'\n[limits]\nheartbeat = '{heartbeat}'\n",
                    servers.password_file().display(),
                    authority.display()
                );
                fs::write(&file, text).expect("a file of this test");
                let file = file.display().to_string();
                let relays = lines.get(number).map(|relays| {
                    relays.iter().map(|relay| format!("nats://{}", relay.address())).collect::<Vec<_>>()
                });
                let list = relays.map_or_else(|| servers.list(), |relays| relays.join(","));
                Octobus::new(Role::Cloud, &data).args(&[
                    "--nats",
                    "off",
                    "--config",
                    &file,
                    "--fabric",
                    &list,
                    "--replica",
                    &name,
                ])
            })
            .collect();
        // A hub that is alone makes the CA that all of them mount.
        Octobus::new(Role::Cloud, &folder.join("alone")).start().stop();
        Self { servers, hubs, lines, authority }
    }

    /// Data folder of a hub that ran once, with the authority that all replicas have.
    ///
    /// # Panics
    /// Never: the authority stands in a folder.
    #[must_use]
    pub fn alone(&self) -> &Path {
        self.authority.parent().expect("a folder")
    }

    /// Cuts a replica from all servers, or lets it connect again.
    pub fn cut(&self, hub: usize, cut: bool) {
        for relay in self.lines.get(hub).into_iter().flatten() {
            relay.refuse(cut);
            if cut {
                relay.cut();
            }
        }
    }

    /// Lets nothing pass between a replica and the servers while connections stay open, or lets it pass again.
    pub fn stall(&self, hub: usize, stall: bool) {
        self.lines.get(hub).into_iter().flatten().for_each(|relay| relay.stall(stall));
    }

    /// Lets a node join at a running replica; how to start it, with every replica to dial. It finds out soon when
    /// one is gone.
    ///
    /// # Panics
    /// If joining fails.
    #[must_use]
    pub fn node(&self, running: &Running, hub: usize, name: &str, data: &Path) -> Octobus {
        join(Place::Here, running, &self.hubs[hub], name, data);
        let file = data.with_extension("toml");
        fs::write(&file, "[limits]\nheartbeat = '1s'\n").expect("a file of this test");
        let file = file.display().to_string();
        Octobus::new(Role::Edge, data).args(&["--hub", &self.dialled(), "--config", &file])
    }

    /// Every replica, as `--hub` takes them.
    #[must_use]
    pub fn dialled(&self) -> String {
        let hubs: Vec<String> =
            self.hubs.iter().map(|hub| format!("quic://{}", hub.address("--quic"))).collect();
        hubs.join(",")
    }
}
