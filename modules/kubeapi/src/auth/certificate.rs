//! Whom a verified client certificate names: CN is the user, each O a group.

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::user::User;

/// The user of a certificate whose chain the handshake has verified.
pub(crate) fn user_of(certificate: &CertificateDer<'_>) -> Option<User> {
    let (_rest, parsed) = X509Certificate::from_der(certificate).ok()?;
    let subject = parsed.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|group| group.as_str().ok()).map(str::to_owned);
    let groups: Vec<String> = groups.collect();
    (!name.is_empty()).then(|| User { name, groups, ..User::default() })
}
