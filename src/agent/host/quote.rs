//! Users' text on its way to systemd: the only functions through which it passes.
//!
//! Each takes any text and gives back a form that systemd reads as exactly that
//! text, or refuses it with a message that says what to change. There are three
//! ways in and no others: a word of a command in a unit file, a word of a command
//! over D-Bus, and a value in an environment file; the script of a build is a
//! file, quoted for the shell where it is a list of words. Everything else that a
//! unit says is made of validated names and paths ([`plain_path`]).
//!
//! Rules and evidence: systemd.service(5), "Command lines"; systemd.exec(5),
//! "EnvironmentFile=".

use std::path::Path;

/// Bytes of one word of a command, or of one `NAME=value`: the kernel refuses a longer string
/// (`MAX_ARG_STRLEN`, 128 KiB with its NUL).
pub const LONGEST_WORD_BYTES: usize = 131_071;

/// Bytes of one line of a unit file: half of what systemd reads (`LONG_LINE_MAX`, 1 MiB).
pub const LONGEST_LINE_BYTES: usize = 512 * 1024;

/// Text that systemd or the kernel could not carry unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuoteError {
    /// A command without words, or whose first word names no program.
    #[error("a command must begin with the name of a program: not empty and without '='")]
    NoProgram,
    /// No program can be given a NUL byte.
    #[error("{what} contains a NUL byte, which no program can be given: remove it")]
    Nul {
        /// Which word or variable.
        what: String,
    },
    /// The kernel refuses it.
    #[error(
        "{what} is longer than {LONGEST_WORD_BYTES} bytes, which no program can be given: put it into a file"
    )]
    TooLong {
        /// Which word or variable.
        what: String,
    },
    /// systemd refuses it.
    #[error(
        "the command is longer than {LONGEST_LINE_BYTES} bytes when quoted: put its arguments into a file"
    )]
    CommandTooLong,
    /// systemd drops such a variable without a word.
    #[error(
        "{name:?} is not the name of a variable: letters, digits and '_', not starting with a digit"
    )]
    VariableName {
        /// The name.
        name: String,
    },
    /// A path of the node that would need quoting.
    #[error(
        "{path:?} is not usable in a unit: an absolute path of letters, digits, '.', '_', '-' and '/', without '..'"
    )]
    Path {
        /// The path.
        path: String,
    },
}

/// The words of a command as one `Exec…=` value of a unit file. The first word must be a constant of
/// ours (an absolute path): systemd does not unquote it as it does the others.
pub fn exec_line(program: &'static str, words: &[String]) -> Result<String, QuoteError> {
    let mut line = program.to_owned();
    for (index, word) in words.iter().enumerate() {
        check_word(word, || format!("word {} of the command", index + 1))?;
        line.push(' ');
        push_quoted(&mut line, word, Dollar::Double);
    }
    if line.len() > LONGEST_LINE_BYTES {
        return Err(QuoteError::CommandTooLong);
    }
    Ok(line)
}

/// The words of a command for `Exec…` over D-Bus, where only `$` still has a meaning.
pub fn exec_arguments(words: &[String]) -> Result<Vec<String>, QuoteError> {
    words
        .iter()
        .enumerate()
        .map(|(index, word)| {
            check_word(word, || format!("word {} of the command", index + 1))?;
            Ok(word.replace('$', "$$"))
        })
        .collect()
}

/// Checks that `/usr/bin/env -- words…` would run the first word, not set a variable.
pub fn check_program(words: &[String]) -> Result<(), QuoteError> {
    match words.first() {
        Some(program) if !program.is_empty() && !program.contains('=') => Ok(()),
        Some(_) | None => Err(QuoteError::NoProgram),
    }
}

/// One assignment as a value of `Environment=` in a unit file. For variables of ours only: what it
/// holds is public.
pub fn environment_assignment(name: &str, value: &str) -> Result<String, QuoteError> {
    check_variable(name, value)?;
    let mut quoted = String::new();
    push_quoted(&mut quoted, &format!("{name}={value}"), Dollar::Literal);
    Ok(quoted)
}

/// The content of an environment file: a line for each variable, in the order given.
pub fn environment_file<'a>(
    variables: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<Vec<u8>, QuoteError> {
    let mut content = String::new();
    for (name, value) in variables {
        check_variable(name, value)?;
        content.push_str(name);
        content.push_str("=\"");
        for character in value.chars() {
            if matches!(character, '\\' | '"' | '$' | '`') {
                content.push('\\');
            }
            content.push(character);
        }
        content.push_str("\"\n");
    }
    Ok(content.into_bytes())
}

/// The words of a command as one line for `/bin/sh`, each in single quotes.
pub fn shell_words(words: &[String]) -> Result<String, QuoteError> {
    let mut line = String::new();
    for (index, word) in words.iter().enumerate() {
        check_word(word, || format!("word {} of the command", index + 1))?;
        if index > 0 {
            line.push(' ');
        }
        line.push('\'');
        line.push_str(&word.replace('\'', r"'\''"));
        line.push('\'');
    }
    Ok(line)
}

/// A path of the node as a unit can say it without quotes.
pub fn plain_path(path: &Path) -> Result<&str, QuoteError> {
    let refused = || QuoteError::Path {
        path: path.display().to_string(),
    };
    let text = path.to_str().ok_or_else(refused)?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/');
    let normal = text.starts_with('/') && !text.split('/').any(|part| part == "..");
    if normal && text.bytes().all(plain) {
        Ok(text)
    } else {
        Err(refused())
    }
}

/// Whether systemd would expand `$` where the word goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dollar {
    Double,
    Literal,
}

fn push_quoted(line: &mut String, word: &str, dollar: Dollar) {
    line.push('"');
    for byte in word.bytes() {
        match byte {
            b'"' => line.push_str("\\\""),
            b'\\' => line.push_str("\\\\"),
            b'%' => line.push_str("%%"),
            b'$' if dollar == Dollar::Double => line.push_str("$$"),
            b' '..=b'~' => line.push(char::from(byte)),
            _ => line.push_str(&format!("\\x{byte:02x}")),
        }
    }
    line.push('"');
}

fn check_word(word: &str, what: impl Fn() -> String) -> Result<(), QuoteError> {
    if word.contains('\0') {
        return Err(QuoteError::Nul { what: what() });
    }
    if word.len() > LONGEST_WORD_BYTES {
        return Err(QuoteError::TooLong { what: what() });
    }
    Ok(())
}

fn check_variable(name: &str, value: &str) -> Result<(), QuoteError> {
    let mut bytes = name.bytes();
    let first = bytes
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !first || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(QuoteError::VariableName {
            name: name.to_owned(),
        });
    }
    if value.contains('\0') {
        return Err(QuoteError::Nul {
            what: format!("the variable {name}"),
        });
    }
    if name.len() + 1 + value.len() > LONGEST_WORD_BYTES {
        return Err(QuoteError::TooLong {
            what: format!("the variable {name}"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn what_systemd_would_expand_or_split_is_quoted() {
        for (word, quoted) in [
            ("", r#""""#),
            ("a b", r#""a b""#),
            ("%n", r#""%%n""#),
            ("$HOME ${X}", r#""$$HOME $${X}""#),
            (r#"say "hi"\"#, r#""say \"hi\"\\""#),
            (";", r#"";""#),
            (
                "a\nExecStopPost=+/bin/sh",
                r#""a\x0aExecStopPost=+/bin/sh""#,
            ),
            ("ä\u{7f}", r#""\xc3\xa4\x7f""#),
        ] {
            assert_eq!(
                exec_line("/usr/bin/env", &words(&[word])),
                Ok(format!("/usr/bin/env {quoted}")),
                "{word:?}"
            );
        }
        assert_eq!(
            exec_arguments(&words(&["$A", "%n", "a b"])),
            Ok(words(&["$$A", "%n", "a b"]))
        );
        assert_eq!(
            environment_assignment("A", "1 $B %n \"x\""),
            Ok(r#""A=1 $B %%n \"x\"""#.to_owned())
        );
        assert_eq!(
            shell_words(&words(&["it's", "$x", ""])),
            Ok(r"'it'\''s' '$x' ''".to_owned())
        );
    }

    #[test]
    fn what_no_program_can_be_given_is_refused_with_its_place() {
        let nul = exec_line("/usr/bin/env", &words(&["a", "b\0c"]));
        assert_eq!(
            nul,
            Err(QuoteError::Nul {
                what: "word 2 of the command".to_owned()
            })
        );
        let long = "x".repeat(LONGEST_WORD_BYTES + 1);
        assert!(matches!(
            exec_arguments(std::slice::from_ref(&long)),
            Err(QuoteError::TooLong { .. })
        ));
        assert!(matches!(
            environment_file([("A", long.as_str())]),
            Err(QuoteError::TooLong { .. })
        ));
        let many = vec!["\u{1}".repeat(100_000); 2];
        assert_eq!(
            exec_line("/usr/bin/env", &many),
            Err(QuoteError::CommandTooLong)
        );
        for name in ["", "1X", "a-b", "A=B", "A\nB", "Ä"] {
            assert!(
                matches!(
                    environment_file([(name, "")]),
                    Err(QuoteError::VariableName { .. })
                ),
                "{name:?}"
            );
        }
        for program in [&[][..], &["", "x"], &["A=1", "x"]] {
            assert_eq!(check_program(&words(program)), Err(QuoteError::NoProgram));
        }
        for path in ["a", "/a b", "/a:b", "/a/../b", "/a\n", "/%n", "/ä", ""] {
            assert!(plain_path(Path::new(path)).is_err(), "{path:?}");
        }
    }

    proptest! {
        /// Whatever a user writes, a line of a unit file stays one line of printable ASCII, and each
        /// word ends where it should.
        #[test]
        fn a_command_stays_one_line_and_reads_back(given in prop::collection::vec("[^\\x00]{0,40}", 0..6)) {
            let line = exec_line("/usr/bin/env", &given).unwrap();
            prop_assert!(line.bytes().all(|b| (b' '..=b'~').contains(&b)));
            prop_assert_eq!(read_back(&line["/usr/bin/env".len()..]), given);
        }

        #[test]
        fn a_variable_reads_back(value in "[^\\x00]{0,200}") {
            let content = String::from_utf8(environment_file([("A", value.as_str())]).unwrap()).unwrap();
            let inner = content.strip_prefix("A=\"").and_then(|c| c.strip_suffix("\"\n")).unwrap();
            let mut read = String::new();
            let mut characters = inner.chars();
            while let Some(c) = characters.next() {
                prop_assert!(c != '"');
                read.push(if c == '\\' { characters.next().unwrap() } else { c });
            }
            prop_assert_eq!(read, value);
        }
    }

    /// What systemd.service(5) says of quotes, escapes, specifiers and `$$`, for the forms that we write.
    fn read_back(mut line: &str) -> Vec<String> {
        let mut words = Vec::new();
        while let Some(rest) = line.strip_prefix(" \"") {
            let mut word = Vec::new();
            let bytes = rest.as_bytes();
            let mut at = 0;
            while bytes[at] != b'"' {
                let (byte, used) = match &bytes[at..] {
                    [b'\\', b'x', high, low, ..] => {
                        let digits = [*high, *low];
                        (
                            u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap(),
                            4,
                        )
                    }
                    [b'\\', escaped, ..] => (*escaped, 2),
                    [b'%', b'%', ..] => (b'%', 2),
                    [b'$', b'$', ..] => (b'$', 2),
                    [b'%' | b'$', ..] => panic!("an expansion is left in {line}"),
                    [byte, ..] => (*byte, 1),
                    [] => panic!("a quote is left open in {line}"),
                };
                word.push(byte);
                at += used;
            }
            words.push(String::from_utf8(word).unwrap());
            line = &rest[at + 1..];
        }
        assert_eq!(line, "");
        words
    }
}
