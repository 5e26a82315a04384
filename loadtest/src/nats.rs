//! As much of a NATS client as a load test needs: it publishes and subscribes at the hub's front.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// A line of the protocol, INFO included.
const LINE_MAX: u64 = 64 << 10;
/// A message with its headers.
const MESSAGE_MAX: usize = 4 << 20;

/// The sending side of a connection.
#[derive(Debug)]
pub struct Publisher(OwnedWriteHalf);

/// The receiving side of a connection.
#[derive(Debug)]
pub struct Subscriber {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

/// Connects, without a name or a password: the fronts of a test let everybody in.
///
/// # Errors
/// No connection, or no NATS server.
pub async fn connect(address: SocketAddr) -> io::Result<(Publisher, Subscriber)> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (reader, writer) = stream.into_split();
    let (mut publisher, mut subscriber) =
        (Publisher(writer), Subscriber { reader: BufReader::new(reader), line: Vec::new() });
    subscriber.line().await?;
    if !subscriber.line.starts_with(b"INFO ") {
        return Err(io::Error::other("no NATS server answers there"));
    }
    let hello = "CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"lang\":\"octobus\"}\r\n";
    publisher.0.write_all(hello.as_bytes()).await?;
    Ok((publisher, subscriber))
}

impl Publisher {
    /// Subscribes.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn subscribe(&mut self, subject: &str) -> io::Result<()> {
        self.0.write_all(format!("SUB {subject} 1\r\n").as_bytes()).await
    }

    /// Publishes.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn publish(&mut self, subject: &str, payload: &[u8]) -> io::Result<()> {
        let mut bytes = format!("PUB {subject} {}\r\n", payload.len()).into_bytes();
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(b"\r\n");
        self.0.write_all(&bytes).await
    }

    /// Asks the server to say that it has taken everything before.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn ping(&mut self) -> io::Result<()> {
        self.0.write_all(b"PING\r\n").await
    }

    /// Says that somebody is here.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn pong(&mut self) -> io::Result<()> {
        self.0.write_all(b"PONG\r\n").await
    }
}

/// What the server says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// A message's payload.
    Message(Vec<u8>),
    /// It has taken everything before a PING.
    Pong,
    /// It wants to know whether somebody is here: answer with `PONG`.
    Ping,
}

impl Subscriber {
    /// What comes next. Not cancel safe.
    ///
    /// # Errors
    /// The connection is gone, or the server is unhappy; it says why.
    pub async fn next(&mut self) -> io::Result<Said> {
        loop {
            self.line().await?;
            let line = String::from_utf8_lossy(&self.line);
            let mut words = line.split_ascii_whitespace();
            let kind = words.next().unwrap_or_default();
            let lengths: Vec<usize> = words.rev().map_while(|word| word.parse().ok()).take(2).collect();
            match (kind, &*lengths) {
                ("PONG", _) => return Ok(Said::Pong),
                ("PING", _) => return Ok(Said::Ping),
                ("INFO" | "+OK", _) => {}
                ("MSG", [total, ..]) => return self.payload(0, *total).await,
                ("HMSG", [total, headers]) => {
                    let (headers, total) = (*headers, *total);
                    return self.payload(headers, total).await;
                }
                _ => return Err(io::Error::other(line.into_owned())),
            }
        }
    }

    async fn payload(&mut self, headers: usize, total: usize) -> io::Result<Said> {
        if headers > total || total > MESSAGE_MAX {
            return Err(io::Error::other("a message of a length that makes no sense"));
        }
        let mut body = vec![0; total + 2];
        self.reader.read_exact(&mut body).await?;
        body.truncate(total);
        Ok(Said::Message(body.split_off(headers)))
    }

    async fn line(&mut self) -> io::Result<()> {
        self.line.clear();
        let mut limited = (&mut self.reader).take(LINE_MAX);
        match limited.read_until(b'\n', &mut self.line).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ if self.line.ends_with(b"\n") => Ok(()),
            _ => Err(io::Error::other("a line without end")),
        }
    }
}
