//! Between the Kubernetes API and nodes: Streams of kind `kubelet` to them, and of kind `kubernetes` from them.

use std::sync::Arc;

use broker::{
    Tasks,
    event::Role,
    link::{
        Links,
        stream::{OpenError, StreamCode},
    },
};
use codec::proto::StreamOpen;
use kubeapi::{
    Front, KUBERNETES,
    nodes::{KUBELET, NodeStreams, Opening, Unreachable},
};

/// Nodes by the links of this hub.
#[derive(Debug)]
pub struct Linked(pub Arc<Links>);

impl NodeStreams for Linked {
    fn open<'a>(&'a self, node: &'a str) -> Opening<'a> {
        Box::pin(async move {
            let open = StreamOpen { kind: KUBELET.to_owned(), ..StreamOpen::default() };
            let stream = self.0.open(node, &open).await.map_err(|error| unreachable(node, error))?;
            Ok(Box::new(stream) as _)
        })
    }
}

fn unreachable(node: &str, error: OpenError) -> Unreachable {
    let node = node.to_owned();
    match error {
        OpenError::NoLink(_) | OpenError::LinkGone => Unreachable::Offline(node),
        OpenError::NoAnswer => Unreachable::Slow(node),
        OpenError::Refused { code: StreamCode::UNKNOWN_KIND, .. } => {
            Unreachable::Refused { node, why: "it runs no pods".to_owned() }
        }
        OpenError::Refused { message, .. } => Unreachable::Refused { node, why: message },
        OpenError::TooLong(_) | OpenError::Malformed => Unreachable::Refused { node, why: error.to_string() },
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
