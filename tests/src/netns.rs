//! Two machines on one: network namespaces joined by a cable. Needs root.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use crate::process;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Two namespaces with a veth pair between them. Dropping it removes both.
#[derive(Debug)]
pub struct Cable {
    /// One end.
    pub a: Machine,
    /// The other.
    pub b: Machine,
}

/// A network namespace with one address.
#[derive(Debug)]
pub struct Machine {
    /// Name of the namespace.
    pub name: String,
    /// Its address on the cable.
    pub address: &'static str,
}

impl Cable {
    /// Creates both ends, or says why this machine does not let us.
    ///
    /// # Errors
    /// Not root, or no network namespaces here.
    pub fn new() -> Result<Self, String> {
        let n = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |end: &str| format!("octo{}{end}{n}", std::process::id());
        let cable = Self {
            a: Machine { name: name("a"), address: "10.231.7.1" },
            b: Machine { name: name("b"), address: "10.231.7.2" },
        };
        for machine in [&cable.a, &cable.b] {
            ip(&["netns", "add", &machine.name])?;
        }
        let device = "octo0";
        let (a, b) = (cable.a.name.as_str(), cable.b.name.as_str());
        ip(&["link", "add", device, "netns", a, "type", "veth", "peer", "name", device, "netns", b])?;
        for machine in [&cable.a, &cable.b] {
            let inside = ["-n", machine.name.as_str()];
            let address = format!("{}/24", machine.address);
            ip(&[&inside[..], &["address", "add", &address, "dev", device]].concat())?;
            ip(&[&inside[..], &["link", "set", device, "up"]].concat())?;
            ip(&[&inside[..], &["link", "set", "lo", "up"]].concat())?;
        }
        Ok(cable)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for machine in [&self.a, &self.b] {
            drop(ip(&["netns", "delete", &machine.name]));
        }
    }
}

impl Machine {
    /// A command that runs on this machine.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let done = process::run(Duration::from_secs(10), "ip", args);
    if done.status.success() { Ok(()) } else { Err(done.describe()) }
}
