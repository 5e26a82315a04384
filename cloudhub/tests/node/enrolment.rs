//! Tokens, joining, renewing.

use std::{sync::Arc, time::Duration};

use broker::{
    Tasks,
    enroll::{self, ErrorBody, JoinRequest, Joined, RenewRequest},
    event::Expect,
};
use cloudhub::{
    bootstrap,
    ca::{Authority, ProvenKey},
    registry::TokenRecord,
    token::{CreateError, TokenRequest},
};
use edgehub::{
    https::{self, Pin, RequestError, Server},
    identity::Identity,
    join::{JoinError, JoinOptions, join, keep_current, renew},
};
use rcgen::{CertificateParams, KeyPair};
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tokio_rustls::TlsAcceptor;

use super::TestHub;

fn csr(key: &KeyPair) -> String {
    CertificateParams::default().serialize_request(key).unwrap().pem().unwrap()
}

async fn post_join(hub: &TestHub, token: &str, key: &KeyPair) -> Result<Joined, RequestError> {
    let pin = Pin { ca_sha256: token.parse::<enroll::Token>().unwrap().ca_sha256, tier: None };
    let request = JoinRequest { token: token.into(), csr: csr(key) };
    let server = Server::parse(&hub.url()).unwrap();
    https::post(&server, pin, enroll::PATH_JOIN, &request).await
}

async fn post_renew(hub: &TestHub, pin: Pin, request: &RenewRequest) -> Result<Joined, RequestError> {
    https::post(&Server::parse(&hub.url()).unwrap(), pin, enroll::PATH_RENEW, request).await
}

fn word<T: std::fmt::Debug>(result: Result<T, RequestError>) -> String {
    match result {
        Err(RequestError::Refused(ErrorBody { error, message, .. })) => {
            assert!(message.len() > 20, "it says what to do: {message}");
            error
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_node_joins_once_and_knows_its_tier() {
    let hub = TestHub::start().await;
    let node = tempfile::tempdir().unwrap();
    let token = hub.token("edge-1", false).await;
    let identity = hub.join(node.path(), &token).await.unwrap();
    assert_eq!((&*identity.name(), identity.generation()), ("edge-1", 1));
    assert_eq!(identity.tier(), hub.hub.tier());
    let (quic, websocket) = (hub.hub.endpoints().quic.unwrap(), hub.hub.endpoints().websocket.unwrap());
    let dialled = identity.hubs().iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(dialled, [format!("quic://{quic}, wss://{websocket}")]);
    let again = hub.join(node.path(), &token).await;
    assert!(matches!(again, Err(JoinError::AlreadyJoined { .. })), "{again:?}");
    assert!(!node.path().join("identity/joining.key").exists());
    hub.stop().await;
}

#[tokio::test]
async fn a_lost_reply_is_asked_for_again_with_the_same_key() {
    let hub = TestHub::start().await;
    let node = tempfile::tempdir().unwrap();
    let token = hub.token("edge-1", false).await;
    // The hub enrols, the reply is lost: of the attempt only the key is left on the node's disk.
    let first = hub.join(node.path(), &token).await.unwrap();
    let key = first.key().secret_der().to_vec();
    let pem = KeyPair::try_from(key.as_slice()).unwrap().serialize_pem();
    std::fs::remove_file(node.path().join("identity/identity.json")).unwrap();
    broker::private::write(&node.path().join("identity/joining.key"), pem.as_bytes()).unwrap();
    let second = hub.join(node.path(), &token).await.unwrap();
    assert_eq!(second.generation(), 1);
    assert_eq!(second.key().secret_der(), key);
    hub.stop().await;
}

#[tokio::test]
async fn a_token_serves_one_key_only() {
    let hub = TestHub::start().await;
    let token = hub.token("edge-1", false).await;
    post_join(&hub, &token, &KeyPair::generate().unwrap()).await.unwrap();
    assert_eq!(word(post_join(&hub, &token, &KeyPair::generate().unwrap()).await), "token_used");
    hub.stop().await;
}

#[tokio::test]
async fn two_keys_that_race_for_a_token_get_one_enrolment() {
    let hub = TestHub::start().await;
    let token = hub.token("edge-1", false).await;
    let (a, b) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let (a, b) = tokio::join!(post_join(&hub, &token, &a), post_join(&hub, &token, &b));
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    hub.stop().await;
}

#[tokio::test]
async fn replacing_raises_the_generation_and_ends_the_old_key() {
    let hub = TestHub::start().await;
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = hub.token("edge-1", false).await;
    let stale = hub.token("edge-1", false).await;
    let before = hub.join(old.path(), &first).await.unwrap();

    let request = TokenRequest { ttl: Duration::from_secs(60), ..TokenRequest::new("edge-1") };
    assert!(matches!(hub.hub.create_token(&request).await, Err(CreateError::NameTaken(_))));
    assert_eq!(word(post_join(&hub, &stale, &KeyPair::generate().unwrap()).await), "name_taken");

    let after = hub.join(new.path(), &hub.token("edge-1", true).await).await.unwrap();
    assert_eq!((before.generation(), after.generation()), (1, 2));
    match Box::pin(renew(old.path(), &before)).await {
        Err(JoinError::Request(error)) => assert_eq!(word::<()>(Err(error)), "revoked"),
        other => panic!("{other:?}"),
    }
    assert_eq!(Box::pin(renew(new.path(), &after)).await.unwrap().generation(), 2);
    hub.stop().await;
}

#[tokio::test]
async fn expired_unknown_and_foreign_tokens_are_refused() {
    let hub = TestHub::start().await;
    let registry = hub.hub.registry().clone();
    let key = KeyPair::generate().unwrap();
    let text = hub.token("edge-1", false).await;
    let mut token: enroll::Token = text.parse().unwrap();

    let id = token.id.to_string();
    let stored = registry.token(&id).await.unwrap().unwrap();
    let expired = TokenRecord { expires_us: 1, ..stored.value };
    let op = registry.put_token(&id, &expired, Expect::Revision(stored.revision));
    registry.write(vec![op]).await.unwrap().unwrap();
    assert_eq!(word(post_join(&hub, &text, &key).await), "token_expired");

    token.secret[0] ^= 1;
    assert_eq!(word(post_join(&hub, &token.to_string(), &key).await), "unknown_token");
    token.id.0[0] ^= 1;
    assert_eq!(word(post_join(&hub, &token.to_string(), &key).await), "unknown_token");
    hub.stop().await;
}

#[tokio::test]
async fn a_hub_with_another_ca_never_sees_the_token() {
    let hub = TestHub::start().await;
    let (impostor, node) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let authority = Authority::open(impostor.path(), None).unwrap();
    let tls = bootstrap::tls(authority.issue_hub("hub", &["localhost".into()]).unwrap()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        TlsAcceptor::from(tls).accept(stream).await.map(drop)
    };
    let options = JoinOptions { hub: url, token: hub.token("edge-1", false).await, again: false };
    let (joined, handshake) = tokio::join!(Box::pin(join(node.path(), &options)), accept);
    assert!(matches!(joined, Err(JoinError::Request(RequestError::Handshake { .. }))), "{joined:?}");
    assert!(handshake.is_err(), "the handshake was not finished, so nothing could be sent");
    hub.stop().await;
}

#[tokio::test]
async fn a_node_does_not_take_a_node_for_its_hub() {
    let hub = TestHub::start().await;
    let (thief, node) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stolen = hub.join(thief.path(), &hub.token("edge-2", false).await).await.unwrap();
    let identity = cloudhub::ca::HubIdentity {
        chain: vec![stolen.certificate().clone(), stolen.ca().clone()],
        key: stolen.key(),
    };
    let tls = bootstrap::tls(identity).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        TlsAcceptor::from(tls).accept(stream).await.map(drop)
    };
    let options = JoinOptions { hub: url, token: hub.token("edge-1", false).await, again: false };
    let (joined, handshake) = tokio::join!(Box::pin(join(node.path(), &options)), accept);
    assert!(matches!(joined, Err(JoinError::Request(RequestError::Handshake { .. }))), "{joined:?}");
    assert!(handshake.is_err());
    hub.stop().await;
}

#[tokio::test]
async fn an_expired_certificate_renews_with_its_own_key_and_with_no_other() {
    let hub = TestHub::start().await;
    let node = tempfile::tempdir().unwrap();
    let identity = hub.join(node.path(), &hub.token("edge-1", false).await).await.unwrap();
    let key = KeyPair::try_from(identity.key().secret_der()).unwrap();
    // The same authority, asked directly for a certificate that is over at once.
    let authority = Authority::open(hub.data.path(), None).unwrap();
    let proven = ProvenKey::from_csr(&csr(&key)).unwrap();
    let expired = authority.issue_node("edge-1", 1, false, &proven, Duration::ZERO).unwrap().pem();
    let renewal = |csr| RenewRequest { certificate: expired.clone(), csr };
    let renewed = post_renew(&hub, identity.pin(), &renewal(csr(&key))).await.unwrap();
    assert_eq!((renewed.name.as_str(), renewed.generation), ("edge-1", 1));
    let other = csr(&KeyPair::generate().unwrap());
    assert_eq!(word(post_renew(&hub, identity.pin(), &renewal(other)).await), "other_key");
    hub.stop().await;
}

#[tokio::test]
async fn a_certificate_of_another_tier_of_the_same_name_does_not_renew() {
    let hub = TestHub::start().await;
    let (node, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let identity = hub.join(node.path(), &hub.token("edge-1", false).await).await.unwrap();
    let key = KeyPair::try_from(identity.key().secret_der()).unwrap();
    let proven = ProvenKey::from_csr(&csr(&key)).unwrap();
    // It even claims this tier's id; only the signature gives it away.
    let forger = Authority::open(elsewhere.path(), Some(hub.hub.tier())).unwrap();
    let forged = forger.issue_node("edge-1", 1, false, &proven, Duration::from_secs(60)).unwrap().pem();
    let request = RenewRequest { certificate: forged, csr: csr(&key) };
    assert_eq!(word(post_renew(&hub, identity.pin(), &request).await), "bad_certificate");
    hub.stop().await;
}

#[tokio::test]
async fn nonsense_and_oversized_requests_get_typed_answers() {
    let hub = TestHub::start().await;
    let token = hub.token("edge-1", false).await;
    let ca_sha256 = token.parse::<enroll::Token>().unwrap().ca_sha256;
    let server = Server::parse(&hub.url()).unwrap();
    let pin = || Pin { ca_sha256, tier: Some(Arc::from(hub.hub.tier())) };
    let large = JoinRequest { token: "x".repeat(enroll::BODY_MAX), csr: String::new() };
    let answer = https::post::<_, Joined>(&server, pin(), enroll::PATH_JOIN, &large).await;
    assert_eq!(word(answer), "bad_request");
    let answer = https::post::<_, Joined>(&server, pin(), enroll::PATH_JOIN, &["x"]).await;
    assert_eq!(word(answer), "bad_request");
    let answer = https::post::<_, Joined>(&server, pin(), "/v2/join", &["x"]).await;
    assert_eq!(word(answer), "not_found");
    let bad_csr = JoinRequest { token, csr: "x".into() };
    assert_eq!(word(https::post::<_, Joined>(&server, pin(), enroll::PATH_JOIN, &bad_csr).await), "bad_csr");
    hub.stop().await;
}

#[tokio::test]
async fn an_address_that_fails_too_often_is_told_to_wait() {
    let hub = TestHub::start().await;
    let token = hub.token("edge-1", false).await;
    let ca_sha256 = token.parse::<enroll::Token>().unwrap().ca_sha256;
    let server = Server::parse(&hub.url()).unwrap();
    let wrong = JoinRequest { token: "ob1.x".into(), csr: String::new() };
    for _ in 0..20 {
        let pin = Pin { ca_sha256, tier: None };
        assert_eq!(
            word(https::post::<_, Joined>(&server, pin, enroll::PATH_JOIN, &wrong).await),
            "bad_token"
        );
    }
    assert_eq!(word(post_join(&hub, &token, &KeyPair::generate().unwrap()).await), "too_many_failures");
    hub.stop().await;
}

#[tokio::test]
async fn every_node_gets_the_tiers_key_of_secrets() {
    let hub = TestHub::start().await;
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = hub.join(one.path(), &hub.token("edge-1", false).await).await.unwrap();
    let second = hub.join(two.path(), &hub.token("edge-2", false).await).await.unwrap();
    let key = first.secrets_key().expect("a key");
    assert_eq!(second.secrets_key(), Some(key.clone()));
    assert_eq!(Box::pin(renew(one.path(), &first)).await.unwrap().secrets_key(), Some(key));
    hub.stop().await;
}

#[tokio::test]
async fn a_node_that_joined_before_there_was_a_key_of_secrets_asks_for_it() {
    let hub = TestHub::start().await;
    let node = tempfile::tempdir().unwrap();
    let joined = hub.join(node.path(), &hub.token("edge-1", false).await).await.unwrap();
    let path = node.path().join("identity/identity.json");
    let mut stored: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(stored.as_object_mut().unwrap().remove("secrets").is_some());
    broker::private::write(&path, stored.to_string().as_bytes()).unwrap();
    let before = Identity::load(node.path()).unwrap().unwrap();
    assert_eq!(before.secrets_key(), None);
    let (sender, mut current) = watch::channel(Some(Arc::new(before)));
    let tasks = Tasks::new();
    tasks.spawn("identity", keep_current(node.path().into(), "edge-1".into(), sender, tasks.clone()));
    let has_key = |now: &Option<Arc<Identity>>| now.as_ref().is_some_and(|now| now.secrets_key().is_some());
    timeout(Duration::from_secs(20), current.wait_for(has_key)).await.expect("in time").unwrap();
    let after = Identity::load(node.path()).unwrap().unwrap();
    assert_eq!(after.secrets_key(), joined.secrets_key(), "and it is on disk");
    tasks.drain(Duration::from_secs(5)).await;
    hub.stop().await;
}
