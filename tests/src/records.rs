//! Generated records: any number, deterministic.

use bytes::Bytes;
use vasto_testkit::Numbers;

/// Bytes of a generated value.
pub const VALUE_BYTES: usize = 100;

/// Returns the key of record `index`.
pub fn key(index: u64) -> String {
    format!("record:{index:08}")
}

/// Returns the value of record `index`: 100 characters of a 64-letter alphabet, which compress
/// about as well as real text.
pub fn value(index: u64) -> Bytes {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut numbers = Numbers::new(index);
    let mut out = Vec::with_capacity(VALUE_BYTES);
    while out.len() < VALUE_BYTES {
        let mut bits = numbers.draw();
        for _ in 0..10.min(VALUE_BYTES - out.len()) {
            out.push(LETTERS[(bits & 63) as usize]);
            bits >>= 6;
        }
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_their_size_and_differ() {
        assert_eq!(value(1).len(), VALUE_BYTES);
        assert_eq!(value(1), value(1));
        assert_ne!(value(1), value(2));
    }
}
