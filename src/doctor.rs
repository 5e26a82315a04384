//! `octobus doctor`: the checks of [`ops::doctor`], and those that need to know a node's or hub's files.

use std::path::{Path, PathBuf};

use broker::{clock, link::identity::PeerCertificate};
use edgehub::identity::Identity;
use ops::{
    api::{ConditionRow, rfc3339},
    client::Client,
    config::{Config, Flags, HostPort, Role},
    doctor::{Finding, Subject, Verdict, examine},
};

use crate::{
    cli::{DoctorArgs, Rows},
    exit::{Failure, Outcome},
    get::samples,
    output,
};

/// A clock that differs more from the hub's makes certificates and time-to-live wrong.
const OFFSET_MAX_S: f64 = 30.0;

pub(crate) async fn run(args: &DoctorArgs) -> Outcome {
    let data = args.data.as_deref().map(node_folder);
    let role = match &data {
        Some(data) if data.join("tier").is_dir() => Role::Cloud,
        _ => Role::Edge,
    };
    let flags = Flags {
        config: args.config.clone(),
        data: data.map(|data| data.display().to_string()),
        ..Flags::default()
    };
    let config = Config::load(role, &flags)?;
    let mut subject = Subject::of(&config);
    let (mut findings, identity) = certificate(role, &config.data);
    if let Some(identity) = &identity {
        add_hub(&mut subject, identity);
    }
    let running = Client::new(&config.listen.admin)
        .text(hyper::Method::GET, "/v1/stats", &[], bytes::Bytes::new())
        .await;
    findings.extend(examine(&subject, running.is_ok()).await);
    findings.push(offset(role, running.ok().as_deref()));
    findings.extend(conditions(&config).await);
    report(&findings, args.output)
}

/// Of `dev`, the node is examined: it has the longer way.
fn node_folder(data: &Path) -> PathBuf {
    let node = data.join("node");
    if node.is_dir() && data.join("hub").is_dir() { node } else { data.to_owned() }
}

fn certificate(role: Role, data: &Path) -> (Vec<Finding>, Option<Identity>) {
    const CHECK: &str = "certificate";
    if role == Role::Cloud {
        return (vec![Finding::skip(CHECK, "a hub makes its own at each start")], None);
    }
    let identity = match Identity::load(data) {
        Ok(Some(identity)) => identity,
        Ok(None) => {
            return (
                vec![Finding::skip(CHECK, "this node has not joined a hub; it serves its devices alone")],
                None,
            );
        }
        Err(error) => {
            let remedy = "restore it from a backup, or join again with a token made with --replace";
            return (vec![Finding::fail(CHECK, error.to_string(), remedy)], None);
        }
    };
    let until = match PeerCertificate::parse(identity.certificate()) {
        Ok(certificate) => u64::try_from(certificate.not_after_s).unwrap_or(0).saturating_mul(1_000_000),
        Err(error) => return (vec![Finding::fail(CHECK, error.to_string(), "join again")], None),
    };
    let found = format!(
        "node {}, generation {}, valid until {}",
        identity.name(),
        identity.generation(),
        rfc3339(until)
    );
    let finding = if clock::wall_us() >= until {
        let remedy = "is the clock right? Else it is renewed as soon as TCP to the hub works (up to 90 days after), \
                      or join again with a token made with --replace";
        Finding::fail(CHECK, format!("{found}: expired"), remedy)
    } else if identity.renew_in().is_zero() {
        Finding::warn(
            CHECK,
            format!("{found}: renewal is due"),
            "see that TCP to the hub works and octobus runs",
        )
    } else {
        Finding::ok(CHECK, found)
    };
    (vec![finding], Some(identity))
}

fn add_hub(subject: &mut Subject, identity: &Identity) {
    if subject.hubs.is_empty() {
        subject.hubs = identity.hubs();
    }
    let server = identity.bootstrap();
    subject.bootstrap = Some(HostPort { host: server.host, port: server.port });
}

/// What a running process itself says that needs attention.
async fn conditions(config: &Config) -> Vec<Finding> {
    let client = Client::new(&config.listen.admin);
    // Who does not run has no conditions; that was said before.
    let rows: Vec<ConditionRow> = client.get("/v1/conditions", &[]).await.unwrap_or_default();
    let finding = |row: &ConditionRow| {
        let what = format!("{} ({}) since {}: {}", row.kind, row.subject, row.since, row.message);
        Finding::warn("condition", what, "")
    };
    rows.iter().map(finding).collect()
}

/// The hub's time comes with each heartbeat; only a running node knows it.
fn offset(role: Role, stats: Option<&[u8]>) -> Finding {
    const CHECK: &str = "hub clock";
    if role == Role::Cloud {
        return Finding::skip(CHECK, "this is the hub");
    }
    let Some(stats) = stats else {
        return Finding::skip(CHECK, "start the node: its link compares the clocks");
    };
    let page = String::from_utf8_lossy(stats);
    match samples(&page).get("octobus_link_clock_offset_seconds") {
        Some(offset) if offset.abs() > OFFSET_MAX_S => Finding::fail(
            CHECK,
            format!("the hub's clock is {offset:+.1} s from this one"),
            "let both follow NTP (timedatectl set-ntp true)",
        ),
        Some(offset) => Finding::ok(CHECK, format!("the hub's clock is {offset:+.3} s from this one")),
        None => Finding::skip(CHECK, "not measured yet"),
    }
}

fn report(findings: &[Finding], output: Rows) -> Outcome {
    match output {
        Rows::Json => output::json(&findings)?,
        Rows::Text => {
            let lines: String = findings.iter().map(|finding| format!("{finding}\n")).collect();
            output::bytes(lines.as_bytes())?;
        }
    }
    match findings.iter().filter(|finding| finding.verdict == Verdict::Fail).count() {
        0 => Ok(()),
        1 => Err(Failure::failed("1 check failed")),
        n => Err(Failure::failed(format!("{n} checks failed"))),
    }
}
