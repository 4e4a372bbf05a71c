//! What the conformance suite runs against: real S3 servers, and stores that misbehave on purpose.

pub mod faulty;
pub mod s3_server;
