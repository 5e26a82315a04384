//! exec, attach, port-forward: the client's request for another protocol goes on to the runtime's streaming server,
//! and then bytes go both ways.

use std::time::Duration;

use broker::Tasks;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, Response, StatusCode, Uri,
    body::Incoming,
    client::conn::http1,
    header::{CONTENT_LENGTH, HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING},
    upgrade::{OnUpgrade, on},
};
use hyper_util::rt::TokioIo;
use tokio::{io::copy_bidirectional_with_sizes, net::TcpStream, time::timeout};

use super::answer::{self, Answer, Refusal};
use crate::runtime::RuntimeError;

/// How long the runtime's streaming server may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Buffer of each direction, bytes.
const PIPE_BYTES: usize = 32 << 10;
/// What is passed on of a refusal.
const REFUSAL_BYTES_MAX: usize = 64 << 10;

/// Joins the client to what waits at the runtime's URL.
///
/// # Errors
/// The runtime refused, or its streaming server does not answer.
pub(super) async fn to(
    url: Result<String, RuntimeError>,
    mut request: Request<Incoming>,
    tasks: &Tasks,
) -> Result<Answer, Refusal> {
    let url = url?;
    let broken = |why: String| Refusal::failed(format!("the runtime's streaming server at {url}: {why}"));
    let target = target(&url).map_err(&broken)?;
    let client = on(&mut request);
    let asked = asked(&request, &target).map_err(&broken)?;
    let answering = async {
        let stream = TcpStream::connect(target.authority.as_str()).await.map_err(|e| e.to_string())?;
        // What a person types is sent letter by letter.
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|e| e.to_string())?;
        let stop = tasks.stopped();
        tasks.spawn("request to the runtime", async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                ended = connection.with_upgrades() => if let Err(error) = ended {
                    tracing::debug!(%error, "a request to the runtime ended");
                }
            }
        });
        sender.send_request(asked).await.map_err(|e| e.to_string())
    };
    let answered = timeout(ANSWER_WITHIN, answering).await;
    let mut answered = answered.map_err(|_| broken("no answer".to_owned()))?.map_err(&broken)?;
    if answered.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(refused(answered).await);
    }
    join(client, on(&mut answered), tasks);
    let mut answer = answer::empty();
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *answer.headers_mut() = std::mem::take(answered.headers_mut());
    Ok(answer)
}

#[derive(Debug, PartialEq, Eq)]
struct Target {
    authority: String,
    path: String,
}

fn target(url: &str) -> Result<Target, String> {
    let uri: Uri = url.parse().map_err(|e| format!("it is no URL: {e}"))?;
    if uri.scheme_str() != Some("http") {
        return Err("only http is spoken on one machine; switch its TLS off".to_owned());
    }
    let authority = uri.authority().ok_or("it names no host")?;
    let port = authority.port_u16().unwrap_or(80);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    Ok(Target { authority: format!("{}:{port}", authority.host()), path: path.to_owned() })
}

/// The client's request at another address. Whatever it says of its body is left out: there is none.
fn asked(request: &Request<Incoming>, target: &Target) -> Result<Request<Empty<Bytes>>, String> {
    let mut headers: HeaderMap = request.headers().clone();
    for gone in [CONTENT_LENGTH, TRANSFER_ENCODING] {
        headers.remove(gone);
    }
    let host = HeaderValue::from_str(&target.authority).map_err(|e| e.to_string())?;
    headers.insert(HOST, host);
    let asked = Request::builder().method(request.method().clone()).uri(&target.path);
    let mut asked = asked.body(Empty::new()).map_err(|e| e.to_string())?;
    *asked.headers_mut() = headers;
    Ok(asked)
}

/// Why the runtime does not, in its own words.
async fn refused(answered: Response<Incoming>) -> Answer {
    let status = answered.status();
    let said = Limited::new(answered.into_body(), REFUSAL_BYTES_MAX).collect().await;
    let said = said.map_or_else(|e| Bytes::from(e.to_string()), |said| said.to_bytes());
    let mut answer = answer::text(said);
    *answer.status_mut() = status;
    answer
}

/// Both directions until both have ended, or one breaks. Each may end by itself.
fn join(client: OnUpgrade, server: OnUpgrade, tasks: &Tasks) {
    let stop = tasks.stopped();
    let joined = async move {
        let (client, server) = match tokio::try_join!(client, server) {
            Ok(both) => both,
            Err(error) => return tracing::debug!(%error, "a connection was not upgraded"),
        };
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        let copied = copy_bidirectional_with_sizes(&mut client, &mut server, PIPE_BYTES, PIPE_BYTES).await;
        if let Err(error) = copied {
            tracing::debug!(%error, "an upgraded connection broke");
        }
    };
    tasks.spawn("upgraded connection to the runtime", async move {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = joined => {}
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_url_says_where_to_go() {
        let expected = Target { authority: "127.0.0.1:4000".to_owned(), path: "/exec/tok?a=b".to_owned() };
        assert_eq!(target("http://127.0.0.1:4000/exec/tok?a=b"), Ok(expected));
        let expected = Target { authority: "[::1]:80".to_owned(), path: "/attach/t".to_owned() };
        assert_eq!(target("http://[::1]/attach/t"), Ok(expected));
        for bad in ["https://127.0.0.1:1/x", "/exec/x", "no url", ""] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }
}
