//! OUTLINE
use super::systemd::Properties;
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuoteError {
    #[error("{0}")]
    Refused(String),
}
pub fn exec_line(words: &[String]) -> Result<String, QuoteError> { todo!() }
/// One `NAME="…"` line for each; total.
pub fn environment_file<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Vec<u8>, QuoteError> { todo!() }
