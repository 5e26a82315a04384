//! A look at LMDB's file before LMDB maps it.
//!
//! LMDB trusts its file: where a page lies about its sizes it reads outside of the page, and a free page that is
//! in use is written over. So every page that LMDB can reach is checked first: that it is the page it should
//! be, that its nodes are in it and in order, and that no page is used twice. What the values say is not looked
//! at here; they have checksums.
//!
//! The layout is LMDB's data version 1 for 64-bit little-endian machines; elsewhere nothing is checked.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use bytes::Buf;

/// What is wrong with the file in front of a page's or node's bytes.
#[derive(Debug, thiserror::Error)]
pub(super) enum PageError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Damaged(String),
}

type Result<T> = std::result::Result<T, PageError>;

/// Checks the file in this folder; fine if there is none.
pub(super) fn check(dir: &Path) -> Result<()> {
    if !cfg!(all(target_pointer_width = "64", target_endian = "little")) {
        return Ok(());
    }
    let file = match File::open(dir.join("data.mdb")) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let len = file.metadata()?.len();
    if len == 0 {
        return Ok(());
    }
    let meta = newest_meta(&file, len)?;
    let pages = (len / meta.page_bytes as u64).min(meta.last_page.saturating_add(1));
    let used = vec![false; usize::try_from(pages).map_err(|_| damaged("the file is too large"))?];
    let mut walk = Walk { file, page_bytes: meta.page_bytes, used, free: Vec::new(), tables: Vec::new() };
    walk.tree(&meta.free, Tree::Free)?;
    walk.tree(&meta.main, Tree::Main)?;
    for table in std::mem::take(&mut walk.tables) {
        walk.tree(&table, Tree::Table)?;
    }
    for page in std::mem::take(&mut walk.free) {
        if page < METAS || page > meta.last_page {
            return Err(damaged(format!("page {page} is free and is not in the file")));
        }
        // Free pages at the end need not be in the file.
        if page < walk.used.len() as u64 {
            walk.take(page)?;
        }
    }
    Ok(())
}

#[derive(Debug)]
struct Meta {
    page_bytes: usize,
    free: Root,
    main: Root,
    last_page: u64,
    transaction: u64,
}

/// The head of a tree, as it stands in a meta page or in the main tree.
#[derive(Debug)]
struct Root {
    pad: u32,
    flags: u16,
    depth: u16,
    /// Branch, leaf and overflow pages, entries.
    counts: [u64; 4],
    root: u64,
}

impl Root {
    const LEN: usize = 48;

    fn decode(mut raw: &[u8]) -> Self {
        Self {
            pad: raw.get_u32_le(),
            flags: raw.get_u16_le(),
            depth: raw.get_u16_le(),
            counts: std::array::from_fn(|_| raw.get_u64_le()),
            root: raw.get_u64_le(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tree {
    /// Transaction -> pages that it freed.
    Free,
    /// Name -> table.
    Main,
    Table,
}

fn newest_meta(file: &File, len: u64) -> Result<Meta> {
    let first = meta(file, 0, len)?;
    let second = meta(file, first.page_bytes as u64, len)?;
    if first.page_bytes != second.page_bytes || first.transaction.abs_diff(second.transaction) > 1 {
        return Err(damaged("the two meta pages are not of one file"));
    }
    Ok(if second.transaction > first.transaction { second } else { first })
}

fn meta(file: &File, offset: u64, len: u64) -> Result<Meta> {
    let mut raw = [0; HEADER + META_LEN];
    if offset + raw.len() as u64 > len {
        return Err(damaged("the file ends in its meta pages"));
    }
    file.read_exact_at(&mut raw, offset)?;
    let (flags, mut body) = (u16_at(&raw, 10), &raw[HEADER..]);
    let (magic, version) = (body.get_u32_le(), body.get_u32_le());
    // An address and a size of map, which LMDB does not take from here.
    body.advance(16);
    let (free, main) = (Root::decode(body), Root::decode(&body[Root::LEN..]));
    body.advance(2 * Root::LEN);
    let (last_page, transaction) = (body.get_u64_le(), body.get_u64_le());
    let page_bytes = free.pad as usize;
    let is_meta = flags == P_META && magic == MAGIC && version == VERSION;
    if !is_meta || !page_bytes.is_power_of_two() || !(512..=32 << 10).contains(&page_bytes) {
        return Err(damaged("a meta page is none"));
    }
    if transaction > 0 && transaction % METAS != offset / page_bytes as u64 {
        return Err(damaged("a meta page is of another transaction"));
    }
    if free.flags != INTEGER_KEYS || main.flags != 0 {
        return Err(damaged("a meta page has flags that are not this store's"));
    }
    Ok(Meta { page_bytes, free, main, last_page, transaction })
}

struct Walk {
    file: File,
    page_bytes: usize,
    used: Vec<bool>,
    free: Vec<u64>,
    tables: Vec<Root>,
}

impl Walk {
    fn tree(&mut self, head: &Root, tree: Tree) -> Result<()> {
        let mut counts = [0; 4];
        if head.root == u64::MAX {
            if head.depth != 0 || head.counts != counts {
                return Err(damaged("an empty tree has pages"));
            }
            return Ok(());
        }
        if head.depth == 0 || head.depth > DEPTH_MAX {
            return Err(damaged("a tree's depth cannot be"));
        }
        let bounds = (None, None);
        self.page(head.root, head.depth, tree, bounds, &mut counts)?;
        if counts != head.counts {
            return Err(damaged("a tree does not have as many pages and entries as it says"));
        }
        Ok(())
    }

    /// A page that is used, for the first time.
    fn take(&mut self, page: u64) -> Result<()> {
        let used = usize::try_from(page).ok().and_then(|page| self.used.get_mut(page));
        match used {
            Some(used) if page >= METAS && !*used => {
                *used = true;
                Ok(())
            }
            Some(_) => Err(damaged(format!("page {page} is used twice"))),
            None => Err(damaged(format!("page {page} is not in the file"))),
        }
    }

    fn read(&self, page: u64, len: usize) -> Result<Vec<u8>> {
        let mut raw = vec![0; len];
        self.file.read_exact_at(&mut raw, page * self.page_bytes as u64)?;
        if u64_at(&raw, 0) != page {
            return Err(damaged(format!("page {page} is another page")));
        }
        Ok(raw)
    }

    /// A branch or leaf page and all below it. Its keys are within the bounds: not below, below.
    fn page(
        &mut self,
        number: u64,
        depth: u16,
        tree: Tree,
        (low, high): (Option<&[u8]>, Option<&[u8]>),
        counts: &mut [u64; 4],
    ) -> Result<()> {
        self.take(number)?;
        let raw = self.read(number, self.page_bytes)?;
        let what = |what: &str| damaged(format!("page {number}: {what}"));
        let is_leaf = depth == 1;
        if u16_at(&raw, 10) != if is_leaf { P_LEAF } else { P_BRANCH } {
            return Err(what("it is of another kind"));
        }
        let (lower, upper) = (usize::from(u16_at(&raw, 12)), usize::from(u16_at(&raw, 14)));
        if lower <= HEADER || !lower.is_multiple_of(2) || lower > upper || upper > raw.len() {
            return Err(what("its bounds cannot be"));
        }
        counts[usize::from(is_leaf)] += 1;
        let nodes = Vec::from_iter((HEADER..lower).step_by(2).map(|at| usize::from(u16_at(&raw, at))));
        let nodes = nodes.into_iter().map(|at| Node::at(&raw, at, is_leaf));
        let nodes = nodes.collect::<Option<Vec<Node<'_>>>>().ok_or_else(|| what("a node is not in it"))?;
        let mut places = Vec::from_iter(nodes.iter().map(|node| node.place.clone()));
        places.sort_unstable_by_key(|place| place.start);
        let ends = places.iter().map(|place| place.end);
        let starts = places.iter().skip(1).map(|place| place.start).chain([raw.len()]);
        if places[0].start != upper || !ends.eq(starts) {
            return Err(what("its nodes are not one behind the other"));
        }
        // The first key of a branch is not looked at.
        let named = &nodes[usize::from(!is_leaf)..];
        let ordered = named.windows(2).all(|pair| precedes(tree, pair[0].key, pair[1].key));
        let above = named.first().zip(low).is_none_or(|(node, low)| !precedes(tree, node.key, low));
        let below = named.last().zip(high).is_none_or(|(node, high)| precedes(tree, node.key, high));
        if !ordered || !above || !below || tree == Tree::Free && named.iter().any(|node| node.key.len() != 8)
        {
            return Err(what("its keys are not in order"));
        }
        for (at, node) in nodes.iter().enumerate() {
            if is_leaf {
                counts[3] += 1;
                self.leaf(node, tree, counts)?;
            } else {
                let low = if at == 0 { low } else { Some(node.key) };
                let high = nodes.get(at + 1).map(|next| next.key).or(high);
                self.page(node.child, depth - 1, tree, (low, high), counts)?;
            }
        }
        Ok(())
    }

    fn leaf(&mut self, node: &Node<'_>, tree: Tree, counts: &mut [u64; 4]) -> Result<()> {
        let outside;
        let data = match (node.flags, tree) {
            (0, Tree::Free | Tree::Table) | (SUB_DATA, Tree::Main) => node.data,
            (BIG_DATA, Tree::Free | Tree::Table) => {
                outside = self.overflow(u64_at(node.data, 0), node.data_len, tree, counts)?;
                &outside
            }
            _ => return Err(damaged("a node has flags that are not this store's")),
        };
        match tree {
            Tree::Table => {}
            Tree::Main if data.len() == Root::LEN => {
                let table = Root::decode(data);
                if table.flags != 0 {
                    return Err(damaged("a table has flags that are not this store's"));
                }
                self.tables.push(table);
            }
            Tree::Main => return Err(damaged("a table's head is none")),
            Tree::Free => {
                let pages = Vec::from_iter(data.chunks_exact(8).map(|raw| u64_at(raw, 0)));
                let Some((count, pages)) = pages.split_first() else {
                    return Err(damaged("a list of free pages is none"));
                };
                if !data.len().is_multiple_of(8) || *count != pages.len() as u64 {
                    return Err(damaged("a list of free pages has another length"));
                }
                if pages.windows(2).any(|pair| pair[0] <= pair[1]) {
                    return Err(damaged("a list of free pages is not in order"));
                }
                self.free.extend_from_slice(pages);
            }
        }
        Ok(())
    }

    /// A value on pages of its own. Returns it if it is looked at.
    fn overflow(&mut self, first: u64, len: usize, tree: Tree, counts: &mut [u64; 4]) -> Result<Vec<u8>> {
        let needed = (HEADER + len).div_ceil(self.page_bytes) as u64;
        self.take(first)?;
        let raw = self.read(first, HEADER)?;
        let pages = u64::from(u32_at(&raw, 12));
        if u16_at(&raw, 10) != P_OVERFLOW || pages < needed || pages > self.used.len() as u64 {
            return Err(damaged(format!("page {first} does not hold the value that it should")));
        }
        counts[2] += pages;
        (first + 1..first + pages).try_for_each(|page| self.take(page))?;
        match tree {
            Tree::Free => Ok(self.read(first, HEADER + len)?.split_off(HEADER)),
            _ => Ok(Vec::new()),
        }
    }
}

struct Node<'a> {
    /// Its bytes in the page.
    place: std::ops::Range<usize>,
    flags: u16,
    key: &'a [u8],
    child: u64,
    data_len: usize,
    /// In the page: the value, or the number of its first page.
    data: &'a [u8],
}

impl<'a> Node<'a> {
    /// `None` if it is not in the page.
    fn at(page: &'a [u8], at: usize, is_leaf: bool) -> Option<Self> {
        let head = page.get(at..at.checked_add(NODE)?)?;
        let size = u64::from(u16_at(head, 0)) | u64::from(u16_at(head, 2)) << 16;
        let (flags, key_len) = (u16_at(head, 4), usize::from(u16_at(head, 6)));
        let key = page.get(at + NODE..at + NODE + key_len)?;
        let (child, data_len) = (size | u64::from(flags) << 32, size as usize);
        let in_page = match (is_leaf, flags) {
            (false, _) => 0,
            (true, BIG_DATA) => 8,
            (true, _) => data_len,
        };
        let start = at + NODE + key_len;
        let data = page.get(start..start.checked_add(in_page)?)?;
        let end = (start + in_page).next_multiple_of(2);
        Some(Self { place: at..end, flags, key, child, data_len, data })
    }
}

fn precedes(tree: Tree, a: &[u8], b: &[u8]) -> bool {
    match tree {
        Tree::Free if a.len() == 8 && b.len() == 8 => u64_at(a, 0) < u64_at(b, 0),
        _ => a < b,
    }
}

fn damaged(what: impl Into<String>) -> PageError {
    PageError::Damaged(what.into())
}

fn u16_at(raw: &[u8], at: usize) -> u16 {
    (&raw[at..]).get_u16_le()
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    (&raw[at..]).get_u32_le()
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    (&raw[at..]).get_u64_le()
}

/// In front of a page: number, padding, flags, bounds of its free space or number of its pages.
const HEADER: usize = 16;
/// In front of a node: size of its data or number of its child, flags, size of its key.
const NODE: usize = 8;
const META_LEN: usize = 136;
const METAS: u64 = 2;
const MAGIC: u32 = 0xBEEF_C0DE;
const VERSION: u32 = 1;
const DEPTH_MAX: u16 = 32;
const P_BRANCH: u16 = 1;
const P_LEAF: u16 = 2;
const P_OVERFLOW: u16 = 4;
const P_META: u16 = 8;
const INTEGER_KEYS: u16 = 8;
const BIG_DATA: u16 = 1;
const SUB_DATA: u16 = 2;
