//! What a peer may send: every source that it declares is judged by its certificate and by whom it may
//! forward for.

use std::sync::Arc;

use codec::{Class, Record, proto};

use super::{
    Core, DropReason,
    event::{Origin, Role, SessionId},
    link::{Import, Link, Side},
};

/// Sources that one peer may declare, for itself and for each name behind it.
pub(super) const SOURCES_MAX: usize = 256;
/// Of everybody behind one relay.
pub(super) const SOURCES_BEHIND_MAX: usize = 16_384;

impl Core {
    /// A declare binds a number, if this peer may speak of that source.
    pub(super) fn on_declare(&mut self, session: SessionId, record: Record) -> Result<(), String> {
        let number = record.header.source;
        let declare: proto::Declare =
            codec::decode(record.body).map_err(|error| format!("a declare that is none: {error}"))?;
        let Some(class) = u8::try_from(declare.class).ok().and_then(Class::from_u8) else {
            return Err(format!("a source of class {}", declare.class));
        };
        let link = &self.links[&session];
        let names = link
            .behind
            .as_ref()
            .map_or(0, |behind| behind.known.len())
            .max(if link.side == Side::Above { self.forwards.len() } else { 0 });
        let most = SOURCES_MAX.saturating_mul(1 + names).min(SOURCES_BEHIND_MAX.max(SOURCES_MAX));
        if link.imports.len() >= most || number == 0 || link.imports.contains_key(&number) {
            return Err(format!("source number {number} declared twice, or too many sources"));
        }
        let import = match self.authorize(session, &declare, class) {
            Ok(import) => import,
            Err(what) => {
                self.not_authorized(session, what);
                return Ok(());
            }
        };
        let link = self.links.get_mut(&session).expect("looked at it");
        link.imports.insert(number, import);
        Ok(())
    }

    /// A peer went beyond what it may: counted, shown, and its session ends.
    pub(super) fn not_authorized(&mut self, session: SessionId, what: String) {
        self.stats.drop(DropReason::NotAuthorized);
        let peer = Arc::clone(&self.links[&session].peer.name);
        self.set_condition("NotAuthorized", peer.to_string(), what.clone());
        self.refuse(session, proto::RefusalReason::NotAuthorized, &what, 0);
    }

    /// Whether the peer of a link may speak of this origin: its own, or one that it forwards for.
    fn speaks_of(&self, link: &Link, origin: &Origin) -> bool {
        match link.side {
            Side::Below => {
                let theirs = *origin == link.peer.name || link.speaks_for(origin);
                link.peer.role == Role::Node && theirs
            }
            Side::Above => *origin == self.own || self.forwards.contains_key(origin),
        }
    }

    fn import_state(&mut self, session: SessionId, origin: &Origin, name: &Arc<str>) -> Import {
        let space = self.space_of(origin, name);
        let link = self.links.get_mut(&session).expect("the link that declares");
        let run = link.runs.remove(&(Arc::clone(origin), Arc::clone(name))).unwrap_or(0);
        Import::State { space, run }
    }

    /// Default deny: what is not listed here, nobody may send.
    fn authorize(
        &mut self,
        session: SessionId,
        declare: &proto::Declare,
        class: Class,
    ) -> Result<Import, String> {
        let link = &self.links[&session];
        let origin = link.origin_named(&declare.origin);
        let name = self.known_name(&declare.name);
        let refused = || {
            Err(format!(
                "{} may not send source origin={:?} kind={} name={:?}",
                link.peer.name, declare.origin, declare.kind, declare.name
            ))
        };
        let below = link.side == Side::Below && self.speaks_of(link, &origin);
        let tier = link.side == Side::Above && origin.is_empty();
        let down = tier && name.strip_prefix("down/").is_some_and(|node| self.speaks_of(link, &node.into()));
        // What only passes through is taken as far as it is passed on.
        let through = link.side == Side::Below && !self.config.is_hub();
        let policy = if through { &self.config.exports } else { &self.config.imports };
        let taken = match declare.kind {
            2 => policy.has_stream(&name),
            3 => policy.has_space(&name),
            _ => true,
        };
        let import = match declare.kind {
            1 if self.speaks_of(link, &origin) => Ok(Import::Live { origin }),
            2 if below => {
                codec::topic::validate_topic(&name).map_err(|error| format!("stream name: {error}"))?;
                Ok(Import::Log { origin, stream: name, class, log: None })
            }
            2 if down => Ok(Import::Log { origin, stream: name, class, log: None }),
            3 if below && super::NODE_SPACES.contains(&&*name) => {
                Ok(self.import_state(session, &origin, &name))
            }
            // A relay passes no part of it on, so from one it can only be made up.
            3 if tier && link.peer.role == Role::Hub && &*name == "fleet" => {
                Ok(self.import_state(session, &origin, &name))
            }
            1..=3 => refused(),
            _ => Ok(Import::Unknown),
        };
        // What configuration does not take is skipped, and stays unacknowledged with its sender.
        import.map(|import| if taken { import } else { Import::Unknown })
    }
}
