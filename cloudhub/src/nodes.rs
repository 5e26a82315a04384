//! The way from the Kubernetes API to nodes: Streams of kind `kubelet`.

use std::sync::Arc;

use broker::link::{
    Links,
    stream::{OpenError, StreamCode},
};
use codec::proto::StreamOpen;
use kubeapi::nodes::{KUBELET, NodeStreams, Opening, Unreachable};

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
