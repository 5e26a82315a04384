//! HTTP CONNECT: a way out for stations that have no other. The proxy sees where to, and ciphertext.

use std::{fmt, io};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// A proxy that forwards TCP at request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// DNS name or address, an IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// Why a proxy gives no connection.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// It cannot be reached, or goes away.
    #[error("proxy {proxy}: {source}")]
    Io { proxy: Proxy, source: io::Error },
    /// It says no.
    #[error("proxy {proxy} refused: {status}")]
    Refused { proxy: Proxy, status: String },
}

/// Longest answer of a proxy, headers included.
const ANSWER_MAX: usize = 8 << 10;
/// Of what a proxy says, this much is shown.
const STATUS_MAX: usize = 80;

impl Proxy {
    /// Asks for a connection to `host:port`; the proxy resolves the name. Dropping the future gives up.
    pub(super) async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, ProxyError> {
        let failed = |source| ProxyError::Io { proxy: self.clone(), source };
        let mut stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(failed)?;
        let to = Self { host: host.to_owned(), port };
        let request = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.map_err(failed)?;
        // Behind the answer comes nothing until we speak: TLS begins with the client.
        let mut answer = Vec::new();
        while !answer.windows(4).any(|end| end == b"\r\n\r\n") {
            if answer.len() >= ANSWER_MAX {
                return Err(failed(io::ErrorKind::InvalidData.into()));
            }
            let mut part = [0; 512];
            let n = stream.read(&mut part).await.map_err(failed)?;
            if n == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            answer.extend_from_slice(&part[..n]);
        }
        let status = String::from_utf8_lossy(&answer);
        let status: String = status.lines().next().unwrap_or_default().chars().take(STATUS_MAX).collect();
        let mut words = status.split(' ');
        let (version, code) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if version.starts_with("HTTP/1.") && code.len() == 3 && code.starts_with('2') {
            Ok(stream)
        } else {
            Err(ProxyError::Refused { proxy: self.clone(), status })
        }
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}
