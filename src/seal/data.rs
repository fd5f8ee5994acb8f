//! Keys of a Secret with their values as one value: what the controller seals and the node opens.
//!
//! As bytes: `<key> NUL <length> NUL <value>` for each, sorted, so that values may hold anything.

use std::collections::BTreeMap;

use super::SecretBytes;

/// A Secret's data.
pub type SecretData = BTreeMap<String, SecretBytes>;

/// Bytes that are no data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sealed data is not in the form that this version knows")]
pub struct MalformedData;

/// Those of the data's keys that are in `keys`, as bytes.
pub fn to_bytes(data: &SecretData, keys: &[&str]) -> SecretBytes {
    let wanted = || data.iter().filter(|(key, _)| keys.contains(&key.as_str()));
    let size = wanted()
        .map(|(key, value)| key.len() + value.len() + 32)
        .sum();
    // Of its whole size from the start: what grows leaves copies behind.
    let mut bytes = Vec::with_capacity(size);
    for (key, value) in wanted() {
        bytes.extend_from_slice(format!("{key}\0{}\0", value.len()).as_bytes());
        bytes.extend_from_slice(value.expose());
    }
    SecretBytes::new(bytes)
}

/// Reads what [`to_bytes`] wrote.
///
/// # Errors
/// It is not in that form.
pub fn from_bytes(bytes: &SecretBytes) -> Result<SecretData, MalformedData> {
    let mut data = SecretData::new();
    let mut rest = bytes.expose();
    while !rest.is_empty() {
        let mut parts = rest.splitn(3, |byte| *byte == 0);
        let mut part = || parts.next().ok_or(MalformedData);
        let (key, length, after) = (part()?, part()?, part()?);
        let text = |bytes| std::str::from_utf8(bytes).map_err(|_| MalformedData);
        let length = text(length)?.parse().map_err(|_| MalformedData)?;
        let (value, left) = after.split_at_checked(length).ok_or(MalformedData)?;
        data.insert(text(key)?.to_owned(), SecretBytes::new(value.to_vec()));
        rest = left;
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn data_reads_back_and_what_is_cut_off_does_not(
            data in proptest::collection::btree_map("[a-z.]{1,8}", proptest::collection::vec(any::<u8>(), 0..40), 1..4),
            cut in 1_usize..4,
        ) {
            let data: SecretData = data.into_iter().map(|(k, v)| (k, SecretBytes::new(v))).collect();
            let keys: Vec<&str> = data.keys().map(String::as_str).collect();
            let bytes = to_bytes(&data, &keys);
            prop_assert_eq!(from_bytes(&bytes), Ok(data.clone()));
            prop_assert!(to_bytes(&data, &[]).is_empty());
            let short = &bytes.expose()[..bytes.len() - cut.min(bytes.len() - 1)];
            prop_assert_ne!(from_bytes(&SecretBytes::new(short.to_vec())), Ok(data));
        }
    }
}
