//! The types and text forms of single configuration values.
//!
//! Invariant: a written value is read back as the same value, and a secret is never written.

use std::{fmt, str::FromStr, time::Duration};

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A value that no log, error or `config show` prints: it always shows as `***`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret<T>(T);

impl<T> Secret<T> {
    #[cfg(test)]
    pub(crate) fn new(value: T) -> Secret<T> {
        Secret(value)
    }

    /// Returns the secret value, for the only code that has to send it.
    pub(crate) fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl<T> fmt::Display for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl<T> Serialize for Secret<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Secret<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Secret<T>, D::Error> {
        T::deserialize(deserializer).map(Secret)
    }
}

/// A choice between `off` and `on`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum OnOff {
    #[default]
    Off,
    On,
}

impl OnOff {
    /// Returns true for `on`.
    pub(crate) fn is_on(self) -> bool {
        self == OnOff::On
    }
}

impl fmt::Display for OnOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_on() { "on" } else { "off" })
    }
}

impl FromStr for OnOff {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(OnOff::Off),
            "on" => Ok(OnOff::On),
            other => Err(format!("`{other}` is neither off nor on")),
        }
    }
}

/// Sizes: a number of bytes, or text such as `256MiB`.
pub(super) mod size {
    use super::*;

    pub(in crate::config) fn serialize<S: Serializer>(
        size: &ByteSize,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&exact(*size))
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<ByteSize, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(bytes) => Ok(ByteSize::b(bytes)),
            Form::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }

    /// Formats a size in the largest binary unit without loss.
    fn exact(size: ByteSize) -> String {
        let bytes = size.as_u64();
        [(30, "GiB"), (20, "MiB"), (10, "KiB")]
            .into_iter()
            .find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift)
            .map_or_else(
                || format!("{bytes}B"),
                |(shift, unit)| format!("{}{unit}", bytes >> shift),
            )
    }
}

/// Positive durations, such as `10s` or `1h 30m`.
pub(super) mod duration {
    use super::*;

    pub(in crate::config) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*duration))
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        let duration = humantime::parse_duration(&text).map_err(D::Error::custom)?;
        match duration.is_zero() {
            true => Err(D::Error::custom("it is zero")),
            false => Ok(duration),
        }
    }
}

/// Durations that may be zero.
pub(super) mod period {
    use super::*;

    pub(in crate::config) use super::duration::serialize;

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        humantime::parse_duration(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// Whole numbers from 1.
pub(super) mod count {
    use super::*;

    pub(in crate::config) fn serialize<S: Serializer>(
        count: &usize,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        count.serialize(serializer)
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<usize, D::Error> {
        match u32::deserialize(deserializer)? {
            0 => Err(D::Error::custom("it is zero")),
            count => Ok(count as usize),
        }
    }
}

/// Prices: numbers from 0.
pub(super) mod price {
    use super::*;

    pub(in crate::config) fn serialize<S: Serializer>(
        price: &f64,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        price.serialize(serializer)
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<f64, D::Error> {
        match f64::deserialize(deserializer)? {
            price if price.is_finite() && price >= 0.0 => Ok(price),
            _ => Err(D::Error::custom("it is no number from 0")),
        }
    }
}

/// Factors: numbers from 1, or 0 for none.
pub(super) mod factor {
    use super::*;

    pub(in crate::config) use super::price::serialize;

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<f64, D::Error> {
        match f64::deserialize(deserializer)? {
            factor if factor.is_finite() && (factor == 0.0 || factor >= 1.0) => Ok(factor),
            _ => Err(D::Error::custom("it is neither 0 nor a number from 1")),
        }
    }
}

/// Words that a type parses and formats.
pub(super) mod word {
    use super::*;

    pub(in crate::config) fn serialize<T: fmt::Display, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(in crate::config) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: fmt::Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
