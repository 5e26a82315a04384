//! `PUB` and `HPUB`: from bytes to a frame that the core takes.

use std::sync::atomic::Ordering;

use codec::{Trace, frame::FrameParts};

use super::{
    super::{
        Side, header, message,
        parser::PublishOp,
        reply::{Complaint, Fatal},
        subject::{self, Destination, SubjectError},
    },
    Session,
};
use crate::{
    clock,
    core::event::{Event, Publish, Target},
    limits,
};

/// Header that makes a publish on a node durable: its QoS, `0` or `1`.
const QOS: &str = "Octobus-QoS";

impl Session {
    pub(super) fn publish(&mut self, op: PublishOp<'_>) {
        let counters = &self.config.counters;
        counters.messages_in.fetch_add(1, Ordering::Relaxed);
        let bytes = op.payload.len() + op.headers.map_or(0, <[u8]>::len);
        counters.bytes_in.fetch_add(bytes as u64, Ordering::Relaxed);

        let headers = match (op.headers, self.options.headers()) {
            (None, _) => Ok(Vec::new()),
            (Some(_), false) => Err(Fatal::HeadersNotSupported),
            (Some(block), true) => header::parse(block).map_err(|_| Fatal::UnknownOperation),
        };
        match headers {
            Ok(headers) => match self.publication(op, headers) {
                Ok(()) => self.okay(),
                Err(Refused::Complaint(complaint)) => self.complain(&complaint),
                Err(Refused::Fatal(fatal)) => self.fail(fatal),
            },
            Err(fatal) => self.fail(fatal),
        }
    }

    /// Checks a message and hands it to the core.
    fn publication<'a>(
        &mut self,
        op: PublishOp<'a>,
        mut headers: Vec<(&'a str, &'a [u8])>,
    ) -> Result<(), Refused<'a>> {
        let subject = str::from_utf8(op.subject).map_err(|_| Complaint::PublishSubject)?;
        let destination = subject::destination(self.config.side, subject).map_err(|error| match error {
            SubjectError::Invalid => Complaint::PublishSubject,
            SubjectError::Forbidden => Complaint::Publish(subject),
        })?;
        if let Some(topic) = destination.permission()
            && !self.permissions.as_ref().is_some_and(|permissions| permissions.may_publish(&topic))
        {
            return Err(Complaint::Publish(subject).into());
        }
        let reply = match op.reply.map(str::from_utf8) {
            None => None,
            Some(Err(_)) => return Err(Complaint::PublishSubject.into()),
            Some(Ok(reply)) => Some(subject::reply(reply).map_err(|error| match error {
                SubjectError::Invalid => Complaint::PublishSubject,
                SubjectError::Forbidden => Complaint::Reply(reply),
            })?),
        };
        let Destination::Topic { target, topic } = destination else {
            if let Some(reply) = reply {
                self.nobody_responds(&reply);
            }
            return Ok(());
        };
        let qos = self.qos(&target, reply.is_some(), &mut headers);
        let trace = take_trace(&mut headers);
        let parts = FrameParts {
            topic: &topic,
            time_us: clock::wall_us(),
            time_trusted: self.config.time_trusted.load(Ordering::Relaxed),
            trace,
            ttl_s: 0,
            headers: &headers,
            payload: op.payload,
        };
        if parts.encoded_len() > limits::FRAME_MAX {
            return Err(Fatal::Payload.into());
        }
        let frame = parts.encode();
        // What is durable is no request: its reply subject goes no further.
        let reply = reply.filter(|_| qos == 0);
        let message = Publish { target, frame, qos, packet_id: 0, dup: false, retain: false, reply };
        self.push_publish(message);
        Ok(())
    }

    /// A node's Log takes what a header says, the Log towards a node takes what is no request. The header
    /// is for this front alone.
    fn qos(&self, target: &Target, is_request: bool, headers: &mut Vec<(&str, &[u8])>) -> u8 {
        let asked = headers.iter().any(|&(name, value)| name.eq_ignore_ascii_case(QOS) && value == b"1");
        headers.retain(|(name, _)| !name.eq_ignore_ascii_case(QOS));
        match target {
            Target::Node(_) => u8::from(!is_request),
            Target::Own => u8::from(asked && self.config.side == Side::Node),
        }
    }

    fn push_publish(&mut self, message: Publish) {
        self.unconfirmed = true;
        let cost = message.frame.len();
        match self.events.last_mut() {
            Some((Event::Published { messages, .. }, bytes)) => {
                messages.push(message);
                *bytes += cost;
                self.events_bytes += cost;
            }
            _ => self.push_event(Event::Published { session: self.id, messages: vec![message] }, cost),
        }
    }
}

/// Why a message is not taken.
enum Refused<'a> {
    Complaint(Complaint<'a>),
    Fatal(Fatal),
}

impl<'a> From<Complaint<'a>> for Refused<'a> {
    fn from(complaint: Complaint<'a>) -> Self {
        Self::Complaint(complaint)
    }
}

impl From<Fatal> for Refused<'_> {
    fn from(fatal: Fatal) -> Self {
        Self::Fatal(fatal)
    }
}

/// Takes the first valid trace context out of the headers.
fn take_trace(headers: &mut Vec<(&str, &[u8])>) -> Option<Trace> {
    let parsed = |&(name, value): &(&str, &[u8])| {
        let named = name.eq_ignore_ascii_case(message::TRACEPARENT);
        named.then(|| str::from_utf8(value).ok().and_then(Trace::from_traceparent)).flatten()
    };
    let at = headers.iter().position(|header| parsed(header).is_some())?;
    parsed(&headers.remove(at))
}
