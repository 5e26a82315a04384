//! What both ends of an enrolment must know alike: the join token's text and the bootstrap messages.
//!
//! A **join token** is one word that can be pasted. It names the tier (by the SHA-256 of its CA
//! certificate, so that a joiner recognises the right hub before it says anything), itself (under which
//! the hub keeps what it is good for), and a secret:
//!
//! ```text
//! ob1.<base64url without padding of: ca_sha256[32] | id[8] | secret[20] | crc32c[4] of those 60 bytes>
//! ```
//!
//! The checksum is there for people: a truncated paste is told from a wrong token.
//!
//! The bootstrap protocol is JSON over HTTPS, certificates and requests as PEM. Unknown fields are
//! skipped, so that neighbouring versions understand each other.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Default port of the bootstrap server.
pub const PORT: u16 = 10002;
/// `POST` a [`JoinRequest`], receive a [`Joined`].
pub const PATH_JOIN: &str = "/v1/join";
/// `POST` a [`RenewRequest`], receive a [`Joined`].
pub const PATH_RENEW: &str = "/v1/renew";
/// `GET` the CA certificate as PEM.
pub const PATH_CA: &str = "/v1/ca";
/// Largest request or response body.
pub const BODY_MAX: usize = 64 << 10;

const PREFIX: &str = "ob1.";
const SIGNED: usize = 60;
const RAW: usize = SIGNED + 4;

/// A join token. Its `Display` form is the one to paste, and the secret itself: never log it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// SHA-256 of the DER of the tier's CA certificate.
    pub ca_sha256: [u8; 32],
    /// Under which the hub keeps it.
    pub id: TokenId,
    /// What only the holder knows.
    pub secret: [u8; 20],
}

/// A token's name; not a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenId(pub [u8; 8]);

/// Why a text is not a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not start as one.
    #[error("a join token starts with `ob1.`; make one at the hub with `octobus token create --node NAME`")]
    NotOne,
    /// It starts as one and then does not go on.
    #[error("the join token is damaged (cut off or mistyped); paste it again as one word")]
    Damaged,
}

impl Token {
    /// SHA-256 of the secret: what the hub keeps instead of it.
    #[must_use]
    pub fn secret_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.secret).into()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut raw = [0; RAW];
        raw[..32].copy_from_slice(&self.ca_sha256);
        raw[32..40].copy_from_slice(&self.id.0);
        raw[40..SIGNED].copy_from_slice(&self.secret);
        let crc = crc32c::crc32c(&raw[..SIGNED]);
        raw[SIGNED..].copy_from_slice(&crc.to_le_bytes());
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(raw))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    /// Accepts exactly what `Display` writes, and white space around it.
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(TokenError::NotOne)?;
        let mut raw = [0; RAW];
        let len = URL_SAFE_NO_PAD.decode_slice(encoded, &mut raw).map_err(|_| TokenError::Damaged)?;
        let crc = crc32c::crc32c(&raw[..SIGNED]);
        if len != RAW || raw[SIGNED..] != crc.to_le_bytes() {
            return Err(TokenError::Damaged);
        }
        Ok(Self { ca_sha256: part(&raw, 0), id: TokenId(part(&raw, 32)), secret: part(&raw, 40) })
    }
}

fn part<const N: usize>(raw: &[u8; RAW], at: usize) -> [u8; N] {
    raw[at..at + N].try_into().expect("the slice has N bytes")
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.id)
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

/// A node asks for its first certificate.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Text of a [`Token`].
    pub token: String,
    /// PKCS#10, PEM. Only its key counts; names in it are ignored.
    pub csr: String,
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinRequest")
    }
}

/// A node asks for its next certificate, with the same key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RenewRequest {
    /// The certificate it has, PEM; it may have expired a while ago.
    pub certificate: String,
    /// PKCS#10, PEM, made with the same key: its self-signature proves possession.
    pub csr: String,
}

/// The answer to both. A secret is in it: never log it.
#[derive(Clone, Serialize, Deserialize)]
pub struct Joined {
    /// The node's certificate, PEM.
    pub certificate: String,
    /// The tier's CA certificate, PEM.
    pub ca: String,
    /// Id of the tier: pinned by the node, it never talks to another.
    pub tier: String,
    /// The node's name.
    pub name: String,
    /// The enrolment generation.
    pub generation: u32,
    /// Where to dial QUIC, as `host:port`; an empty host means the one that was asked.
    pub quic: Vec<String>,
    /// Where to dial WebSocket, likewise. Hubs before it existed say nothing.
    #[serde(default)]
    pub websocket: Vec<String>,
    /// Text of the tier's [`SealKey`](crate::seal::SealKey) of secrets. Hubs before it existed say nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub secrets: String,
}

impl fmt::Debug for Joined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Joined({}, generation {}, tier {})", self.name, self.generation, self.tier)
    }
}

/// What went wrong, for a program and for a person.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// A stable word: `token_expired`.
    pub error: String,
    /// What it is and what to do.
    pub message: String,
    /// Seconds to wait before a retry, where a retry can help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token { ca_sha256: [0xa5; 32], id: TokenId([1, 2, 3, 4, 5, 6, 7, 8]), secret: [9; 20] }
    }

    #[test]
    fn a_token_reads_back_as_it_was_written() {
        let text = token().to_string();
        assert_eq!(text.parse::<Token>(), Ok(token()));
        assert_eq!(format!(" {text}\n").parse::<Token>(), Ok(token()), "a paste brings white space");
    }

    #[test]
    fn every_single_changed_or_missing_character_is_noticed() {
        let text = token().to_string();
        for at in PREFIX.len()..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(changed.parse::<Token>(), Err(TokenError::Damaged), "{changed}");
            assert_eq!(text[..at].parse::<Token>(), Err(TokenError::Damaged));
        }
        assert_eq!(format!("{text}A").parse::<Token>(), Err(TokenError::Damaged));
        assert_eq!("ob2.AAAA".parse::<Token>(), Err(TokenError::NotOne));
        assert_eq!("".parse::<Token>(), Err(TokenError::NotOne));
    }

    #[test]
    fn debug_output_does_not_show_the_secret() {
        assert_eq!(format!("{:?}", token()), "Token(0102030405060708)");
    }
}
