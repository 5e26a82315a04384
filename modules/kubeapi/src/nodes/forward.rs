//! Passing a request on to a node, and its answer back as it comes.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use broker::Tasks;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1,
    header::{HeaderName, HeaderValue},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::copy_bidirectional_with_sizes,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{NodeStreams, Unreachable, upgrade};
use crate::limits;

/// How long a node may take to begin its answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Buffer of each direction of an upgraded connection, bytes.
const PIPE_BYTES: usize = 32 << 10;

/// Passes requests on to nodes. Cloning shares the bound on how many.
#[derive(Debug, Clone)]
pub struct Forwarder {
    nodes: Arc<dyn NodeStreams>,
    places: Arc<Semaphore>,
    tasks: Tasks,
}

/// A request as a node gets it: with the client's body as it comes, or a whole one.
pub type ToNode = Request<Either<Incoming, Full<Bytes>>>;

impl Forwarder {
    /// Over these nodes. What goes on after an answer has begun lives in `tasks`.
    #[must_use]
    pub fn new(nodes: Arc<dyn NodeStreams>, tasks: Tasks) -> Self {
        Self { nodes, places: Arc::new(Semaphore::new(limits::NODE_REQUESTS_MAX)), tasks }
    }

    /// Passes on a request; the answer, whose body comes as the node sends it. With `upgrade`, what the client's
    /// connection becomes, an answer that switches protocols joins the two until either ends. Dropping the call,
    /// or the body, ends the Stream.
    ///
    /// # Errors
    /// See [`Unreachable`].
    pub async fn forward(
        &self,
        node: &str,
        request: ToNode,
        upgrade: Option<OnUpgrade>,
    ) -> Result<Response<NodeBody>, Unreachable> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_full| Unreachable::TooMany)?;
        let broken =
            |error: hyper::Error| Unreachable::Broken { node: node.to_owned(), why: error.to_string() };
        let stream = self.nodes.open(node).await?;
        let mut builder = http1::Builder::new();
        let handshake = builder.max_buf_size(limits::HEADER_BYTES_MAX).handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(broken)?;
        let (stop, ended) = (self.tasks.stopped(), CancellationToken::new());
        let ends = ended.clone().drop_guard();
        self.tasks.spawn("request to a node", async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = ended.cancelled() => {}
                ended = connection.with_upgrades() => if let Err(error) = ended {
                    tracing::debug!(%error, "a request to a node ended");
                }
            }
        });
        let answered = timeout(ANSWER_WITHIN, sender.send_request(request)).await;
        let mut response =
            answered.map_err(|_elapsed| Unreachable::Slow(node.to_owned()))?.map_err(broken)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response.map(|body| NodeBody { body: Some(body), _ends: ends, _place: Some(place) }));
        }
        let Some(client) = upgrade else {
            let why = "it switched protocols unasked".to_owned();
            return Err(Unreachable::Broken { node: node.to_owned(), why });
        };
        let server = hyper::upgrade::on(&mut response);
        self.join(client, server, place);
        Ok(response.map(|_none| NodeBody { body: None, _ends: ends, _place: None }))
    }

    /// Passes on a client's request as it is, but for the path and what concerns the client alone: who it is, and
    /// its connection. See [`forward`](Self::forward).
    ///
    /// # Errors
    /// See [`Unreachable`].
    pub async fn pass(
        &self,
        node: &str,
        mut request: Request<Incoming>,
        path: &str,
    ) -> Result<Response<NodeBody>, Unreachable> {
        let refused = |why: &str| Unreachable::Refused { node: node.to_owned(), why: why.to_owned() };
        let mut headers = passed_on(request.headers());
        let client = upgrade::is_asked_for(request.headers()).then(|| {
            for name in ["connection", "upgrade"].map(HeaderName::from_static) {
                headers.extend(request.headers().get(&name).map(|value| (name, value.clone())));
            }
            hyper::upgrade::on(&mut request)
        });
        headers.insert("host", HeaderValue::from_str(node).map_err(|_| refused("no node has such a name"))?);
        let mut to_node = Request::builder().method(request.method()).uri(path);
        if let Some(all) = to_node.headers_mut() {
            *all = headers;
        }
        let body =
            if client.is_some() { Either::Right(Full::default()) } else { Either::Left(request.into_body()) };
        let to_node = to_node.body(body).map_err(|error| refused(&error.to_string()))?;
        self.forward(node, to_node, client).await
    }

    /// Asks a node for a path, and reads at most `bytes_max` of its answer.
    ///
    /// # Errors
    /// See [`Unreachable`]; anything but success is *refused*.
    pub async fn read(&self, node: &str, path: &str, bytes_max: usize) -> Result<Bytes, Unreachable> {
        let request = Request::get(path).header("host", node).body(Either::Right(Full::default()));
        let request = request.expect("a path of ours");
        let response = self.forward(node, request, None).await?;
        if !response.status().is_success() {
            let why = format!("{path}: {}", response.status());
            return Err(Unreachable::Refused { node: node.to_owned(), why });
        }
        let body = Limited::new(response.into_body(), bytes_max).collect().await;
        body.map(|whole| whole.to_bytes())
            .map_err(|error| Unreachable::Broken { node: node.to_owned(), why: error.to_string() })
    }

    /// Both directions until both have ended, or one breaks. Each may end by itself (half-close).
    fn join(&self, client: OnUpgrade, server: OnUpgrade, place: OwnedSemaphorePermit) {
        let stop = self.tasks.stopped();
        let joined = async move {
            let _place = place;
            let both = tokio::try_join!(client, server);
            let (client, server) = match both {
                Ok(both) => both,
                Err(error) => return tracing::debug!(%error, "a connection was not upgraded"),
            };
            let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
            let copied =
                copy_bidirectional_with_sizes(&mut client, &mut server, PIPE_BYTES, PIPE_BYTES).await;
            if let Err(error) = copied {
                tracing::debug!(%error, "an upgraded connection to a node broke");
            }
        };
        self.tasks.spawn("upgraded connection to a node", async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = joined => {}
            }
        });
    }
}

/// Headers that concern one connection, and those that say who asks: not the node's business.
const NOT_PASSED_ON: [&str; 10] = [
    "authorization",
    "connection",
    "cookie",
    "host",
    "keep-alive",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What of a request's headers a node gets.
pub(crate) fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let passes = |name: &str| !NOT_PASSED_ON.contains(&name) && !name.starts_with("impersonate-");
    let passed = headers.iter().filter(|(name, _)| passes(name.as_str()));
    passed.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// The body of a node's answer. Dropped, it ends the Stream.
#[derive(Debug)]
pub struct NodeBody {
    /// None: protocols were switched.
    body: Option<Incoming>,
    _ends: DropGuard,
    _place: Option<OwnedSemaphorePermit>,
}

impl Body for NodeBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.get_mut().body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}
