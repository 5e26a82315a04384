//! An ordered map that costs little while it holds little.
//!
//! A hub has some maps for each of very many nodes, and most of them hold nothing or two or three entries. A
//! `BTreeMap` of one entry takes room for eleven; this one takes room for what it holds, and becomes a
//! `BTreeMap` beyond [`MOST`] entries. Order, look-ups and ranges are those of a `BTreeMap`.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, btree_map},
    ops::{Bound, RangeBounds},
};

/// Entries up to which they stand in one array.
const MOST: usize = 16;

/// See the module's documentation.
#[derive(Debug, Clone)]
pub(super) enum Few<K, V> {
    /// Ascending.
    Array(Vec<(K, V)>),
    /// Boxed, so that the map itself is three words while it is small.
    #[allow(clippy::box_collection)]
    Tree(Box<BTreeMap<K, V>>),
}

impl<K, V> Default for Few<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, V> Few<K, V> {
    /// An empty map; it holds no memory.
    pub(super) const fn new() -> Self {
        Self::Array(Vec::new())
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Array(array) => array.len(),
            Self::Tree(tree) => tree.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Ord, V> Few<K, V> {
    pub(super) fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.get_key_value(key).map(|(_, value)| value)
    }

    pub(super) fn get_key_value<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(&K, &V)>
    where
        K: Borrow<Q>,
    {
        match self {
            Self::Array(array) => find(array, key).ok().map(|at| (&array[at].0, &array[at].1)),
            Self::Tree(tree) => tree.get_key_value(key),
        }
    }

    pub(super) fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        match self {
            Self::Array(array) => find(array, key).ok().map(|at| &mut array[at].1),
            Self::Tree(tree) => tree.get_mut(key),
        }
    }

    pub(super) fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// The value that stood there before.
    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let array = match self {
            Self::Tree(tree) => return tree.insert(key, value),
            Self::Array(array) => array,
        };
        match find(array, &key) {
            Ok(at) => return Some(std::mem::replace(&mut array[at].1, value)),
            Err(at) if array.len() < MOST => {
                // One at a time while there are very few, as most will stay; then as arrays grow.
                array.reserve_exact(if array.len() < 4 { 1 } else { 4 });
                array.insert(at, (key, value));
            }
            Err(_) => {
                let mut tree: BTreeMap<K, V> = std::mem::take(array).into_iter().collect();
                tree.insert(key, value);
                *self = Self::Tree(Box::new(tree));
            }
        }
        None
    }

    pub(super) fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        match self {
            Self::Array(array) => {
                let (_, value) = array.remove(find(array, key).ok()?);
                if array.is_empty() {
                    array.shrink_to_fit();
                }
                Some(value)
            }
            Self::Tree(tree) => {
                let value = tree.remove(key)?;
                if tree.len() <= MOST / 2 {
                    *self = Self::Array(std::mem::take(&mut **tree).into_iter().collect());
                }
                Some(value)
            }
        }
    }

    /// The value at `key`, made if there is none.
    pub(super) fn get_or_insert_with(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V
    where
        K: Clone,
    {
        if !self.contains_key(&key) {
            self.insert(key.clone(), make());
        }
        self.get_mut(&key).expect("it is there by now")
    }

    /// Ascending.
    pub(super) fn iter(&self) -> Entries<'_, K, V> {
        match self {
            Self::Array(array) => Entries::Array(array.iter()),
            Self::Tree(tree) => Entries::Tree(tree.range(..)),
        }
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        let (array, tree) = match self {
            Self::Array(array) => (Some(array), None),
            Self::Tree(tree) => (None, Some(tree)),
        };
        let array = array.into_iter().flatten().map(|(key, value)| (&*key, value));
        array.chain(tree.into_iter().flat_map(|tree| tree.iter_mut()))
    }

    pub(super) fn keys(&self) -> impl DoubleEndedIterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    pub(super) fn values(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.iter_mut().map(|(_, value)| value)
    }

    /// What lies within the bounds, ascending.
    pub(super) fn range<Q: Ord + ?Sized>(&self, bounds: (Bound<&Q>, Bound<&Q>)) -> Entries<'_, K, V>
    where
        K: Borrow<Q>,
    {
        match self {
            Self::Array(array) => {
                let from = array.partition_point(|(key, _)| match bounds.start_bound() {
                    Bound::Included(start) => key.borrow() < *start,
                    Bound::Excluded(start) => key.borrow() <= *start,
                    Bound::Unbounded => false,
                });
                let to = array.partition_point(|(key, _)| match bounds.end_bound() {
                    Bound::Included(end) => key.borrow() <= *end,
                    Bound::Excluded(end) => key.borrow() < *end,
                    Bound::Unbounded => true,
                });
                Entries::Array(array.get(from..to).unwrap_or_default().iter())
            }
            Self::Tree(tree) => Entries::Tree(tree.range(bounds)),
        }
    }
}

fn find<K: Borrow<Q>, V, Q: Ord + ?Sized>(array: &[(K, V)], key: &Q) -> Result<usize, usize> {
    array.binary_search_by(|(held, _)| held.borrow().cmp(key))
}

impl<K, V> IntoIterator for Few<K, V> {
    type Item = (K, V);
    type IntoIter = std::iter::Chain<std::vec::IntoIter<(K, V)>, btree_map::IntoIter<K, V>>;

    fn into_iter(self) -> Self::IntoIter {
        let (array, tree) = match self {
            Self::Array(array) => (array, BTreeMap::new()),
            Self::Tree(tree) => (Vec::new(), *tree),
        };
        array.into_iter().chain(tree)
    }
}

impl<K: Ord, V> FromIterator<(K, V)> for Few<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut few = Self::new();
        for (key, value) in entries {
            few.insert(key, value);
        }
        few
    }
}

/// Entries of a [`Few`], ascending.
#[derive(Debug)]
pub(super) enum Entries<'a, K, V> {
    Array(std::slice::Iter<'a, (K, V)>),
    Tree(btree_map::Range<'a, K, V>),
}

impl<'a, K, V> Iterator for Entries<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Array(array) => array.next().map(|(key, value)| (key, value)),
            Self::Tree(tree) => tree.next(),
        }
    }
}

impl<K, V> DoubleEndedIterator for Entries<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        match self {
            Self::Array(array) => array.next_back().map(|(key, value)| (key, value)),
            Self::Tree(tree) => tree.next_back(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u8, u32),
        Remove(u8),
        Look(u8),
        Range(u8, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = 0..40u8;
        prop_oneof![
            4 => (key.clone(), any::<u32>()).prop_map(|(key, value)| Step::Insert(key, value)),
            3 => key.clone().prop_map(Step::Remove),
            1 => key.clone().prop_map(Step::Look),
            1 => (key.clone(), key).prop_map(|(from, to)| Step::Range(from.min(to), from.max(to))),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_map_whatever_its_size(steps in prop::collection::vec(step(), 0..200)) {
            let (mut few, mut model) = (Few::new(), BTreeMap::new());
            for step in steps {
                match step {
                    Step::Insert(key, value) => prop_assert_eq!(few.insert(key, value), model.insert(key, value)),
                    Step::Remove(key) => prop_assert_eq!(few.remove(&key), model.remove(&key)),
                    Step::Look(key) => prop_assert_eq!(few.get(&key), model.get(&key)),
                    Step::Range(from, to) => {
                        let bounds = (Bound::Excluded(&from), Bound::Unbounded);
                        prop_assert!(few.range::<u8>(bounds).eq(model.range::<u8, _>(bounds)));
                        let bounds = (Bound::Included(&from), Bound::Included(&to));
                        prop_assert!(few.range::<u8>(bounds).rev().eq(model.range::<u8, _>(bounds).rev()));
                    }
                }
                prop_assert!(few.iter().eq(model.iter()));
                prop_assert_eq!(few.len(), model.len());
            }
            let both: Vec<_> = few.iter_mut().map(|(key, value)| (*key, *value)).collect();
            prop_assert!(both.into_iter().eq(model));
        }
    }

    #[test]
    fn what_is_empty_holds_no_memory() {
        let mut few = Few::new();
        few.insert(1, 2);
        few.remove(&1);
        assert!(matches!(few, Few::Array(array) if array.capacity() == 0));
    }
}
