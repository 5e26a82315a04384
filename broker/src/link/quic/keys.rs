//! Packet keys as they are kept: the key itself, not its schedule.
//!
//! An expanded AES-GCM key takes 560 bytes, and a connection has six keys: the next pair has to be there before
//! anybody asks for it. A hub's connections are mostly silent, so the schedule is made when a packet comes and
//! kept in a small cache of the thread, which serves those connections that are not silent.

use std::cell::RefCell;

use ring::aead::{self, quic::HeaderProtectionKey};
use rustls::{
    Error, SupportedCipherSuite, Tls13CipherSuite,
    crypto::{
        CipherSuiteCommon,
        cipher::{AeadKey, Iv, Nonce},
    },
    quic,
};

/// The suite with keys that are kept small, for the life of the process.
pub(in crate::link) fn with_small_keys(suite: SupportedCipherSuite) -> SupportedCipherSuite {
    use rustls::CipherSuite;
    let Some(of) = suite.tls13() else { return suite };
    let cipher: &'static dyn quic::Algorithm = match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => &AES_128,
        CipherSuite::TLS13_AES_256_GCM_SHA384 => &AES_256,
        _ => return suite,
    };
    let common = CipherSuiteCommon {
        suite: of.common.suite,
        hash_provider: of.common.hash_provider,
        confidentiality_limit: of.common.confidentiality_limit,
    };
    let small = Tls13CipherSuite {
        common,
        hkdf_provider: of.hkdf_provider,
        aead_alg: of.aead_alg,
        quic: Some(cipher),
    };
    SupportedCipherSuite::Tls13(Box::leak(Box::new(small)))
}

static AES_128: Cipher<16> = Cipher { packet: &aead::AES_128_GCM, header: &aead::quic::AES_128 };
static AES_256: Cipher<32> = Cipher { packet: &aead::AES_256_GCM, header: &aead::quic::AES_256 };

/// RFC 9001, appendices B.1.1 and B.1.2, for packets of any size: the same for both.
const CONFIDENTIALITY_LIMIT: u64 = 1 << 23;
const INTEGRITY_LIMIT: u64 = 1 << 52;

/// AES-GCM with a key of `N` bytes.
struct Cipher<const N: usize> {
    packet: &'static aead::Algorithm,
    header: &'static aead::quic::Algorithm,
}

impl<const N: usize> quic::Algorithm for Cipher<N>
where
    Self: Named,
{
    fn packet_key(&self, key: AeadKey, iv: Iv) -> Box<dyn quic::PacketKey> {
        let iv = iv.as_ref().try_into().expect("as long as a nonce");
        Box::new(SmallPacketKey::<N> { key: bytes(&key), iv })
    }

    fn header_protection_key(&self, key: AeadKey) -> Box<dyn quic::HeaderProtectionKey> {
        Box::new(SmallHeaderKey::<N>(bytes(&key)))
    }

    fn aead_key_len(&self) -> usize {
        N
    }
}

/// The cipher that belongs to a length of key.
trait Named: Sized {
    fn of() -> &'static Self;
}

impl Named for Cipher<16> {
    fn of() -> &'static Self {
        &AES_128
    }
}

impl Named for Cipher<32> {
    fn of() -> &'static Self {
        &AES_256
    }
}

fn bytes<const N: usize>(key: &AeadKey) -> [u8; N] {
    key.as_ref().try_into().expect("as long as the algorithm says")
}

/// Schedules of a thread.
const CACHED: usize = 64;

thread_local! {
    static PACKET: RefCell<Cache<aead::LessSafeKey>> = const { RefCell::new(Cache::new()) };
    static HEADER: RefCell<Cache<HeaderProtectionKey>> = const { RefCell::new(Cache::new()) };
}

/// A schedule and the key that it was made of, at a place that the key determines.
struct Cache<K>([Option<Cached<K>>; CACHED]);

type Cached<K> = Box<(Vec<u8>, K)>;

impl<K> Cache<K> {
    const fn new() -> Self {
        Self([const { None }; CACHED])
    }

    fn get(&mut self, key: &[u8], make: impl FnOnce() -> K) -> &K {
        // Keys are random.
        let place = &mut self.0[usize::from(key[0]) % CACHED];
        if place.as_ref().is_none_or(|cached| cached.0 != key) {
            *place = Some(Box::new((key.to_vec(), make())));
        }
        &place.as_ref().expect("just made").1
    }
}

struct SmallPacketKey<const N: usize> {
    key: [u8; N],
    iv: [u8; aead::NONCE_LEN],
}

impl<const N: usize> SmallPacketKey<N>
where
    Cipher<N>: Named,
{
    fn with<R>(&self, packet_number: u64, work: impl FnOnce(&aead::LessSafeKey, aead::Nonce) -> R) -> R {
        let nonce = Nonce::new(&Iv::from(self.iv), packet_number);
        let nonce = aead::Nonce::assume_unique_for_key(nonce.0);
        PACKET.with_borrow_mut(|cache| {
            let make = || {
                let key = aead::UnboundKey::new(Cipher::<N>::of().packet, &self.key);
                aead::LessSafeKey::new(key.expect("as long as the algorithm says"))
            };
            work(cache.get(&self.key, make), nonce)
        })
    }
}

impl<const N: usize> quic::PacketKey for SmallPacketKey<N>
where
    Cipher<N>: Named,
{
    fn encrypt_in_place(
        &self,
        packet_number: u64,
        header: &[u8],
        payload: &mut [u8],
    ) -> Result<quic::Tag, Error> {
        self.with(packet_number, |key, nonce| {
            let tag = key.seal_in_place_separate_tag(nonce, aead::Aad::from(header), payload);
            tag.map(|tag| quic::Tag::from(tag.as_ref())).map_err(|_unspecified| Error::EncryptError)
        })
    }

    fn decrypt_in_place<'a>(
        &self,
        packet_number: u64,
        header: &[u8],
        payload: &'a mut [u8],
    ) -> Result<&'a [u8], Error> {
        self.with(packet_number, |key, nonce| {
            let plain = key.open_in_place(nonce, aead::Aad::from(header), payload);
            plain.map(|plain| &*plain).map_err(|_unspecified| Error::DecryptError)
        })
    }

    fn tag_len(&self) -> usize {
        aead::MAX_TAG_LEN
    }

    fn confidentiality_limit(&self) -> u64 {
        CONFIDENTIALITY_LIMIT
    }

    fn integrity_limit(&self) -> u64 {
        INTEGRITY_LIMIT
    }
}

struct SmallHeaderKey<const N: usize>([u8; N]);

/// What is masked of a long header's first byte, and of a short one's.
const LONG_FORM: u8 = 0x80;
const LONG_BITS: u8 = 0x0f;
const SHORT_BITS: u8 = 0x1f;

impl<const N: usize> SmallHeaderKey<N>
where
    Cipher<N>: Named,
{
    /// RFC 9001, 5.4.1.
    fn mask(
        &self,
        sample: &[u8],
        first: &mut u8,
        packet_number: &mut [u8],
        is_masked: bool,
    ) -> Result<(), Error> {
        let mask = HEADER.with_borrow_mut(|cache| {
            let make = || {
                let key = HeaderProtectionKey::new(Cipher::<N>::of().header, &self.0);
                key.expect("as long as the algorithm says")
            };
            cache.get(&self.0, make).new_mask(sample)
        });
        let [first_mask, mask @ ..] = mask.map_err(|_unspecified| Error::General("a short sample".into()))?;
        if packet_number.len() > mask.len() {
            return Err(Error::General("a long packet number".into()));
        }
        let bits = if *first & LONG_FORM == 0 { SHORT_BITS } else { LONG_BITS };
        let plain = if is_masked { *first ^ (first_mask & bits) } else { *first };
        *first ^= first_mask & bits;
        let len = usize::from(plain & 0x03) + 1;
        packet_number.iter_mut().zip(mask).take(len).for_each(|(byte, mask)| *byte ^= mask);
        Ok(())
    }
}

impl<const N: usize> quic::HeaderProtectionKey for SmallHeaderKey<N>
where
    Cipher<N>: Named,
{
    fn encrypt_in_place(&self, sample: &[u8], first: &mut u8, packet_number: &mut [u8]) -> Result<(), Error> {
        self.mask(sample, first, packet_number, false)
    }

    fn decrypt_in_place(&self, sample: &[u8], first: &mut u8, packet_number: &mut [u8]) -> Result<(), Error> {
        self.mask(sample, first, packet_number, true)
    }

    fn sample_len(&self) -> usize {
        Cipher::<N>::of().header.sample_len()
    }
}

#[cfg(test)]
mod tests {
    use rustls::{crypto::ring::cipher_suite, quic::Version};

    use super::*;

    fn keys(suite: SupportedCipherSuite, side: rustls::Side) -> quic::Keys {
        let suite = suite.tls13().unwrap();
        // Initial keys of AES-128 are derived by the RFC; of others alike, for this test alone.
        quic::Suite { suite, quic: suite.quic.unwrap() }.keys(b"\x83\x94\xc8\xf0", side, Version::V1)
    }

    #[test]
    fn small_keys_do_what_expanded_ones_do() {
        for suite in [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384] {
            let small = keys(with_small_keys(suite), rustls::Side::Client);
            let expanded = keys(suite, rustls::Side::Server);
            for number in 0..300 {
                let (mut one, mut other) = (vec![7; 100 + number], vec![7; 100 + number]);
                let (header, pn) = ([0x43, 1, 2], number as u64);
                let tag = small.local.packet.encrypt_in_place(pn, &header, &mut one).unwrap();
                let same = keys(suite, rustls::Side::Client);
                let expected = same.local.packet.encrypt_in_place(pn, &header, &mut other).unwrap();
                assert_eq!((tag.as_ref(), &one), (expected.as_ref(), &other));

                other.extend_from_slice(expected.as_ref());
                let mut sealed = [one, tag.as_ref().to_vec()].concat();
                let opened = expanded.remote.packet.decrypt_in_place(pn, &header, &mut sealed).unwrap();
                assert_eq!(opened, vec![7; 100 + number]);
                other[0] ^= 1;
                let small = keys(with_small_keys(suite), rustls::Side::Server);
                assert!(small.remote.packet.decrypt_in_place(pn, &header, &mut other).is_err());
            }
            assert_eq!(small.local.packet.tag_len(), expanded.local.packet.tag_len());
            assert_eq!(
                small.local.packet.confidentiality_limit(),
                expanded.local.packet.confidentiality_limit()
            );
            assert_eq!(small.local.packet.integrity_limit(), expanded.local.packet.integrity_limit());
        }
    }

    #[test]
    fn headers_are_masked_as_by_expanded_keys() {
        for suite in [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384] {
            let small = keys(with_small_keys(suite), rustls::Side::Client);
            let expanded = keys(suite, rustls::Side::Client);
            let sample: Vec<u8> = (0..16).collect();
            assert_eq!(small.local.header.sample_len(), expanded.local.header.sample_len());
            for first in 0..=255u8 {
                let (mut one, mut other) = ((first, [1, 2, 3, 4]), (first, [1, 2, 3, 4]));
                small.local.header.encrypt_in_place(&sample, &mut one.0, &mut one.1).unwrap();
                expanded.local.header.encrypt_in_place(&sample, &mut other.0, &mut other.1).unwrap();
                assert_eq!(one, other);
                small.local.header.decrypt_in_place(&sample, &mut one.0, &mut one.1).unwrap();
                assert_eq!(one, (first, [1, 2, 3, 4]));
            }
            assert!(small.local.header.encrypt_in_place(&sample[..3], &mut 0, &mut [0]).is_err());
        }
    }

    #[test]
    fn a_kept_key_is_small() {
        assert!(size_of::<SmallPacketKey<16>>() <= 28 && size_of::<SmallHeaderKey<16>>() <= 16);
    }
}
