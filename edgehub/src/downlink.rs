//! A relay's port: nodes link here as they would to a hub.
//!
//! Who may is what the tier has said: names on this relay's list, with the key and generation that are in
//! force. The list is on the relay's own disk, so nodes are admitted also while no hub can be reached. A
//! renewed certificate means a new listener at the same address: links end in an orderly way and come again.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use broker::{
    Handle, Tasks, clock,
    event::{Command, Response},
    link::{
        Counters, Links, Params,
        accept::{Acceptor, Admission},
        identity::{PeerCertificate, Role},
        quic::{BindError, QuicListener, Shape},
        tls::{self, Credentials, TierSecret},
    },
};
use codec::proto::{Forward, Refusal, RefusalReason};
use tokio::sync::watch;

use crate::identity::Identity;

/// A relay that cannot look at its list asks nodes to come again after this long.
const RETRY_MS: u32 = 5_000;

/// What is the same for every link of this process.
#[derive(Debug, Clone)]
pub(crate) struct Downlink {
    /// The address that was bound.
    pub(crate) address: SocketAddr,
    /// The relay's broker.
    pub(crate) broker: Handle,
    /// Times and bounds.
    pub(crate) params: Arc<Params>,
    /// Counters.
    pub(crate) counters: Arc<Counters>,
    /// Links at a time.
    pub(crate) links_max: usize,
}

/// Binds a relay's port with this identity.
pub(crate) fn bind(
    address: SocketAddr,
    identity: &Identity,
    params: &Params,
) -> Result<QuicListener, BindError> {
    let secret = TierSecret::new(&identity.link_secret());
    let credentials = Credentials {
        ca: vec![identity.ca().clone()],
        chain: vec![identity.certificate().clone()],
        key: identity.key(),
    };
    let tls = tls::acceptor(credentials, &secret)?;
    QuicListener::bind(address, Arc::new(tls), &secret, Shape::HUB.with_heartbeat(params.heartbeat))
}

/// A port that could not be bound is tried again this often.
const BIND_AGAIN: Duration = Duration::from_secs(30);

impl Downlink {
    /// Accepts links until `tasks` are asked to stop; `listener` was bound with the identity of the start.
    pub(crate) async fn run(
        self,
        listener: QuicListener,
        mut identity: watch::Receiver<Option<Arc<Identity>>>,
        tasks: Tasks,
    ) {
        let stopped = tasks.stopped();
        let mut next = Some(listener);
        loop {
            let current = identity.borrow_and_update().clone();
            let accepting = Tasks::new();
            let listening = next.is_some();
            if let (Some(current), Some(listener)) = (current, next.take()) {
                self.accept(listener, &current, &accepting);
            }
            let ended = tokio::select! {
                biased;
                () = stopped.cancelled() => true,
                changed = identity.changed() => changed.is_err(),
                () = tokio::time::sleep(BIND_AGAIN), if !listening => false,
            };
            // The acceptor closes its links, then its port, each within this.
            accepting.drain(self.params.drain * 3).await;
            if ended {
                return;
            }
            next = self.bind_again(&identity);
        }
    }

    fn bind_again(&self, identity: &watch::Receiver<Option<Arc<Identity>>>) -> Option<QuicListener> {
        let current = identity.borrow().clone()?;
        if !current.is_relay() {
            tracing::error!("the renewed certificate does not permit others to link here: no relay any more");
            return None;
        }
        match bind(self.address, &current, &self.params) {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::error!(%error, "cannot listen with the renewed certificate");
                None
            }
        }
    }

    fn accept(&self, listener: QuicListener, identity: &Identity, tasks: &Tasks) {
        let acceptor = Acceptor {
            broker: self.broker.clone(),
            params: Arc::clone(&self.params),
            admission: Admission::with_connections(self.links_max),
            counters: Arc::clone(&self.counters),
            links: Arc::<Links>::default(),
            tasks: tasks.clone(),
        };
        let (broker, tier): (Handle, Arc<str>) = (self.broker.clone(), identity.tier().into());
        let authorize = move |certificate| {
            let (broker, tier) = (broker.clone(), Arc::clone(&tier));
            async move { authorize(&broker, &tier, &certificate).await }
        };
        tasks.spawn("link acceptor", acceptor.run(listener, authorize));
    }
}

/// Asked at every session start: whether this certificate is what the tier stands by, as far as was heard.
async fn authorize(broker: &Handle, tier: &str, certificate: &PeerCertificate) -> Result<(), Refusal> {
    let Ok(Response::Forwards(forwards)) = broker.call(Command::Forwards).await else {
        let message = "the relay cannot look at its list now; try again".to_owned();
        return Err(Refusal { reason: RefusalReason::Overloaded.into(), message, retry_after_ms: RETRY_MS });
    };
    decide(tier, certificate, clock::wall_us(), &forwards)
}

fn decide(
    tier: &str,
    certificate: &PeerCertificate,
    wall_us: u64,
    forwards: &[Forward],
) -> Result<(), Refusal> {
    let refused = |reason: RefusalReason, message: String| {
        Err(Refusal { reason: reason.into(), message, retry_after_ms: 0 })
    };
    let Role::Node { name, generation } = &certificate.identity.role else {
        return refused(RefusalReason::NotAuthorized, "a relay links with nodes only".to_owned());
    };
    if *certificate.identity.tier != *tier {
        return refused(
            RefusalReason::NotAuthorized,
            format!("this is a relay of tier {tier}, not of yours"),
        );
    }
    if !certificate.is_valid_at(wall_us) {
        let message = format!(
            "the certificate of {name} is not valid now: check the clocks of node and relay, or renew at the \
             bootstrap port"
        );
        return refused(RefusalReason::NotAuthorized, message);
    }
    let Some(known) = forwards.iter().find(|forward| *forward.name == **name) else {
        let message = format!("this relay does not forward for {name}: name it in the relay's --forwards");
        return refused(RefusalReason::NotAuthorized, message);
    };
    let revoked = known.revoked.contains(&certificate.serial);
    // The relay may have heard less than the node: a newer enrolment passes, the hub judges it.
    let older = known.generation > *generation;
    let other_key = known.generation == *generation && known.key != certificate.key;
    if revoked || older || other_key {
        let message = format!(
            "the certificate of {name} (generation {generation}) was revoked or replaced: if this machine should \
             be {name}, make a token with `octobus token create --node {name} --replace` and join again"
        );
        return refused(RefusalReason::Revoked, message);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(uri: &str) -> PeerCertificate {
        PeerCertificate {
            identity: uri.parse().unwrap(),
            serial: "0b".into(),
            key: "k".into(),
            serves: false,
            not_before_s: 0,
            not_after_s: i64::MAX,
        }
    }

    #[test]
    fn a_relay_admits_what_the_tier_stands_by_and_nobody_else() {
        let known = |generation, key: &str, revoked: &[&str]| {
            let revoked = revoked.iter().map(|&serial| serial.to_owned()).collect();
            vec![Forward {
                name: "pump-1".into(),
                generation,
                key: key.into(),
                revoked,
                forwards: Vec::new(),
            }]
        };
        let pump = certificate("octobus://t/node/pump-1/2");
        let judge = |certificate: &PeerCertificate, known: &[Forward]| {
            decide("t", certificate, 1, known).map_err(|refusal| refusal.reason())
        };
        assert_eq!(judge(&pump, &known(2, "k", &[])), Ok(()));
        assert_eq!(judge(&pump, &known(1, "old", &[])), Ok(()), "enrolled anew, and the relay has not heard");
        assert_eq!(judge(&pump, &known(3, "k", &[])), Err(RefusalReason::Revoked));
        assert_eq!(judge(&pump, &known(2, "other", &[])), Err(RefusalReason::Revoked));
        assert_eq!(judge(&pump, &known(2, "k", &["0b"])), Err(RefusalReason::Revoked));
        assert_eq!(judge(&pump, &[]), Err(RefusalReason::NotAuthorized));
        let others = ["octobus://t/node/pump-2/2", "octobus://other/node/pump-1/2", "octobus://t/hub/r0"];
        for uri in others {
            let reason = judge(&certificate(uri), &known(2, "k", &[]));
            assert_eq!(reason, Err(RefusalReason::NotAuthorized), "{uri}");
        }
    }
}
