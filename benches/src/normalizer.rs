//! What this machine can do today: measured in every run, so that runs can be compared.

use std::{
    fs::File,
    hint::black_box,
    io::{Seek, SeekFrom, Write},
    sync::Arc,
};

use anyhow::Context;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, Connection, RootCertStore, ServerConfig, server::WebPkiClientVerifier, version};
use rustls_pki_types::{PrivateKeyDer, ServerName};
use serde_json::{Value, json};

use crate::measure::{self, Figure, round};

/// All of them.
///
/// # Errors
/// No file can be written in the folder for temporary files.
pub fn measure() -> anyhow::Result<Value> {
    Ok(json!({
        "flush_us": flush_us()?.json(),
        "tls_handshake_pairs_per_s": round(handshakes_per_s()?),
        "memcpy_gb_per_s": round(memcpy_gb_per_s()),
    }))
}

/// Microseconds of one 4 KiB write and fdatasync into a preallocated file.
fn flush_us() -> anyhow::Result<Figure> {
    let mut file: File = tempfile::tempfile().context("make a file to flush")?;
    file.write_all(&[1; 64 << 10])?;
    file.sync_all()?;
    let mut times = Vec::new();
    for _ in 0..64 {
        let started = measure::now();
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&[2; 4 << 10])?;
        file.sync_data()?;
        times.push(started.elapsed().as_nanos() as f64 / 1000.0);
    }
    Ok(Figure::of(times))
}

/// Full mutual TLS 1.3 handshakes in memory, both ends on one thread: pairs per second of CPU.
fn handshakes_per_s() -> anyhow::Result<f64> {
    const PAIRS: u32 = 200;
    let (client, server) = tls_configs()?;
    let cpu = measure::process_cpu();
    for _ in 0..PAIRS {
        handshake(&client, &server)?;
    }
    Ok(f64::from(PAIRS) / (measure::process_cpu() - cpu).as_secs_f64())
}

fn tls_configs() -> anyhow::Result<(Arc<ClientConfig>, Arc<ServerConfig>)> {
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec!["bench".to_owned()])?.self_signed(&key)?.der().clone();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone())?;
    let roots = Arc::new(roots);
    let private = || PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build()?;
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.clone()], private()?)?;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], private()?)?;
    client.resumption = rustls::client::Resumption::disabled();
    Ok((Arc::new(client), Arc::new(server)))
}

fn handshake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> anyhow::Result<()> {
    let name = ServerName::try_from("bench")?;
    let mut client = Connection::from(rustls::ClientConnection::new(Arc::clone(client), name)?);
    let mut server = Connection::from(rustls::ServerConnection::new(Arc::clone(server))?);
    while client.is_handshaking() || server.is_handshaking() {
        carry(&mut client, &mut server)?;
        carry(&mut server, &mut client)?;
    }
    Ok(())
}

fn carry(from: &mut Connection, to: &mut Connection) -> anyhow::Result<()> {
    let mut wire = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut wire)?;
    }
    let mut rest = &wire[..];
    while !rest.is_empty() {
        to.read_tls(&mut rest)?;
        to.process_new_packets()?;
    }
    Ok(())
}

/// Copying between two buffers of 32 MiB.
fn memcpy_gb_per_s() -> f64 {
    const BYTES: usize = 32 << 20;
    let from = vec![1_u8; BYTES];
    let mut to = vec![0_u8; BYTES];
    to.copy_from_slice(black_box(&from));
    let rounds = (0..8).map(|_| {
        let started = measure::now();
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
        BYTES as f64 / started.elapsed().as_nanos() as f64
    });
    Figure::of(rounds).median
}
