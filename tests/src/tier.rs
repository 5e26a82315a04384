//! A tier: hub replicas on nats-servers of their own, all on this machine.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    octobus::{Octobus, Role, Running, join},
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
}

impl Tier {
    /// So many replicas on so many nats-servers. The first made the tier's CA; none runs.
    ///
    /// # Panics
    /// If a server or the first replica does not start.
    #[must_use]
    pub fn new(folder: &Path, hubs: usize, servers: usize) -> Self {
        let servers = NatsServers::start(servers);
        let authority = folder.join("authority");
        let copies = servers.count();
        let hubs: Vec<Octobus> = (0..hubs)
            .map(|number| {
                let name = format!("hub-{number}");
                let data = folder.join(&name);
                let file = folder.join(format!("{name}.toml"));
                let text = format!(
                    "[fabric]\nuser = 'octobus'\npassword_file = '{}'\nauthority = '{}'\ncopies = {copies}\n\
                     shards = 2\nlog_bytes = '1GiB'\n[limits]\nheartbeat = '1s'\n",
                    servers.password_file().display(),
                    authority.display()
                );
                fs::write(&file, text).expect("a file of this test");
                let file = file.display().to_string();
                Octobus::new(Role::Cloud, &data).args(&[
                    "--nats",
                    "off",
                    "--config",
                    &file,
                    "--fabric",
                    &servers.list(),
                    "--replica",
                    &name,
                ])
            })
            .collect();
        // A hub that is alone makes the CA that all of them mount.
        let alone = folder.join("first");
        Octobus::new(Role::Cloud, &alone).start().stop();
        copy(&alone.join("tier"), &authority);
        Self { servers, hubs }
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

fn copy(from: &Path, to: &PathBuf) {
    fs::create_dir(to).expect("a folder of this test");
    for entry in fs::read_dir(from).expect("the authority").flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a file of this test");
    }
}
