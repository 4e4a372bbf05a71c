//! Pages of an S3 listing, as text: the foreign names are cut out before object_store parses the
//! page, since it rejects the whole page for one name.

use super::strangers::oddity;

/// Removes the objects with unreadable names from an S3 page, and reports their names.
pub(super) fn without_strangers(
    page: &str,
    mut report: impl FnMut(&str, String),
) -> Option<String> {
    const OPEN: &str = "<Contents>";
    const CLOSE: &str = "</Contents>";
    let mut kept = String::new();
    let mut copied = 0;
    let mut at = 0;
    while let Some(begin) = page[at..].find(OPEN).map(|found| at + found) {
        let end = page[begin..].find(CLOSE).map(|found| begin + found + CLOSE.len())?;
        let key =
            page[begin..end].split_once("<Key>").and_then(|(_, rest)| rest.split_once("</Key>"));
        let key = unescaped(key.map_or("", |(key, _)| key));
        if let Some(why) = oddity(&key) {
            // A console's folder marker is no object, and needs no warning.
            if key.trim_end_matches('/').is_empty() || !key.ends_with('/') || key.ends_with("//") {
                report(&key, why);
            }
            kept.push_str(&page[copied..begin]);
            copied = end;
        }
        at = end;
    }
    if copied == 0 {
        return None;
    }
    kept.push_str(&page[copied..]);
    Some(kept)
}

/// Decodes XML's five named and its numeric entities; anything else stays as it is.
fn unescaped(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        let end = rest[at..].find(';').map(|end| at + end);
        let found = end.and_then(|end| {
            let name = &rest[at + 1..end];
            let number =
                |text: &str, radix| u32::from_str_radix(text, radix).ok().and_then(char::from_u32);
            let character = match name {
                "lt" => Some('<'),
                "gt" => Some('>'),
                "amp" => Some('&'),
                "quot" => Some('"'),
                "apos" => Some('\''),
                _ => match name.strip_prefix('#') {
                    Some(digits) => match digits.strip_prefix('x') {
                        Some(hex) => number(hex, 16),
                        None => number(digits, 10),
                    },
                    None => None,
                },
            };
            character.map(|character| (character, end + 1))
        });
        let (character, next) = found.unwrap_or(('&', at + 1));
        out.push(character);
        rest = &rest[next..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn page_of(keys: &[&str]) -> String {
        let contents = |key: &&str| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>");
        format!(
            "<List><IsTruncated>false</IsTruncated>{}</List>",
            keys.iter().map(contents).collect::<String>()
        )
    }

    #[test]
    fn a_page_loses_the_names_that_cannot_be_read_and_nothing_else() {
        let odd = ["a//b", "..", "a/../b", "catalog//x", "/a", "a//", "x&#1;y", "x&#x7f;y", ""];
        let good = ["a/b", "a&amp;b", "&lt;", "a b", "ä", "&unknown;", "&", "a..b", "&#99999999;"];
        for stranger in odd {
            let mixed = page_of(&["first", stranger, "between", stranger, "last"]);
            let mut reported = Vec::new();
            let kept = without_strangers(&mixed, |key, _| reported.push(key.to_owned())).unwrap();
            assert_eq!(kept, page_of(&["first", "between", "last"]), "{stranger}");
            assert_eq!(reported, [unescaped(stranger), unescaped(stranger)]);
        }
        let folder = without_strangers(&page_of(&["a/b", "a/"]), |key, _| panic!("{key}"));
        assert_eq!(folder, Some(page_of(&["a/b"])));
        for key in good {
            assert_eq!(
                without_strangers(&page_of(&[key]), |key, _| panic!("{key}")),
                None,
                "{key}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_page(text in "(<Contents>|</Contents>|<Key>|</Key>|&|#|;|x|[0-9a-z/.é]){0,20}") {
            let _ = without_strangers(&text, |_, _| ());
        }
    }
}
