//! The wire: generated messages and services, and their conversions to and from `vasto-core`.
//!
//! **Invariant:** only this crate and its users at the edge see generated types; the conversions
//! are total, and a message of a peer can at worst become a typed error.

/// Generated from `proto/vasto/v1`.
#[allow(clippy::all, clippy::unwrap_used, missing_docs)]
pub mod v1 {
    tonic::include_proto!("vasto.v1");
}

pub mod convert;
pub mod incoming;

/// Protocol number, raised when an old node and a new master would misunderstand each other.
pub const PROTOCOL: u32 = 2;

/// Name of the metadata entry of a gRPC status that carries the [`vasto_core::ErrorCode`] number.
pub const CODE_HEADER: &str = "vasto-code";
