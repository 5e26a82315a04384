//! The tier's certificate authority: who nodes and hubs are, said in certificates.
//!
//! A single hub keeps four files in `DATA/tier`, written together on the first start and never changed:
//!
//! | file | |
//! |---|---|
//! | `id` | the tier's id, as configured or 32 random hexadecimal digits; stands in every certificate |
//! | `ca.pem` | the CA certificate; its SHA-256 is what join tokens carry |
//! | `ca.key` | its key, PKCS#8 |
//! | `secret` | 32 random bytes in hex; ticket and reset keys, and the one of secrets, derive from it |
//!
//! They appear by the renaming of a directory, so that a crash leaves all of them or none: a folder with
//! only some was made by hand, and starting with a new key beside an old certificate would lock every
//! node out. Hence such a folder is refused, never completed.

use std::{
    fmt, fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use broker::{
    clock, enroll,
    private::{self, PrivateError},
    seal::SealKey,
};
use codec::topic::validate_node_name;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

pub mod csr;
pub use csr::{CsrError, ProvenKey};

/// How long a node's certificate is good for.
pub const NODE_LIFETIME: Duration = Duration::from_secs(90 * DAY);
/// A hub's certificate is made anew at every start, by a key that lies beside it: it expires only to be
/// a valid certificate.
pub const HUB_LIFETIME: Duration = Duration::from_secs(5 * 365 * DAY);

const CA_LIFETIME: Duration = Duration::from_secs(30 * 365 * DAY);
/// Certificates start to be valid this long ago: clocks of nodes run behind.
const BACKDATED: Duration = Duration::from_secs(DAY);
const DAY: u64 = 24 * 60 * 60;
const FILE_MAX: usize = 16 << 10;

/// The tier's CA, id and secret.
pub struct Authority {
    tier: String,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
    secret: [u8; 32],
}

/// Certificate, chain and key of a hub replica, as rustls wants them.
#[derive(Debug)]
pub struct HubIdentity {
    /// Its certificate, then the CA's: a joiner looks for the latter in the chain.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

/// Why the authority cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Unreadable, unwritable, or readable by others.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// Some of the files are there.
    #[error(
        "{missing} is missing in {dir}, which holds the other files of this tier: restore it from a backup \
         (removing the folder makes a new tier, and every node has to join again)"
    )]
    Incomplete { dir: PathBuf, missing: &'static str },
    /// A file is not what this program wrote.
    #[error("{path} is damaged ({what}): restore it from a backup")]
    Damaged { path: PathBuf, what: &'static str },
    /// Key or certificate generation failed.
    #[error("cannot make the tier's CA: {0}")]
    Generate(#[from] rcgen::Error),
    /// The folder belongs to another tier than the configuration says.
    #[error(
        "{dir} holds tier {found}, the configuration says {wanted}: set `tier` to {found} or leave it out, \
         or name another data folder"
    )]
    OtherTier { dir: PathBuf, found: String, wanted: String },
    /// The configured id cannot stand in certificates.
    #[error("`{0}` cannot be a tier's id: write lower-case letters, digits and inner '-'")]
    TierName(String),
    /// No randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
    /// The file system says no.
    #[error("cannot {doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

/// Why a certificate could not be issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// Signing or key generation failed.
    #[error("cannot issue a certificate: {0}")]
    Sign(#[from] rcgen::Error),
    /// No randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

impl Authority {
    /// Loads the authority of this data folder, or creates it on the first start, with the configured
    /// tier id if there is one.
    ///
    /// # Errors
    /// See [`AuthorityError`]; each says what to do.
    pub fn open(data: &Path, tier: Option<&str>) -> Result<Self, AuthorityError> {
        if let Some(tier) = tier.filter(|tier| validate_node_name(tier).is_err()) {
            return Err(AuthorityError::TierName(tier.to_owned()));
        }
        let dir = data.join("tier");
        if !dir.exists() {
            if !data.exists() {
                private::create_dir(data)?;
            }
            create(data, &dir, tier)?;
        }
        private::create_dir(&dir)?; // it exists: checks the mode
        Self::mounted(&dir, tier)
    }

    /// Loads the authority of a tier from a folder that all its replicas have: its mode is the mount's.
    ///
    /// # Errors
    /// See [`AuthorityError`]; each says what to do.
    pub fn mounted(dir: &Path, tier: Option<&str>) -> Result<Self, AuthorityError> {
        let authority = load(dir)?;
        let dir = dir.to_owned();
        match tier {
            Some(wanted) if wanted != authority.tier => {
                Err(AuthorityError::OtherTier { dir, found: authority.tier, wanted: wanted.to_owned() })
            }
            _ => Ok(authority),
        }
    }

    /// The tier's id.
    #[must_use]
    pub fn tier(&self) -> &str {
        &self.tier
    }

    /// The CA certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The CA certificate as PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// What join tokens carry of the CA certificate.
    #[must_use]
    pub fn certificate_sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.certificate).into()
    }

    /// The tier's secret. Keys are derived from it, it is never used itself.
    #[must_use]
    pub fn secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// What secrets are sealed with before they enter fabric, journal or mirror: nodes have it too.
    #[must_use]
    pub fn secrets_key(&self) -> SealKey {
        SealKey::derived(&self.secret, "octobus tier: secrets at rest")
    }

    /// Issues a node's certificate, with which a relay may also let others link to it. The name must have
    /// passed [`validate_node_name`].
    ///
    /// # Errors
    /// Signing failed; nothing a caller can repair.
    pub fn issue_node(
        &self,
        name: &str,
        generation: u32,
        relay: bool,
        key: &ProvenKey,
        lifetime: Duration,
    ) -> Result<Certificate, IssueError> {
        let mut params = self.leaf(&format!("system:node:{name}"), "system:nodes", lifetime)?;
        params.subject_alt_names =
            vec![SanType::URI(format!("octobus://{}/node/{name}/{generation}", self.tier).try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if relay {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        self.sign(&params, &key.spki)
    }

    /// Issues the certificate of this replica with a fresh key. `names` are the DNS names and addresses
    /// under which HTTPS clients reach it; links look at the role alone.
    ///
    /// # Errors
    /// A name is not ASCII, or signing failed.
    pub fn issue_hub(&self, replica: &str, names: &[String]) -> Result<HubIdentity, IssueError> {
        let mut params = self.leaf(&format!("system:hub:{replica}"), "system:hubs", HUB_LIFETIME)?;
        params.subject_alt_names =
            vec![SanType::URI(format!("octobus://{}/hub/{replica}", self.tier).try_into()?)];
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            });
        }
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = self.sign(&params, &key)?;
        Ok(HubIdentity {
            chain: vec![certificate.der().clone(), self.certificate.clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        })
    }

    fn leaf(
        &self,
        common_name: &str,
        organization: &str,
        lifetime: Duration,
    ) -> Result<CertificateParams, IssueError> {
        let mut params = dated(lifetime);
        params.distinguished_name.push(DnType::OrganizationName, organization);
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.serial_number = Some(random_serial()?);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }

    fn sign(&self, params: &CertificateParams, key: &impl PublicKeyData) -> Result<Certificate, IssueError> {
        Ok(params.signed_by(key, &self.issuer)?)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("tier", &self.tier).finish_non_exhaustive()
    }
}

fn create(data: &Path, dir: &Path, tier: Option<&str>) -> Result<(), AuthorityError> {
    let new = data.join("tier.new");
    // Left by a crash before the rename: nothing was ever issued with it.
    match fs::remove_dir_all(&new) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(AuthorityError::Io { doing: "remove", path: new, source });
        }
        Ok(()) | Err(_) => {}
    }
    private::create_dir(&new)?;
    let mut id = [0; 16];
    getrandom::fill(&mut id)?;
    let id = tier.map_or_else(|| enroll::hex(&id), str::to_owned);
    let mut secret = [0; 32];
    getrandom::fill(&mut secret)?;
    let key = KeyPair::generate()?;
    private::write(&new.join("ca.key"), key.serialize_pem().as_bytes())?;
    private::write(&new.join("ca.pem"), self_sign(&id, &key)?.pem().as_bytes())?;
    private::write(&new.join("secret"), enroll::hex(&secret).as_bytes())?;
    private::write(&new.join("id"), id.as_bytes())?;
    fs::rename(&new, dir).map_err(|source| AuthorityError::Io {
        doing: "create",
        path: dir.into(),
        source,
    })?;
    private::sync_dir(data)?;
    tracing::info!(tier = %id, dir = %dir.display(), "created a new tier and its CA");
    Ok(())
}

fn self_sign(tier: &str, key: &KeyPair) -> Result<Certificate, AuthorityError> {
    let mut params = dated(CA_LIFETIME);
    params.distinguished_name.push(DnType::OrganizationName, "octobus");
    params.distinguished_name.push(DnType::CommonName, format!("octobus tier {tier}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(random_serial()?);
    Ok(params.self_signed(key)?)
}

fn load(dir: &Path) -> Result<Authority, AuthorityError> {
    let file = |name: &'static str| -> Result<String, AuthorityError> {
        let path = dir.join(name);
        let bytes = private::read(&path, FILE_MAX)?
            .ok_or_else(|| AuthorityError::Incomplete { dir: dir.into(), missing: name })?;
        String::from_utf8(bytes).map_err(|_| AuthorityError::Damaged { path, what: "not text" })
    };
    let damaged = |name: &str, what| AuthorityError::Damaged { path: dir.join(name), what };
    // All are read before any is interpreted, so that a missing file is what a person hears of first.
    let (id, ca, key, secret) = (file("id")?, file("ca.pem")?, file("ca.key")?, file("secret")?);
    let tier = id.trim().to_owned();
    if validate_node_name(&tier).is_err() {
        return Err(damaged("id", "not a tier's id"));
    }
    let secret = unhex(secret.trim()).ok_or_else(|| damaged("secret", "not 64 hexadecimal digits"))?;
    let key = KeyPair::from_pem(&key).map_err(|_| damaged("ca.key", "not a PKCS#8 key in PEM"))?;
    let certificate = CertificateDer::from_pem_slice(ca.as_bytes())
        .map_err(|_| damaged("ca.pem", "not a certificate in PEM"))?;
    let (_rest, parsed) = x509_parser::parse_x509_certificate(&certificate)
        .map_err(|_| damaged("ca.pem", "not an X.509 certificate"))?;
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err(damaged("ca.key", "it is not the key of ca.pem"));
    }
    let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
    Ok(Authority { tier, certificate_pem: ca, certificate: certificate.clone(), issuer, secret })
}

fn dated(lifetime: Duration) -> CertificateParams {
    let now = wall();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = now - BACKDATED;
    params.not_after = now + lifetime;
    params
}

fn wall() -> OffsetDateTime {
    let seconds = i64::try_from(clock::wall_us() / 1_000_000).unwrap_or(i64::MAX);
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// 127 random bits: positive, and no two alike.
fn random_serial() -> Result<SerialNumber, getrandom::Error> {
    let mut serial = [0; 16];
    getrandom::fill(&mut serial)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&serial))
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
