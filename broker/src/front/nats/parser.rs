//! The client protocol's grammar: bytes of a client to operations.
//!
//! [`parse`] looks at the bytes received so far and is a pure function of them, so how the stream was
//! split into reads cannot matter. It borrows from the buffer and allocates nothing; a payload's
//! claimed size is checked against the limit before the caller is asked to make room for it.
//!
//! It is as strict as nats-server about numbers and argument counts, and as lenient about the case of
//! verbs, tabs between arguments and a bare line feed.

/// Longest control line, verb included and line end excluded.
pub(super) const CONTROL_LINE_MAX: usize = 4096;

/// One operation of a client. What it names is not validated yet, only found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op<'a> {
    /// The client's options, as JSON.
    Connect(&'a [u8]),
    /// A message, with a header block (`HPUB`) or without.
    Publish(PublishOp<'a>),
    /// Interest.
    Subscribe {
        /// Pattern.
        subject: &'a [u8],
        /// Queue group.
        queue: Option<&'a [u8]>,
        /// The client's name for this subscription.
        sid: &'a [u8],
    },
    /// End of interest, at once or after `max` deliveries in all.
    Unsubscribe {
        /// As in `Subscribe`.
        sid: &'a [u8],
        /// Deliveries since the subscription began.
        max: Option<u64>,
    },
    /// Asks for a `PONG`.
    Ping,
    /// Answers a `PING`.
    Pong,
}

/// The parts of `PUB` and `HPUB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PublishOp<'a> {
    /// Where to.
    pub subject: &'a [u8],
    /// Where an answer goes.
    pub reply: Option<&'a [u8]>,
    /// The header block as received, `NATS/1.0` and the empty line included.
    pub headers: Option<&'a [u8]>,
    /// What follows the headers.
    pub payload: &'a [u8],
}

/// What the bytes at the front of the buffer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    /// An operation in the first `used` bytes.
    Op {
        /// What.
        op: Op<'a>,
        /// Bytes it took, at least 1.
        used: usize,
    },
    /// An operation that is not complete. Parsing again is useless before the buffer holds
    /// `needed` bytes, which the limits bound.
    Incomplete {
        /// Greater than what the buffer holds.
        needed: usize,
    },
}

/// Bytes that no client may send. All of them end the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ParseError {
    /// No such verb, or its arguments make no sense.
    #[error("unknown protocol operation")]
    UnknownOperation,
    /// A line that does not end.
    #[error("control line longer than {CONTROL_LINE_MAX} bytes")]
    ControlLine,
    /// A message larger than the server said it takes.
    #[error("a payload of {0} bytes exceeds the maximum")]
    Payload(u64),
}

/// Reads one operation from the front of `input`.
///
/// # Errors
/// The client broke the protocol.
pub(super) fn parse(input: &[u8], payload_max: usize) -> Result<Parsed<'_>, ParseError> {
    let window = &input[..input.len().min(CONTROL_LINE_MAX + 2)];
    let Some(line_feed) = window.iter().position(|&byte| byte == b'\n') else {
        Verb::of_prefix(window)?;
        if window.len() >= CONTROL_LINE_MAX + 2 {
            return Err(ParseError::ControlLine);
        }
        return Ok(Parsed::Incomplete { needed: input.len() + 1 });
    };
    let line = &input[..line_feed];
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let (verb, rest) = Verb::of_line(line)?;
    if line.len() > CONTROL_LINE_MAX {
        return Err(ParseError::ControlLine);
    }
    let used = line_feed + 1;
    match verb {
        // Whatever follows on the line is ignored, as by nats-server.
        Verb::Ping => Ok(Parsed::Op { op: Op::Ping, used }),
        Verb::Pong => Ok(Parsed::Op { op: Op::Pong, used }),
        Verb::Connect => Ok(Parsed::Op { op: Op::Connect(rest.trim_ascii()), used }),
        Verb::Sub => subscribe(rest, used),
        Verb::Unsub => unsubscribe(rest, used),
        Verb::Pub => publish(input, rest, used, payload_max),
        Verb::Hpub => publish_with_headers(input, rest, used, payload_max),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Connect,
    Pub,
    Hpub,
    Sub,
    Unsub,
    Ping,
    Pong,
}

impl Verb {
    const ALL: [(&'static [u8], Self); 7] = [
        (b"PUB", Self::Pub),
        (b"HPUB", Self::Hpub),
        (b"SUB", Self::Sub),
        (b"UNSUB", Self::Unsub),
        (b"PING", Self::Ping),
        (b"PONG", Self::Pong),
        (b"CONNECT", Self::Connect),
    ];

    /// The verb of a complete line, and what follows it.
    fn of_line(line: &[u8]) -> Result<(Self, &[u8]), ParseError> {
        let end = line.iter().position(|&byte| is_blank(byte)).unwrap_or(line.len());
        let (word, rest) = line.split_at(end);
        let known = Self::ALL.iter().find(|(name, _)| word.eq_ignore_ascii_case(name));
        known.map(|&(_, verb)| (verb, rest)).ok_or(ParseError::UnknownOperation)
    }

    /// Refuses the beginning of a line that no verb begins with, so that another protocol's client is
    /// turned away by its first byte and not by a timeout.
    fn of_prefix(begun: &[u8]) -> Result<(), ParseError> {
        let end = begun.iter().position(|&byte| is_blank(byte) || byte == b'\r');
        let word = &begun[..end.unwrap_or(begun.len())];
        let fits = |name: &[u8]| {
            let same = word.len() <= name.len() && name[..word.len()].eq_ignore_ascii_case(word);
            same && (end.is_none() || word.len() == name.len())
        };
        let some = Self::ALL.iter().any(|(name, _)| fits(name));
        if some { Ok(()) } else { Err(ParseError::UnknownOperation) }
    }
}

fn subscribe(rest: &[u8], used: usize) -> Result<Parsed<'_>, ParseError> {
    let op = match arguments::<3>(rest)? {
        [Some(subject), Some(sid), None] => Op::Subscribe { subject, queue: None, sid },
        [Some(subject), Some(queue), Some(sid)] => Op::Subscribe { subject, queue: Some(queue), sid },
        _ => return Err(ParseError::UnknownOperation),
    };
    Ok(Parsed::Op { op, used })
}

fn unsubscribe(rest: &[u8], used: usize) -> Result<Parsed<'_>, ParseError> {
    let [Some(sid), max] = arguments::<2>(rest)? else { return Err(ParseError::UnknownOperation) };
    let max = max.map(number).transpose()?;
    Ok(Parsed::Op { op: Op::Unsubscribe { sid, max }, used })
}

fn publish<'a>(
    input: &'a [u8],
    rest: &'a [u8],
    used: usize,
    payload_max: usize,
) -> Result<Parsed<'a>, ParseError> {
    let (subject, reply, size) = match arguments::<3>(rest)? {
        [Some(subject), Some(size), None] => (subject, None, size),
        [Some(subject), Some(reply), Some(size)] => (subject, Some(reply), size),
        _ => return Err(ParseError::UnknownOperation),
    };
    let size = bounded(number(size)?, payload_max)?;
    match body(input, used, size)? {
        Ok(payload) => {
            let op = PublishOp { subject, reply, headers: None, payload };
            Ok(Parsed::Op { op: Op::Publish(op), used: used + size + 2 })
        }
        Err(needed) => Ok(Parsed::Incomplete { needed }),
    }
}

fn publish_with_headers<'a>(
    input: &'a [u8],
    rest: &'a [u8],
    used: usize,
    payload_max: usize,
) -> Result<Parsed<'a>, ParseError> {
    let (subject, reply, headers, size) = match arguments::<4>(rest)? {
        [Some(subject), Some(headers), Some(size), None] => (subject, None, headers, size),
        [Some(subject), Some(reply), Some(headers), Some(size)] => (subject, Some(reply), headers, size),
        _ => return Err(ParseError::UnknownOperation),
    };
    let headers = number(headers)?;
    let size = number(size)?;
    if headers > size {
        return Err(ParseError::UnknownOperation);
    }
    let size = bounded(size, payload_max)?;
    let headers = bounded(headers, payload_max)?;
    match body(input, used, size)? {
        Ok(body) => {
            let (headers, payload) = body.split_at(headers);
            let op = PublishOp { subject, reply, headers: Some(headers), payload };
            Ok(Parsed::Op { op: Op::Publish(op), used: used + size + 2 })
        }
        Err(needed) => Ok(Parsed::Incomplete { needed }),
    }
}

/// The `size` bytes after the control line, if they and the line end behind them are there; else how
/// many bytes the buffer must hold for that.
fn body(input: &[u8], start: usize, size: usize) -> Result<Result<&[u8], usize>, ParseError> {
    let end = start + size;
    match (input.get(end), input.get(end + 1)) {
        (Some(b'\r'), Some(b'\n')) => Ok(Ok(&input[start..end])),
        (None, _) | (Some(b'\r'), None) => Ok(Err(end + 2)),
        _ => Err(ParseError::UnknownOperation),
    }
}

/// Splits at blanks into at most `N` arguments.
fn arguments<const N: usize>(rest: &[u8]) -> Result<[Option<&[u8]>; N], ParseError> {
    let mut found = [None; N];
    let words = rest.split(|&byte| is_blank(byte)).filter(|word| !word.is_empty());
    for (at, word) in words.enumerate() {
        *found.get_mut(at).ok_or(ParseError::UnknownOperation)? = Some(word);
    }
    Ok(found)
}

/// A decimal number of 1 to 18 digits and nothing else.
fn number(digits: &[u8]) -> Result<u64, ParseError> {
    if digits.is_empty() || digits.len() > 18 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(ParseError::UnknownOperation);
    }
    Ok(digits.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')))
}

fn bounded(size: u64, max: usize) -> Result<usize, ParseError> {
    usize::try_from(size).ok().filter(|&size| size <= max).ok_or(ParseError::Payload(size))
}

const fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

#[cfg(test)]
mod tests;
