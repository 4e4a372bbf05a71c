//! The matrix of faults: every structural change, at every step, with every victim, and every
//! fault that the victim can have.
//!
//! A cell holds its change at a failpoint, checks by the catalog that it is at its step, lets the
//! fault begin, lets the change go on, checks that the fault was met, and ends it. Meanwhile clients
//! write and delete, one of them a process of its own. At most 30 s after the end began everything
//! is as before: the change is done or undone, no acknowledged write is lost, no delete is undone,
//! replicas are the same, and neither a node nor the bucket holds what nothing needs.
//!
//! `VASTO_MATRIX` sets the number of cells of a run (14), or `all` of them, with faults that last
//! for longer. Which cells a run takes follows from `VASTO_MATRIX_SEED`, which is printed, and by
//! default from the hour. `VASTO_MATRIX_CELL` runs one cell by its name. A cell that fails names
//! itself, and the directory with the logs stays.

mod cells;
mod change;
mod deletes;
mod fault;
mod ground;
mod rest;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use vasto_tests::setting;

use cells::{Change, Choice, chosen, is_name_of_a_cell};
use fault::Lasting;
use ground::Ground;

/// Cells of a run in which nothing else is said.
const CELLS: usize = 14;
/// Cells that one cluster serves, one after the other.
const CELLS_OF_A_CLUSTER: usize = 12;

/// Returns the cells that this run is to take, and how long their faults last.
fn choice() -> (Choice, Lasting) {
    let name: String = setting("VASTO_MATRIX_CELL", String::new());
    let count: String = setting("VASTO_MATRIX", CELLS.to_string());
    match (name.as_str(), count.as_str()) {
        ("", "all") => (Choice::All, Lasting::Long),
        ("", count) => {
            let count = count.parse().expect("VASTO_MATRIX is a number of cells, or all");
            (Choice::Count(count), Lasting::Short)
        }
        (name, "all") => (Choice::One(name.to_owned()), Lasting::Long),
        (name, _) => (Choice::One(name.to_owned()), Lasting::Short),
    }
}

/// Returns the hours since 1970: runs of different hours take different cells.
#[allow(clippy::disallowed_methods, reason = "the choice of cells follows the clock")]
fn hour() -> u64 {
    jiff::Timestamp::now().as_second() as u64 / 3_600
}

async fn cells_of(change: Change) -> Result<()> {
    let seed: u64 = setting("VASTO_MATRIX_SEED", hour());
    let (choice, lasting) = choice();
    match &choice {
        Choice::One(name) => {
            ensure!(is_name_of_a_cell(name), "no cell is called {name}");
        }
        Choice::All | Choice::Count(1..) => {}
        Choice::Count(0) => anyhow::bail!("VASTO_MATRIX=0 takes no cells"),
    }
    let cells = chosen(change, &choice, seed);
    println!("{change:?}: {} cells, VASTO_MATRIX_SEED={seed}", cells.len());
    for cells in cells.chunks(CELLS_OF_A_CLUSTER) {
        let mut ground = Ground::start(lasting).await?;
        for cell in cells {
            let began = Instant::now();
            let said = Box::pin(ground.run(*cell)).await.with_context(|| {
                format!("cell {cell}: VASTO_MATRIX_CELL={cell} repeats it; seed {seed}")
            })?;
            println!("cell {cell}: {said}, {:.1} s in all", began.elapsed().as_secs_f64());
        }
        ground.end().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_at_every_step_of_a_grow_by_one_shard() -> Result<()> {
    cells_of(Change::GrowOne).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_at_every_step_of_a_grow_by_several_shards() -> Result<()> {
    cells_of(Change::GrowMany).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_at_every_step_of_a_shrink() -> Result<()> {
    cells_of(Change::Shrink).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_at_every_step_of_a_replacement() -> Result<()> {
    cells_of(Change::Replace).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_at_every_step_of_a_drain() -> Result<()> {
    cells_of(Change::Drain).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_at_every_step_of_a_rebalance() -> Result<()> {
    cells_of(Change::Rebalance).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_at_every_step_of_a_restore() -> Result<()> {
    cells_of(Change::Restore).await
}
