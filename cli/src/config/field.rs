//! The list of all configuration fields: name, parser, error message, and the nearest field to a
//! misspelled name.
//!
//! Invariant: this list and the sections of [`super::Config`] name the same fields; a test
//! compares them.

use figment::value::Value;

/// The kind of value that a field takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Url,
    Secret,
    Switch,
    Count,
    Size,
    Shift,
    Price,
    Factor,
    Duration,
    Period,
    Address,
    OnOff,
    LogFormat,
}

/// A field of a section.
#[derive(Debug)]
pub(super) struct Field {
    /// `section.field`.
    pub(super) path: &'static str,
    pub(super) kind: Kind,
}

const fn field(path: &'static str, kind: Kind) -> Field {
    Field { path, kind }
}

/// All fields, in the order in which `vasto config show` prints them.
pub(super) const FIELDS: &[Field] = &[
    field("bucket.url", Kind::Url),
    field("bucket.endpoint", Kind::Url),
    field("bucket.region", Kind::Text),
    field("bucket.access_key_id", Kind::Secret),
    field("bucket.secret_access_key", Kind::Secret),
    field("bucket.allow_http", Kind::Switch),
    field("bucket.keep_checkpoints", Kind::Count),
    field("bucket.keep_for", Kind::Period),
    field("bucket.min_age", Kind::Period),
    field("bucket.gc_interval", Kind::Period),
    field("master.listen", Kind::Address),
    field("master.admin_listen", Kind::Address),
    field("master.node_silence", Kind::Duration),
    field("master.replace_after", Kind::Period),
    field("master.rebalance", Kind::OnOff),
    field("master.moves_at_once", Kind::Count),
    field("node.master", Kind::Url),
    field("node.dir", Kind::Text),
    field("node.listen", Kind::Address),
    field("node.advertise", Kind::Text),
    field("node.zone", Kind::Text),
    field("node.admin_listen", Kind::Address),
    field("node.cache", Kind::Size),
    field("node.write_buffer", Kind::Size),
    field("node.background_jobs", Kind::Count),
    field("node.rate_limit", Kind::Size),
    field("node.ship_interval", Kind::Duration),
    field("node.ship_rate", Kind::Size),
    field("node.bulk_rate", Kind::Size),
    field("node.background_latency_factor", Kind::Factor),
    field("node.read_threads", Kind::Count),
    field("node.max_replicas", Kind::Count),
    field("node.max_log", Kind::Size),
    field("node.clock_shift_ms", Kind::Shift),
    field("log.filter", Kind::Text),
    field("log.format", Kind::LogFormat),
    field("security.insecure", Kind::Switch),
    field("prices.currency", Kind::Text),
    field("prices.put_per_1000", Kind::Price),
    field("prices.get_per_1000", Kind::Price),
    field("prices.list_per_1000", Kind::Price),
    field("prices.gib_month", Kind::Price),
    field("prices.egress_gib", Kind::Price),
];

impl Kind {
    /// Describes a valid value, as a phrase that follows the word "expected".
    pub(super) fn expected(self) -> &'static str {
        match self {
            Kind::Text | Kind::Secret => "text in quotes",
            Kind::Url => "a URL in quotes",
            Kind::Switch => "true or false",
            Kind::Count => "a whole number from 1 to 4294967295",
            Kind::Shift => "a whole number of milliseconds, negative for a slow clock",
            Kind::Price => "a number from 0 such as 0.005",
            Kind::Factor => "a number from 1 such as 2.0, or 0",
            Kind::Size => "a size such as \"256MiB\", or a number of bytes",
            Kind::Duration => "a duration above zero such as \"10s\" or \"1h 30m\"",
            Kind::Period => "a duration such as \"10s\" or \"1h 30m\", or \"0s\"",
            Kind::Address => "an IP address and a port such as \"127.0.0.1:8278\"",
            Kind::OnOff => "\"off\" or \"on\"",
            Kind::LogFormat => "\"auto\", \"human\" or \"json\"",
        }
    }

    /// Parses a text from the environment or from a flag. Text that does not parse stays text; the
    /// check of all values rejects it later.
    pub(super) fn value_of(self, text: &str) -> Value {
        match self {
            Kind::Switch => match text {
                "true" | "1" => Value::from(true),
                "false" | "0" => Value::from(false),
                other => Value::from(other),
            },
            Kind::Shift => text.parse::<i64>().map_or_else(|_| Value::from(text), Value::from),
            Kind::Price | Kind::Factor => {
                let number = text.parse::<f64>().ok().filter(|number| number.is_finite());
                number.map_or_else(|| Value::from(text), Value::from)
            }
            Kind::Count => text.parse::<u64>().map_or_else(|_| Value::from(text), Value::from),
            _ => Value::from(text),
        }
    }
}

pub(super) fn find(path: &str) -> Option<&'static Field> {
    FIELDS.iter().find(|field| field.path == path)
}

/// Likeness (0 to 1) below which a guess confuses more than it helps.
const LIKENESS_MIN: f64 = 0.6;

/// Returns the field whose path, or whose last part, is most like `path`.
pub(super) fn nearest(path: &str) -> Option<&'static Field> {
    let likeness = |field: &Field| {
        let whole = strsim::normalized_damerau_levenshtein(path, field.path);
        // The right name in the wrong section, or without a section; slightly less likely.
        let last = strsim::normalized_damerau_levenshtein(last_part(path), last_part(field.path));
        whole.max(0.9 * last)
    };
    FIELDS
        .iter()
        .map(|field| (likeness(field), field))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, field)| field)
}

/// Returns the field names of the section that `path` is in, or of all sections.
pub(super) fn neighbours(path: &str) -> Vec<&'static str> {
    let section = path.split('.').next().unwrap_or_default();
    let of = |wanted: &str| {
        let parts = FIELDS.iter().filter_map(|field| field.path.split_once('.'));
        parts.filter(|(section, _)| *section == wanted).map(|(_, name)| name).collect::<Vec<_>>()
    };
    let fields = of(section);
    if !fields.is_empty() {
        return fields;
    }
    let mut sections: Vec<_> =
        FIELDS.iter().filter_map(|field| field.path.split('.').next()).collect();
    sections.dedup();
    sections
}

fn last_part(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_nearest_field_is_found_across_sections_and_nonsense_finds_none() {
        for (given, meant) in [
            ("node.cahce", "node.cache"),
            ("node.write_bufer", "node.write_buffer"),
            ("master.cache", "node.cache"),
            ("master.zone", "node.zone"),
            ("nodes.listen", "node.listen"),
            ("log.fromat", "log.format"),
            ("ship_interval", "node.ship_interval"),
        ] {
            assert_eq!(nearest(given).unwrap().path, meant, "{given}");
        }
        assert!(nearest("weather.is_fine").is_none());
    }

    #[test]
    fn text_becomes_the_kind_of_its_field() {
        assert_eq!(Kind::Switch.value_of("true"), Value::from(true));
        assert_eq!(Kind::Shift.value_of("-250"), Value::from(-250i64));
        assert_eq!(Kind::Count.value_of("7"), Value::from(7u64));
        assert_eq!(Kind::Price.value_of("0.005"), Value::from(0.005));
        assert_eq!(Kind::Price.value_of("NaN"), Value::from("NaN"));
        assert_eq!(Kind::Factor.value_of("2.5"), Value::from(2.5));
        assert_eq!(Kind::Text.value_of("7"), Value::from("7"));
        assert_eq!(Kind::Count.value_of("seven"), Value::from("seven"));
    }
}
