//! Which nodes a placement means. Pure.

use std::collections::BTreeMap;

use crate::api::deployment::{LabelValue, NodeSelectorOperator, NodeSelectorTerm, Placement};

/// Whether a node with these labels is meant: every label of the selector and every term must hold, as
/// in core/v1's nodeAffinity.
pub fn matches(placement: &Placement, labels: &BTreeMap<String, String>) -> bool {
    let Placement {
        node_selector,
        match_expressions,
    } = placement;
    node_selector
        .iter()
        .all(|(key, LabelValue(value))| labels.get(key) == Some(value))
        && match_expressions.iter().all(|term| holds(term, labels))
}

fn holds(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>) -> bool {
    let NodeSelectorTerm {
        key,
        operator,
        values,
    } = term;
    let label = labels.get(key);
    let compare = |wanted: std::cmp::Ordering| {
        let number = label.and_then(|l| l.parse::<i64>().ok());
        let bound = values.first().and_then(|v| v.parse::<i64>().ok());
        number
            .zip(bound)
            .is_some_and(|(number, bound)| number.cmp(&bound) == wanted)
    };
    match operator {
        NodeSelectorOperator::In => label.is_some_and(|l| values.contains(l)),
        NodeSelectorOperator::NotIn => label.is_none_or(|l| !values.contains(l)),
        NodeSelectorOperator::Exists => label.is_some(),
        NodeSelectorOperator::DoesNotExist => label.is_none(),
        NodeSelectorOperator::Gt => compare(std::cmp::Ordering::Greater),
        NodeSelectorOperator::Lt => compare(std::cmp::Ordering::Less),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_means_the_nodes_that_satisfy_all_of_it() {
        use NodeSelectorOperator::*;
        let labels: BTreeMap<String, String> = [("pool", "web"), ("cpus", "8")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        let term = |key: &str, operator, values: &[&str]| NodeSelectorTerm {
            key: key.to_owned(),
            operator,
            values: values.iter().map(|v| (*v).to_owned()).collect(),
        };
        for (case, selector, terms, expected) in [
            ("everything", vec![], vec![], true),
            ("a label", vec![("pool", "web")], vec![], true),
            ("another value", vec![("pool", "db")], vec![], false),
            ("a label it has not", vec![("zone", "a")], vec![], false),
            ("in", vec![], vec![term("pool", In, &["db", "web"])], true),
            ("not in", vec![], vec![term("pool", NotIn, &["web"])], false),
            (
                "not in, absent",
                vec![],
                vec![term("zone", NotIn, &["a"])],
                true,
            ),
            ("in, absent", vec![], vec![term("zone", In, &["a"])], false),
            ("exists", vec![], vec![term("pool", Exists, &[])], true),
            (
                "does not exist",
                vec![],
                vec![term("pool", DoesNotExist, &[])],
                false,
            ),
            ("greater", vec![], vec![term("cpus", Gt, &["4"])], true),
            ("not greater", vec![], vec![term("cpus", Gt, &["8"])], false),
            ("less", vec![], vec![term("cpus", Lt, &["9"])], true),
            (
                "not a number",
                vec![],
                vec![term("pool", Gt, &["1"])],
                false,
            ),
            (
                "one of two terms fails",
                vec![("pool", "web")],
                vec![term("pool", Exists, &[]), term("cpus", Lt, &["2"])],
                false,
            ),
        ] {
            let placement = Placement {
                node_selector: selector
                    .into_iter()
                    .map(|(k, v)| (k.to_owned(), LabelValue(v.to_owned())))
                    .collect(),
                match_expressions: terms,
            };
            assert_eq!(matches(&placement, &labels), expected, "{case}");
        }
    }
}
