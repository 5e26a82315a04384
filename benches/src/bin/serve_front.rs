//! Our broker and MQTT front alone: `serve_front ADDRESS lmdb|mem FOLDER`. Started by p13.

use std::{path::Path, sync::Arc};

use anyhow::{Context, bail};
use broker::{
    Handle, Tasks,
    core::Config,
    driver,
    front::{auth::Auth, mqtt},
    store::{lmdb, mem::MemStore},
};
use tokio::net::TcpListener;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, store, folder] = &args[..] else { bail!("usage: serve_front ADDRESS lmdb|mem FOLDER") };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let tasks = Tasks::new();
        let broker = start(store, Path::new(folder), &tasks)?;
        let listener = TcpListener::bind(address.as_str()).await.context("listen for MQTT")?;
        mqtt::serve(listener, Arc::new(mqtt::Config::new(Auth::Anonymous)), broker, tasks).await;
        Ok(())
    })
}

fn start(store: &str, folder: &Path, tasks: &Tasks) -> anyhow::Result<Handle> {
    let config = Config::node("bench", [1; 16], 1);
    match store {
        "mem" => {
            let store = MemStore::auto();
            let recovered = store.recover();
            Ok(driver::start(config, store, recovered, tasks))
        }
        "lmdb" => {
            let (store, recovered) = lmdb::open(folder, lmdb::Options::node())?;
            Ok(driver::start(config, store, recovered, tasks))
        }
        other => bail!("no store is called {other}"),
    }
}
