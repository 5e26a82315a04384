//! A small NATS client from the protocol's description, for what a stock client would not send.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its subject.
    pub subject: String,
    /// The reply subject, if it has one.
    pub reply: Option<String>,
    /// Its payload, after the headers.
    pub payload: Vec<u8>,
    /// Its headers as they were on the wire.
    pub headers: String,
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<TcpStream>,
    waiting: Vec<Message>,
    sid: u32,
}

/// Longest wait for an answer that must come.
const ANSWER: Duration = Duration::from_secs(20);

impl Client {
    /// Connects and waits until the server has taken CONNECT.
    ///
    /// # Errors
    /// No connection, or the server refuses.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        Self::connect_with(address, "")
    }

    /// The same as a user with a password.
    ///
    /// # Errors
    /// No connection, or the server refuses.
    pub fn connect_as(address: SocketAddr, (user, password): (&str, &str)) -> io::Result<Self> {
        Self::connect_with(address, &format!("\"user\":\"{user}\",\"pass\":\"{password}\","))
    }

    fn connect_with(address: SocketAddr, login: &str) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut client = Self { reader: BufReader::new(stream), waiting: Vec::new(), sid: 0 };
        let info = client.line()?;
        if !info.starts_with("INFO {") {
            return Err(io::Error::other(format!("{info:?} instead of INFO")));
        }
        let connect = format!(
            "CONNECT {{{login}\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true,\
              \"lang\":\"octobus-tests\",\"version\":\"1\",\"protocol\":1}}\r\n"
        );
        client.write(connect.as_bytes())?;
        client.flush()?;
        Ok(client)
    }

    /// Writes bytes as they are.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// PING and its PONG: the server has taken everything before it.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        self.write(b"PING\r\n")?;
        loop {
            if self.step()? {
                return Ok(());
            }
        }
    }

    /// Subscribes; the server has it when this returns.
    ///
    /// # Errors
    /// The connection is gone or the server refuses.
    pub fn subscribe(&mut self, subject: &str) -> io::Result<()> {
        self.sid += 1;
        let line = format!("SUB {subject} {}\r\n", self.sid);
        self.write(line.as_bytes())?;
        self.flush()
    }

    /// Publishes.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn publish(&mut self, subject: &str, payload: &[u8]) -> io::Result<()> {
        let mut bytes = format!("PUB {subject} {}\r\n", payload.len()).into_bytes();
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(b"\r\n");
        self.write(&bytes)
    }

    /// Publishes with a subject for the answer.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn request(&mut self, subject: &str, reply: &str, payload: &[u8]) -> io::Result<()> {
        let mut bytes = format!("PUB {subject} {reply} {}\r\n", payload.len()).into_bytes();
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(b"\r\n");
        self.write(&bytes)
    }

    /// The next message.
    ///
    /// # Errors
    /// None within `limit`, or the connection is gone.
    pub fn next(&mut self, limit: Duration) -> io::Result<Message> {
        self.reader.get_ref().set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        while self.waiting.is_empty() {
            self.step()?;
        }
        self.reader.get_ref().set_read_timeout(Some(ANSWER))?;
        Ok(self.waiting.remove(0))
    }

    /// Takes one line from the server; true if it was PONG.
    fn step(&mut self) -> io::Result<bool> {
        let line = self.line()?;
        let mut words = line.split(' ');
        match words.next() {
            Some("PONG") => return Ok(true),
            Some("PING") => self.write(b"PONG\r\n")?,
            Some("INFO" | "+OK") => {}
            Some(kind @ ("MSG" | "HMSG")) => {
                let words: Vec<&str> = words.collect();
                let message = self.message(kind == "HMSG", &words)?;
                self.waiting.push(message);
            }
            _ => return Err(io::Error::other(line)),
        }
        Ok(false)
    }

    fn message(&mut self, with_headers: bool, words: &[&str]) -> io::Result<Message> {
        let number = |text: &str| text.parse::<usize>().map_err(|_bad| io::Error::other("a bad length"));
        let numbers = if with_headers { 2 } else { 1 };
        let (names, sizes) =
            words.split_at_checked(words.len().saturating_sub(numbers)).ok_or(io::ErrorKind::InvalidData)?;
        let headers = if with_headers { number(sizes[0])? } else { 0 };
        let total = number(sizes[numbers - 1])?;
        let mut body = vec![0; total + 2];
        io::Read::read_exact(&mut self.reader, &mut body)?;
        body.truncate(total);
        let payload = body.split_off(headers.min(total));
        Ok(Message {
            subject: names.first().copied().unwrap_or_default().to_owned(),
            reply: names.get(2).map(|reply| (*reply).to_owned()),
            payload,
            headers: String::from_utf8_lossy(&body).into_owned(),
        })
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        if self.reader.read_until(b'\n', &mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned())
    }
}
