//! Total byte reader: every decoder of this crate is built on it, and none can panic.

/// Decoding errors: too few bytes, or bytes that no version wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the value needs.
    #[error("{what} ends too early")]
    Short {
        /// Name of the value being read.
        what: &'static str,
    },
    /// A number that this version does not know; a newer version may have written it.
    #[error("{what} {value} is unknown to this version; use a newer one")]
    Unknown {
        /// Name of the field.
        what: &'static str,
        /// Number found.
        value: u64,
    },
    /// A field contradicts another.
    #[error("{what} is malformed")]
    Malformed {
        /// Name of the field.
        what: &'static str,
    },
    /// A checksum does not match its bytes.
    #[error("{what} fails its checksum")]
    Checksum {
        /// Name of the value being verified.
        what: &'static str,
    },
}

/// Reads fields from the front of a slice.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Creates a reader of `bytes`; errors name `what`.
    pub fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    /// Reads the next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) =
            self.rest.split_at_checked(n).ok_or(DecodeError::Short { what: self.what })?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        Ok(self.take(N)?.try_into().expect("take answers exactly N bytes"))
    }

    /// Reads one byte.
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    /// Reads a little-endian u32.
    pub fn u32_le(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Reads a little-endian u64.
    pub fn u64_le(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads a big-endian u64.
    pub fn u64_be(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    /// Reads a little-endian u32 length and that many bytes.
    pub fn bytes_le(&mut self) -> Result<&'a [u8], DecodeError> {
        let len = self.u32_le()?;
        self.take(len as usize)
    }

    /// Returns all remaining bytes.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Fails unless everything was read.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Malformed { what: self.what }) }
    }
}

/// Appends a little-endian u32 length and the bytes.
pub fn put_bytes_le(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(
        &u32::try_from(bytes.len()).expect("limits keep every field below 4 GiB").to_le_bytes(),
    );
    out.extend_from_slice(bytes);
}
