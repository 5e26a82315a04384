//! Renewal: a certificate, perhaps an expired one, becomes a new one for the same key and generation.
//!
//! A node that was switched off for months must come back without a person. What protects the tier is
//! not the expiry of the old certificate but the enrolment: a name that was enrolled anew has another
//! generation, and the old key renews nothing.

use std::time::Duration;

use broker::{
    clock,
    enroll::RenewRequest,
    link::identity::{IdentityError, PeerCertificate, Role},
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    ca::{Authority, CsrError, ProvenKey},
    registry::{Enrolment, Registry, RegistryError},
};

/// A certificate is renewed until this long after it expired.
pub const EXPIRED_MAX: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// Who gets a new certificate.
#[derive(Debug)]
pub struct Renewal {
    /// The node's name.
    pub node: String,
    /// The generation in force.
    pub generation: u32,
    /// Its key, the same as before.
    pub key: ProvenKey,
    /// It permits others to link to it.
    pub relay: bool,
}

/// Why a certificate is not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewRefusal {
    /// Not a node's certificate of this CA.
    #[error("this is not a node's certificate of this tier ({0}): join with a token")]
    Certificate(&'static str),
    /// It names nobody.
    #[error("the certificate is of another tier: join with a token of this one")]
    OtherTier,
    /// It expired too long ago.
    #[error(
        "the certificate of {node} expired more than 90 days ago: make a token with `octobus token create \
         --node {node} --replace` and join again"
    )]
    TooOld { node: String },
    /// The request does not prove possession of the certificate's key.
    #[error("the certificate request is not made with the certificate's key")]
    OtherKey,
    /// The enrolment is not in force.
    #[error(
        "the enrolment of {node} has been replaced or revoked: if this machine should be {node}, make a \
         token with `octobus token create --node {node} --replace` and join again"
    )]
    Revoked { node: String },
    /// The request is not acceptable.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// State cannot be read.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Checks a renewal. The cheap checks come first; two signatures are verified at the end.
///
/// # Errors
/// See [`RenewRefusal`].
pub async fn check(
    registry: &Registry,
    authority: &Authority,
    request: &RenewRequest,
) -> Result<Renewal, RenewRefusal> {
    let der = CertificateDer::from_pem_slice(request.certificate.as_bytes())
        .map_err(|_| RenewRefusal::Certificate("not a certificate in PEM"))?;
    let certificate = PeerCertificate::parse(&der).map_err(|error| match error {
        IdentityError::Malformed => RenewRefusal::Certificate("unreadable"),
        _ => RenewRefusal::Certificate("it names no node"),
    })?;
    if certificate.identity.tier.as_ref() != authority.tier() {
        return Err(RenewRefusal::OtherTier);
    }
    let Role::Node { name, generation } = &certificate.identity.role else {
        return Err(RenewRefusal::Certificate("it is a hub's"));
    };
    let (node, generation) = (name.to_string(), *generation);
    if is_too_old(certificate.not_after_s, clock::wall_us()) {
        return Err(RenewRefusal::TooOld { node });
    }
    let enrolment = registry.enrolment(&node).await?.map(|now| now.value);
    let Some(enrolment) =
        enrolment.filter(|now| in_force(now, generation, &certificate.key, &certificate.serial))
    else {
        return Err(RenewRefusal::Revoked { node });
    };
    if !is_issued_by(&der, authority) {
        return Err(RenewRefusal::Certificate("another CA signed it"));
    }
    let proven = ProvenKey::from_csr(&request.csr)?;
    if proven.hash() == certificate.key {
        Ok(Renewal { node, generation, key: proven, relay: !enrolment.forwards.is_empty() })
    } else {
        Err(RenewRefusal::OtherKey)
    }
}

/// Whether a certificate of this generation, key and serial is what the tier stands by.
#[must_use]
pub(crate) fn in_force(enrolment: &Enrolment, generation: u32, key: &str, serial: &str) -> bool {
    enrolment.generation == generation
        && enrolment.key == key
        && !enrolment.revoked.iter().any(|revoked| revoked == serial)
}

fn is_too_old(not_after_s: i64, now_us: u64) -> bool {
    let not_after_us = u64::try_from(not_after_s).unwrap_or(0).saturating_mul(1_000_000);
    let horizon = not_after_us.saturating_add(u64::try_from(EXPIRED_MAX.as_micros()).unwrap_or(u64::MAX));
    now_us > horizon
}

fn is_issued_by(certificate: &CertificateDer<'_>, authority: &Authority) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return false };
    let Ok((_, ca)) = X509Certificate::from_der(authority.certificate()) else { return false };
    certificate.issuer() == ca.subject() && certificate.verify_signature(Some(ca.public_key())).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enrolment() -> Enrolment {
        Enrolment {
            generation: 2,
            key: "k".into(),
            revoked: vec!["0a".into()],
            enrolled_us: 0,
            forwards: Vec::new(),
        }
    }

    #[test]
    fn only_generation_key_and_serial_together_are_in_force() {
        assert!(in_force(&enrolment(), 2, "k", "0b"));
        assert!(!in_force(&enrolment(), 1, "k", "0b"), "an older generation");
        assert!(!in_force(&enrolment(), 3, "k", "0b"), "a generation that was never given");
        assert!(!in_force(&enrolment(), 2, "other", "0b"));
        assert!(!in_force(&enrolment(), 2, "k", "0a"), "a revoked serial");
    }

    #[test]
    fn an_expired_certificate_renews_for_ninety_days() {
        const DAY: i64 = 24 * 60 * 60;
        let now = |days: i64| u64::try_from(days * DAY).unwrap() * 1_000_000;
        assert!(!is_too_old(10 * DAY, now(5)));
        assert!(!is_too_old(10 * DAY, now(100)));
        assert!(is_too_old(10 * DAY, now(101)));
        assert!(is_too_old(-DAY, now(101)), "a date before 1970 is old");
    }
}
