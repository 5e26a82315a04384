use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

const PAYLOAD_MAX: usize = 1 << 20;

/// An operation that outlives the buffer.
fn owned(op: &Op<'_>) -> String {
    format!("{op:?}")
}

/// What a connection would make of a stream that arrives in pieces.
fn receive<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<String>, Option<ParseError>) {
    let mut buffer = Vec::new();
    let mut needed = 1;
    let mut ops = Vec::new();
    for piece in pieces {
        buffer.extend_from_slice(piece);
        while buffer.len() >= needed {
            match parse(&buffer, PAYLOAD_MAX) {
                Ok(Parsed::Op { op, used }) => {
                    ops.push(owned(&op));
                    assert!((1..=buffer.len()).contains(&used));
                    buffer.drain(..used);
                    needed = 1;
                }
                Ok(Parsed::Incomplete { needed: more }) => {
                    assert!(more > buffer.len(), "waits for what is there already");
                    assert!(more <= PAYLOAD_MAX + 2 * CONTROL_LINE_MAX, "asks for more than limits allow");
                    needed = more;
                }
                Err(error) => return (ops, Some(error)),
            }
        }
    }
    (ops, None)
}

fn one(input: &[u8]) -> Op<'_> {
    match parse(input, PAYLOAD_MAX) {
        Ok(Parsed::Op { op, used }) => {
            assert_eq!(used, input.len());
            op
        }
        other => panic!("{other:?} from {}", input.escape_ascii()),
    }
}

fn error(input: &[u8]) -> ParseError {
    parse(input, PAYLOAD_MAX).expect_err(&input.escape_ascii().to_string())
}

fn token() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9$_.>*-]{1,20}"
}

fn message() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(b"PING\r\n".to_vec()),
        Just(b"pong\n".to_vec()),
        Just(b"CONNECT {\"verbose\":false}\r\n".to_vec()),
        (token(), token()).prop_map(|(subject, sid)| format!("SUB {subject} {sid}\r\n").into_bytes()),
        (token(), token(), token()).prop_map(|(a, b, c)| format!("sub\t{a}  {b} {c}\r\n").into_bytes()),
        (token(), any::<u32>()).prop_map(|(sid, max)| format!("UNSUB {sid} {max}\r\n").into_bytes()),
        (token(), prop::option::of(token()), prop::collection::vec(any::<u8>(), 0..300)).prop_map(
            |(subject, reply, payload)| {
                let reply = reply.map(|reply| format!(" {reply}")).unwrap_or_default();
                let head = format!("PUB {subject}{reply} {}\r\n", payload.len());
                [head.as_bytes(), &payload, b"\r\n"].concat()
            }
        ),
        (token(), prop::collection::vec(any::<u8>(), 0..50), prop::collection::vec(any::<u8>(), 0..50))
            .prop_map(|(subject, headers, payload)| {
                let head = format!("HPUB {subject} {} {}\r\n", headers.len(), headers.len() + payload.len());
                [head.as_bytes(), &headers, &payload, b"\r\n"].concat()
            }),
    ]
}

proptest! {
    #[test]
    fn any_split_of_the_stream_gives_the_same_operations(
        messages in prop::collection::vec(message(), 1..12),
        damage in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
        splits in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let count = messages.len();
        let mut stream = messages.concat();
        if let Some((at, byte)) = &damage {
            let at = at.index(stream.len());
            stream[at] = *byte;
        }
        let mut cuts: Vec<usize> = splits.iter().map(|split| split.index(stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let whole = receive([&stream[..]]);
        let split = receive(cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]));
        let bytewise = receive(stream.chunks(1));
        prop_assert_eq!(&whole, &split);
        prop_assert_eq!(&whole, &bytewise);
        if damage.is_none() {
            prop_assert_eq!((whole.0.len(), whole.1), (count, None));
        }
    }
}

#[test]
fn no_mutation_of_a_stream_panics() {
    let stream = b"CONNECT {\"headers\":true}\r\nSUB a.b.> q 1\r\nPUB a.b r.1 5\r\nhello\r\n\
        HPUB a 12 17\r\nNATS/1.0\r\n\r\nhello\r\nUNSUB 1 5\r\nPING\r\nPONG\r\n";
    for seed in 0..20_000 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut stream = stream.to_vec();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..stream.len());
            match random.random_range(0..4) {
                0 => stream[at] = random.random(),
                1 => stream.truncate(at.max(1)),
                2 => stream.insert(at, random.random()),
                _ => stream.extend_from_within(at..),
            }
        }
        receive(stream.chunks(random.random_range(1..50)));
    }
}

#[test]
fn a_claim_beyond_the_limit_is_refused_before_its_payload() {
    assert_eq!(error(b"PUB a 1073741824\r\n"), ParseError::Payload(1 << 30));
    assert_eq!(error(b"HPUB a 10 1073741824\r\n"), ParseError::Payload(1 << 30));
    assert_eq!(error(b"PUB a 1048577\r\n"), ParseError::Payload((1 << 20) + 1));
    let incomplete = parse(b"PUB a 1048576\r\n", PAYLOAD_MAX).unwrap();
    assert_eq!(incomplete, Parsed::Incomplete { needed: 15 + (1 << 20) + 2 });
}

#[test]
fn a_publish_has_its_parts() {
    let publish =
        |subject, reply, headers, payload| Op::Publish(PublishOp { subject, reply, headers, payload });
    assert_eq!(one(b"PUB a.b 0\r\n\r\n"), publish(b"a.b", None, None, b""));
    assert_eq!(one(b"pub a.b 2\n\r\n\r\n"), publish(b"a.b", None, None, b"\r\n"));
    assert_eq!(one(b"PUB a r 2\r\nxy\r\n"), publish(b"a", Some(b"r"), None, b"xy"));
    assert_eq!(one(b"HPUB a 2 3\r\nhhp\r\n"), publish(b"a", None, Some(b"hh"), b"p"));
    assert_eq!(one(b"hPub\ta  r\t2 2 \r\nhh\r\n"), publish(b"a", Some(b"r"), Some(b"hh"), b""));
    assert_eq!(one(b"HPUB a 0 0\r\n\r\n"), publish(b"a", None, Some(b""), b""));
}

#[test]
fn numbers_and_argument_counts_are_strict() {
    let lines: [&[u8]; 25] = [
        b"PUB\r\n",
        b"PUB a\r\n",
        b"PUB a b c 1\r\n",
        b"PUB a -1\r\n",
        b"PUB a +1\r\n",
        b"PUB a 1x\r\n",
        b"PUB a 0x1\r\n",
        b"PUB a 99999999999999999999999\r\n",
        b"HPUB a 5\r\n",
        b"HPUB a 5 4\r\n",
        b"HPUB a r 1 x\r\n",
        b"HPUB a b c 1 1\r\n",
        b"SUB\r\n",
        b"SUB a\r\n",
        b"SUB a b c d\r\n",
        b"UNSUB\r\n",
        b"UNSUB 1 2 3\r\n",
        b"UNSUB 1 -1\r\n",
        b"UNSUB 1 many\r\n",
        b"PINGPONG\r\n",
        b"PUBa 1\r\n",
        b"MSG a 1 0\r\n",
        b"\r\n",
        b" PING\r\n",
        b"PUB a 2\r\nxyz\r\n",
    ];
    for line in lines {
        assert_eq!(error(line), ParseError::UnknownOperation, "{}", line.escape_ascii());
    }
}

#[test]
fn another_protocols_client_is_turned_away_by_its_first_byte() {
    let beginnings: [&[u8]; 5] = [b"GET", b"\x16\x03\x01", b"\x10\x0e\x00\x04MQTT", b"CONNECTX", b"*1"];
    for beginning in beginnings {
        assert_eq!(error(beginning), ParseError::UnknownOperation, "{}", beginning.escape_ascii());
    }
    for beginning in [&b"C"[..], b"CONNECT", b"CONNECT ", b"h", b"un", b"PING\r"] {
        assert!(matches!(parse(beginning, 0), Ok(Parsed::Incomplete { .. })));
    }
}

#[test]
fn a_control_line_has_a_limit() {
    let line = |len: usize| format!("SUB {} 1", "a".repeat(len - 6)).into_bytes();
    let longest = [&line(CONTROL_LINE_MAX)[..], b"\r\n"].concat();
    assert!(matches!(one(&longest), Op::Subscribe { .. }));
    assert_eq!(error(&[&line(CONTROL_LINE_MAX + 1)[..], b"\r\n"].concat()), ParseError::ControlLine);
    assert_eq!(error(&line(CONTROL_LINE_MAX + 2)), ParseError::ControlLine);
    assert_eq!(error(&line(1 << 20)), ParseError::ControlLine);
}
