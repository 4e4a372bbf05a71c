//! What the conformance suite runs against: a real S3 server, and stores that misbehave on purpose.

pub mod faulty;
pub mod s3_server;
