//! The form of an address under which others reach a server: `host:port`.
//!
//! **Invariant:** pure. An address of this form may still be unreachable: the master finds that out
//! by dialling it.

/// Reasons why a text is not an address that other processes can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadAddress {
    /// No port.
    #[error(
        "`{0}` has no port; an address looks like node-1.example.com:8279, 10.0.0.1:8279 or [fd00::1]:8279"
    )]
    NoPort(String),
    /// A port that is not a number from 1 to 65535.
    #[error("`{0}` has no usable port; give the one that others connect to, 1 to 65535")]
    Port(String),
    /// A host that is neither a name nor an IP address.
    #[error("`{0}` has no usable host; give a name or an IP address, an IPv6 address in brackets")]
    Host(String),
    /// The unspecified address ("every address of this machine"), to which no other machine can
    /// connect.
    #[error(
        "`{0}` is every address of the machine and leads others to themselves; give the one that they connect to"
    )]
    Unspecified(String),
}

/// Longest host name, by DNS.
const HOST_BYTES_MAX: usize = 253;

/// Checks the form of `host:port`.
///
/// # Errors
/// The fault in the form.
pub fn check_address(text: &str) -> Result<(), BadAddress> {
    let shown = || text.chars().take(300).collect::<String>();
    let (host, port) = text.rsplit_once(':').ok_or_else(|| BadAddress::NoPort(shown()))?;
    if port.is_empty()
        || !port.bytes().all(|c| c.is_ascii_digit())
        || !matches!(port.parse::<u16>(), Ok(1..))
    {
        return Err(BadAddress::Port(shown()));
    }
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let address: std::net::Ipv6Addr = inner.parse().map_err(|_| BadAddress::Host(shown()))?;
        return if address.is_unspecified() {
            Err(BadAddress::Unspecified(shown()))
        } else {
            Ok(())
        };
    }
    // A host of numeric labels only can be nothing but an IPv4 address.
    if host.bytes().all(|c| c.is_ascii_digit() || c == b'.') {
        let address: std::net::Ipv4Addr = host.parse().map_err(|_| BadAddress::Host(shown()))?;
        return if address.is_unspecified() {
            Err(BadAddress::Unspecified(shown()))
        } else {
            Ok(())
        };
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() > HOST_BYTES_MAX || !name.split('.').all(is_label) {
        return Err(BadAddress::Host(shown()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_others_can_connect_to_is_an_address() {
        for good in [
            "127.0.0.1:8279",
            "localhost:1",
            "node-1:65535",
            "a_b.example.com.:80",
            "[::1]:8279",
            "n1:8279",
            "3com.example:9",
        ] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        let bad = |text: &str| check_address(text).map_err(|error| std::mem::discriminant(&error));
        let kind = |error: BadAddress| Err(std::mem::discriminant(&error));
        for text in ["localhost", "", "10.0.0.1"] {
            assert_eq!(bad(text), kind(BadAddress::NoPort(String::new())), "{text}");
        }
        for text in [
            "127.0.0.1:0",
            "h:65536",
            "h:",
            "h:+80",
            "h:8o",
            "h:-1",
            "http://h:80/",
            "h:80 ",
            "::1",
        ] {
            assert!(bad(text).is_err(), "{text}");
        }
        assert_eq!(bad("127.0.0.1:0"), kind(BadAddress::Port(String::new())));
        for text in [
            "a b:1",
            ":1",
            "http://h:80",
            "1.2.3:4",
            "256.1.1.1:4",
            "::1:80",
            "[::g]:1",
            "-a:1",
            "a..b:1",
            "ä:1",
            "h\n:1",
        ] {
            assert_eq!(bad(text), kind(BadAddress::Host(String::new())), "{text}");
        }
        for text in ["0.0.0.0:80", "[::]:80"] {
            assert_eq!(bad(text), kind(BadAddress::Unspecified(String::new())), "{text}");
        }
        assert!(check_address(&format!("{}:1", "a".repeat(64))).is_err());
    }
}
