//! WordNet 3.0 as records: one per synset, from the files of Debian's package `wordnet-base`.
//!
//! The format is described in `wndb(5)`: a licence whose lines begin with two spaces, then one
//! synset a line: `offset lex_filenum ss_type w_cnt (word lex_id)* p_cnt ... | gloss`, with `w_cnt`
//! in hexadecimal.

use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Directory of the package's files.
pub const DIR: &str = "/usr/share/wordnet";

/// Name and licence of the data set, in one line.
pub const ABOUT: &str = "WordNet 3.0, Copyright 2006 by Princeton University, under the WordNet 3.0 licence \
                         (free use, copying and modification; Debian package wordnet-base)";

/// Number of synsets of WordNet 3.0.
pub const SYNSETS: usize = 117_659;

/// One synset: `synset:n:00001740` and `entity: that which is perceived ...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synset {
    /// Part of speech and offset.
    pub key: String,
    /// Words and gloss.
    pub value: String,
}

/// Reads all synsets.
///
/// # Errors
/// When the data set is not installed (the text says how to install it) or has unexpected contents.
pub fn load(dir: &Path) -> Result<Vec<Synset>> {
    let mut all = Vec::with_capacity(SYNSETS);
    for (file, part) in
        [("data.noun", 'n'), ("data.verb", 'v'), ("data.adj", 'a'), ("data.adv", 'r')]
    {
        let path = dir.join(file);
        let bytes = std::fs::read(&path).with_context(|| {
            format!(
                "the WordNet file {} cannot be read; `make setup` installs it (Debian package wordnet-base)",
                path.display()
            )
        })?;
        let text = String::from_utf8_lossy(&bytes);
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with("  ")) {
            let synset = parse(part, line).with_context(|| {
                format!("{}:{}: this is not a synset of WordNet 3.0", path.display(), number + 1)
            })?;
            all.push(synset);
        }
    }
    ensure!(
        all.len() == SYNSETS,
        "{} holds {} synsets, WordNet 3.0 has {SYNSETS}",
        dir.display(),
        all.len()
    );
    Ok(all)
}

fn parse(part: char, line: &str) -> Option<Synset> {
    let (data, gloss) = line.split_once(" | ")?;
    let mut fields = data.split(' ');
    let offset =
        fields.next().filter(|text| text.len() == 8 && text.bytes().all(|c| c.is_ascii_digit()))?;
    let count = usize::from_str_radix(fields.nth(2)?, 16).ok()?;
    let words: Vec<String> =
        fields.step_by(2).take(count).map(|word| word.replace('_', " ")).collect();
    (words.len() == count && count > 0).then(|| Synset {
        key: format!("synset:{part}:{offset}"),
        value: format!("{}: {}", words.join(", "), gloss.trim()),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_line_becomes_a_record() {
        let line = "00002137 03 n 02 abstraction 0 abstract_entity 0 002 @ 00001740 n 0000 + 00692347 v 0101 | a general concept  ";
        let synset = parse('n', line).unwrap();
        assert_eq!(synset.key, "synset:n:00002137");
        assert_eq!(synset.value, "abstraction, abstract entity: a general concept");
        for bad in ["", "00002137 03 n 02 one 0 | gloss", "x | y", "00002137 03 n 00 | y"] {
            assert!(parse('n', bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_missing_data_set_says_how_to_get_it() {
        let error = format!("{:#}", load(Path::new("/nowhere")).unwrap_err());
        assert!(error.contains("make setup") && error.contains("wordnet-base"), "{error}");
    }
}
