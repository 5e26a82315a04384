//! Who this node is: what it received when it joined, kept in `DATA/identity`.
//!
//! | file | |
//! |---|---|
//! | `identity.json` | name, generation, tier, certificate, key, CA, hub addresses and the tier's key of secrets, replaced as one |
//! | `joining.key` | the key of a join that is under way, written before the request |
//!
//! Certificate and key stand in one file, so that no crash can separate them. The key of a join
//! exists on disk before the hub hears of it: when the reply is lost, the next attempt presents the same
//! key and gets the certificate after all.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use broker::{
    clock,
    enroll::Joined,
    link::{
        dial::Hub,
        identity::{PeerCertificate, Role},
    },
    private::{self, PrivateError},
    seal::SealKey,
};
use ops::config::units;
use rcgen::{CertificateParams, KeyPair, PublicKeyData as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::https::{Pin, Server};

const FILE_MAX: usize = 64 << 10;

/// An enrolled node's identity. Its key is in it: never log it.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    stored: Stored,
    certificate: CertificateDer<'static>,
    ca: CertificateDer<'static>,
    parsed: PeerCertificate,
}

/// Contents of `identity.json`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    name: String,
    generation: u32,
    tier: String,
    /// Where it joined and renews.
    bootstrap: String,
    /// Where links are dialled, `host:port`, hosts filled in.
    quic: Vec<String>,
    /// Likewise, by WebSocket.
    #[serde(default)]
    websocket: Vec<String>,
    certificate: String,
    ca: String,
    key: String,
    /// Text of the tier's key of secrets; empty from a hub that had none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    secrets: String,
}

/// Why an identity cannot be loaded or stored.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Unreadable, unwritable, or readable by others.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// The file is not what this program wrote.
    #[error("{path} is damaged ({what}): restore it from a backup, or remove it and join again")]
    Damaged { path: PathBuf, what: String },
    /// What the hub sent does not fit together.
    #[error("the hub's answer does not fit: {0}")]
    Answer(String),
    /// Key generation failed.
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
    /// The file system says no.
    #[error("cannot remove {path}: {source}")]
    Remove { path: PathBuf, source: io::Error },
}

impl Identity {
    /// The identity in this data folder; `None` if it never joined.
    ///
    /// # Errors
    /// It is there and cannot be used.
    pub fn load(data: &Path) -> Result<Option<Self>, IdentityError> {
        let path = file(data);
        let Some(bytes) = private::read(&path, FILE_MAX)? else { return Ok(None) };
        let damaged = |what: String| IdentityError::Damaged { path: path.clone(), what };
        let stored: Stored = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        Self::check(stored).map(Some).map_err(damaged)
    }

    /// Stores what the hub answered to a join or renewal with `key`, as one file.
    ///
    /// # Errors
    /// The answer does not fit the key or itself, or cannot be written; what was stored before stays.
    pub(crate) fn store(
        data: &Path,
        joined: Joined,
        key: &KeyPair,
        server: &Server,
    ) -> Result<Self, IdentityError> {
        let filled =
            |addresses: &[String]| addresses.iter().map(|address| fill_host(address, server)).collect();
        let (quic, websocket) = (filled(&joined.quic), filled(&joined.websocket));
        let identity = Self::check(Stored {
            name: joined.name,
            generation: joined.generation,
            tier: joined.tier,
            bootstrap: server.to_string(),
            quic,
            websocket,
            certificate: joined.certificate,
            ca: joined.ca,
            key: key.serialize_pem(),
            secrets: joined.secrets,
        })
        .map_err(IdentityError::Answer)?;
        private::create_dir(&data.join(DIR))?;
        let bytes = serde_json::to_vec_pretty(&identity.stored).expect("a struct of strings");
        private::write(&file(data), &bytes)?;
        Ok(identity)
    }

    /// Holds every part against the others: what is dialled with must be one identity.
    fn check(stored: Stored) -> Result<Self, String> {
        let certificate = CertificateDer::from_pem_slice(stored.certificate.as_bytes())
            .map_err(|_| "the certificate is not PEM")?;
        let ca = CertificateDer::from_pem_slice(stored.ca.as_bytes())
            .map_err(|_| "the CA certificate is not PEM")?;
        let parsed = PeerCertificate::parse(&certificate).map_err(|error| error.to_string())?;
        let named = match &parsed.identity.role {
            Role::Node { name, generation } => **name == *stored.name && *generation == stored.generation,
            Role::Hub { .. } => false,
        };
        if !named || *parsed.identity.tier != *stored.tier {
            return Err(format!("the certificate is {}'s", parsed.identity));
        }
        let key = KeyPair::from_pem(&stored.key).map_err(|_| "the key is not PKCS#8 in PEM")?;
        let (_, leaf) = x509_parser::parse_x509_certificate(&certificate)
            .map_err(|_| "the certificate cannot be read")?;
        let (_, issuer) =
            x509_parser::parse_x509_certificate(&ca).map_err(|_| "the CA certificate cannot be read")?;
        if leaf.public_key().raw != key.subject_public_key_info() {
            return Err("the certificate is of another key".to_owned());
        }
        leaf.verify_signature(Some(issuer.public_key())).map_err(|_| "another CA signed the certificate")?;
        Server::parse(&stored.bootstrap).map_err(|error| error.to_string())?;
        if !stored.secrets.is_empty() && SealKey::parse(&stored.secrets).is_none() {
            return Err("the key of secrets is none".to_owned());
        }
        Ok(Self { stored, certificate, ca, parsed })
    }

    /// The node's name.
    #[must_use]
    pub fn name(&self) -> Arc<str> {
        Arc::from(self.stored.name.as_str())
    }

    /// The tier it belongs to, and talks to alone.
    #[must_use]
    pub fn tier(&self) -> &str {
        &self.stored.tier
    }

    /// The enrolment generation.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.stored.generation
    }

    /// Where links are dialled.
    #[must_use]
    pub fn hubs(&self) -> Vec<Hub> {
        let quic = self.stored.quic.iter().map(|address| format!("quic://{address}"));
        let websocket = self.stored.websocket.iter().map(|address| format!("wss://{address}"));
        // An address that this version does not understand is one that it cannot dial.
        Hub::merged(quic.chain(websocket).filter_map(|address| units::hub(&address).ok()))
    }

    /// Where it renews.
    #[must_use]
    pub fn bootstrap(&self) -> Server {
        Server::parse(&self.stored.bootstrap).expect("checked when it was loaded")
    }

    /// Its certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its certificate as PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.stored.certificate
    }

    /// The tier's CA certificate.
    #[must_use]
    pub fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// Its key, for TLS.
    #[must_use]
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(self.stored.key.as_bytes()).expect("checked when it was loaded")
    }

    /// What the tier's secrets are sealed with. `None`: the hub that it joined knew of none; it gets the key
    /// when it renews.
    #[must_use]
    pub fn secrets_key(&self) -> Option<SealKey> {
        SealKey::parse(&self.stored.secrets)
    }

    /// Whether it permits others to link to this node.
    #[must_use]
    pub fn is_relay(&self) -> bool {
        self.parsed.serves
    }

    /// What a relay's session tickets and resets derive from: the same after a restart, and nobody else's.
    pub(crate) fn link_secret(&self) -> [u8; 32] {
        let mut hash = Sha256::new_with_prefix(b"octobus relay links\0");
        hash.update(self.key().secret_der());
        hash.finalize().into()
    }

    /// Its key, for certificate requests.
    pub(crate) fn key_pair(&self) -> KeyPair {
        KeyPair::from_pem(&self.stored.key).expect("checked when it was loaded")
    }

    /// Who the hub must be.
    #[must_use]
    pub fn pin(&self) -> Pin {
        let ca_sha256 = Sha256::digest(&self.ca).into();
        Pin { ca_sha256, tier: Some(Arc::clone(&self.parsed.identity.tier)) }
    }

    /// How long until the certificate has a third of its life left; zero if that is past.
    #[must_use]
    pub fn renew_in(&self) -> Duration {
        let micros = |seconds: i64| u64::try_from(seconds).unwrap_or(0).saturating_mul(1_000_000);
        let (from, until) = (micros(self.parsed.not_before_s), micros(self.parsed.not_after_s));
        let due = until.saturating_sub(until.saturating_sub(from) / 3);
        Duration::from_micros(due.saturating_sub(clock::wall_us()))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.parsed.identity)
    }
}

/// The key of a join under way: the one of an earlier attempt, or a new one, on disk before it is used.
pub(crate) fn joining_key(data: &Path) -> Result<KeyPair, IdentityError> {
    let dir = data.join(DIR);
    private::create_dir(&dir)?;
    let path = dir.join(JOINING);
    if let Some(pem) = private::read(&path, FILE_MAX)? {
        let damaged = |what: &str| IdentityError::Damaged { path: path.clone(), what: what.to_owned() };
        let pem = String::from_utf8(pem).map_err(|_| damaged("not text"))?;
        return KeyPair::from_pem(&pem).map_err(|_| damaged("not a PKCS#8 key in PEM"));
    }
    let key = KeyPair::generate()?;
    private::write(&path, key.serialize_pem().as_bytes())?;
    Ok(key)
}

/// The join is through: its key stands in the identity now.
pub(crate) fn forget_joining_key(data: &Path) -> Result<(), IdentityError> {
    let path = data.join(DIR).join(JOINING);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(IdentityError::Remove { path, source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// A certificate request: proof that this node holds the key, and nothing else.
pub(crate) fn csr(key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.serialize_request(key)?.pem()
}

const DIR: &str = "identity";
const JOINING: &str = "joining.key";

fn file(data: &Path) -> PathBuf {
    data.join(DIR).join("identity.json")
}

/// `:10001` means the host that was asked.
fn fill_host(address: &str, server: &Server) -> String {
    match address.strip_prefix(':') {
        Some(port) if server.host.contains(':') => format!("[{}]:{port}", server.host),
        Some(port) => format!("{}:{port}", server.host),
        None => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_a_join_survives_until_the_join_is_through() {
        let data = tempfile::tempdir().unwrap();
        let first = joining_key(data.path()).unwrap();
        let again = joining_key(data.path()).unwrap();
        assert_eq!(first.serialized_der(), again.serialized_der());
        forget_joining_key(data.path()).unwrap();
        forget_joining_key(data.path()).unwrap();
        assert_ne!(joining_key(data.path()).unwrap().serialized_der(), first.serialized_der());
    }

    #[test]
    fn an_address_without_host_is_at_the_hub_that_was_asked() {
        let server = |host: &str| Server { host: host.into(), port: 1 };
        assert_eq!(fill_host(":10001", &server("hub")), "hub:10001");
        assert_eq!(fill_host(":10001", &server("::1")), "[::1]:10001");
        assert_eq!(fill_host("other:7", &server("hub")), "other:7");
    }

    #[test]
    fn a_folder_that_never_joined_has_no_identity() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(Identity::load(data.path()).unwrap(), None);
    }
}
