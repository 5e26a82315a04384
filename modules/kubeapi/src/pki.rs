//! The server's own authority, in a folder of its own: who serves, and who may administrate.
//!
//! | file | |
//! |---|---|
//! | `ca.pem`, `ca.key` | the cluster CA: signs the server's certificate and those of clients |
//! | `sa.key` | signs tokens of service accounts |
//! | `admin.pem`, `admin.key` | the administrator, in group `system:masters` |
//! | `secrets.key` | seals secrets in the store |
//! | `kubeconfig` | how to reach the server as the administrator |
//!
//! Each file is written once, whole, mode 0600. The server's certificate is made anew at every start.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use broker::{
    clock,
    private::{self, PrivateError},
    seal::{SealKey, SealKeyError},
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use time::OffsetDateTime;

use crate::auth::token::TokenKey;

const DAY: u64 = 24 * 60 * 60;
const CA_LIFETIME: Duration = Duration::from_secs(30 * 365 * DAY);
const LEAF_LIFETIME: Duration = Duration::from_secs(10 * 365 * DAY);
/// Certificates start to be valid this long ago: clocks of clients run behind.
const BACKDATED: Duration = Duration::from_secs(DAY);
const FILE_MAX: usize = 64 << 10;

/// Why the authority cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Unreadable, unwritable, or readable by others.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// The key of secrets.
    #[error(transparent)]
    Seal(#[from] SealKeyError),
    /// A file is not what this program wrote.
    #[error("{path} is damaged: restore it from a backup, or remove the folder for a new authority")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// A key or certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The TLS library refuses them.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The TLS library refuses the CA.
    #[error("TLS: {0}")]
    Verifier(#[from] rustls::client::VerifierBuilderError),
}

/// The server's authority.
pub(crate) struct Pki {
    folder: PathBuf,
    ca_pem: String,
    ca: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Opens the authority of a folder, or makes it.
    pub(crate) fn open(folder: &Path) -> Result<Self, PkiError> {
        private::create_dir(folder)?;
        let key = key(&folder.join("ca.key"))?;
        let path = folder.join("ca.pem");
        let ca_pem = match text(&path)? {
            Some(pem) => pem,
            None => {
                let mut params = dated(CA_LIFETIME, "octobus kubernetes CA", &[]);
                params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
                params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
                let pem = params.self_signed(&key)?.pem();
                private::write(&path, pem.as_bytes())?;
                pem
            }
        };
        let damaged = || PkiError::Damaged { path: path.clone() };
        let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(|_| damaged())?;
        let issuer = Issuer::from_ca_cert_der(&ca, key).map_err(|_| damaged())?;
        Ok(Self { folder: folder.to_owned(), ca_pem, ca, issuer })
    }

    /// The CA's certificate.
    pub(crate) fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The key that signs tokens of service accounts.
    pub(crate) fn token_key(&self) -> Result<TokenKey, PkiError> {
        let path = self.folder.join("sa.key");
        let key = key(&path)?;
        TokenKey::new(&key.serialize_der()).map_err(|_| PkiError::Damaged { path })
    }

    /// The key that seals secrets.
    pub(crate) fn secrets_key(&self) -> Result<SealKey, PkiError> {
        Ok(SealKey::stored(&self.secrets_path())?)
    }

    /// Where it stands.
    pub(crate) fn secrets_path(&self) -> PathBuf {
        self.folder.join("secrets.key")
    }

    /// TLS of the server at these addresses besides those of loopback and of the service, which asks clients for a
    /// certificate of this CA.
    pub(crate) fn tls(&self, at: &[IpAddr]) -> Result<Arc<ServerConfig>, PkiError> {
        let mut params = dated(LEAF_LIFETIME, "kube-apiserver", &[]);
        let names = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
        let mut addresses = vec![
            IpAddr::from([127, 0, 0, 1]),
            IpAddr::from([10, 96, 0, 1]),
            IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        ];
        addresses.extend(at.iter().filter(|ip| !ip.is_unspecified()));
        params.subject_alt_names.extend(addresses.into_iter().map(SanType::IpAddress));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone())?;
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![certificate.der().clone(), self.ca.clone()],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// Writes how the administrator reaches the server, and returns where.
    pub(crate) fn kubeconfig(&self, address: SocketAddr) -> Result<PathBuf, PkiError> {
        let key = key(&self.folder.join("admin.key"))?;
        let path = self.folder.join("admin.pem");
        let certificate = match text(&path)? {
            Some(pem) => pem,
            None => {
                let pem = self.client("kubernetes-admin", &["system:masters"], &key)?;
                private::write(&path, pem.as_bytes())?;
                pem
            }
        };
        let host = match address.ip() {
            ip if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
            ip => ip,
        };
        let server = format!("https://{}", SocketAddr::new(host, address.port()));
        let encoded = |text: &str| STANDARD.encode(text);
        let config = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: octobus\nclusters:\n- name: octobus\n  cluster:\n    \
             server: {server}\n    certificate-authority-data: {}\nusers:\n- name: admin\n  user:\n    \
             client-certificate-data: {}\n    client-key-data: {}\ncontexts:\n- name: octobus\n  context:\n    \
             cluster: octobus\n    user: admin\n",
            encoded(&self.ca_pem),
            encoded(&certificate),
            encoded(&key.serialize_pem()),
        );
        let path = self.folder.join("kubeconfig");
        private::write(&path, config.as_bytes())?;
        Ok(path)
    }

    /// A certificate for a client, as PEM.
    pub(crate) fn client(&self, name: &str, groups: &[&str], key: &KeyPair) -> Result<String, PkiError> {
        let mut params = dated(LEAF_LIFETIME, name, groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(key, &self.issuer)?.pem())
    }
}

fn key(path: &Path) -> Result<KeyPair, PkiError> {
    match text(path)? {
        Some(pem) => KeyPair::from_pem(&pem).map_err(|_| PkiError::Damaged { path: path.to_owned() }),
        None => {
            let key = KeyPair::generate()?;
            private::write(path, key.serialize_pem().as_bytes())?;
            Ok(key)
        }
    }
}

fn text(path: &Path) -> Result<Option<String>, PkiError> {
    let bytes = private::read(path, FILE_MAX)?;
    let text =
        bytes.map(|bytes| String::from_utf8(bytes).map_err(|_| PkiError::Damaged { path: path.to_owned() }));
    text.transpose()
}

fn dated(lifetime: Duration, name: &str, groups: &[&str]) -> CertificateParams {
    let seconds = i64::try_from(clock::wall_us() / 1_000_000).unwrap_or(i64::MAX);
    let now = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    for group in groups {
        params.distinguished_name.push(DnType::OrganizationName, *group);
    }
    params.not_before = now - BACKDATED;
    params.not_after = now + lifetime;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}
