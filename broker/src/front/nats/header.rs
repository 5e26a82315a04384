//! NATS message headers: the block in front of a payload, and frame headers.
//!
//! A block is `NATS/1.0`, optionally with a status, then lines `name: value`, then an empty line. What
//! comes in is taken apart strictly. What goes out is written only if it is valid header text: a value
//! that came in by MQTT may hold any bytes, and a line end in it would forge headers of ours.

use super::egress::push_decimal;

/// Most headers of one message: a bound on the list that is built from one block.
pub(super) const HEADERS_MAX: usize = 1024;

/// A header block that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed message headers")]
pub(super) struct HeaderError;

/// The version that every block begins with.
const VERSION: &[u8] = b"NATS/1.0";
/// Name under which an inline status is kept, as client libraries show it.
const STATUS: &str = "Status";
/// Name under which an inline status's text is kept.
const DESCRIPTION: &str = "Description";

/// Takes a block apart, in order. An inline status becomes the headers `Status` and `Description`.
///
/// # Errors
/// It is no header block, or holds more than [`HEADERS_MAX`] headers.
pub(super) fn parse(block: &[u8]) -> Result<Vec<(&str, &[u8])>, HeaderError> {
    let block = block.strip_suffix(b"\r\n").ok_or(HeaderError)?;
    let mut lines = Lines { rest: block };
    let mut headers = Vec::new();
    let status = lines.next().ok_or(HeaderError)??.strip_prefix(VERSION).ok_or(HeaderError)?;
    inline_status(status, &mut headers)?;
    for line in lines {
        let line = line?;
        let colon = line.iter().position(|&byte| byte == b':').ok_or(HeaderError)?;
        let name = str::from_utf8(&line[..colon]).map_err(|_| HeaderError)?;
        if !is_name(name) || headers.len() >= HEADERS_MAX {
            return Err(HeaderError);
        }
        headers.push((name, line[colon + 1..].trim_ascii()));
    }
    Ok(headers)
}

fn inline_status<'a>(line: &'a [u8], headers: &mut Vec<(&'a str, &'a [u8])>) -> Result<(), HeaderError> {
    if line.is_empty() {
        return Ok(());
    }
    if line[0] != b' ' {
        return Err(HeaderError);
    }
    let line = line.trim_ascii();
    let (status, description) = line.split_at_checked(3).ok_or(HeaderError)?;
    if !status.iter().all(u8::is_ascii_digit) || description.first().is_some_and(|&byte| byte != b' ') {
        return Err(HeaderError);
    }
    headers.push((STATUS, status));
    let description = description.trim_ascii();
    if !description.is_empty() {
        headers.push((DESCRIPTION, description));
    }
    Ok(())
}

/// Lines that each end in CR LF; a CR or LF elsewhere is an error.
struct Lines<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Lines<'a> {
    type Item = Result<&'a [u8], HeaderError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.rest);
        let end = rest.iter().position(|&byte| matches!(byte, b'\r' | b'\n'));
        match end {
            Some(end) if rest[end..].starts_with(b"\r\n") => {
                self.rest = &rest[end + 2..];
                Some(Ok(&rest[..end]))
            }
            _ => Some(Err(HeaderError)),
        }
    }
}

/// Writes one block.
#[derive(Debug)]
pub(super) struct BlockWriter<'a> {
    out: &'a mut Vec<u8>,
    empty: bool,
}

impl<'a> BlockWriter<'a> {
    /// Begins a block in `out`, which is cleared.
    pub(super) fn new(out: &'a mut Vec<u8>) -> Self {
        out.clear();
        out.extend_from_slice(VERSION);
        Self { out, empty: true }
    }

    /// Sets the status on the first line; before any header.
    pub(super) fn status(&mut self, status: u16) {
        debug_assert!(self.empty, "the status stands on the first line");
        self.out.push(b' ');
        push_decimal(self.out, u64::from(status));
        self.empty = false;
        self.out.extend_from_slice(b"\r\n");
    }

    /// Adds a header, unless its name or value is no valid header text.
    pub(super) fn header(&mut self, name: &str, value: &[u8]) {
        if !is_name(name) || !is_value(value) {
            return;
        }
        if std::mem::take(&mut self.empty) {
            self.out.extend_from_slice(b"\r\n");
        }
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b": ");
        self.out.extend_from_slice(value);
        self.out.extend_from_slice(b"\r\n");
    }

    /// Ends the block. False: there was nothing to write, and `out` is empty.
    pub(super) fn finish(self) -> bool {
        if self.empty {
            self.out.clear();
        } else {
            self.out.extend_from_slice(b"\r\n");
        }
        !self.empty
    }
}

/// A token that no parser can take for anything else.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte > b' ' && byte != b':' && byte != 0x7f)
}

/// UTF-8 without control characters other than tab.
fn is_value(value: &[u8]) -> bool {
    str::from_utf8(value).is_ok() && value.iter().all(|&byte| byte == b'\t' || (byte >= b' ' && byte != 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(headers: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut block = BlockWriter::new(&mut out);
        for (name, value) in headers {
            block.header(name, value);
        }
        block.finish();
        out
    }

    #[test]
    fn headers_keep_their_order_their_case_and_every_value() {
        let block = b"NATS/1.0\r\nTrace:  a b \r\ntrace:c\r\nTrace: d\r\nEmpty:\r\nColon: a:b\r\n\r\n";
        let headers = parse(block).unwrap();
        let expected: Vec<(&str, &[u8])> =
            vec![("Trace", b"a b"), ("trace", b"c"), ("Trace", b"d"), ("Empty", b""), ("Colon", b"a:b")];
        assert_eq!(headers, expected);
        assert_eq!(parse(&written(&headers)).unwrap(), expected);
    }

    #[test]
    fn an_inline_status_becomes_headers() {
        let headers = parse(b"NATS/1.0 404 No Messages\r\nA: b\r\n\r\n").unwrap();
        let expected: Vec<(&str, &[u8])> =
            vec![("Status", b"404"), ("Description", b"No Messages"), ("A", b"b")];
        assert_eq!(headers, expected);
        assert_eq!(parse(b"NATS/1.0 503\r\n\r\n").unwrap(), vec![("Status", &b"503"[..])]);
    }

    #[test]
    fn an_empty_block_is_valid() {
        assert!(parse(b"NATS/1.0\r\n\r\n").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_header_block_is_refused() {
        let blocks: [&[u8]; 14] = [
            b"",
            b"\r\n",
            b"\r\n\r\n",
            b"NATS/1.0",
            b"NATS/1.0\r\n",
            b"NATS/1.1\r\n\r\n",
            b"NATS/1.0\r\nno colon\r\n\r\n",
            b"NATS/1.0\r\n: no name\r\n\r\n",
            b"NATS/1.0\r\nspace in: name\r\n\r\n",
            b"NATS/1.0\r\na: b\nc: d\r\n\r\n",
            b"NATS/1.0\r\na: b\rc\r\n\r\n",
            b"NATS/1.0\r\na: b\r\n",
            b"NATS/1.0\r\na: b\r\n\r\nmore",
            b"NATS/1.0 50\r\n\r\n",
        ];
        for block in blocks {
            assert_eq!(parse(block), Err(HeaderError), "{}", block.escape_ascii());
        }
    }

    #[test]
    fn the_number_of_headers_is_bounded() {
        let block = |n: usize| [&b"NATS/1.0\r\n"[..], &b"a:\r\n".repeat(n), b"\r\n"].concat();
        assert_eq!(parse(&block(HEADERS_MAX)).unwrap().len(), HEADERS_MAX);
        assert_eq!(parse(&block(HEADERS_MAX + 1)), Err(HeaderError));
    }

    #[test]
    fn a_value_that_could_forge_a_header_is_not_written() {
        let headers: [(&str, &[u8]); 6] = [
            ("a", b"x\r\nOctobus-Seq: 1"),
            ("b", b"x\ny"),
            ("c", b"\0"),
            ("d", b"\xff"),
            ("e\r\nf", b"x"),
            ("g:h", b"x"),
        ];
        assert_eq!(written(&headers), b"", "nothing valid: no block at all");
        assert_eq!(written(&[headers[0], ("ok", b"\tz")]), b"NATS/1.0\r\nok: \tz\r\n\r\n");
    }

    #[test]
    fn a_status_needs_no_headers() {
        let mut out = Vec::new();
        let mut block = BlockWriter::new(&mut out);
        block.status(503);
        assert!(block.finish());
        assert_eq!(out, b"NATS/1.0 503\r\n\r\n");
    }
}
