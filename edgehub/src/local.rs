//! The node's own API: where it listens, and how it reaches the hub.

use std::{path::Path, pin::Pin, sync::Arc};

use broker::{
    Handle, Tasks,
    event::{Peer, Role},
    link::{
        Links,
        stream::{OpenError, StreamCode},
    },
};
use codec::proto::StreamOpen;
use kubeapi::{
    KUBERNETES, LocalOptions, LocalServing, PkiError,
    nodes::{KUBELET, NodeStreams, Opening, Unreachable},
};
use ops::admin::pipe::{Pipe, Pipes};
use tokio::{net::TcpListener, sync::watch};

use crate::identity::Identity;

/// What the API needs of its node.
pub(crate) struct LocalApi<'a> {
    pub(crate) node: Arc<str>,
    pub(crate) data: &'a Path,
    pub(crate) broker: Handle,
    pub(crate) links: Arc<Links>,
    pub(crate) identity: watch::Receiver<Option<Arc<Identity>>>,
    pub(crate) tasks: Tasks,
}

impl LocalApi<'_> {
    /// Serves at this socket, if there is one, and to who comes by the admin socket.
    pub(crate) fn serve(self, listener: Option<TcpListener>) -> Result<LocalServing, PkiError> {
        let identity = self.identity;
        let options = LocalOptions {
            node: self.node,
            folder: self.data.join("kubernetes"),
            broker: self.broker,
            tasks: self.tasks,
            secrets: Arc::new(move || identity.borrow().as_deref().and_then(Identity::secrets_key)),
            containers: Some(Arc::new(Containers(Arc::clone(&self.links)))),
            hub: Arc::new(Hub(self.links)),
        };
        kubeapi::serve_local(options, listener)
    }
}

/// Who comes by the admin socket.
#[derive(Debug)]
pub(crate) struct AtTheMachine(pub(crate) kubeapi::LocalApi);

impl Pipes for AtTheMachine {
    fn serve(&self, pipe: Box<dyn Pipe>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            match self.0.front().await {
                Ok(front) => front.serve_admin(pipe).await,
                Err(error) => tracing::error!(%error, "the node's API does not serve"),
            }
        })
    }
}

/// What answers for this node's pods, in this process: the same that answers the hub.
#[derive(Debug)]
struct Containers(Arc<Links>);

impl NodeStreams for Containers {
    fn open<'a>(&'a self, node: &'a str) -> Opening<'a> {
        Box::pin(async move {
            let open = StreamOpen { kind: KUBELET.to_owned(), ..StreamOpen::default() };
            let peer = Peer { name: node.into(), role: Role::Node, generation: 0 };
            let refused = |why: &str| Unreachable::Refused { node: node.to_owned(), why: why.to_owned() };
            match self.0.open_here(peer, open).await {
                Ok(stream) => Ok(Box::new(stream) as _),
                Err(OpenError::Refused { code: StreamCode::UNKNOWN_KIND, .. }) => {
                    Err(refused("it runs no pods; `octobus get conditions` says why"))
                }
                Err(error) => Err(refused(&error.to_string())),
            }
        })
    }
}

/// The hub's API, by whichever link is up.
#[derive(Debug)]
struct Hub(Arc<Links>);

impl NodeStreams for Hub {
    fn open<'a>(&'a self, hub: &'a str) -> Opening<'a> {
        Box::pin(async move {
            let link = self.0.newest().ok_or_else(|| Unreachable::Offline(hub.to_owned()))?;
            let open = StreamOpen { kind: KUBERNETES.to_owned(), ..StreamOpen::default() };
            let stream = link.open_stream(&open).await.map_err(|error| unreachable(hub, error))?;
            Ok(Box::new(stream) as _)
        })
    }
}

fn unreachable(hub: &str, error: OpenError) -> Unreachable {
    let node = hub.to_owned();
    match error {
        OpenError::NoLink(_) | OpenError::LinkGone => Unreachable::Offline(node),
        OpenError::NoAnswer => Unreachable::Slow(node),
        OpenError::Refused { code: StreamCode::UNKNOWN_KIND, .. } => {
            Unreachable::Refused { node, why: "it serves no Kubernetes API to nodes".to_owned() }
        }
        OpenError::Refused { message, .. } => Unreachable::Refused { node, why: message },
        OpenError::Replica { .. } | OpenError::TooLong(_) | OpenError::Malformed => {
            Unreachable::Refused { node, why: error.to_string() }
        }
    }
}
