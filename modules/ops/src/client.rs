//! The command line's side of the admin socket.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use broker::Tasks;
use bytes::{Buf, Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::{admin::pipe::PROTOCOL, api::Problem};

/// A local process answers at once or is stuck. Streams may be silent for longer once they have begun.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Largest answer that is not a stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Largest line of a stream: a frame in base64 with room for the rest.
const LINE_BYTES_MAX: usize = 4 << 20;

const JSON: &str = "application/json";
const BYTES: &str = "application/octet-stream";

/// Why the admin socket gives no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves it.
    #[error(
        "no octobus answers at {socket}: {source}\n  is it running? `octobus dev` and its ready file print the \
         socket; name it with --admin"
    )]
    Unreachable { socket: PathBuf, source: io::Error },
    /// The file is there and this user may not use it.
    #[error("{socket} is another user's: run this as root or as the user that octobus runs as")]
    Forbidden { socket: PathBuf },
    /// The process said no, and why.
    #[error("{message}")]
    Refused { status: u16, message: String },
    /// The connection broke in the middle of an answer.
    #[error("the connection to {socket} broke: {what}")]
    Broken { socket: PathBuf, what: String },
    /// The answer is not what this version understands.
    #[error("the answer is not understood ({what}): are both sides of the same version?")]
    NotUnderstood { what: String },
}

impl ClientError {
    /// True if what was asked for is not there, rather than something having failed.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    /// True if no process could be asked.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Forbidden { .. })
    }
}

/// A way to one admin socket. Each request has its own connection.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    tasks: Tasks,
}

impl Client {
    /// Asks at this socket; nothing is opened yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), tasks: Tasks::new() }
    }

    /// A JSON answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<T, ClientError> {
        let text = self.text(Method::GET, path, query, Bytes::new()).await?;
        serde_json::from_slice(&text).map_err(|error| ClientError::NotUnderstood { what: error.to_string() })
    }

    /// A JSON answer to a body of bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, &str)],
        body: Bytes,
    ) -> Result<T, ClientError> {
        let text = self.text(Method::POST, path, query, body).await?;
        serde_json::from_slice(&text).map_err(|error| ClientError::NotUnderstood { what: error.to_string() })
    }

    /// A JSON answer to a JSON body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post_json<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).expect("requests have string keys");
        let response = self.request(Method::POST, path, &[], JSON, body.into()).await?;
        let text = self.whole(response).await?;
        serde_json::from_slice(&text).map_err(|error| ClientError::NotUnderstood { what: error.to_string() })
    }

    /// A whole answer as bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn text(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let response = self.request(method, path, query, BYTES, body).await?;
        self.whole(response).await
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        body.map(http_body_util::Collected::to_bytes).map_err(|error| self.broken(&error.to_string()))
    }

    /// An answer line by line.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lines(&self, path: &str, query: &[(&str, &str)]) -> Result<Lines, ClientError> {
        let response = self.request(Method::GET, path, query, BYTES, Bytes::new()).await?;
        Ok(Lines { body: response.into_body(), buffer: BytesMut::new(), socket: self.socket.clone() })
    }

    /// A connection to what stands behind this path ([`pipe`](crate::admin::pipe)).
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn pipe(&self, path: &str) -> Result<Upgraded, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| self.unreachable(source))?;
        let broken = |error: hyper::Error| self.broken(&error.to_string());
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        self.tasks.spawn("admin client", async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "admin connection ended");
            }
        });
        let request = Request::get(path)
            .header("host", "octobus")
            .header("connection", "upgrade")
            .header("upgrade", PROTOCOL)
            .body(Full::new(Bytes::new()))
            .expect("a path of ours");
        let answer = tokio::time::timeout(ANSWER_WITHIN, sender.send_request(request)).await;
        let response = answer
            .map_err(|_elapsed| self.broken(&format!("no answer within {ANSWER_WITHIN:?}")))?
            .map_err(broken)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.refused(response).await);
        }
        hyper::upgrade::on(response).await.map_err(broken)
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        content_type: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| self.unreachable(source))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(&error.to_string()))?;
        self.tasks.spawn("admin client", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "admin connection ended");
            }
        });
        let request = Request::builder()
            .method(method)
            .uri(uri(path, query))
            .header("host", "octobus")
            .header("content-type", content_type)
            .body(Full::new(body))
            .expect("path and escaped query make a URI");
        let answer = tokio::time::timeout(ANSWER_WITHIN, sender.send_request(request)).await;
        let response = answer
            .map_err(|_elapsed| self.broken(&format!("no answer within {ANSWER_WITHIN:?}")))?
            .map_err(|error| self.broken(&error.to_string()))?;
        if response.status().is_success() { Ok(response) } else { Err(self.refused(response).await) }
    }

    async fn refused(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let message = serde_json::from_slice::<Problem>(&body).map_or_else(
            |_| match status {
                StatusCode::NOT_FOUND => {
                    "this process does not offer that; a node cannot do what a hub can".to_owned()
                }
                status => format!("{status}: {}", String::from_utf8_lossy(&body).trim()),
            },
            |problem| problem.error,
        );
        ClientError::Refused { status: status.as_u16(), message }
    }

    fn unreachable(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Forbidden { socket },
            _ => ClientError::Unreachable { socket, source },
        }
    }

    fn broken(&self, what: &str) -> ClientError {
        ClientError::Broken { socket: self.socket.clone(), what: what.to_owned() }
    }
}

/// Lines of a streaming answer.
#[derive(Debug)]
pub struct Lines {
    body: Incoming,
    buffer: BytesMut,
    socket: PathBuf,
}

impl Lines {
    /// The next line without its newline; `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// The connection broke, or a line is longer than any that is ever sent.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        let broken = |what: String, socket: &Path| ClientError::Broken { socket: socket.to_owned(), what };
        let mut searched = 0;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(searched + at).freeze();
                self.buffer.advance(1);
                return Ok(Some(line));
            }
            searched = self.buffer.len();
            if searched > LINE_BYTES_MAX {
                return Err(broken("a line without end".to_owned(), &self.socket));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(broken(error.to_string(), &self.socket)),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(broken("it ended within a line".to_owned(), &self.socket)),
            }
        }
    }
}

/// Path and query, each value percent-encoded.
fn uri(path: &str, query: &[(&str, &str)]) -> String {
    let mut uri = path.to_owned();
    for (at, (name, value)) in query.iter().enumerate() {
        uri.push(if at == 0 { '?' } else { '&' });
        uri.push_str(name);
        uri.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                uri.push(char::from(byte));
            } else {
                uri.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_a_query_are_escaped() {
        assert_eq!(uri("/v1/log", &[]), "/v1/log");
        assert_eq!(uri("/v1/log", &[("topic", "a/+ü&b"), ("n", "1")]), "/v1/log?topic=a%2F%2B%C3%BC%26b&n=1");
    }

    #[tokio::test]
    async fn a_socket_that_nobody_serves_says_what_to_do() {
        let error =
            Client::new(Path::new("/nonexistent/admin.sock")).get::<()>("/v1/logs", &[]).await.unwrap_err();
        assert!(error.is_unreachable() && error.to_string().contains("--admin"), "{error}");
    }
}
