//! `octobus doctor`: what is wrong with this machine, why, and what to do.
//!
//! Every check gives one [`Finding`]. A check that cannot be made says so; it never guesses. The checks
//! of certificates belong to whoever knows their files and are added by the command line.

mod local;
mod network;

use std::{fmt, net::SocketAddr, path::PathBuf};

use broker::link::dial::Hub;
use serde::Serialize;

use crate::config::{Config, HostPort};

pub use self::network::Probe;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works, and could be better.
    Warn,
    /// It does not work.
    Fail,
    /// It could not be checked here.
    Skip,
}

/// The outcome of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check.
    pub check: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do; empty if nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Finding {
    /// As it should be.
    pub fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), remedy: String::new() }
    }

    /// It works, and could be better.
    pub fn warn(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warn, found: found.into(), remedy: remedy.into() }
    }

    /// It does not work.
    pub fn fail(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Fail, found: found.into(), remedy: remedy.into() }
    }

    /// It could not be checked here.
    pub fn skip(check: &'static str, why: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Skip, found: why.into(), remedy: String::new() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
            Verdict::Skip => "-   ",
        };
        write!(f, "{mark}  {:<12} {}", self.check, self.found)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "\n      {:<12} -> {}", "", self.remedy) }
    }
}

/// What to examine.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The data folder.
    pub data: PathBuf,
    /// TCP addresses that this process would listen on, with the flag of each.
    pub tcp: Vec<(&'static str, SocketAddr)>,
    /// UDP addresses likewise.
    pub udp: Vec<(&'static str, SocketAddr)>,
    /// Hubs to dial.
    pub hubs: Vec<Hub>,
    /// Where to enrol and renew, if known.
    pub bootstrap: Option<HostPort>,
}

impl Subject {
    /// What this configuration would use.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let listen = &config.listen;
        let tcp = [
            ("--mqtt", listen.mqtt),
            ("--nats", listen.nats),
            ("--node-nats", listen.node_nats),
            ("--websocket", listen.websocket),
            ("--bootstrap", listen.bootstrap),
            ("--metrics", listen.metrics),
        ];
        Self {
            data: config.data.clone(),
            tcp: tcp.into_iter().filter_map(|(flag, addr)| Some((flag, addr?))).collect(),
            udp: listen.quic.map(|addr| ("--quic", addr)).into_iter().collect(),
            hubs: config.hubs.clone(),
            bootstrap: None,
        }
    }
}

/// Makes every check that needs no keys. `running`: an octobus has the data folder, so ports in use are
/// its own. Writes a small file into the data folder and removes it.
pub async fn examine(subject: &Subject, running: bool) -> Vec<Finding> {
    let mut findings = local::examine(subject);
    if running {
        findings.push(Finding::skip("ports", "an octobus runs on this data folder, so its ports are in use"));
    } else {
        findings.extend(network::ports(subject));
    }
    findings.extend(network::hubs(subject).await);
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sound_machine_has_no_failures() {
        let data = tempfile::tempdir().unwrap();
        let subject = Subject {
            data: data.path().to_owned(),
            tcp: vec![("--mqtt", "127.0.0.1:0".parse().unwrap())],
            udp: vec![("--quic", "127.0.0.1:0".parse().unwrap())],
            hubs: Vec::new(),
            bootstrap: None,
        };
        let findings = examine(&subject, false).await;
        let failed: Vec<_> = findings.iter().filter(|finding| finding.verdict == Verdict::Fail).collect();
        assert!(failed.is_empty(), "{failed:?}");
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok || !finding.found.is_empty()));
    }

    #[tokio::test]
    async fn a_port_in_use_is_named_with_its_flag() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let subject = Subject {
            data: PathBuf::from("/nonexistent"),
            tcp: vec![("--mqtt", taken.local_addr().unwrap())],
            udp: Vec::new(),
            hubs: Vec::new(),
            bootstrap: None,
        };
        let findings = network::ports(&subject);
        assert_eq!(findings[0].verdict, Verdict::Fail);
        assert!(findings[0].remedy.contains("--mqtt"), "{findings:?}");
    }

    #[tokio::test]
    async fn a_hub_whose_udp_port_is_closed_is_told_from_one_that_answers() {
        let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(matches!(network::probe_quic(closed).await, Probe::Refused | Probe::Silent));
    }
}
