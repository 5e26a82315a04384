//! Certificate requests: the one thing taken from them is a key whose possession they prove.

use broker::enroll;
use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use x509_parser::{
    asn1_rs::{Oid, oid},
    certification_request::X509CertificationRequest,
    prelude::FromDer as _,
};

const EC_PUBLIC_KEY: Oid<'static> = oid!(1.2.840.10045.2.1);
const PRIME256V1: Oid<'static> = oid!(1.2.840.10045.3.1.7);
const ECDSA_WITH_SHA256: Oid<'static> = oid!(1.2.840.10045.4.3.2);

/// Why a request is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Not PEM, not PKCS#10, or something behind it.
    #[error("the certificate request is not one PKCS#10 request in PEM")]
    Malformed,
    /// Another algorithm or curve.
    #[error("the key must be ECDSA P-256, signed with SHA-256")]
    NotP256,
    /// The sender does not hold the key.
    #[error("the request's signature does not verify with the key in it")]
    BadSignature,
}

/// A public key whose holder has proved possession.
///
/// Subject, alternative names and extensions of the request are not read: who somebody is stands in the
/// token or in the certificate that is renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvenKey {
    pub(super) spki: SubjectPublicKeyInfo,
    sha256: [u8; 32],
}

impl ProvenKey {
    /// Verifies a request in PEM.
    ///
    /// # Errors
    /// It is malformed, its key is not P-256, or its self-signature does not verify.
    pub fn from_csr(pem: &str) -> Result<Self, CsrError> {
        let der =
            CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|_| CsrError::Malformed)?;
        let (rest, csr) = X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        let spki = &csr.certification_request_info.subject_pki;
        let curve = spki.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
        if spki.algorithm.algorithm != EC_PUBLIC_KEY
            || curve != Some(PRIME256V1)
            || csr.signature_algorithm.algorithm != ECDSA_WITH_SHA256
        {
            return Err(CsrError::NotP256);
        }
        csr.verify_signature().map_err(|_| CsrError::BadSignature)?;
        let sha256 = Sha256::digest(spki.raw).into();
        let spki = SubjectPublicKeyInfo::from_der(spki.raw).map_err(|_| CsrError::NotP256)?;
        Ok(Self { spki, sha256 })
    }

    /// SHA-256 of the SubjectPublicKeyInfo, in hex: how keys are named in `identity/<n>`.
    #[must_use]
    pub fn hash(&self) -> String {
        enroll::hex(&self.sha256)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};

    use super::*;

    fn csr(key: &KeyPair) -> rcgen::CertificateSigningRequest {
        CertificateParams::new(["evil.example".to_owned()]).unwrap().serialize_request(key).unwrap()
    }

    fn pem(der: &[u8]) -> String {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let body = STANDARD.encode(der);
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n")
    }

    #[test]
    fn a_good_request_gives_its_key() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let proven = ProvenKey::from_csr(&csr(&key).pem().unwrap()).unwrap();
        assert_eq!(rcgen::PublicKeyData::der_bytes(&proven.spki), key.public_key_raw());
        let again = ProvenKey::from_csr(&csr(&key).pem().unwrap()).unwrap();
        assert_eq!(proven.hash(), again.hash(), "the hash names the key, not the request");
    }

    #[test]
    fn another_curve_or_algorithm_is_refused() {
        for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            assert_eq!(ProvenKey::from_csr(&csr(&key).pem().unwrap()), Err(CsrError::NotP256));
        }
    }

    #[test]
    fn a_request_signed_by_another_key_is_refused() {
        let key = KeyPair::generate().unwrap();
        let other = KeyPair::generate().unwrap();
        let mut der = csr(&key).der().to_vec();
        let at = der.windows(65).position(|window| window == key.public_key_raw()).unwrap();
        der[at..at + 65].copy_from_slice(other.public_key_raw());
        assert_eq!(ProvenKey::from_csr(&pem(&der)), Err(CsrError::BadSignature));
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_refused() {
        let key = KeyPair::generate().unwrap();
        let der = csr(&key).der().to_vec();
        let good = ProvenKey::from_csr(&pem(&der)).unwrap();
        for at in 0..der.len() {
            assert!(ProvenKey::from_csr(&pem(&der[..at])).is_err(), "cut at {at}");
            let mut changed = der.clone();
            changed[at] ^= 1;
            // A flip in the encoding of a length or tag may still spell the same request.
            if let Ok(proven) = ProvenKey::from_csr(&pem(&changed)) {
                assert_eq!(proven, good, "flipped at {at}");
            }
        }
        let mut longer = der;
        longer.push(0);
        assert_eq!(ProvenKey::from_csr(&pem(&longer)), Err(CsrError::Malformed));
        assert_eq!(ProvenKey::from_csr("nonsense"), Err(CsrError::Malformed));
    }
}
