//! Stores for the conformance suite: real S3 servers, and stores that inject faults.

pub mod faulty;
pub mod s3_server;
