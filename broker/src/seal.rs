//! Sealing of values at rest: what a stolen disk, backup or journal shows of a secret is that there is one.
//!
//! ```text
//! u8 0 | u8 version = 1 | key id[4] | salt[24] | ciphertext | tag[16]
//! ```
//!
//! JSON never begins with a zero byte, so a reader tells a sealed value from a plain one of an older version.
//!
//! **Nonces.** Many writers share a key for years (all replicas of a tier), and none of them can promise
//! another that a counter is its own, least of all one that came back from a backup. 96 random bits would be
//! too few for that. So no nonce is ever chosen: each envelope is sealed with a key of its own, derived by HKDF
//! from the long-lived key and 192 random bits of salt, and that key meets exactly one message, with the nonce
//! zero. Two envelopes share a key only if two salts are equal: after 2^64 envelopes that is still a chance of
//! one in 2^65.
//!
//! **Context.** The key of State under which a value stands is authenticated with it, and the header too. So a
//! sealed value that is moved to another key opens nowhere: who can write the store but not read it cannot give
//! one pod the secret of another.
//!
//! What sealing does not hide: that a value exists, its key, its length, and whether it changed.

use std::{fmt, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use bytes::Bytes;
use rand::RngCore as _;
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, Prk, Salt},
};

use crate::private::{self, PrivateError};

const MARK: u8 = 0;
const VERSION: u8 = 1;
const ID: usize = 4;
const SALT: usize = 24;
const HEADER: usize = 2 + ID + SALT;
const TAG: usize = 16;
/// Sealing makes a value this many bytes longer.
pub const OVERHEAD: usize = HEADER + TAG;

const LABEL_ID: &[u8] = b"octobus seal: key id";
const LABEL_MESSAGE: &[u8] = b"octobus seal: key of one message";
const FILE_MAX: usize = 1 << 10;

/// A key that seals. It shows itself in [`text`](Self::text) alone.
#[derive(Clone, PartialEq, Eq)]
pub struct SealKey {
    bytes: [u8; 32],
    id: [u8; ID],
}

/// Why a key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SealKeyError {
    /// Its file is unreadable, unwritable, or readable by others.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// What is written is no key.
    #[error(
        "{0} holds no key of 32 bytes: restore it from a backup (without it, what it sealed cannot be read)"
    )]
    Damaged(String),
    /// No randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

impl SealKey {
    /// A key of bytes that nobody can guess.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        let mut id = [0; ID];
        expand(&bytes, &[], LABEL_ID, &mut id);
        Self { bytes, id }
    }

    /// The key for one purpose that follows from a longer-lived secret, which it does not show.
    #[must_use]
    pub fn derived(secret: &[u8; 32], purpose: &str) -> Self {
        let mut bytes = [0; 32];
        expand(secret, &[], purpose.as_bytes(), &mut bytes);
        Self::new(bytes)
    }

    /// The key in a private file, which is made with a new one if it is missing.
    ///
    /// # Errors
    /// See [`SealKeyError`]. A damaged file is never replaced: what its key sealed would be lost.
    pub fn stored(path: &Path) -> Result<Self, SealKeyError> {
        if let Some(text) = private::read(path, FILE_MAX)? {
            let damaged = || SealKeyError::Damaged(path.display().to_string());
            let text = str::from_utf8(&text).map_err(|_| damaged())?;
            return Self::parse(text).ok_or_else(damaged);
        }
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        let key = Self::new(bytes);
        private::write(path, key.text().as_bytes())?;
        Ok(key)
    }

    /// The key of a text that [`text`](Self::text) wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = STANDARD_NO_PAD.decode(text.trim()).ok()?;
        Some(Self::new(bytes.try_into().ok()?))
    }

    /// The key as text. It is the secret itself: never log it.
    #[must_use]
    pub fn text(&self) -> String {
        STANDARD_NO_PAD.encode(self.bytes)
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealKey({:02x?})", self.id)
    }
}

/// Seals a value for one place: its key of State is the context.
///
/// # Panics
/// The system has no random bytes; without them it has made no key either.
#[must_use]
pub fn seal(key: &SealKey, context: &str, plaintext: &[u8]) -> Bytes {
    let mut header = [0; HEADER];
    header[0] = MARK;
    header[1] = VERSION;
    header[2..2 + ID].copy_from_slice(&key.id);
    rand::rng().fill_bytes(&mut header[2 + ID..]);
    let mut sealed = Vec::with_capacity(plaintext.len() + OVERHEAD);
    sealed.extend_from_slice(&header);
    sealed.extend_from_slice(plaintext);
    let tag = of_message(key, &header)
        .seal_in_place_separate_tag(nonce(), Aad::from(aad(&header, context)), &mut sealed[HEADER..])
        .expect("AES-GCM takes 64 GiB");
    sealed.extend_from_slice(tag.as_ref());
    sealed.into()
}

/// What was sealed with this key for this place; `None` for anything else, whatever it is.
#[must_use]
pub fn open(key: &SealKey, context: &str, sealed: &[u8]) -> Option<Vec<u8>> {
    if !is_sealed(sealed) {
        return None;
    }
    let (header, body) = sealed.split_at_checked(HEADER)?;
    let header: &[u8; HEADER] = header.try_into().ok()?;
    if header[1] != VERSION || header[2..2 + ID] != key.id {
        return None;
    }
    let mut body = body.to_vec();
    let opened = of_message(key, header)
        .open_in_place(nonce(), Aad::from(aad(header, context)), &mut body)
        .ok()?
        .len();
    body.truncate(opened);
    Some(body)
}

/// Whether this is an envelope, of whatever key and version; JSON never is.
#[must_use]
pub fn is_sealed(bytes: &[u8]) -> bool {
    bytes.first() == Some(&MARK)
}

/// The key of one message: see the module's text on nonces.
fn of_message(key: &SealKey, header: &[u8; HEADER]) -> LessSafeKey {
    let mut bytes = [0; 32];
    expand(&key.bytes, &header[2 + ID..], LABEL_MESSAGE, &mut bytes);
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &bytes).expect("32 bytes"))
}

/// Of a key's one message.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

fn aad(header: &[u8; HEADER], context: &str) -> Vec<u8> {
    [header.as_slice(), context.as_bytes()].concat()
}

fn expand(secret: &[u8; 32], salt: &[u8], label: &[u8], out: &mut [u8]) {
    let prk: Prk = Salt::new(HKDF_SHA256, salt).extract(secret);
    let info = [label];
    let filled = prk.expand(&info, Length(out.len())).and_then(|okm| okm.fill(out));
    filled.expect("HKDF gives up to 8160 bytes");
}

struct Length(usize);

impl ring::hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> SealKey {
        SealKey::new([byte; 32])
    }

    const CONTEXT: &str = "obj/core/secrets/default/password";

    proptest! {
        #[test]
        fn what_was_sealed_opens_for_its_key_and_place_alone(
            plain in proptest::collection::vec(any::<u8>(), 0..400),
            context in ".{0,40}", other in ".{0,40}",
        ) {
            let sealed = seal(&key(1), &context, &plain);
            prop_assert_eq!(sealed.len(), plain.len() + OVERHEAD);
            prop_assert!(is_sealed(&sealed));
            prop_assert_eq!(open(&key(1), &context, &sealed), Some(plain));
            prop_assert_eq!(open(&key(2), &context, &sealed), None);
            prop_assert_eq!(open(&key(1), &other, &sealed).is_some(), other == context);
        }

        #[test]
        fn an_envelope_with_any_other_bit_opens_nowhere(
            plain in proptest::collection::vec(any::<u8>(), 0..100), at in any::<usize>(), bit in 0..8_u8,
        ) {
            let mut sealed = seal(&key(1), CONTEXT, &plain).to_vec();
            let at = at % sealed.len();
            sealed[at] ^= 1 << bit;
            prop_assert_eq!(open(&key(1), CONTEXT, &sealed), None);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), of_one in any::<bool>()) {
            let mut bytes = bytes;
            if of_one && bytes.len() > 6 {
                bytes[..6].copy_from_slice(&seal(&key(1), "", b"")[..6]);
            }
            prop_assert_eq!(open(&key(1), CONTEXT, &bytes), None);
        }
    }

    #[test]
    fn a_cut_envelope_opens_nowhere() {
        let sealed = seal(&key(1), CONTEXT, b"hunter2");
        for end in 0..sealed.len() {
            assert_eq!(open(&key(1), CONTEXT, &sealed[..end]), None);
        }
    }

    /// With one nonce for all, equal texts would show that they are equal, and two of them their difference.
    #[test]
    fn equal_texts_are_sealed_differently() {
        let [one, two] = [(); 2].map(|()| seal(&key(1), CONTEXT, b"hunter2"));
        assert_ne!(one[6..30], two[6..30]);
        assert_ne!(one[30..], two[30..]);
    }

    #[test]
    fn the_format_of_an_envelope_stays() {
        const WRITTEN: &str = "AAHeAVLOTuK+mGbUQ6wGB6V9ACheOi7Fs9Ur34oCBjlvp85G/V8+t8Ep7n9UHQF2IL7CErw";
        let bytes = STANDARD_NO_PAD.decode(WRITTEN).unwrap();
        assert_eq!(open(&key(1), CONTEXT, &bytes).as_deref(), Some(b"hunter2".as_slice()));
    }

    #[test]
    fn a_key_is_the_same_after_a_restart_and_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seal.key");
        let first = SealKey::stored(&path).unwrap();
        assert_eq!(SealKey::stored(&path).unwrap(), first);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!format!("{first:?}").contains(&first.text()));
        std::fs::write(&path, "short").unwrap();
        assert!(matches!(SealKey::stored(&path), Err(SealKeyError::Damaged(_))), "never replaced");
    }

    #[test]
    fn keys_of_different_purposes_are_different() {
        let secret = [7; 32];
        let [one, two] = ["secrets", "tickets"].map(|purpose| SealKey::derived(&secret, purpose));
        assert_ne!(one, two);
        assert_eq!(one, SealKey::derived(&secret, "secrets"));
        assert_eq!(open(&two, CONTEXT, &seal(&one, CONTEXT, b"x")), None);
    }
}
