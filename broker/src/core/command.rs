//! Administration and modules.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    Core,
    event::{Command, CommandId, LogInfo, Origin, Response, SessionInfo, StateChange, StateOp},
    ledger::Effect,
    link::Phase,
    log::{Log, LogId},
    space::{BARRIER, scope},
};
use crate::limits;

/// What a replica of a tier says to who looks for what it does not have.
const ELSEWHERE: &str =
    "this hub is one replica of a tier: what nodes own, and all writes of State, are in NATS";

/// Whether a command is about what a tier's replicas share: this core has a mirror of the tier's own State, and of
/// nodes only what is on its way.
fn is_elsewhere(command: &Command, own: &Origin) -> bool {
    match command {
        Command::StateGet { origin, .. }
        | Command::StateList { origin, .. }
        | Command::StateWatch { origin, .. } => origin != own,
        Command::StateWrite(_)
        | Command::StateBarrier { .. }
        | Command::Intend { .. }
        | Command::LogRead { .. }
        | Command::LogSeek { .. } => true,
        _ => false,
    }
}

fn no_stream(origin: &Origin, stream: &str) -> Response {
    Response::Refused(format!("no stream {stream} of {origin:?}"))
}

impl Core {
    pub(super) fn on_command(&mut self, command: Command, id: CommandId) {
        let response = match command {
            command if self.config.shared && is_elsewhere(&command, &self.own) => {
                Response::Refused(ELSEWHERE.to_owned())
            }
            Command::StateGet { origin, space, key } => {
                let space = self.existing_space(&origin, &space);
                Response::Entry(space.and_then(|index| self.spaces[index].get(&key)))
            }
            Command::StateList { origin, space, prefix, after, limit, at } => {
                self.list_state(&origin, &space, &prefix, after.as_deref(), limit, at)
            }
            Command::StateWrite(ops) => match self.write_state(&ops) {
                Ok(revisions) => {
                    return self.ledger.after(Effect::Respond(id, Response::Written(revisions)));
                }
                Err(response) => response,
            },
            Command::Intend { owner, intent } => match self.intend(&owner, intent) {
                Ok(()) => return self.ledger.after(Effect::Respond(id, Response::Done)),
                Err(reason) => Response::Refused(reason),
            },
            Command::StateBarrier { space } => match self.write_barrier(&space) {
                Ok(revision) => {
                    return self.ledger.after(Effect::Respond(id, Response::Written(vec![revision])));
                }
                Err(reason) => Response::Refused(reason),
            },
            Command::StateWatch { .. } => self.on_state_watch(command),
            Command::LogList { origin } => Response::Logs(self.list_logs(origin.as_ref())),
            Command::LogRead { origin, stream, epoch, from, bytes_max } => {
                match self.history(&origin, &stream, epoch) {
                    Some(log) => return self.read_log(log, from, bytes_max, id),
                    None => no_stream(&origin, &stream),
                }
            }
            Command::LogSeek { origin, stream, epoch, time_us } => {
                match self.history(&origin, &stream, epoch) {
                    Some(log) => return self.seek_log(log, time_us, id),
                    None => no_stream(&origin, &stream),
                }
            }
            Command::Stats => Response::Stats(Box::new(self.stats_now())),
            Command::Sessions => Response::Sessions(self.list_sessions()),
            Command::Conditions => Response::Conditions(self.conditions.values().cloned().collect()),
            Command::SetCondition { kind, subject, message } => {
                match message {
                    Some(message) => self.set_condition(kind, subject, message),
                    None => self.clear_condition(kind, &subject),
                }
                Response::Done
            }
            Command::CloseNode { node, generation } => {
                self.replace_generation(&node, generation);
                Response::Done
            }
            Command::Forwards => Response::Forwards(self.forwarded()),
            Command::Drain { within } => return self.drain(within, id),
        };
        self.out.push(super::Action::Respond { id, response });
    }

    pub(super) fn existing_space(&self, origin: &Origin, space: &Arc<str>) -> Option<usize> {
        self.space_names.get(&(Arc::clone(origin), Arc::clone(space))).copied()
    }

    /// All or none: everything is checked before the first write.
    fn write_state(&mut self, ops: &[StateOp]) -> Result<Vec<u64>, Response> {
        let adds = ops.iter().any(|op| matches!(op.change, StateChange::Put(_)));
        if self.refusing || self.low && adds {
            return Err(Response::Refused("the store takes no writes now".to_owned()));
        }
        check_form(ops).map_err(Response::Refused)?;
        let own = Arc::clone(&self.own);
        for (index, op) in ops.iter().enumerate() {
            let space = self.space_of(&own, &op.space);
            self.spaces[space]
                .check(&op.key, op.expect)
                .map_err(|found| Response::Conflict { index, found })?;
        }
        let now = self.now;
        let write = |op: &StateOp| {
            let space = self.space_of(&own, &op.space);
            let (space, ledger) = (&mut self.spaces[space], &mut self.ledger);
            match &op.change {
                StateChange::Put(value) => space.write(ledger, now, &op.key, Some(value)),
                StateChange::Delete => space.write(ledger, now, &op.key, None),
                StateChange::Check => 0,
            }
        };
        Ok(ops.iter().map(write).collect())
    }

    /// The owner says that it has listed the source of this space completely.
    fn write_barrier(&mut self, name: &Arc<str>) -> Result<u64, String> {
        if self.refusing {
            return Err("the store takes no writes now".to_owned());
        }
        let own = Arc::clone(&self.own);
        let space = self.existing_space(&own, name).filter(|index| self.spaces[*index].scoped);
        let Some(index) = space else {
            return Err(format!("no space {name} here whose barrier is written by hand"));
        };
        Ok(self.spaces[index].write(&mut self.ledger, self.now, BARRIER, Some(b"")))
    }

    fn list_logs(&self, origin: Option<&Origin>) -> Vec<LogInfo> {
        self.logs
            .values()
            .filter(|log| origin.is_none_or(|origin| log.origin == *origin))
            .map(|log| LogInfo {
                origin: Arc::clone(&log.origin),
                stream: Arc::clone(&log.stream),
                class: log.class,
                epoch: log.epoch(),
                first: log.first,
                next: log.durable_next,
                begin: log.begin(),
                bytes: log.kept.bytes(),
                records: log.kept.records(),
                bytes_max: log.policy.bytes_max,
                seconds_to_full: self.seconds_to_full(log),
            })
            .collect()
    }

    /// The Log of this name that had this epoch, or the current one.
    fn history(&self, origin: &Origin, stream: &Arc<str>, epoch: Option<u64>) -> Option<LogId> {
        let current = self.log_names.get(&(Arc::clone(origin), Arc::clone(stream))).copied();
        let Some(epoch) = epoch else { return current };
        let had = |log: &Log| {
            let named = log.origin == *origin && log.stream == *stream;
            named && log.epochs.iter().any(|(_, held)| *held == epoch)
        };
        self.logs.values().find(|log| had(log)).map(|log| log.id)
    }

    fn list_sessions(&self) -> Vec<SessionInfo> {
        let clients = self.clients.values().map(|client| SessionInfo {
            session: client.session.unwrap_or(super::SessionId(0)),
            kind: match client.front {
                super::event::Front::Mqtt => "mqtt",
                super::event::Front::Nats => "nats",
                super::event::Front::Internal => "internal",
            },
            name: Arc::clone(&client.id),
            connected: client.session.is_some(),
            subscriptions: client.subscriptions.len(),
            queued_bytes: client.queued,
            established: client.session.is_some(),
        });
        let links = self.links.iter().map(|(session, link)| SessionInfo {
            session: *session,
            kind: "link",
            name: Arc::clone(&link.peer.name),
            connected: true,
            subscriptions: 0,
            queued_bytes: link.queued,
            established: link.phase == Phase::Established,
        });
        let relayed = self.relayed_nodes().map(|(node, link, session)| SessionInfo {
            session,
            kind: "relayed",
            name: Arc::clone(node),
            connected: true,
            subscriptions: 0,
            queued_bytes: 0,
            established: link.phase == Phase::Established,
        });
        clients.chain(links).chain(relayed).collect()
    }

    /// The counters, with the gauges as they are now.
    fn stats_now(&self) -> super::Stats {
        let mut stats = self.stats.clone();
        stats.clients_away = self.clients.values().filter(|client| client.session.is_none()).count() as u64;
        stats.clients = self.clients.len() as u64 - stats.clients_away;
        stats.links = self.established as u64;
        let clients: usize = self.clients.values().map(|client| client.queued).sum();
        stats.queue_bytes = (clients + self.links_queued) as u64;
        stats.budgets = self.budgets.states();
        stats.spent_today = self.budgets.spend.by_class();
        stats.logs = self.logs.len() as u64;
        stats.log_bytes = self.logs.values().map(|log| log.kept.bytes()).sum();
        let above = |log: &Log| !self.config.is_hub() && !log.origin.is_empty();
        for log in self.logs.values().filter(|log| above(log)) {
            if let Some(seconds) =
                self.seconds_to_full(log).filter(|_| log.origin == self.own && !log.retired)
            {
                stats.seconds_to_full.insert(Arc::clone(&log.stream), seconds);
            }
            let acknowledged = self.passed_upto(log.id).max(log.first.saturating_sub(1));
            stats.log_unacknowledged += (log.durable_next - 1).saturating_sub(acknowledged);
            let oldest =
                log.in_tail(acknowledged + 1).and_then(|record| codec::FrameView::parse(&record.body).ok());
            if let Some(view) = oldest {
                let held = stats.oldest_unacknowledged_us;
                stats.oldest_unacknowledged_us =
                    if held == 0 { view.time_us() } else { held.min(view.time_us()) };
            }
        }
        stats
    }
}

/// What a write must be, whatever is stored.
fn check_form(ops: &[StateOp]) -> Result<(), String> {
    if ops.len() > limits::STATE_OPS_MAX {
        return Err(format!("more than {} operations in one write", limits::STATE_OPS_MAX));
    }
    let mut bytes = 0;
    let mut keys = BTreeSet::new();
    for op in ops {
        codec::topic::validate_topic(&op.key).map_err(|error| format!("key {:?}: {error}", op.key))?;
        if !keys.insert((&op.space, &op.key)) {
            return Err(format!("key {:?} stands twice in one write", op.key));
        }
        bytes += op.key.len();
        if let StateChange::Put(value) = &op.change {
            if value.len() > limits::STATE_VALUE_MAX {
                return Err(format!("key {:?}: more than {} bytes", op.key, limits::STATE_VALUE_MAX));
            }
            if &*op.space == "fleet" && op.key.starts_with(scope::WANT) {
                scope::listed(value)?;
            }
            bytes += value.len();
        }
    }
    if bytes > limits::STATE_WRITE_BYTES_MAX {
        return Err(format!("more than {} bytes in one write", limits::STATE_WRITE_BYTES_MAX));
    }
    Ok(())
}
