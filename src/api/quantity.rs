//! Quantities of CPU and memory, in the notation of core/v1.
//!
//! A schema pattern keeps what cannot be read out of the API; parsing is total
//! all the same, as a stored object may be older than the pattern.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// CPUs: `2`, `0.5` or `500m`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(transparent)]
pub struct Cpu(pub IntOrString);

/// Bytes of memory: `268435456`, `256Mi` or `1G`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(transparent)]
pub struct Memory(pub IntOrString);

/// A quantity that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a quantity; write CPUs as 2, 0.5 or 500m and memory as 256Mi or 1G")]
pub struct QuantityError(String);

impl Cpu {
    /// Thousandths of a CPU, at least 1.
    pub fn millis(&self) -> Result<u64, QuantityError> {
        let text = text_of(&self.0);
        let wrong = || QuantityError(text.clone());
        let millis = match text.strip_suffix('m') {
            Some(digits) => digits.parse::<u64>().map_err(|_| wrong())?,
            None => {
                let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
                if fraction.len() > 3 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(wrong());
                }
                let whole = whole.parse::<u64>().map_err(|_| wrong())?;
                let thousandths = format!("{fraction:0<3}")
                    .parse::<u64>()
                    .map_err(|_| wrong())?;
                whole
                    .checked_mul(1000)
                    .and_then(|w| w.checked_add(thousandths))
                    .ok_or_else(wrong)?
            }
        };
        if millis == 0 {
            Err(wrong())
        } else {
            Ok(millis)
        }
    }
}

impl Memory {
    /// Bytes, at least 1.
    pub fn bytes(&self) -> Result<u64, QuantityError> {
        let text = text_of(&self.0);
        let wrong = || QuantityError(text.clone());
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let factor: u64 = match &text[digits.len()..] {
            "" => 1,
            "k" => 1000,
            "M" => 1000 * 1000,
            "G" => 1000 * 1000 * 1000,
            "T" => 1000 * 1000 * 1000 * 1000,
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            _ => return Err(wrong()),
        };
        let bytes = digits
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(factor))
            .ok_or_else(wrong)?;
        if bytes == 0 { Err(wrong()) } else { Ok(bytes) }
    }
}

fn text_of(value: &IntOrString) -> String {
    match value {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(text) => text.clone(),
    }
}

impl JsonSchema for Cpu {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Cpu".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "pattern": r"^([1-9][0-9]{0,6}m|[0-9]{1,4}(\.[0-9]{1,3})?)$",
            "minimum": 1,
            "maximum": 1024,
        })
    }
}

impl JsonSchema for Memory {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Memory".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "pattern": r"^[1-9][0-9]{0,15}(Ki|Mi|Gi|Ti|k|M|G|T)?$",
            "minimum": 4194304,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_read_in_the_notation_of_core_v1() {
        for (text, millis) in [
            ("500m", Some(500)),
            ("2", Some(2000)),
            ("0.5", Some(500)),
            ("1.25", Some(1250)),
            ("0", None),
            ("1.2345", None),
            ("x", None),
            ("-1", None),
        ] {
            assert_eq!(
                Cpu(IntOrString::String(text.into())).millis().ok(),
                millis,
                "{text}"
            );
        }
        assert_eq!(Cpu(IntOrString::Int(3)).millis(), Ok(3000));
    }

    #[test]
    fn memory_is_read_in_the_notation_of_core_v1() {
        for (text, bytes) in [
            ("256Mi", Some(256 << 20)),
            ("1G", Some(1_000_000_000)),
            ("7", Some(7)),
            ("0", None),
            ("1Zi", None),
            ("Mi", None),
            ("99999999999Ti", None),
        ] {
            assert_eq!(
                Memory(IntOrString::String(text.into())).bytes().ok(),
                bytes,
                "{text}"
            );
        }
    }
}
