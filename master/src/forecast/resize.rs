//! The forecast of a resize: which bands move, how they divide among the targets, in which files
//! they come, and how long that takes.
//!
//! **Invariant:** a replica that has reported no bands (of an older node, or not measured yet)
//! counts by the sum of its bytes and the shares of the hash, without what tables and lists add.

use std::collections::BTreeSet;

use vasto_core::band::Band;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{NodeId, ReplicaId, ShardId};
use vasto_core::plan::Plan;
use vasto_core::record::BandRange;
use vasto_core::report::{ReplicaReport, Reports};

use super::size::{export_manifest_bytes, gets, manifest_bytes, puts, tables, unshipped};
use super::time::{GROW, Paces, SHRINK, SideBySide};
use super::{Forecast, Source};

/// Bytes on the disk of a target for each byte that it receives: the download, and the tables
/// rewritten from it.
const TARGET_DISK: f64 = 2.0;
/// A source rewrites the moving bands first when files that reach beyond them are more than this
/// part of those inside.
const CROSSING_PART: f64 = 0.1;

/// The shard counts, and the bands that move.
#[derive(Debug, Clone, Copy)]
struct Shape {
    from: u32,
    to: u32,
    leaving: BandRange,
    arriving: BandRange,
}

/// What a band of a source gives.
#[derive(Debug, Clone, Copy)]
struct Amount {
    band: Band,
    rows: f64,
    /// In fresh tables.
    bytes: f64,
    /// In files of the band alone, as they are.
    files: f64,
}

/// What a source gives.
struct Gives {
    source: Source,
    bands: Vec<Amount>,
    /// The replica has reported its bands.
    measured: bool,
    /// Bytes of a table beside its rows.
    table: f64,
    /// Bytes of files that reach beyond a band.
    crossing: f64,
    /// Files of its checkpoint.
    files: f64,
    /// Bytes of its checkpoint that are not in the bucket.
    unshipped: f64,
}

/// A shard that keys move to.
struct Takes {
    shard: u32,
    replicas: u64,
    /// Where its replicas are; empty while no node is chosen.
    nodes: Vec<NodeId>,
}

/// What one target takes from one source.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    rows: f64,
    bytes: f64,
    tables: f64,
}

/// Returns the forecast of a resize to `to` shards, a legal count; `plan` is its plan once nodes
/// are chosen.
pub(crate) fn resize(
    catalog: &Catalog,
    reports: &Reports,
    to: u32,
    plan: Option<&Plan>,
    paces: &Paces,
) -> Forecast {
    let Some(shape) = Shape::of(catalog.spec.shards, to) else { return Forecast::default() };
    let gives: Vec<Gives> = catalog
        .placement
        .iter()
        .filter(|shard| !shape.shrinks() || shard.shard.0 >= to)
        .filter_map(|shard| {
            let shipper = shard.shipper()?;
            let report = reports.get(&shipper.replica);
            Some(Gives::of(catalog, shape, shard.shard, shipper.replica, shipper.node, report))
        })
        .collect();
    let mut forecast = Forecast {
        moving_fraction: Some(
            f64::from(shape.from.abs_diff(to)) / f64::from(shape.from.max(to).max(1)),
        ),
        sources: gives.iter().map(|gives| gives.source.clone()).collect(),
        ..Forecast::default()
    };
    let mut at_sources = SideBySide::default();
    let sources: BTreeSet<NodeId> = gives.iter().filter_map(|gives| gives.source.node).collect();
    for gives in &gives {
        at_sources.add(gives.source.node, gives.seconds(shape, paces, sources.len()));
        forecast.puts += gives.puts(shape);
        if let Some(node) = gives.source.node.filter(|_| shape.exports()) {
            *forecast.disk.entry(node).or_default() += gives.source.moves;
        }
    }
    let mut at_targets = SideBySide::default();
    let receivers = shape.receivers(catalog, plan);
    let sharing = nodes_of(&receivers);
    for takes in &receivers {
        take(takes, &gives, shape, (paces, sharing), &mut at_targets, &mut forecast);
    }
    let fixed = paces.fixed(if shape.shrinks() { SHRINK } else { GROW });
    forecast.seconds = fixed + at_sources.seconds() + at_targets.seconds();
    forecast
}

/// Returns the number of nodes that receive; while they are not chosen, each replica is on one of
/// its own.
fn nodes_of(receivers: &[Takes]) -> usize {
    let chosen: BTreeSet<NodeId> =
        receivers.iter().flat_map(|takes| takes.nodes.iter().copied()).collect();
    let replicas: u64 = receivers.iter().map(|takes| takes.replicas).sum();
    if chosen.is_empty() { replicas as usize } else { chosen.len() }
}

/// Adds what the replicas of one shard take, whose nodes share the rate with others.
fn take(
    takes: &Takes,
    gives: &[Gives],
    shape: Shape,
    (paces, sharing): (&Paces, usize),
    at_targets: &mut SideBySide,
    forecast: &mut Forecast,
) {
    let (mut all, mut fetched, mut requests) = (Taken::default(), 0.0, 0);
    for gives in gives {
        let taken = gives.for_target(shape, takes.shard);
        let (objects, list) = gives.objects(shape, taken);
        fetched += objects + list;
        requests += 1 + gets(objects.round() as u64);
        all = Taken { rows: all.rows + taken.rows, bytes: all.bytes + taken.bytes, ..all };
    }
    let table = gives.iter().map(|gives| gives.table).fold(0.0, f64::max);
    let moved = all.bytes + table * shape.arriving_tables(all);
    forecast.bytes_moved += takes.replicas * moved.round() as u64;
    forecast.bytes_from_bucket += takes.replicas * fetched.round() as u64;
    forecast.gets += takes.replicas * requests;
    // The first manifest, the list of the database, and the files.
    forecast.puts += 2 + puts(moved.round() as u64);
    for node in &takes.nodes {
        *forecast.disk.entry(*node).or_default() += (TARGET_DISK * all.bytes).round() as u64;
    }
    let chosen = takes.nodes.iter().copied().map(Some);
    let nodes: Vec<Option<NodeId>> = match takes.nodes.is_empty() {
        true => vec![None],
        false => chosen.collect(),
    };
    for (at, node) in nodes.into_iter().enumerate() {
        let rates = paces.shared_at(node, sharing);
        // A survivor ships as it always does.
        let upload = if shape.shrinks() { paces.at(node).upload } else { rates.upload };
        let ships = if at == 0 { moved / upload } else { 0.0 };
        let reads = paces.downloads(rates, fetched, requests);
        at_targets.add(node, reads + moved / rates.rewrite + ships);
    }
}

impl Shape {
    fn of(from: u32, to: u32) -> Option<Self> {
        let (leaving, arriving) = match from.cmp(&to) {
            std::cmp::Ordering::Less => (Band::leaving(from, to), Band::owned(to)),
            std::cmp::Ordering::Greater => (Band::owned(from), Band::leaving(to, from)),
            std::cmp::Ordering::Equal => return None,
        };
        Some(Self { from, to, leaving: leaving.into(), arriving: arriving.into() })
    }

    fn shrinks(self) -> bool {
        self.to < self.from
    }

    fn exports(self) -> bool {
        self.shrinks() || self.to > self.from + 1
    }

    /// Returns the part of the moving keys of a band that belongs to a shard afterwards. In a grow
    /// they leave for the shard of their next jump, and each further shard takes an equal part.
    fn part_for(self, band: Band, shard: u32) -> f64 {
        let to = f64::from(self.to);
        match (self.shrinks(), shard.cmp(&band.low_edge())) {
            (true, _) | (false, std::cmp::Ordering::Greater) => 1.0 / to,
            (false, std::cmp::Ordering::Equal) => f64::from(shard + 1) / to,
            (false, std::cmp::Ordering::Less) => 0.0,
        }
    }

    /// Returns the tables in which a target holds what arrives: one for each band, and one more for
    /// each that is full.
    fn arriving_tables(self, all: Taken) -> f64 {
        let shards = self.arriving.first.low_edge();
        let whole: f64 = self.arriving.bands().map(|band| band.share(shards)).sum();
        let tables_of = |band: Band| {
            let part = band.share(shards) / whole.max(f64::MIN_POSITIVE);
            // A band of few rows may have none.
            let has_rows = 1.0 - (-all.rows * part).exp();
            has_rows * tables(all.bytes * part)
        };
        self.arriving.bands().map(tables_of).sum()
    }

    fn receivers(self, catalog: &Catalog, plan: Option<&Plan>) -> Vec<Takes> {
        if self.shrinks() {
            let stay = catalog.placement.iter().filter(|shard| shard.shard.0 < self.to);
            let takes = stay.map(|shard| Takes {
                shard: shard.shard.0,
                replicas: shard.replicas.len() as u64,
                nodes: shard.replicas.iter().map(|member| member.node).collect(),
            });
            return takes.collect();
        }
        let nodes_of = |shard| {
            let targets = plan.iter().flat_map(|plan| &plan.targets);
            targets
                .filter(move |target| target.shard.0 == shard)
                .map(|target| target.node)
                .collect()
        };
        let replicas = u64::from(catalog.spec.replicas);
        (self.from..self.to)
            .map(|shard| Takes { shard, replicas, nodes: nodes_of(shard) })
            .collect()
    }
}

impl Gives {
    fn of(
        catalog: &Catalog,
        shape: Shape,
        shard: ShardId,
        replica: ReplicaId,
        node: NodeId,
        report: Option<&ReplicaReport>,
    ) -> Self {
        let (keys, bytes) = report.map_or((0, 0), |report| (report.keys, report.bytes));
        let stored = report.and_then(|report| report.stored.as_ref());
        let bands: Vec<Amount> = match stored {
            Some(stored) => stored
                .in_range(shape.leaving)
                .map(|size| Amount {
                    band: size.band,
                    rows: size.rows as f64,
                    bytes: size.bytes as f64,
                    files: size.file_bytes as f64,
                })
                .collect(),
            None => by_the_hash(catalog, replica, shape.leaving, keys, bytes),
        };
        let moves: f64 = bands.iter().map(|amount| amount.bytes).sum();
        let checkpoint = stored.map_or(bytes, |stored| stored.checkpoint_bytes) as f64;
        Self {
            source: Source {
                keyspace: catalog.name.clone(),
                shard,
                node: Some(node),
                keys,
                bytes,
                moves: moves.round() as u64,
            },
            bands,
            measured: stored.is_some(),
            table: stored.map_or(0.0, |stored| stored.table_bytes as f64),
            crossing: stored.map_or(0.0, |stored| stored.crossing_bytes as f64),
            files: stored.map_or(0.0, |stored| stored.checkpoint_files as f64),
            unshipped: report.map_or(checkpoint, |report| unshipped(report, checkpoint)),
        }
    }

    /// Returns what belongs to one shard afterwards.
    fn for_target(&self, shape: Shape, shard: u32) -> Taken {
        let sum = |amount: fn(&Amount) -> f64| {
            let parts = self.bands.iter();
            parts.map(|band| amount(band) * shape.part_for(band.band, shard)).sum::<f64>()
        };
        let (rows, bytes) = (sum(|band| band.rows), sum(|band| band.bytes));
        let tables = if rows < 0.5 { 0.0 } else { tables(bytes) };
        Taken { rows, bytes, tables }
    }

    /// Returns true when the source rewrites the moving bands before its checkpoint.
    fn rewrites(&self, shape: Shape) -> bool {
        let files: f64 = self.bands.iter().map(|band| band.files).sum();
        !shape.exports() && self.crossing > files * CROSSING_PART
    }

    /// Returns the bytes of the objects that a target fetches, and of the manifest that names them.
    fn objects(&self, shape: Shape, taken: Taken) -> (f64, f64) {
        if !self.measured {
            return (taken.bytes, 0.0);
        }
        if shape.exports() {
            let of_all = (0..shape.from.max(shape.to))
                .filter(
                    |shard| if shape.shrinks() { *shard < shape.to } else { *shard >= shape.from },
                )
                .map(|shard| self.for_target(shape, shard).tables);
            let list = export_manifest_bytes(of_all.sum());
            return (taken.bytes + self.table * taken.tables, list);
        }
        let files: f64 = self.bands.iter().map(|band| band.files).sum();
        match self.rewrites(shape) {
            // The rewriting divides the files that reach beyond the bands, so there is one for each.
            true => {
                let list = manifest_bytes(self.files.max(self.bands_of_all()));
                (taken.bytes + self.table * taken.tables, list)
            }
            false => (files + self.crossing, manifest_bytes(self.files)),
        }
    }

    /// Returns the bands in which a shard of so many rows has some.
    fn bands_of_all(&self) -> f64 {
        let of = self.bands.first().map(|amount| (amount.band, amount.rows));
        let Some((first, rows)) = of else { return 0.0 };
        let shards = first.low_edge();
        let all = rows / first.share(shards).max(f64::MIN_POSITIVE);
        Band::all().map(|band| 1.0 - (-all * band.share(shards)).exp()).sum()
    }

    fn puts(&self, shape: Shape) -> u64 {
        // A manifest and the list of the database, and the same of an export.
        let export = if shape.exports() { 1 + puts(self.source.moves) } else { 0 };
        2 + puts(self.uploads(shape).round() as u64) + export
    }

    /// Returns how long the source works, whose node shares the rate with others.
    fn seconds(&self, shape: Shape, paces: &Paces, sharing: usize) -> f64 {
        let rates = paces.at(self.source.node);
        let moves = self.source.moves as f64;
        let first = match (shape.exports(), self.rewrites(shape)) {
            (true, _) => moves / paces.shared_at(self.source.node, sharing).export,
            (false, true) => moves / rates.rewrite,
            (false, false) => 0.0,
        };
        first + self.uploads(shape) / rates.upload
    }

    /// Returns the bytes that its checkpoint uploads; bands that it rewrites first are in new files.
    fn uploads(&self, shape: Shape) -> f64 {
        match self.rewrites(shape) {
            true => self.unshipped.max(self.source.moves as f64),
            false => self.unshipped,
        }
    }
}

/// Divides the bytes of a replica among its bands by the hash. A shard of `n` shards holds `1/n` of
/// all keys; a replica that keeps the bands of an earlier grow in quarantine holds as many as it did
/// before that grow.
fn by_the_hash(
    catalog: &Catalog,
    replica: ReplicaId,
    bands: BandRange,
    keys: u64,
    bytes: u64,
) -> Vec<Amount> {
    let from = catalog.spec.shards;
    let kept = catalog.quarantines.iter().filter(|kept| kept.replicas.contains(&replica));
    let held = kept.map(|kept| kept.range.first.low_edge()).chain([from]).min().unwrap_or(from);
    let amount = |band: Band| {
        let share = band.share(held.max(1));
        let bytes = bytes as f64 * share;
        Amount { band, rows: keys as f64 * share, bytes, files: bytes }
    };
    bands.bands().map(amount).collect()
}
