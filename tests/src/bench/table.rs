//! Tables in Markdown, goals, and the lines that tell how far a run has come.

use std::sync::LazyLock;
use std::time::Instant;

use serde::Serialize;

/// A table.
#[derive(Debug, Clone)]
pub(super) struct Table {
    text: String,
    columns: usize,
}

impl Table {
    pub(super) fn new(heads: &[&str]) -> Self {
        let rule = "---|".repeat(heads.len());
        Self { text: format!("| {} |\n|{rule}\n", heads.join(" | ")), columns: heads.len() }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert!(N == self.columns, "{N} cells in a table of {} columns", self.columns);
        self.text += &format!("| {} |\n", cells.join(" | "));
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

/// A bound for a figure, and whether the figure keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Goal {
    #[serde(skip_serializing_if = "Option::is_none")]
    at_most: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_least: Option<f64>,
    pub(super) held: bool,
}

impl Goal {
    pub(super) fn at_most(bound: f64, figure: f64) -> Self {
        Self { at_most: Some(bound), at_least: None, held: figure <= bound }
    }

    pub(super) fn at_least(bound: f64, figure: f64) -> Self {
        Self { at_most: None, at_least: Some(bound), held: figure >= bound }
    }

    fn bound(self) -> String {
        match (self.at_most, self.at_least) {
            (Some(bound), _) => format!("<= {bound}"),
            (None, bound) => format!(">= {}", bound.unwrap_or_default()),
        }
    }

    /// Formats the goal and whether it held, for instance `<= 1.15 held`.
    pub(super) fn text(self) -> String {
        format!("{} {}", self.bound(), if self.held { "held" } else { "**missed**" })
    }

    /// Returns the line that names a goal that was missed, with what was found instead.
    pub(super) fn missed(self, what: &str, figure: f64) -> Option<String> {
        (!self.held).then(|| format!("{what}: {figure:.3}, the goal is {}", self.bound()))
    }
}

/// Formats an optional goal.
pub(super) fn goal_text(goal: Option<Goal>) -> String {
    goal.map_or_else(|| "–".to_owned(), Goal::text)
}

pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Returns 10^9 bytes as one.
pub(super) fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// Prints a line about the progress to stderr, with the time since the first one.
pub(super) fn note(line: &str) {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let seconds = BEGAN.elapsed().as_secs();
    eprintln!("[{:>3}:{:02}] {line}", seconds / 60, seconds % 60);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_markdown_and_a_goal_says_whether_it_held() {
        let mut table = Table::new(&["change", "goal"]);
        table.row(["4 -> 5".to_owned(), Goal::at_most(1.15, 1.15).text()]);
        table.row(["speed".to_owned(), goal_text(Some(Goal::at_least(0.5, 0.49)))]);
        table.row(["else".to_owned(), goal_text(None)]);
        assert_eq!(
            table.text(),
            "| change | goal |\n|---|---|\n| 4 -> 5 | <= 1.15 held |\n| speed | >= 0.5 **missed** |\n| else | – |\n"
        );
    }

    #[test]
    fn a_figure_that_is_no_number_keeps_no_goal() {
        assert!(!Goal::at_most(1.0, f64::NAN).held && !Goal::at_least(1.0, f64::NAN).held);
    }

    #[test]
    fn only_a_goal_that_was_missed_is_named() {
        assert_eq!(Goal::at_most(1.15, 1.1).missed("4 -> 5", 1.1), None);
        let missed = Goal::at_least(0.5, 0.25).missed("grow", 0.25);
        assert_eq!(missed.as_deref(), Some("grow: 0.250, the goal is >= 0.5"));
    }

    #[test]
    fn a_goal_in_json_has_its_bound_alone() {
        let json = serde_json::to_value(Goal::at_most(1.5, 2.0)).unwrap();
        assert_eq!(json, serde_json::json!({"at_most": 1.5, "held": false}));
    }
}
