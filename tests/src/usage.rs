//! Command-line handling of the programs of this crate: no arguments are taken, and `--help` prints
//! a description instead of running the program.

use std::process::ExitCode;

/// Returns the exit code for a program that was given arguments: prints `about` for `--help`, a
/// usage error for everything else; `None` when there are no arguments and the program can run.
pub fn answered(about: &str) -> Option<ExitCode> {
    answer(std::env::args().skip(1), about)
}

fn answer(mut args: impl Iterator<Item = String>, about: &str) -> Option<ExitCode> {
    match args.next()?.as_str() {
        "--help" | "-h" | "help" => {
            println!("{about}");
            Some(ExitCode::SUCCESS)
        }
        other => {
            eprintln!("error: `{other}` means nothing here\n\n{about}");
            Some(ExitCode::from(2))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_begins_when_something_is_asked() {
        let of = |args: &[&str]| answer(args.iter().map(|arg| (*arg).to_owned()), "about");
        assert_eq!(of(&[]), None);
        assert_eq!(of(&["--help"]), Some(ExitCode::SUCCESS));
        assert_eq!(of(&["-h"]), Some(ExitCode::SUCCESS));
        assert_eq!(of(&["--seconds", "3"]), Some(ExitCode::from(2)));
    }
}
