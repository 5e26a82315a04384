//! What servers must offer: each refusal at the start of a hub names the line to change.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cloudhub::fabric::nats::{Identity, OpenError, Tier};
use octobus_tests::{octobus::folder, servers::NatsServers};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::{hub_config, identity};

async fn refused(servers: &NatsServers, change: impl FnOnce(&mut ops::config::fabric::Fabric)) -> String {
    let mut config = hub_config(servers, "hub-1");
    change(&mut config);
    match Box::pin(Tier::open(&config, &identity())).await {
        Ok(_tier) => panic!("these servers were accepted"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn a_start_on_servers_that_lack_something_names_the_line_to_change() {
    let small = NatsServers::start_with(1, |conf| conf.replace("max_payload: 4MB", "max_payload: 1MB"));
    let said = refused(&small, |_| {}).await;
    assert!(said.contains("max_payload: 4MB"), "{said}");
    drop(small);

    let none = NatsServers::start_with(1, |conf| conf.replace("jetstream: enabled", "jetstream: disabled"));
    let said = refused(&none, |_| {}).await;
    assert!(said.contains("jetstream: enabled") && said.contains("OCTOBUS"), "{said}");
    drop(none);

    let servers = NatsServers::start(1);
    let said = refused(&servers, |config| config.copies = 3).await;
    assert!(said.contains("fabric.copies") && said.contains("cluster"), "{said}");
    let said = refused(&servers, |config| config.log_bytes = 1 << 44).await;
    assert!(said.contains("max_file_store"), "{said}");
    let said = refused(&servers, |config| config.sync_always = true).await;
    assert!(said.contains("sync_interval: always"), "{said}");
    let wrong = servers.password_file().with_extension("wrong");
    fs::write(&wrong, "wrong").unwrap();
    let said = refused(&servers, |config| config.password_file = Some(wrong)).await;
    assert!(said.contains("fabric.user"), "{said}");
}

#[tokio::test]
async fn a_replica_with_the_authority_of_another_tier_does_not_start() {
    let servers = NatsServers::start(1);
    let config = hub_config(&servers, "hub-1");
    drop(Box::pin(Tier::open(&config, &identity())).await.unwrap());
    drop(Box::pin(Tier::open(&config, &identity())).await.unwrap());
    let other = Identity { ca_sha256: [8; 32], ..identity() };
    let refused = Box::pin(Tier::open(&config, &other)).await.unwrap_err();
    assert!(matches!(&refused, OpenError::OtherTier { .. }), "{refused}");
    let mut shards = config.clone();
    shards.shards = 4;
    let refused = Box::pin(Tier::open(&shards, &identity())).await.unwrap_err();
    assert!(matches!(refused, OpenError::Shards { theirs: 2 }), "{refused}");
}

/// A CA of the servers, and what it signed, as PEM files in a folder.
struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(folder: &Path) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        fs::write(folder.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { folder: folder.to_owned(), issuer: Issuer::new(params, key) }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Certificate and key for this name: both files.
    fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let (cert_file, key_file) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        fs::write(&cert_file, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        fs::write(&key_file, key.serialize_pem()).unwrap();
        (cert_file, key_file)
    }

    /// What servers say of TLS: as nats-server.conf suggests, or with users by certificate.
    fn tls(&self, verify: &str) -> String {
        let (cert, key) = self.sign("127.0.0.1");
        let ca = self.path("ca.pem");
        let (cert, key, ca) = (cert.display(), key.display(), ca.display());
        format!("\ntls {{ cert_file: \"{cert}\", key_file: \"{key}\", ca_file: \"{ca}\", {verify}: true }}\n")
    }
}

#[tokio::test]
async fn hubs_and_servers_show_each_other_certificates() {
    let folder = folder();
    let ours = Authority::new(folder.path());
    let servers = NatsServers::start_with(1, |conf| conf + &ours.tls("verify"));
    let (certificate, key) = ours.sign("octobus");
    let with = |config: &mut ops::config::fabric::Fabric| {
        config.servers.iter_mut().for_each(|server| *server = server.replace("nats://", "tls://"));
        config.ca = Some(ours.path("ca.pem"));
        (config.certificate, config.key) = (Some(certificate.clone()), Some(key.clone()));
    };
    let mut config = hub_config(&servers, "hub-1");
    with(&mut config);
    drop(Box::pin(Tier::open(&config, &identity())).await.unwrap());
    // A hub without a certificate, with one that another CA signed, and servers that another CA signed.
    let folder = folder.path().join("other");
    fs::create_dir(&folder).unwrap();
    let others = Authority::new(&folder);
    let strange = others.sign("octobus");
    let changes: [&dyn Fn(&mut ops::config::fabric::Fabric); 3] = [
        &|config| (config.certificate, config.key) = (None, None),
        &|config| (config.certificate, config.key) = (Some(strange.0.clone()), Some(strange.1.clone())),
        &|config| config.ca = Some(others.path("ca.pem")),
    ];
    for change in changes {
        let said = refused(&servers, |config| {
            with(config);
            change(config);
        });
        let said = said.await;
        assert!(said.contains("127.0.0.1"), "{said}");
    }
}

#[tokio::test]
async fn a_hub_is_a_user_by_its_certificate_alone() {
    let folder = folder();
    let ours = Authority::new(folder.path());
    let servers = NatsServers::start_with(1, |conf| {
        let by_password = "{ user: octobus, password: $OCTOBUS_PASSWORD }";
        let other = by_password.replace("octobus", "other");
        let conf = conf.replace(by_password, &format!("{{ user: octobus }}, {other}"));
        conf + &ours.tls("verify_and_map")
    });
    let config = |name: &str| {
        let mut config = hub_config(&servers, "hub-1");
        (config.user, config.password_file) = (None, None);
        config.ca = Some(ours.path("ca.pem"));
        let (certificate, key) = ours.sign(name);
        (config.certificate, config.key) = (Some(certificate), Some(key));
        config
    };
    drop(Box::pin(Tier::open(&config("octobus"), &identity())).await.unwrap());
    let said = Box::pin(Tier::open(&config("somebody"), &identity())).await.map(|_tier| ()).unwrap_err();
    assert!(matches!(said, OpenError::Connect { .. }), "{said}");
}
