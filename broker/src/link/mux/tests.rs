//! Two multiplexers, with the test as the connection between them.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    fragment::{Fragment, Says},
    state::{STREAMS_MAX, WINDOW},
    *,
};

struct Two {
    node: Mux,
    hub: Mux,
}

impl Two {
    fn new() -> Self {
        Self { node: Mux::new(true), hub: Mux::new(false) }
    }

    /// Carries everything both ways until nothing is left; the fragments that the node sent.
    fn carry(&self) -> Vec<Fragment> {
        let mut sent = Vec::new();
        loop {
            let mut moved = false;
            while let Some(message) = self.node.next_message() {
                moved = true;
                match message {
                    Message::Fragment(bytes) => {
                        sent.push(Fragment::parse(bytes.clone()).unwrap());
                        self.hub.receive(bytes).unwrap();
                    }
                    Message::Ping(payload) => self.node.on_pong(&payload),
                }
            }
            while let Some(message) = self.hub.next_message() {
                moved = true;
                match message {
                    Message::Fragment(bytes) => self.node.receive(bytes).unwrap(),
                    Message::Ping(payload) => self.hub.on_pong(&payload),
                }
            }
            if !moved {
                return sent;
            }
        }
    }
}

async fn read_some(receiver: &mut Receiver, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    receiver.read_exact(&mut bytes).await.unwrap();
    bytes
}

#[tokio::test]
async fn control_goes_before_a_batch_that_waited_longer() {
    let two = Two::new();
    let mut bulk = two.node.open(Class::Bulk).await.unwrap();
    bulk.write(vec![Bytes::from(vec![1; 60 << 10])]).await.unwrap();
    let (mut control, _back) = two.node.control().await.unwrap();
    control.write(vec![Bytes::from_static(b"now")]).await.unwrap();
    let mut alarm = two.node.open(Class::Alarm).await.unwrap();
    alarm.write(vec![Bytes::from_static(b"fire")]).await.unwrap();
    let lanes: Vec<u8> = two.carry().iter().map(|fragment| fragment.lane).collect();
    assert_eq!(lanes[..2], [Class::Control as u8, Class::Alarm as u8]);
    assert!(lanes[2..].len() >= 4 && lanes[2..].iter().all(|lane| *lane == Class::Bulk as u8), "{lanes:?}");
}

#[tokio::test]
async fn fragments_of_several_lanes_come_together_each_in_its_own() {
    let two = Two::new();
    let mut lanes = Vec::new();
    for class in [Class::Event, Class::Telemetry] {
        let mut lane = two.node.open(class).await.unwrap();
        lane.write(vec![Bytes::from(vec![class as u8; 40_000]), Bytes::from_static(b"end")]).await.unwrap();
        lanes.push(lane);
    }
    let fragments = two.carry();
    let ends = |lane: Class| {
        let of = fragments.iter().filter(|fragment| fragment.lane == lane as u8);
        of.filter(|fragment| matches!(fragment.says, Says::Data { last: true, .. })).count()
    };
    assert_eq!((ends(Class::Event), ends(Class::Telemetry)), (1, 1));
    for class in [Class::Event, Class::Telemetry] {
        let mut lane = two.hub.accept().await.unwrap();
        assert_eq!(read_some(&mut lane, 40_000).await, vec![class as u8; 40_000]);
        assert_eq!(read_some(&mut lane, 3).await, b"end");
    }
}

#[tokio::test]
async fn a_lane_that_nobody_reads_holds_a_window_and_no_other_lane() {
    let two = Two::new();
    let mut bulk = two.node.open(Class::Bulk).await.unwrap();
    bulk.write(vec![Bytes::from(vec![0; 3 * WINDOW])]).await.unwrap();
    let sent: usize = bodies(&two.carry(), Class::Bulk as u8);
    assert_eq!(sent, WINDOW);
    let mut event = two.node.open(Class::Event).await.unwrap();
    event.write(vec![Bytes::from_static(b"passes")]).await.unwrap();
    two.carry();
    let mut unread = two.hub.accept().await.unwrap();
    assert_eq!(read_some(&mut two.hub.accept().await.unwrap(), 6).await, b"passes");
    read_some(&mut unread, WINDOW / 2).await;
    assert_eq!(bodies(&two.carry(), Class::Bulk as u8), WINDOW / 2, "as much as was read");
}

fn bodies(fragments: &[Fragment], lane: u8) -> usize {
    let of = fragments.iter().filter(|fragment| fragment.lane == lane);
    of.map(|fragment| if let Says::Data { body, .. } = &fragment.says { body.len() } else { 0 }).sum()
}

#[tokio::test]
async fn a_lane_ends_once_its_reader_has_the_end_and_can_be_opened_again() {
    let two = Two::new();
    for round in 0..3_u8 {
        let mut lane = two.node.open(Class::State).await.unwrap();
        lane.write(vec![Bytes::from(vec![round])]).await.unwrap();
        let mut finishing = tokio_test_task(lane.finish());
        assert!(finishing.poll().is_pending());
        two.carry();
        assert!(finishing.poll().is_pending(), "nobody has read it");
        let mut received = Vec::new();
        two.hub.accept().await.unwrap().read_to_end(&mut received).await.unwrap();
        assert_eq!(received, [round]);
        two.carry();
        assert!(matches!(finishing.poll(), Poll::Ready(Ok(()))));
    }
}

/// A future that the test polls by hand.
struct Manual<F>(Pin<Box<F>>);

fn tokio_test_task<F: Future>(future: F) -> Manual<F> {
    Manual(Box::pin(future))
}

impl<F: Future> Manual<F> {
    fn poll(&mut self) -> Poll<F::Output> {
        self.0.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop()))
    }
}

#[tokio::test]
async fn streams_half_close_each_way_and_their_numbers_come_back() {
    let two = Two::new();
    for round in 0..300_u32 {
        let (opener, other) = if round % 2 == 0 { (&two.node, &two.hub) } else { (&two.hub, &two.node) };
        let mut stream = opener.open_stream(Class::Event).await.unwrap();
        stream.write_all(&round.to_le_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        two.carry();
        let mut accepted = other.accept_stream().await.unwrap();
        let mut asked = Vec::new();
        accepted.read_to_end(&mut asked).await.unwrap();
        assert_eq!(asked, round.to_le_bytes());
        accepted.write_all(b"answer").await.unwrap();
        accepted.shutdown().await.unwrap();
        two.carry();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        drop((stream, accepted));
        two.carry();
    }
}

#[tokio::test]
async fn a_dropped_stream_ends_at_the_other_side_and_leaves_nothing() {
    let two = Two::new();
    for round in 0..200 {
        let mut stream = two.hub.open_stream(Class::Event).await.unwrap();
        if round % 3 == 0 {
            continue; // the peer never hears of it
        }
        stream.write_all(b"half of some").await.unwrap();
        two.carry();
        let mut accepted = two.node.accept_stream().await.unwrap();
        if round % 3 == 1 {
            drop(stream);
            two.carry();
            let error = accepted.read_to_end(&mut Vec::new()).await.unwrap_err();
            assert_eq!(StreamCode::of(&error), Some(StreamCode::CANCELLED));
            assert!(accepted.write_all(b"x").await.is_err());
        } else {
            accepted.reset(StreamCode::NOT_FOUND);
            two.carry();
            let error = stream.read_to_end(&mut Vec::new()).await.unwrap_err();
            assert_eq!(StreamCode::of(&error), Some(StreamCode::NOT_FOUND));
        }
        two.carry();
    }
    two.carry();
    // All numbers are free again: as many as are allowed can be opened at once.
    let mut open = Vec::new();
    for _ in 0..STREAMS_MAX {
        let mut stream = two.hub.open_stream(Class::Event).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        open.push(stream);
    }
    two.carry();
    assert!(tokio_test_task(two.hub.open_stream(Class::Event)).poll().is_pending());
}

#[tokio::test]
async fn a_peer_that_breaks_the_rules_is_told_from_one_that_does_not() {
    let data = |lane: u8, len: usize| Fragment {
        lane,
        says: Says::Data { body: vec![0; len].into(), last: true, fin: false },
    };
    let fin = |lane: u8| Fragment { lane, says: Says::Data { body: Bytes::new(), last: true, fin: true } };
    let says = |lane: u8, says: Says| Fragment { lane, says };
    let wrong = [
        ("window", vec![data(5, BODY_MAX); WINDOW / BODY_MAX + 1]),
        ("may not be opened", vec![data(6, 1)]),
        ("may not be opened", vec![data(15, 1)]),
        ("may not be opened", vec![data(17, 1)]),
        ("behind the end", vec![fin(0), data(0, 1)]),
        ("behind the end", vec![data(3, 1), says(3, Says::Reset(1)), says(3, Says::Reset(1))]),
        ("not open", vec![says(2, Says::Reset(0))]),
        ("not open", vec![says(2, Says::Stop(0))]),
        ("not open", vec![says(2, Says::Credit(1))]),
        ("not open", vec![says(2, Says::Ended)]),
        ("has not ended", vec![says(0, Says::Ended)]),
        ("more credit", vec![says(0, Says::Credit(1))]),
        ("more credit", vec![says(0, Says::Credit(u32::MAX))]),
        ("more Streams", (0..=STREAMS_MAX).map(|n| data(16 + 2 * n as u8, 1)).collect()),
    ];
    for (expected, fragments) in wrong {
        let hub = Mux::new(false);
        let (last, before) = fragments.split_last().unwrap();
        for fragment in before {
            hub.receive(fragment.encode()).unwrap();
        }
        let error = hub.receive(last.encode()).unwrap_err();
        assert!(error.contains(expected), "{error:?} instead of {expected:?}");
    }
}

#[test]
fn made_up_messages_panic_nobody() {
    let mut state = 1_u64;
    for _ in 0..20_000 {
        let input: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Small numbers: short messages, known lanes, known flags.
            ((state >> 33) % 23) as u8
        })
        .take(64)
        .collect();
        fuzz(&input);
    }
}
