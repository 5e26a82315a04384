//! What servers must offer: each refusal at the start of a hub names the line to change.

use std::fs;

use cloudhub::fabric::nats::{Identity, OpenError, Tier};
use octobus_tests::servers::NatsServers;

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
