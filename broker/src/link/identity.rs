//! Who a certificate says its holder is: the URI SAN, and nothing else.
//!
//! ```text
//! octobus://<tier-id>/node/<name>/<generation>       EKU clientAuth; a relay's also serverAuth
//! octobus://<tier-id>/hub/<replica>                  EKU serverAuth + clientAuth
//! ```
//!
//! Parsing is strict: an identity has exactly one spelling, so that comparing text is comparing
//! identities. Chains are verified by [`super::tls`]; this file reads a certificate whose chain holds.

use std::{fmt, str::FromStr, sync::Arc};

use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate, X509Version};

use crate::{
    core::event::{self, Origin},
    enroll,
};

/// An identity of one tier.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Which tier. Pinned by a node when it joins.
    pub tier: Arc<str>,
    /// Who within it.
    pub role: Role,
}

/// What an identity may be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// An edge node of this enrolment generation.
    Node { name: Origin, generation: u32 },
    /// A replica of the tier.
    Hub { replica: Origin },
}

impl Identity {
    /// The peer of a link.
    #[must_use]
    pub fn peer(&self) -> event::Peer {
        match &self.role {
            Role::Node { name, generation } => {
                event::Peer { name: Arc::clone(name), role: event::Role::Node, generation: *generation }
            }
            Role::Hub { replica } => {
                event::Peer { name: Arc::clone(replica), role: event::Role::Hub, generation: 0 }
            }
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.tier)?;
        match &self.role {
            Role::Node { name, generation } => write!(f, "/node/{name}/{generation}"),
            Role::Hub { replica } => write!(f, "/hub/{replica}"),
        }
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let bad = || IdentityError::Uri(uri.chars().take(SHOWN_MAX).collect());
        let path = uri.strip_prefix(SCHEME).ok_or_else(bad)?;
        // One more than the longest form has, so that a surplus part is seen.
        let mut parts = path.splitn(5, '/');
        let mut next = || parts.next();
        let (tier, kind, name) = (next(), next(), next());
        let name = name.filter(|name| is_name(name)).ok_or_else(bad)?;
        let tier = tier.filter(|tier| is_name(tier)).ok_or_else(bad)?;
        let role = match (kind, next(), next()) {
            (Some("node"), Some(generation), None) => {
                Role::Node { name: name.into(), generation: parse_generation(generation).ok_or_else(bad)? }
            }
            (Some("hub"), None, None) => Role::Hub { replica: name.into() },
            _ => return Err(bad()),
        };
        Ok(Self { tier: tier.into(), role })
    }
}

/// A verified certificate, as far as sessions care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The one identity in it.
    pub identity: Identity,
    /// Serial number, lower-case hex without separators: how a revocation names it.
    pub serial: String,
    /// SHA-256 of the SubjectPublicKeyInfo, lower-case hex: how an enrolment names the key.
    pub key: String,
    /// Others may link to its holder: a hub, or a relay.
    pub serves: bool,
    /// Seconds since 1970 from which it holds.
    pub not_before_s: i64,
    /// Seconds since 1970 until which it holds.
    pub not_after_s: i64,
}

impl PeerCertificate {
    /// Reads a certificate whose chain was verified.
    ///
    /// Exactly one URI may stand in it, an identity, and its extended key usages must be those of the
    /// identity's role. The role is what the URI says: a node's certificate never passes for a hub's, also
    /// a relay's. Other names (DNS, IP) mean nothing here.
    ///
    /// # Errors
    /// It does not name exactly one identity, or may not be used as what it names.
    pub fn parse(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_parse| IdentityError::Malformed)?;
        if !rest.is_empty() || certificate.version() != X509Version::V3 {
            return Err(IdentityError::Malformed);
        }
        let identity: Identity = only_uri(&certificate)?.parse()?;
        let serves = check_usage(&certificate, &identity.role)?;
        let validity = certificate.validity();
        Ok(Self {
            identity,
            serial: enroll::hex(certificate.raw_serial()),
            key: enroll::hex(&Sha256::digest(certificate.public_key().raw)),
            serves,
            not_before_s: validity.not_before.timestamp(),
            not_after_s: validity.not_after.timestamp(),
        })
    }

    /// Whether the certificate holds at this wall time. Chain verification checked it at the full
    /// handshake; a resumed session is checked here.
    #[must_use]
    pub fn is_valid_at(&self, wall_us: u64) -> bool {
        let now_s = i64::try_from(wall_us / 1_000_000).unwrap_or(i64::MAX);
        (self.not_before_s..=self.not_after_s).contains(&now_s)
    }
}

/// Why a certificate names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not DER of one X.509 v3 certificate.
    #[error("the certificate cannot be read")]
    Malformed,
    /// No URI, or several.
    #[error("the certificate holds {0} URI names; an identity is exactly one")]
    Uris(usize),
    /// The URI is not an identity.
    #[error("`{0}` is not an identity (octobus://TIER/node/NAME/GENERATION or octobus://TIER/hub/REPLICA)")]
    Uri(String),
    /// The extended key usages are not those of the role.
    #[error("the certificate may not be used as what it names ({0})")]
    Usage(&'static str),
}

const SCHEME: &str = "octobus://";
/// Characters of a hostile URI that may reach a log.
const SHOWN_MAX: usize = 100;

/// Names of nodes, replicas and tiers: a DNS-1123 subdomain of at most 253 bytes, as Kubernetes wants
/// nodes to be called.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let label_is_good = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label_is_good)
}

/// Decimal without sign or leading zero: one spelling for each number.
fn parse_generation(text: &str) -> Option<u32> {
    let canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| canonical)
}

fn only_uri<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, IdentityError> {
    let names = certificate.subject_alternative_name().map_err(|_twice| IdentityError::Malformed)?;
    let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => Ok(uri),
        (None, _) => Err(IdentityError::Uris(0)),
        (Some(_), more) => Err(IdentityError::Uris(1 + more)),
    }
}

/// Whether it may be used as what it names; if so, whether others may link to its holder.
fn check_usage(certificate: &X509Certificate<'_>, role: &Role) -> Result<bool, IdentityError> {
    if certificate.is_ca() {
        return Err(IdentityError::Usage("it is a CA"));
    }
    let usage = certificate
        .extended_key_usage()
        .map_err(|_twice| IdentityError::Malformed)?
        .ok_or(IdentityError::Usage("it has no extended key usage"))?
        .value;
    match role {
        _ if usage.any => Err(IdentityError::Usage("anyExtendedKeyUsage")),
        Role::Node { .. } if !usage.client_auth => Err(IdentityError::Usage("a node has clientAuth")),
        Role::Hub { .. } if !usage.client_auth || !usage.server_auth => {
            Err(IdentityError::Usage("a hub has serverAuth and clientAuth"))
        }
        Role::Node { .. } | Role::Hub { .. } => Ok(usage.server_auth),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair, SanType};

    use super::*;

    const CLIENT: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ClientAuth;
    const SERVER: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ServerAuth;

    fn certificate(uris: &[&str], usages: &[ExtendedKeyUsagePurpose]) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        for uri in uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into().unwrap()));
        }
        params.extended_key_usages = usages.to_vec();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn name() -> impl Strategy<Value = String> {
        "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?){0,3}"
    }

    proptest! {
        #[test]
        fn an_identity_reads_back_as_it_was_written(tier in name(), who in name(), generation: Option<u32>) {
            let role = match generation {
                Some(generation) => Role::Node { name: who.into(), generation },
                None => Role::Hub { replica: who.into() },
            };
            let identity = Identity { tier: tier.into(), role };
            prop_assert_eq!(identity.to_string().parse(), Ok(identity));
        }

        #[test]
        fn what_parses_has_one_spelling(text in "octobus://[a-zA-Z0-9./%-]{0,24}(/(node|hub|Node)/[a-z0-9.-]{0,8}(/[0-9+-]{0,11})?)?/?") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }

        #[test]
        fn no_bytes_panic_the_certificate_reader(
            mut der in Just(certificate(&["octobus://t/node/a/1"], &[CLIENT]).to_vec()),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut: prop::sample::Index,
        ) {
            for (at, byte) in changes {
                let at = at.index(der.len());
                der[at] = byte;
            }
            drop(PeerCertificate::parse(&CertificateDer::from(&der[..])));
            drop(PeerCertificate::parse(&CertificateDer::from(&der[..cut.index(der.len())])));
        }
    }

    #[test]
    fn other_spellings_are_refused() {
        for bad in [
            "",
            "octobus://",
            "octobus://t",
            "octobus://t/node/a",
            "octobus://t/node/a/",
            "octobus://t/node/a/01",
            "octobus://t/node/a/+1",
            "octobus://t/node/a/4294967296",
            "octobus://t/node/a/1/",
            "octobus://t/node/a/1/hub/b",
            "octobus://t/node//1",
            "octobus:///node/a/1",
            "octobus://t/hub/a/1",
            "octobus://t/hub/",
            "octobus://t/Node/a/1",
            "OCTOBUS://t/node/a/1",
            "octobus://t/node/A/1",
            "octobus://t/node/a b/1",
            "octobus://t/node/a%2f/1",
            "octobus://t/node/../1",
            "octobus://t/node/a/1?x",
            " octobus://t/node/a/1",
        ] {
            assert_eq!(bad.parse::<Identity>(), Err(IdentityError::Uri(bad.into())), "{bad}");
        }
    }

    #[test]
    fn a_certificate_names_exactly_one_identity_with_the_usages_of_its_role() {
        let node = PeerCertificate::parse(&certificate(&["octobus://t/node/plant.1/7"], &[CLIENT])).unwrap();
        assert_eq!(node.identity.to_string(), "octobus://t/node/plant.1/7");
        let peer = node.identity.peer();
        assert_eq!((&*peer.name, peer.role, peer.generation), ("plant.1", event::Role::Node, 7));
        assert!(!node.serial.is_empty() && node.is_valid_at(crate::clock::wall_us()));
        assert!(!node.is_valid_at(0));

        let hub = PeerCertificate::parse(&certificate(&["octobus://t/hub/r0"], &[SERVER, CLIENT])).unwrap();
        assert_eq!(hub.identity.peer().role, event::Role::Hub);
    }

    #[test]
    fn hostile_certificates_are_refused() {
        let (node, hub) = ("octobus://t/node/a/1", "octobus://t/hub/r0");
        let parse = |uris: &[&str], usages: &[_]| PeerCertificate::parse(&certificate(uris, usages));
        assert_eq!(parse(&[], &[CLIENT]), Err(IdentityError::Uris(0)));
        assert_eq!(parse(&[node, hub], &[CLIENT, SERVER]), Err(IdentityError::Uris(2)));
        assert_eq!(parse(&[node, node], &[CLIENT]), Err(IdentityError::Uris(2)));
        assert_eq!(parse(&[node, "https://x"], &[CLIENT]), Err(IdentityError::Uris(2)));
        assert!(matches!(parse(&["https://x"], &[CLIENT]), Err(IdentityError::Uri(_))));
        // A relay's certificate is a node's.
        let relay = parse(&[node], &[CLIENT, SERVER]).unwrap();
        assert!(relay.serves && matches!(relay.identity.role, Role::Node { .. }));
        assert!(matches!(parse(&[node], &[]), Err(IdentityError::Usage(_))));
        assert!(matches!(parse(&[node], &[ExtendedKeyUsagePurpose::Any]), Err(IdentityError::Usage(_))));
        assert!(matches!(parse(&[hub], &[CLIENT]), Err(IdentityError::Usage(_))), "a node as a hub");
        assert!(matches!(parse(&[hub], &[SERVER]), Err(IdentityError::Usage(_))));
    }
}
