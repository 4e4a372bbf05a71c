//! A real master on loopback, a real bucket, and scripted nodes that speak the real protocol.
#![allow(clippy::unwrap_used)]

mod cost;
mod grow;
mod harness;
mod keyspaces;
mod membership;
mod node;
mod rebalance;
mod repair;
mod shrink;
