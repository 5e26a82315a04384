//! Open connections of each address, so that one address cannot take every place.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use super::failures::key;

/// Connections that one address may have open.
pub(super) const PER_ADDRESS_MAX: usize = 16;

/// How many connections each address has; bounded by the number of all connections.
#[derive(Debug, Clone, Default)]
pub(super) struct Places(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One connection's place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    address: IpAddr,
}

impl Places {
    /// A place for one more connection from there, if it has not too many.
    pub(super) fn take(&self, from: IpAddr) -> Option<Place> {
        let address = key(from);
        let mut places = self.0.lock().expect("no panic under this lock");
        let taken = places.entry(address).or_insert(0);
        if *taken >= PER_ADDRESS_MAX {
            return None;
        }
        *taken += 1;
        Some(Place { places: self.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.places.0.lock().expect("no panic under this lock");
        let Some(taken) = places.get_mut(&self.address) else { return };
        *taken -= 1;
        if *taken == 0 {
            places.remove(&self.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_a_share_of_the_places_and_gets_it_back() {
        let places = Places::default();
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut taken: Vec<_> = (0..PER_ADDRESS_MAX).map(|_| places.take(one).unwrap()).collect();
        assert!(places.take(one).is_none());
        assert!(places.take(other).is_some());
        taken.pop();
        assert!(places.take(one).is_some());
        drop(taken);
        assert!(places.0.lock().unwrap().is_empty(), "nothing is remembered of who has left");
    }
}
