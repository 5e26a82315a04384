//! Certificates of simulated nodes: one each, from the hub's CA, issued here and kept between runs.
//!
//! Joining 100 000 nodes through the bootstrap port would measure that port. All certificates are over **one
//! key pair**: a handshake verifies and signs as much as with a key each, while making keys, which no hub ever
//! sees, does not count. What is kept in the folder, in one of its own for each CA:
//!
//! | file | |
//! |---|---|
//! | `key.pem` | the key, mode 0600 |
//! | `PREFIX.certs` | certificate `i` at byte `i * 1024`: `u16 length`, DER |

use std::{
    fmt,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use broker::{
    clock, enroll,
    link::{
        identity::PeerCertificate,
        tls::{self, Credentials},
    },
    private,
};
use cloudhub::ca::{self, Authority, ProvenKey};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, NamedGroup, SignatureScheme,
    client::{
        ClientSessionStore, ResolvesClientCert, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
    },
    crypto::ring::sign,
    sign::{CertifiedKey, SigningKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject as _};
use serde::{Deserialize, Serialize};

/// Bytes of a certificate's place.
const SLOT: u64 = 1024;
/// A key in PEM.
const KEY_MAX: usize = 16 << 10;
/// Certificates that end sooner are made anew.
const LEFT_MIN_S: i64 = 24 * 3600;

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Not a hub's folder.
    #[error("{0} holds no tier (no folder `tier`): name the data folder of a hub with --ca")]
    NoTier(PathBuf),
    /// The CA.
    #[error(transparent)]
    Authority(#[from] ca::AuthorityError),
    /// Signing.
    #[error(transparent)]
    Issue(#[from] ca::IssueError),
    /// The key pair.
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
    /// The kept key is not one.
    #[error("{0} holds no usable key: remove it")]
    BadKey(PathBuf),
    /// The request of the own key was not accepted.
    #[error(transparent)]
    Csr(#[from] ca::CsrError),
    /// A private file.
    #[error(transparent)]
    Private(#[from] private::PrivateError),
    /// The file system says no.
    #[error("cannot {doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    /// TLS refuses key or CA.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

/// Where certificates are kept, and by whom they were issued: all that a process of the fleet needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The folder.
    pub folder: PathBuf,
    /// First part of the nodes' names.
    pub prefix: String,
    /// The tier's id.
    pub tier: String,
    /// The CA certificate, DER.
    pub ca: Vec<u8>,
    /// How the hub names the nodes' key.
    pub key_sha256: String,
}

/// The name of a node.
#[must_use]
pub fn name(prefix: &str, number: u32) -> String {
    format!("{prefix}-{number}")
}

/// Makes sure that nodes `0..nodes` have certificates: issues those that are missing, or all if the kept ones end
/// soon or are another tier's. `data` is the hub's data folder; `said` hears how many are done.
///
/// # Errors
/// See [`PkiError`].
pub fn prepare(
    data: &Path,
    folder: &Path,
    prefix: &str,
    nodes: u32,
    mut said: impl FnMut(u32),
) -> Result<Kept, PkiError> {
    if !data.join("tier").is_dir() {
        return Err(PkiError::NoTier(data.to_owned()));
    }
    let authority = Authority::open(data, None)?;
    let io = |source| PkiError::Io { doing: "create", path: folder.to_owned(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    let folder = folder.join(&enroll::hex(&authority.certificate_sha256())[..16]);
    private::create_dir(&folder)?;
    let key = key(&folder)?;
    let request = CertificateParams::default().serialize_request(&key)?.pem()?;
    let proven = ProvenKey::from_csr(&request)?;
    let kept = Kept {
        folder,
        prefix: prefix.to_owned(),
        tier: authority.tier().to_owned(),
        ca: authority.certificate().to_vec(),
        key_sha256: proven.hash(),
    };
    let path = kept.certificates();
    let io = |doing| {
        let path = path.clone();
        move |source| PkiError::Io { doing, path, source }
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io("open"))?;
    let mut have = u32::try_from(file.metadata().map_err(io("read"))?.len() / SLOT).unwrap_or(u32::MAX);
    if have > 0 && !kept.holds(&file) {
        file.set_len(0).map_err(io("empty"))?;
        have = 0;
    }
    for number in have..nodes {
        let certificate =
            authority.issue_node(&name(prefix, number), 1, false, &proven, ca::NODE_LIFETIME)?;
        let der = certificate.der();
        let mut slot = [0; SLOT as usize];
        let length = u16::try_from(der.len()).ok().filter(|length| u64::from(*length) + 2 <= SLOT);
        let length = length.expect("a certificate with names of bounded length fits its place");
        slot[..2].copy_from_slice(&length.to_le_bytes());
        slot[2..2 + der.len()].copy_from_slice(der);
        file.write_all_at(&slot, u64::from(number) * SLOT).map_err(io("write"))?;
        said(number + 1);
    }
    Ok(kept)
}

fn key(folder: &Path) -> Result<KeyPair, PkiError> {
    let path = folder.join("key.pem");
    let bad = |_| PkiError::BadKey(path.clone());
    if let Some(pem) = private::read(&path, KEY_MAX)? {
        let pem = String::from_utf8(pem).map_err(|_| PkiError::BadKey(path.clone()))?;
        return KeyPair::from_pem(&pem).map_err(bad);
    }
    let key = KeyPair::generate()?;
    private::write(&path, key.serialize_pem().as_bytes())?;
    Ok(key)
}

impl Kept {
    fn certificates(&self) -> PathBuf {
        self.folder.join(format!("{}.certs", self.prefix))
    }

    /// Whether what the file begins with is of this key, and good for a while.
    fn holds(&self, file: &File) -> bool {
        let now_s = i64::try_from(clock::wall_us() / 1_000_000).unwrap_or(i64::MAX);
        read_slot(file, 0)
            .and_then(|first| PeerCertificate::parse(&first).ok())
            .is_some_and(|first| first.key == self.key_sha256 && first.not_after_s - now_s > LEFT_MIN_S)
    }
}

fn read_slot(file: &File, number: u32) -> Option<CertificateDer<'static>> {
    let mut slot = [0; SLOT as usize];
    file.read_exact_at(&mut slot, u64::from(number) * SLOT).ok()?;
    let length = usize::from(u16::from_le_bytes([slot[0], slot[1]]));
    slot.get(2..2 + length).filter(|der| !der.is_empty()).map(|der| der.to_vec().into())
}

/// The TLS side of all nodes of a process.
#[derive(Debug)]
pub struct Identities {
    base: ClientConfig,
    store: Arc<Store>,
    tickets: bool,
}

/// Where certificates are read from, at each handshake that wants one.
struct Store {
    certificates: File,
    key: Arc<dyn SigningKey>,
}

impl Identities {
    /// Opens what [`prepare`] has kept.
    ///
    /// # Errors
    /// See [`PkiError`].
    pub fn open(kept: &Kept, tickets: bool) -> Result<Self, PkiError> {
        let path = kept.certificates();
        let io = |source| PkiError::Io { doing: "open", path: path.clone(), source };
        let certificates = File::open(&path).map_err(io)?;
        let first = read_slot(&certificates, 0).ok_or_else(|| PkiError::BadKey(path.clone()))?;
        let key_path = kept.folder.join("key.pem");
        let pem = private::read(&key_path, KEY_MAX)?.unwrap_or_default();
        let key = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|_| PkiError::BadKey(key_path))?;
        let key = PrivateKeyDer::from(key);
        let signing = sign::any_ecdsa_type(&key).map_err(tls::TlsError::from)?;
        let ca = vec![CertificateDer::from(kept.ca.clone())];
        // The agent's own configuration; only whose certificate it is differs from node to node.
        let base = tls::dialler(Credentials { ca, chain: vec![first], key }, &kept.tier)?;
        Ok(Self { base, store: Arc::new(Store { certificates, key: signing }), tickets })
    }

    /// What a node keeps between its dials.
    #[must_use]
    pub fn node(&self, number: u32) -> Arc<NodeTls> {
        Arc::new(NodeTls { store: Arc::clone(&self.store), number, ticket: Mutex::default() })
    }

    /// The configuration of one dial.
    #[must_use]
    pub fn config(&self, node: &Arc<NodeTls>) -> Arc<ClientConfig> {
        let mut config = self.base.clone();
        config.client_auth_cert_resolver = Arc::<NodeTls>::clone(node);
        config.resumption = match self.tickets {
            true => Resumption::store(Arc::<NodeTls>::clone(node)),
            false => Resumption::disabled(),
        };
        Arc::new(config)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// A node's certificate and its ticket: one, as there is one hub or all share a tier's keys.
#[derive(Debug)]
pub struct NodeTls {
    store: Arc<Store>,
    number: u32,
    ticket: Mutex<Option<Box<Tls13ClientSessionValue>>>,
}

impl NodeTls {
    /// Whether the next dial can resume a session.
    #[must_use]
    pub fn has_ticket(&self) -> bool {
        self.ticket.lock().expect("no panic under this lock").is_some()
    }
}

impl ResolvesClientCert for NodeTls {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let certificate = read_slot(&self.store.certificates, self.number)?;
        Some(Arc::new(CertifiedKey::new(vec![certificate], Arc::clone(&self.store.key))))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ClientSessionStore for NodeTls {
    fn set_kx_hint(&self, _server: ServerName<'static>, _group: NamedGroup) {}

    fn kx_hint(&self, _server: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _server: ServerName<'static>, _value: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _server: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _server: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _server: ServerName<'static>, value: Tls13ClientSessionValue) {
        *self.ticket.lock().expect("no panic under this lock") = Some(Box::new(value));
    }

    fn take_tls13_ticket(&self, _server: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.ticket.lock().expect("no panic under this lock").take().map(|value| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_issued_once_and_each_is_its_nodes() {
        let (hub, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Authority::open(hub.path(), None).unwrap();
        let mut issued = Vec::new();
        let first = prepare(hub.path(), cache.path(), "load", 3, |n| issued.push(n)).unwrap();
        let more = prepare(hub.path(), cache.path(), "load", 5, |n| issued.push(n)).unwrap();
        assert_eq!((issued, &first), (vec![1, 2, 3, 4, 5], &more));
        let identities = Identities::open(&more, true).unwrap();
        for number in [0, 4] {
            let resolved = identities.node(number).resolve(&[], &[]).unwrap();
            let peer = PeerCertificate::parse(&resolved.cert[0]).unwrap();
            assert_eq!(*peer.identity.peer().name, *name("load", number));
            assert_eq!(peer.key, more.key_sha256);
        }
        assert!(identities.node(5).resolve(&[], &[]).is_none());
    }

    #[test]
    fn a_folder_that_is_no_hubs_makes_no_tier() {
        let empty = tempfile::tempdir().unwrap();
        let error = prepare(empty.path(), empty.path(), "load", 1, |_| {}).unwrap_err();
        assert!(matches!(error, PkiError::NoTier(_)), "{error}");
        assert!(!empty.path().join("tier").exists());
    }
}
