//! What objects may be called.

/// A lower-case RFC 1123 subdomain, at most 253 bytes.
pub(crate) fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_part)
}

/// A lower-case RFC 1123 label, at most 63 bytes.
pub(crate) fn is_label(name: &str) -> bool {
    name.len() <= 63 && is_dns_part(name)
}

/// A lower-case RFC 1035 label: it begins with a letter.
pub(crate) fn is_label_1035(name: &str) -> bool {
    is_label(name) && name.starts_with(|c: char| c.is_ascii_lowercase())
}

fn is_dns_part(part: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !part.is_empty() && part.bytes().all(inner) && !part.starts_with('-') && !part.ends_with('-')
}

/// What may stand as one segment of a path.
pub(crate) fn is_path_segment(name: &str) -> bool {
    name != "." && name != ".." && !name.contains(['/', '%'])
}

/// How a resource's names are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Names {
    Subdomain,
    Label,
    Label1035,
    /// Roles and their bindings have colons in their names.
    PathSegment,
}

impl Names {
    /// What is wrong with a name; `None` if nothing is.
    pub(crate) fn problem(self, name: &str) -> Option<&'static str> {
        match self {
            Self::Subdomain if !is_subdomain(name) => Some(SUBDOMAIN),
            Self::Label if !is_label(name) => Some(LABEL),
            Self::Label1035 if !is_label_1035(name) => Some(LABEL_1035),
            Self::PathSegment if !is_path_segment(name) => {
                Some("may not contain '/' or '%', and may not be '.' or '..'")
            }
            // A key of the store is a topic; what a topic cannot hold is no name of any kind.
            _ if name.len() > 253 || name.contains(['+', '#', '\0']) => {
                Some("must be no more than 253 bytes, without '+' and '#'")
            }
            _ => None,
        }
    }
}

/// What is wrong with a name that is not a subdomain.
pub(crate) const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric \
    characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex \
    used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and \
    must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for \
    validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start \
    with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', \
    regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";

/// A name from the beginning that the client gave and five random characters.
pub(crate) fn generated(prefix: &str) -> String {
    // No vowels, nothing that looks like something else.
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let random = u64::from_le_bytes(random());
    let letters = u64::try_from(LETTERS.len()).unwrap_or(1);
    let letter =
        |n: u32| char::from(LETTERS[usize::try_from(random / letters.pow(n) % letters).unwrap_or(0)]);
    let end = prefix.char_indices().map(|(at, _)| at).take_while(|at| *at <= 248).last().unwrap_or(0);
    let prefix = if prefix.len() <= 248 { prefix } else { &prefix[..end] };
    format!("{prefix}{}", (0..5).map(letter).collect::<String>())
}

/// Random bytes where zeroes would do too: names are tried again when they are taken, and times that are to
/// differ may be the same.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(error) = getrandom::fill(&mut bytes) {
        tracing::warn!(%error, "the system gives no random bytes");
    }
    bytes
}

/// A random uid (version 4).
pub(crate) fn uid() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = broker::enroll::hex(&bytes);
    Ok(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}
