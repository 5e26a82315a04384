//! Who may connect, publish and subscribe: one user file for all fronts. It fails closed.
//!
//! ```toml
//! [[user]]
//! name = "boiler"
//! password_hash = "$7$101$ooHZ0v0+VJHJpOKA$..."   # as mosquitto_passwd writes it, without "boiler:"
//! publish = ["sensors/boiler/#"]
//! subscribe = ["valves/+"]
//! ```
//!
//! What is not listed is refused. One thing needs no listing: answers. A topic in `_INBOX/` has a random name
//! that only who asked and who was asked know, so the name is the permission; a filter that would catch the
//! names of others is refused.

use std::{
    collections::HashMap,
    fmt,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use codec::{
    Filter,
    topic::{INBOX, Level, is_reserved},
};
use ring::pbkdf2;
use tokio::sync::Semaphore;
use toml::{Spanned, Table, Value};

/// How a front knows its clients.
#[derive(Debug, Clone)]
pub enum Auth {
    /// Everybody may do everything: for development, on a loopback address.
    Anonymous,
    /// Who stands in the user file, and nobody else.
    Users(Arc<Users>),
}

/// A client that was let in.
#[derive(Debug, Clone)]
pub struct Principal {
    /// The user's name; `None` for anonymous clients.
    pub name: Option<Arc<str>>,
    /// What it may do.
    pub permissions: Arc<Permissions>,
}

impl Auth {
    /// Lets a client in, or not. Costs one password hash on a thread of its own, whether the user exists or not.
    ///
    /// Cancel safe: dropping the future leaves at most one hash to be finished.
    pub async fn admit(&self, name: Option<&str>, password: Option<&[u8]>) -> Option<Principal> {
        match self {
            Self::Anonymous => Some(Principal { name: None, permissions: Arc::new(Permissions::all()) }),
            Self::Users(users) => users.verify(name?, password?).await,
        }
    }
}

/// The users of a user file.
#[derive(Debug)]
pub struct Users {
    by_name: HashMap<Arc<str>, User>,
    /// Checked for names that do not exist, so that the time tells nothing.
    decoy: Arc<PasswordHash>,
    /// Hashes at a time: a flood of wrong passwords costs a bounded share of the machine.
    verifiers: Arc<Semaphore>,
}

#[derive(Debug)]
struct User {
    hash: Arc<PasswordHash>,
    permissions: Arc<Permissions>,
}

/// A user file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// It cannot be read.
    #[error("cannot read the user file {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It can be read and is wrong; everything that is wrong with it.
    #[error("the user file is wrong:{}", Mistakes(.0))]
    Mistakes(Vec<Mistake>),
}

/// One thing that is wrong in a user file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Line, counted from 1.
    pub line: usize,
    /// The user, if the entry has a name.
    pub user: Option<String>,
    /// What is wrong and what to do.
    pub text: String,
}

struct Mistakes<'a>(&'a [Mistake]);

impl fmt::Display for Mistakes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|mistake| write!(f, "\n  {mistake}"))
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}", self.line)?;
        if let Some(user) = &self.user {
            write!(f, ", user {user:?}")?;
        }
        write!(f, ": {}", self.text)
    }
}

impl Users {
    /// Reads a user file.
    ///
    /// # Errors
    /// It cannot be read, or it has mistakes: all of them are reported at once.
    pub fn load(path: &Path) -> Result<Self, UsersError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| UsersError::Read { path: path.to_owned(), source })?;
        Self::parse(&text)
    }

    /// Reads the text of a user file.
    ///
    /// # Errors
    /// All mistakes in it.
    pub fn parse(text: &str) -> Result<Self, UsersError> {
        let line_at = |offset: usize| 1 + text[..offset.min(text.len())].matches('\n').count();
        let file: File = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_at(span.start));
            UsersError::Mistakes(vec![Mistake { line, user: None, text: error.message().to_owned() }])
        })?;
        let mut by_name = HashMap::with_capacity(file.user.len());
        let mut mistakes = Vec::new();
        for entry in file.user {
            let mut reader =
                EntryReader { line: line_at(entry.span().start), user: None, mistakes: &mut mistakes };
            if let Some((name, user)) = reader.read(entry.into_inner())
                && by_name.insert(Arc::clone(&name), user).is_some()
            {
                reader.mistake("the name is given twice");
            }
        }
        if !mistakes.is_empty() {
            return Err(UsersError::Mistakes(mistakes));
        }
        let decoy = Arc::new(PasswordHash {
            iterations: ITERATIONS_DEFAULT,
            salt: vec![0; 12],
            hash: [0; pbkdf2_sha512::LEN],
        });
        let decoy = by_name.values().next().map_or(decoy, |user| Arc::clone(&user.hash));
        Ok(Self { by_name, decoy, verifiers: Arc::new(Semaphore::new(VERIFIERS)) })
    }

    /// Checks a password.
    async fn verify(&self, name: &str, password: &[u8]) -> Option<Principal> {
        let found = self.by_name.get_key_value(name);
        let hash = Arc::clone(found.map_or(&self.decoy, |(_name, user)| &user.hash));
        let permit = Arc::clone(&self.verifiers).acquire_owned().await.ok()?;
        let password = password.to_vec();
        let matches = tokio::task::spawn_blocking(move || {
            let matches = hash.matches(&password);
            drop(permit);
            matches
        });
        let matches = matches.await.unwrap_or(false);
        let (name, user) = found?;
        matches
            .then(|| Principal { name: Some(Arc::clone(name)), permissions: Arc::clone(&user.permissions) })
    }
}

/// What a client may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permissions {
    all: bool,
    publish: Vec<Filter>,
    subscribe: Vec<Filter>,
}

impl Permissions {
    /// Everything that a client can be allowed.
    #[must_use]
    pub fn all() -> Self {
        Self { all: true, publish: Vec::new(), subscribe: Vec::new() }
    }

    /// Publishing to what `publish` matches and subscribing to what `subscribe` covers.
    #[must_use]
    pub fn new(publish: Vec<Filter>, subscribe: Vec<Filter>) -> Self {
        Self { all: false, publish, subscribe }
    }

    /// True if the client may publish to this topic. Topics that begin with `$` and those of the bus itself
    /// are nobody's.
    #[must_use]
    pub fn may_publish(&self, topic: &str) -> bool {
        if topic.starts_with('$') {
            return false;
        }
        if is_reserved(topic) {
            return topic.split_once('/').is_some_and(|(first, rest)| first == INBOX && !rest.is_empty());
        }
        self.all || self.publish.iter().any(|filter| filter.matches(topic, false))
    }

    /// True if the client may be handed a message of this topic. A session outlives the permissions under which
    /// it subscribed, so every delivery is asked about; what [`may_subscribe`](Self::may_subscribe) grants passes.
    #[must_use]
    pub fn may_receive(&self, topic: &str) -> bool {
        let is_inbox = || topic.split_once('/').is_some_and(|(first, _)| first == INBOX);
        self.all || is_inbox() || self.subscribe.iter().any(|filter| filter.matches(topic, false))
    }

    /// True if nothing is refused that can be allowed.
    pub(crate) fn is_all(&self) -> bool {
        self.all
    }

    /// True if the client may have everything that this filter matches.
    #[must_use]
    pub fn may_subscribe(&self, wanted: &Filter) -> bool {
        let mut levels = wanted.levels();
        if levels.next() == Some(Level::Name(INBOX)) {
            return matches!(levels.next(), Some(Level::Name(name)) if !name.is_empty());
        }
        self.all || self.subscribe.iter().any(|filter| filter.covers(wanted))
    }
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    user: Vec<Spanned<Table>>,
}

/// Reads one `[[user]]` by hand, because serde stops at the first mistake.
struct EntryReader<'a> {
    line: usize,
    user: Option<String>,
    mistakes: &'a mut Vec<Mistake>,
}

impl EntryReader<'_> {
    fn read(&mut self, mut entry: Table) -> Option<(Arc<str>, User)> {
        let name = self.name(entry.remove("name"));
        let hash = self.hash(entry.remove("password_hash"));
        let publish = self.filters("publish", entry.remove("publish"));
        let subscribe = self.filters("subscribe", entry.remove("subscribe"));
        for key in entry.keys() {
            self.mistake(format!("unknown key {key:?}; known are name, password_hash, publish, subscribe"));
        }
        let permissions = Arc::new(Permissions::new(publish, subscribe));
        Some((name?, User { hash: Arc::new(hash?), permissions }))
    }

    fn mistake(&mut self, text: impl Into<String>) {
        self.mistakes.push(Mistake { line: self.line, user: self.user.clone(), text: text.into() });
    }

    fn name(&mut self, value: Option<Value>) -> Option<Arc<str>> {
        let Some(Value::String(name)) = value else {
            self.mistake("name is missing or not a string");
            return None;
        };
        self.user = Some(name.clone());
        // Sessions are kept as "<user>/<client id>".
        if name.is_empty() || name.contains(['/', '\0']) {
            self.mistake("a name is not empty and contains no '/'");
            return None;
        }
        Some(name.into())
    }

    fn hash(&mut self, value: Option<Value>) -> Option<PasswordHash> {
        let Some(Value::String(text)) = value else {
            self.mistake("password_hash is missing or not a string; mosquitto_passwd makes one");
            return None;
        };
        match PasswordHash::parse(&text) {
            Ok(hash) => Some(hash),
            Err(reason) => {
                self.mistake(format!("password_hash: {reason}"));
                None
            }
        }
    }

    fn filters(&mut self, key: &str, value: Option<Value>) -> Vec<Filter> {
        let entries = match value {
            None => return Vec::new(),
            Some(Value::Array(entries)) => entries,
            Some(_) => {
                self.mistake(format!("{key} is not a list of filters"));
                return Vec::new();
            }
        };
        let mut filters = Vec::with_capacity(entries.len());
        for entry in &entries {
            match entry.as_str().map(Filter::parse) {
                Some(Ok(filter)) => filters.push(filter),
                Some(Err(error)) => self.mistake(format!("{key}: {entry}: {error}")),
                None => self.mistake(format!("{key}: {entry} is not a string")),
            }
        }
        filters
    }
}

/// `$7$<iterations>$<salt>$<hash>`: PBKDF2 with HMAC-SHA512, the format of `mosquitto_passwd`.
struct PasswordHash {
    iterations: NonZeroU32,
    salt: Vec<u8>,
    hash: [u8; pbkdf2_sha512::LEN],
}

mod pbkdf2_sha512 {
    pub(super) const LEN: usize = 64;
}

/// Mosquitto's default.
const ITERATIONS_DEFAULT: NonZeroU32 = NonZeroU32::new(101).expect("not zero");
/// About half a second of one core: more is a mistake or a weapon.
const ITERATIONS_MAX: u32 = 1_000_000;
const SALT_BYTES_MAX: usize = 64;
/// Password checks at a time.
const VERIFIERS: usize = 2;

impl PasswordHash {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let rest =
            text.strip_prefix("$7$").ok_or("not of the form $7$iterations$salt$hash (PBKDF2-SHA512)")?;
        let mut parts = rest.split('$');
        let (Some(iterations), Some(salt), Some(hash), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("not of the form $7$iterations$salt$hash");
        };
        let iterations = iterations.parse().map_err(|_not| "the iterations are not a positive number")?;
        if iterations > NonZeroU32::new(ITERATIONS_MAX).expect("not zero") {
            return Err("more than 1000000 iterations");
        }
        let salt = BASE64.decode(salt).map_err(|_not| "the salt is not base64")?;
        if salt.is_empty() || salt.len() > SALT_BYTES_MAX {
            return Err("the salt has not 1 to 64 bytes");
        }
        let hash = BASE64.decode(hash).map_err(|_not| "the hash is not base64")?;
        let hash = hash.try_into().map_err(|_other| "the hash has not 64 bytes")?;
        Ok(Self { iterations, salt, hash })
    }

    fn matches(&self, password: &[u8]) -> bool {
        pbkdf2::verify(pbkdf2::PBKDF2_HMAC_SHA512, self.iterations, &self.salt, password, &self.hash).is_ok()
    }
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PasswordHash").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash_of(password: &str) -> String {
        let salt = b"twelve bytes";
        let mut hash = [0; 64];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA512, ITERATIONS_DEFAULT, salt, password.as_bytes(), &mut hash);
        format!("$7$101${}${}", BASE64.encode(salt), BASE64.encode(hash))
    }

    fn mistakes(text: &str) -> Vec<String> {
        match Users::parse(text) {
            Err(UsersError::Mistakes(mistakes)) => mistakes.iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn only_a_listed_user_with_its_password_is_let_in() {
        let text = format!("[[user]]\nname = \"u\"\npassword_hash = \"{}\"\n", hash_of("secret"));
        let auth = Auth::Users(Arc::new(Users::parse(&text).unwrap()));
        assert_eq!(auth.admit(Some("u"), Some(b"secret")).await.unwrap().name.as_deref(), Some("u"));
        assert!(auth.admit(Some("u"), Some(b"wrong")).await.is_none());
        assert!(auth.admit(Some("u"), None).await.is_none());
        assert!(auth.admit(Some("v"), Some(b"secret")).await.is_none());
        assert!(auth.admit(None, None).await.is_none());
    }

    #[tokio::test]
    async fn a_hash_of_mosquitto_passwd_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwd");
        let made = std::process::Command::new("mosquitto_passwd")
            .args(["-c", "-b", path.to_str().unwrap(), "u", "s3cret"])
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("skipped: mosquitto_passwd is not installed");
            return;
        }
        let line = std::fs::read_to_string(&path).unwrap();
        let hash = line.trim_end().strip_prefix("u:").unwrap();
        let users = Users::parse(&format!("[[user]]\nname = \"u\"\npassword_hash = \"{hash}\"\n")).unwrap();
        assert!(users.verify("u", b"s3cret").await.is_some());
        assert!(users.verify("u", b"S3cret").await.is_none());
    }

    #[tokio::test]
    async fn an_empty_user_file_lets_nobody_in() {
        let users = Users::parse("").unwrap();
        assert!(users.verify("", b"").await.is_none());
    }

    #[test]
    fn all_mistakes_are_reported_at_once_with_line_and_user() {
        let text = format!(
            "[[user]]\nname = \"a\"\npassword_hash = \"plain\"\npublish = [\"a/#/b\", 7]\nrole = 1\n\n\
             [[user]]\npassword_hash = \"{0}\"\n\n\
             [[user]]\nname = \"b\"\npassword_hash = \"{0}\"\nsubscribe = \"#\"\n\n\
             [[user]]\nname = \"b\"\npassword_hash = \"{0}\"\n",
            hash_of("x")
        );
        let found = mistakes(&text);
        assert_eq!(found.len(), 7, "{found:#?}");
        assert!(found[0].starts_with("line 1, user \"a\": password_hash"), "{}", found[0]);
        assert!(found[4].starts_with("line 7: name is missing"), "{}", found[4]);
        assert!(found[6].starts_with("line 15, user \"b\": the name is given twice"), "{}", found[6]);
    }

    #[test]
    fn a_file_that_is_not_toml_is_refused_with_its_line() {
        assert!(mistakes("[[user]]\nname = \n")[0].starts_with("line 2"));
        assert_eq!(mistakes("[[users]]\nname = \"a\"\n").len(), 1, "a misspelt table does not open the door");
    }

    fn permissions(publish: &[&str], subscribe: &[&str]) -> Permissions {
        let parse = |texts: &[&str]| texts.iter().map(|text| Filter::parse(text).unwrap()).collect();
        Permissions::new(parse(publish), parse(subscribe))
    }

    #[test]
    fn what_is_not_listed_is_refused() {
        let some = permissions(&["a/#"], &["b/+/c"]);
        assert!(some.may_publish("a/b") && !some.may_publish("b/x/c"));
        let may_subscribe = |text| some.may_subscribe(&Filter::parse(text).unwrap());
        assert!(may_subscribe("b/x/c") && may_subscribe("b/+/c"));
        assert!(!may_subscribe("b/#") && !may_subscribe("#") && !may_subscribe("a/b"));
        let none = permissions(&[], &[]);
        assert!(!none.may_publish("a") && !none.may_subscribe(&Filter::parse("a").unwrap()));
    }

    #[test]
    fn a_delivery_needs_a_permission_of_today() {
        let some = permissions(&["a/#"], &["b/+/c"]);
        assert!(some.may_receive("b/x/c") && some.may_receive("_INBOX/x7"));
        assert!(!some.may_receive("b/x") && !some.may_receive("a/b") && !some.may_receive("_INBOX"));
        assert!(Permissions::all().may_receive("a/b"));
    }

    #[test]
    fn topics_of_the_bus_and_of_the_system_are_nobodys() {
        let all = Permissions::all();
        assert!(!all.may_publish("$SYS/x") && !all.may_publish("octobus/up") && !all.may_publish("_INBOX"));
        assert!(all.may_publish("octo"));
    }

    #[test]
    fn an_inbox_is_open_to_who_knows_its_name() {
        let none = permissions(&[], &[]);
        assert!(none.may_publish("_INBOX/x7"));
        let may_subscribe = |text| none.may_subscribe(&Filter::parse(text).unwrap());
        assert!(may_subscribe("_INBOX/x7/+") && may_subscribe("_INBOX/x7"));
        assert!(!may_subscribe("_INBOX/+") && !may_subscribe("_INBOX/#") && !may_subscribe("_INBOX"));
        assert!(!Permissions::all().may_subscribe(&Filter::parse("_INBOX/#").unwrap()));
    }
}
