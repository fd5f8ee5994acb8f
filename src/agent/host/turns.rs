//! A queue in which namespaces take turns: first come first served within one, so
//! that many of one keep nobody of another waiting.

use std::collections::VecDeque;

/// Those who wait, each once.
#[derive(Debug, Clone)]
pub struct Turns<T> {
    /// Each namespace once, in turn, with those of it that wait; none is empty.
    waiting: VecDeque<(String, VecDeque<T>)>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
        }
    }
}

impl<T: PartialEq> Turns<T> {
    /// Puts it at the end of its namespace's line; one that waits already keeps its place.
    pub fn push(&mut self, namespace: &str, item: T) {
        if self.contains(&item) {
            return;
        }
        match self.waiting.iter_mut().find(|(name, _)| name == namespace) {
            Some((_, items)) => items.push_back(item),
            None => self
                .waiting
                .push_back((namespace.to_owned(), VecDeque::from([item]))),
        }
    }

    /// Takes it out, as it waits no longer. Whether it did.
    pub fn remove(&mut self, item: &T) -> bool {
        let mut waited = false;
        for (_, items) in &mut self.waiting {
            let before = items.len();
            items.retain(|waiting| waiting != item);
            waited |= items.len() != before;
        }
        self.waiting.retain(|(_, items)| !items.is_empty());
        waited
    }

    /// Takes it out, as it is served: its namespace has had its turn.
    pub fn serve(&mut self, item: &T) {
        let turn = self
            .waiting
            .iter()
            .position(|(_, items)| items.contains(item));
        if let Some((namespace, mut items)) = turn.and_then(|turn| self.waiting.remove(turn)) {
            items.retain(|waiting| waiting != item);
            if !items.is_empty() {
                self.waiting.push_back((namespace, items));
            }
        }
    }

    /// Whether it waits.
    pub fn contains(&self, item: &T) -> bool {
        self.waiting.iter().any(|(_, items)| items.contains(item))
    }

    /// All who wait, in the order in which they will be served.
    pub fn order(&self) -> Vec<&T> {
        let longest = self
            .waiting
            .iter()
            .map(|(_, items)| items.len())
            .max()
            .unwrap_or(0);
        (0..longest)
            .flat_map(|turn| {
                self.waiting
                    .iter()
                    .filter_map(move |(_, items)| items.get(turn))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespaces_take_turns_and_within_one_the_first_comes_first() {
        for (came, served) in [
            ("a1 a2 a3 b1", "a1 b1 a2 a3"),
            ("b2 b1 a1 c1 c2 a2 c3", "b2 a1 c1 b1 a2 c2 c3"),
            ("a1 b1 a2 b2", "a1 b1 a2 b2"),
            ("a1 a1 b1 a1", "a1 b1"),
            ("", ""),
        ] {
            let mut turns = Turns::default();
            for item in came.split_ascii_whitespace() {
                turns.push(&item[..1], item);
            }
            let expected: Vec<&str> = served.split_ascii_whitespace().collect();
            // They are served in the order that was told, whatever has been served before.
            for at in 0..expected.len() {
                let order: Vec<&str> = turns.order().into_iter().copied().collect();
                assert_eq!(order, expected[at..], "{came}");
                turns.serve(&expected[at]);
            }
            assert!(turns.order().is_empty(), "{came}");
        }
    }

    #[test]
    fn who_comes_later_waits_no_longer_than_one_turn_of_each_namespace() {
        let mut turns = Turns::default();
        for item in ["a1", "a2", "a3"] {
            turns.push("a", item);
        }
        turns.serve(&"a1");
        turns.push("b", "b1");
        assert_eq!(turns.order(), [&"a2", &"b1", &"a3"]);
        assert!(turns.remove(&"a2") && !turns.remove(&"a2"));
        assert_eq!(turns.order(), [&"a3", &"b1"]);
    }
}
