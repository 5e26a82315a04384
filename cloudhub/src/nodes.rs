//! Streams to the nodes of a tier: of kind `kubelet` from the Kubernetes API to them, and of kind `kubernetes` from them.
//!
//! A node is one replica's. A Stream to a node of another replica goes to that replica by QUIC, with the
//! certificates of the tier, and never through NATS (`broker::link::replicas`).

use std::sync::Arc;

use broker::{
    Tasks,
    event::Role,
    link::{
        ByteStream, Links,
        replicas::Replicas,
        stream::{OpenError, StreamCode},
    },
};
use codec::proto::StreamOpen;
use kubeapi::{
    Front, KUBERNETES,
    nodes::{KUBELET, NodeStreams, Opening, Unreachable},
};

use crate::fabric::{Fabric, FabricError, Owner};

/// Nodes, by the links of this hub and of its tier's other replicas. Cloning shares them.
#[derive(Debug, Clone)]
pub struct NodeLinks {
    /// Of this hub.
    pub links: Arc<Links>,
    /// Who has which node.
    pub fabric: Arc<dyn Fabric>,
    /// The way to other replicas; none in a hub that is alone.
    pub replicas: Option<Replicas>,
}

impl NodeLinks {
    /// Opens a Stream to a node, whichever replica has it. In bounded time, at once if nobody has it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(&self, node: &str, open: &StreamOpen) -> Result<ByteStream, OpenError> {
        let here = self.links.open(node, open).await;
        let (Err(OpenError::NoLink(_)), Some(replicas)) = (&here, &self.replicas) else { return here };
        match self.fabric.owner(node).await {
            Ok(Owner::Elsewhere { replica, address: Some(address) }) => {
                replicas.open(&replica, &address, node, open).await
            }
            Ok(Owner::Elsewhere { replica, address: None }) => {
                let why = "its lease names no address".to_owned();
                Err(OpenError::Replica { node: node.to_owned(), replica, why })
            }
            Ok(Owner::Here | Owner::Nobody) | Err(FabricError::Stopped(_)) => here,
            Err(error) => {
                tracing::warn!(node, %error, "the tier cannot say who has a node");
                here
            }
        }
    }
}

impl NodeStreams for NodeLinks {
    fn open<'a>(&'a self, node: &'a str) -> Opening<'a> {
        Box::pin(async move {
            let open = StreamOpen { kind: KUBELET.to_owned(), ..StreamOpen::default() };
            let stream = Self::open(self, node, &open).await.map_err(|error| unreachable(node, &error))?;
            Ok(Box::new(stream) as _)
        })
    }
}

fn unreachable(node: &str, error: &OpenError) -> Unreachable {
    let node = node.to_owned();
    match error {
        OpenError::NoLink(_) | OpenError::LinkGone => Unreachable::Offline(node),
        OpenError::NoAnswer => Unreachable::Slow(node),
        OpenError::Refused { code: StreamCode::UNKNOWN_KIND, .. } => {
            Unreachable::Refused { node, why: "it runs no pods".to_owned() }
        }
        OpenError::Refused { message, .. } => Unreachable::Refused { node, why: message.clone() },
        OpenError::Replica { .. } | OpenError::TooLong(_) | OpenError::Malformed => {
            Unreachable::Broken { node, why: error.to_string() }
        }
    }
}

/// Streams of nodes that wait to be served.
const WAITING_MAX: usize = 64;

/// Serves the API to nodes, each under its own name, until `tasks` are asked to stop.
pub fn serve(links: &Links, front: Front, tasks: &Tasks) -> impl Future<Output = ()> + use<> {
    let mut streams = links.accept(KUBERNETES, WAITING_MAX);
    let (stop, tasks) = (tasks.stopped(), tasks.clone());
    async move {
        loop {
            let incoming = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                incoming = streams.recv() => incoming,
            };
            let Some(incoming) = incoming else { return };
            let (front, stop) = (front.clone(), stop.clone());
            let serving = async move {
                if incoming.peer.role != Role::Node {
                    return incoming.refuse(StreamCode::FORBIDDEN, "only nodes ask by this way").await;
                }
                let node = Arc::clone(&incoming.peer.name);
                match incoming.accept().await {
                    Ok(stream) => front.serve_node(stream, &node).await,
                    Err(error) => tracing::debug!(%error, "a node gave up its request"),
                }
            };
            tasks.spawn("kubernetes of a node", async move {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = Box::pin(serving) => {}
                }
            });
        }
    }
}
