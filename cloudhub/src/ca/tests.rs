use std::os::unix::fs::PermissionsExt as _;

use x509_parser::prelude::{GeneralName, ParsedExtension, X509Certificate};

use super::*;

pub(crate) fn proven(key: &KeyPair) -> ProvenKey {
    let mut params = CertificateParams::new(["system:masters".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "system:node:somebody-else");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ProvenKey::from_csr(&params.serialize_request(key).unwrap().pem().unwrap()).unwrap()
}

fn uris(certificate: &X509Certificate<'_>) -> Vec<String> {
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    names.value.general_names.iter().filter_map(uri).collect()
}

#[test]
fn the_tier_survives_a_restart_and_its_files_are_private() {
    let data = tempfile::tempdir().unwrap();
    let first = Authority::open(data.path(), None).unwrap();
    let again = Authority::open(data.path(), None).unwrap();
    assert_eq!(first.tier(), again.tier());
    assert_eq!(first.certificate_sha256(), again.certificate_sha256());
    assert_eq!(first.secret(), again.secret());
    assert_eq!(fs::metadata(data.path().join("tier")).unwrap().permissions().mode() & 0o777, 0o700);
    for file in fs::read_dir(data.path().join("tier")).unwrap() {
        assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn a_folder_with_a_missing_file_is_refused_and_never_completed() {
    for missing in ["id", "ca.pem", "ca.key", "secret"] {
        let data = tempfile::tempdir().unwrap();
        Authority::open(data.path(), None).unwrap();
        fs::remove_file(data.path().join("tier").join(missing)).unwrap();
        let error = Authority::open(data.path(), None).unwrap_err();
        assert!(matches!(error, AuthorityError::Incomplete { missing: m, .. } if m == missing), "{error}");
        assert!(!data.path().join("tier").join(missing).exists());
    }
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let data = tempfile::tempdir().unwrap();
    Authority::open(data.path(), None).unwrap();
    let key = data.path().join("tier/ca.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let error = Authority::open(data.path(), None).unwrap_err().to_string();
    assert!(error.contains("chmod 0600"), "{error}");
}

#[test]
fn a_key_of_another_tier_is_refused() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    Authority::open(a.path(), None).unwrap();
    Authority::open(b.path(), None).unwrap();
    fs::copy(b.path().join("tier/ca.key"), a.path().join("tier/ca.key")).unwrap();
    assert!(matches!(Authority::open(a.path(), None), Err(AuthorityError::Damaged { .. })));
}

#[test]
fn a_crash_during_the_first_start_leaves_nothing_that_hinders_the_second() {
    let data = tempfile::tempdir().unwrap();
    fs::create_dir(data.path().join("tier.new")).unwrap();
    fs::write(data.path().join("tier.new/ca.key"), "half").unwrap();
    Authority::open(data.path(), None).unwrap();
    assert!(!data.path().join("tier.new").exists());
}

#[test]
fn a_node_certificate_names_what_the_hub_says_and_nothing_of_the_request() {
    let data = tempfile::tempdir().unwrap();
    let authority = Authority::open(data.path(), None).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = authority.issue_node("edge-1", 7, false, &proven(&key), NODE_LIFETIME).unwrap();
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate.der()).unwrap();
    assert_eq!(parsed.subject().to_string(), "O=system:nodes, CN=system:node:edge-1");
    assert_eq!(uris(&parsed), [format!("octobus://{}/node/edge-1/7", authority.tier())]);
    assert_eq!(parsed.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
    assert!(!parsed.is_ca());
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth && !usage.any);
    assert_eq!(parsed.public_key().raw, key.subject_public_key_info());
    let days = parsed.validity().time_to_expiration().unwrap().whole_days();
    assert!((89..=90).contains(&days), "{days}");
    let (_, ca) = x509_parser::parse_x509_certificate(authority.certificate()).unwrap();
    parsed.verify_signature(Some(ca.public_key())).unwrap();
}

#[test]
fn a_hub_certificate_is_good_for_both_sides_and_for_its_names() {
    let data = tempfile::tempdir().unwrap();
    let authority = Authority::open(data.path(), None).unwrap();
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let hub = authority.issue_hub("hub", &names).unwrap();
    assert_eq!(&hub.chain[1], authority.certificate());
    let (_, parsed) = x509_parser::parse_x509_certificate(&hub.chain[0]).unwrap();
    assert_eq!(uris(&parsed), [format!("octobus://{}/hub/hub", authority.tier())]);
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth);
    let sans = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(names) => Some(names.general_names.clone()),
        _ => None,
    });
    let sans = sans.unwrap();
    assert!(sans.contains(&GeneralName::DNSName("localhost")));
    assert!(sans.contains(&GeneralName::IPAddress(&[127, 0, 0, 1])));
}

#[test]
fn the_configured_tier_id_is_taken_at_the_first_start_and_checked_afterwards() {
    let data = tempfile::tempdir().unwrap();
    assert!(matches!(Authority::open(data.path(), Some("A/b")), Err(AuthorityError::TierName(_))));
    assert_eq!(Authority::open(data.path(), Some("plant")).unwrap().tier(), "plant");
    assert_eq!(Authority::open(data.path(), None).unwrap().tier(), "plant");
    assert!(matches!(Authority::open(data.path(), Some("other")), Err(AuthorityError::OtherTier { .. })));
}
