//! From CRI's lines to what a client is sent.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::Wanted;

/// The longest line that is looked at. Runtimes cut at 16 KiB; what is longer was not written by one, and is skipped.
const LINE_BYTES_MAX: usize = 256 << 10;

/// Takes a log in pieces of any size. Lines that are not in CRI's format are left out.
#[derive(Debug)]
pub(super) struct Formatter {
    timestamps: bool,
    since: Option<OffsetDateTime>,
    /// Bytes that may still be sent.
    left: Option<u64>,
    /// A line whose end has not come yet.
    begun: Vec<u8>,
    /// What is begun was too long: it is skipped to its end.
    skipping: bool,
    /// The next text begins a line of the client.
    at_start: bool,
}

impl Formatter {
    pub(super) fn new(wanted: &Wanted) -> Self {
        Self {
            timestamps: wanted.timestamps,
            since: wanted.since,
            left: wanted.limit.map(std::num::NonZeroU64::get),
            begun: Vec::new(),
            skipping: false,
            at_start: true,
        }
    }

    /// True once the client has all that it may get.
    pub(super) fn is_full(&self) -> bool {
        self.left == Some(0)
    }

    /// The next piece of the log; what follows from it is appended to `out`.
    pub(super) fn push(&mut self, mut piece: &[u8], out: &mut Vec<u8>) {
        while let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = (&piece[..end], &piece[end + 1..]);
            if self.skipping {
                self.skipping = false;
            } else if self.begun.is_empty() {
                self.line(line, out);
            } else {
                let mut whole = std::mem::take(&mut self.begun);
                whole.extend_from_slice(line);
                self.line(&whole, out);
                whole.clear();
                self.begun = whole;
            }
            piece = rest;
        }
        if self.skipping {
            return;
        }
        if self.begun.len() + piece.len() > LINE_BYTES_MAX {
            self.begun.clear();
            self.skipping = true;
        } else {
            self.begun.extend_from_slice(piece);
        }
    }

    /// A file has ended, and what is begun will not go on: a writer was killed.
    pub(super) fn end_of_file(&mut self, out: &mut Vec<u8>) {
        let begun = std::mem::take(&mut self.begun);
        if !self.skipping && !begun.is_empty() {
            self.line(&begun, out);
        }
        self.skipping = false;
    }

    fn line(&mut self, line: &[u8], out: &mut Vec<u8>) {
        let Some(Line { time, full, text }) = parse(line) else { return };
        if let Some(since) = self.since {
            // Times in a log only grow: once one is late enough, no other is looked at.
            match std::str::from_utf8(time).ok().and_then(|t| OffsetDateTime::parse(t, &Rfc3339).ok()) {
                Some(time) if time >= since => self.since = None,
                _ => return,
            }
        }
        if self.timestamps && self.at_start {
            let mut stamp = with_nine_digits(time);
            stamp.push(b' ');
            self.send(&stamp, out);
        }
        self.send(text, out);
        if full {
            self.send(b"\n", out);
        }
        self.at_start = full;
    }

    fn send(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let take = match &mut self.left {
            None => bytes.len(),
            Some(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= take as u64;
                take
            }
        };
        out.extend_from_slice(&bytes[..take]);
    }
}

struct Line<'a> {
    time: &'a [u8],
    full: bool,
    text: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let (time, stream, tags) = (fields.next()?, fields.next()?, fields.next()?);
    // A line may be empty, with or without the blank before it.
    let text = fields.next().unwrap_or_default();
    if !matches!(stream, b"stdout" | b"stderr") || time.len() < 20 {
        return None;
    }
    let full = match tags.split(|byte| *byte == b':').next()? {
        b"F" => true,
        b"P" => false,
        _ => return None,
    };
    Some(Line { time, full, text })
}

/// Runtimes leave out zeros at the end of a fraction, kubelet does not.
fn with_nine_digits(time: &[u8]) -> Vec<u8> {
    let (seconds, rest) = time.split_at(19);
    let (fraction, zone) = match rest.split_first() {
        Some((b'.', rest)) => {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            rest.split_at(digits)
        }
        _ => (&[][..], rest),
    };
    let mut out = seconds.to_vec();
    out.push(b'.');
    out.extend(fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9));
    out.extend_from_slice(zone);
    out
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use proptest::prelude::*;

    use super::*;

    const LOG: &str = "2026-01-02T03:04:05.1Z stdout F one\n\
        2026-01-02T03:04:06.123456789Z stdout P two, \n\
        2026-01-02T03:04:06.2Z stdout P and still \n\
        2026-01-02T03:04:06.3Z stdout F two\n\
        this is no line of a log\n\
        2026-01-02T03:04:07Z stderr F \n\
        2026-01-02T03:04:08+02:00 stderr F:tag three\n";

    fn all(wanted: &Wanted, pieces: impl IntoIterator<Item = Vec<u8>>) -> String {
        let mut formatter = Formatter::new(wanted);
        let mut out = Vec::new();
        for piece in pieces {
            formatter.push(&piece, &mut out);
        }
        formatter.end_of_file(&mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    fn whole(wanted: &Wanted) -> String {
        all(wanted, [LOG.as_bytes().to_vec()])
    }

    #[test]
    fn parts_are_joined_and_what_is_no_line_is_left_out() {
        assert_eq!(whole(&Wanted::default()), "one\ntwo, and still two\n\nthree\n");
    }

    #[test]
    fn a_time_stands_once_before_each_line_with_nine_digits() {
        let wanted = Wanted { timestamps: true, ..Wanted::default() };
        assert_eq!(
            whole(&wanted),
            "2026-01-02T03:04:05.100000000Z one\n\
             2026-01-02T03:04:06.123456789Z two, and still two\n\
             2026-01-02T03:04:07.000000000Z \n\
             2026-01-02T03:04:08.000000000+02:00 three\n"
        );
    }

    #[test]
    fn what_is_older_is_left_out() {
        let since = OffsetDateTime::parse("2026-01-02T03:04:06.25Z", &Rfc3339).expect("a time");
        let wanted = Wanted { since: Some(since), ..Wanted::default() };
        assert_eq!(whole(&wanted), "two\n\nthree\n");
    }

    #[test]
    fn no_more_than_the_limit_is_sent() {
        let wanted = Wanted { limit: NonZeroU64::new(6), ..Wanted::default() };
        assert_eq!(whole(&wanted), "one\ntw");
    }

    #[test]
    fn a_line_without_an_end_is_shown_when_nothing_more_comes() {
        let cut = LOG.as_bytes()[..LOG.len() - 3].to_vec();
        assert!(all(&Wanted::default(), [cut]).ends_with("thr\n"));
    }

    #[test]
    fn a_line_that_never_ends_takes_no_memory_and_costs_only_itself() {
        let mut formatter = Formatter::new(&Wanted::default());
        let mut out = Vec::new();
        for _ in 0..100 {
            formatter.push(&[b'x'; 10_000], &mut out);
            assert!(formatter.begun.len() <= LINE_BYTES_MAX);
        }
        formatter.push(b"y\n2026-01-02T03:04:05Z stdout F next\n", &mut out);
        assert_eq!(out, b"next\n");
    }

    proptest! {
        #[test]
        fn how_a_log_is_cut_into_pieces_changes_nothing(cuts in prop::collection::vec(1..40_usize, 0..40)) {
            let mut rest = LOG.as_bytes();
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece.to_vec());
                rest = more;
            }
            pieces.push(rest.to_vec());
            let wanted = Wanted { timestamps: true, ..Wanted::default() };
            prop_assert_eq!(all(&wanted, pieces), whole(&wanted));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut log = b"2026-01-02T03:04:05Z stdout F ".to_vec();
            log.extend(bytes.clone());
            let wanted = Wanted { timestamps: true, since: Some(OffsetDateTime::UNIX_EPOCH), ..Wanted::default() };
            all(&wanted, [log, bytes]);
        }
    }
}
