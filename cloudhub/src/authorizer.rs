//! Who may open a link: asked at every session start, resumed TLS sessions included.
//!
//! TLS has shown that the tier's CA issued the certificate and that the peer holds its key. Whether the
//! tier still stands by it is State: `identity/<node>` names the generation, the key and the revoked serial
//! numbers. What a node may then export and import is enforced by the core, record by record.

use broker::{
    clock,
    link::identity::{PeerCertificate, Role},
};
use codec::proto::{Refusal, RefusalReason};

use crate::{
    registry::{Enrolment, Registry, RegistryError},
    renew,
};

/// A hub that cannot read its State asks nodes to come again after this long.
const RETRY_MS: u32 = 5_000;

/// Decides who may open a link. Cloning shares the registry.
#[derive(Debug, Clone)]
pub struct Authorizer {
    registry: Registry,
    tier: String,
    /// This hub is one of several: others may dial it, for Streams.
    replicas: bool,
}

impl Authorizer {
    /// Admits nodes of this tier that the registry stands by.
    #[must_use]
    pub fn new(registry: Registry, tier: &str) -> Self {
        Self { registry, tier: tier.to_owned(), replicas: false }
    }

    /// Whether it also admits other replicas of the tier. What they may is open Streams to this one's nodes.
    #[must_use]
    pub fn with_replicas(self, replicas: bool) -> Self {
        Self { replicas, ..self }
    }

    /// Decides about one peer, whose chain was verified.
    ///
    /// # Errors
    /// What the peer is told; it says what to do.
    pub async fn authorize(&self, certificate: PeerCertificate) -> Result<(), Refusal> {
        let holder = self.holder(&certificate)?;
        let Role::Node { name, .. } = holder else { return Ok(()) };
        let name = name.to_string();
        let unreadable = |error: RegistryError| {
            tracing::error!(node = %name, error = %error, "cannot decide about a node");
            let message = "the hub cannot read its State now; try again".to_owned();
            Refusal { reason: RefusalReason::Overloaded.into(), message, retry_after_ms: RETRY_MS }
        };
        let seen = self.registry.enrolment_seen(&name).await.map_err(unreadable)?;
        if decide(&certificate, seen.as_ref()).is_ok() {
            return Ok(());
        }
        // It may have been enrolled a moment ago, by another replica.
        let enrolment = self.registry.enrolment(&name).await.map_err(unreadable)?;
        decide(&certificate, enrolment.as_ref().map(|enrolment| &enrolment.value))
    }

    /// Whose the certificate is, if it is of this tier, holds now, and its holder may come here. Resumption has
    /// not looked at the clock.
    fn holder<'a>(&self, certificate: &'a PeerCertificate) -> Result<&'a Role, Refusal> {
        let role = &certificate.identity.role;
        let name = match role {
            Role::Node { name, .. } => name,
            Role::Hub { replica } if self.replicas => replica,
            Role::Hub { .. } => return Err(not_authorized("this hub links with nodes only".to_owned())),
        };
        if *certificate.identity.tier != *self.tier {
            return Err(not_authorized(format!("this is a hub of tier {}, not of yours", self.tier)));
        }
        if !certificate.is_valid_at(clock::wall_us()) {
            return Err(not_authorized(format!(
                "the certificate of {name} is not valid now: check the node's clock, or renew at the bootstrap port"
            )));
        }
        Ok(role)
    }
}

fn decide(certificate: &PeerCertificate, enrolment: Option<&Enrolment>) -> Result<(), Refusal> {
    let Role::Node { name, generation } = &certificate.identity.role else {
        return Err(not_authorized("not a node".to_owned()));
    };
    let Some(enrolment) = enrolment else {
        return Err(not_authorized(format!(
            "no node {name} is enrolled: make a token with `octobus token create --node {name}` and join"
        )));
    };
    if renew::in_force(enrolment, *generation, &certificate.key, &certificate.serial) {
        return Ok(());
    }
    Err(Refusal {
        reason: RefusalReason::Revoked.into(),
        message: format!(
            "the certificate of {name} (generation {generation}) was revoked or replaced: if this machine \
             should be {name}, make a token with `octobus token create --node {name} --replace` and join again"
        ),
        retry_after_ms: 0,
    })
}

fn not_authorized(message: String) -> Refusal {
    Refusal { reason: RefusalReason::NotAuthorized.into(), message, retry_after_ms: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(generation: u32) -> PeerCertificate {
        PeerCertificate {
            identity: format!("octobus://t/node/edge-1/{generation}").parse().unwrap(),
            serial: "0b".into(),
            key: "k".into(),
            serves: false,
            not_before_s: 0,
            not_after_s: i64::MAX,
        }
    }

    fn reason(decision: Result<(), Refusal>) -> RefusalReason {
        decision.unwrap_err().reason()
    }

    #[test]
    fn only_what_the_tier_stands_by_is_admitted() {
        let enrolment = |generation, key: &str, revoked: &[&str]| Enrolment {
            generation,
            key: key.into(),
            revoked: revoked.iter().map(|&serial| serial.to_owned()).collect(),
            enrolled_us: 0,
            forwards: Vec::new(),
        };
        assert_eq!(decide(&certificate(2), Some(&enrolment(2, "k", &[]))), Ok(()));
        assert_eq!(reason(decide(&certificate(1), Some(&enrolment(2, "k", &[])))), RefusalReason::Revoked);
        assert_eq!(reason(decide(&certificate(2), Some(&enrolment(2, "l", &[])))), RefusalReason::Revoked);
        assert_eq!(
            reason(decide(&certificate(2), Some(&enrolment(2, "k", &["0b"])))),
            RefusalReason::Revoked
        );
        assert_eq!(reason(decide(&certificate(2), None)), RefusalReason::NotAuthorized);
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let refusal = decide(&certificate(2), None).unwrap_err();
        assert!(refusal.message.contains("octobus token create --node edge-1"), "{}", refusal.message);
    }
}
