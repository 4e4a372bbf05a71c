//! The machine's clock, for calls that are given no time of their own, and to compare it with the
//! store's.

/// Returns the time, microseconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "the clock of callers that give no time of their own"
)]
pub(crate) fn now_us() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64)
}
