//! What an uninstallation of Kari must wait for: `kari uninstall-check`, which
//! the chart runs before it deletes anything.
//!
//! Apps that nobody removes run on without Kari, and a later installation takes
//! them on. A removal that has begun is another matter: its Release waits for the
//! agent of its node and for the controller, and would wait for ever, and its
//! namespace with it.
//!
//! It reads and decides nothing else, and changes nothing.

use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt as _};

use crate::api::Release;

/// How many Releases are named; of the others their number is told.
const NAMED: usize = 20;

/// Releases that are read with one request.
const PAGE: u32 = 500;

/// Why Kari must not be uninstalled now.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// Nodes are in the middle of a removal.
    #[error(
        "{count} apps are being removed from their nodes, and without Kari nobody would finish that: {names}; wait until `kubectl get krel --all-namespaces` shows no Removing any more, and uninstall again. \
         If a node will never come back: kubectl delete node NAME"
    )]
    Removing {
        /// How many.
        count: usize,
        /// Some of them, with their nodes.
        names: String,
    },
    /// The API server cannot be asked.
    #[error("cannot list the Releases")]
    List(#[source] Box<kube::Error>),
}

/// Looks for removals that have begun.
///
/// # Errors
/// There are some, or the API server cannot be asked. A cluster without the
/// definitions has none.
pub async fn check(client: Client) -> Result<(), UninstallError> {
    let api: Api<Release> = Api::all(client);
    let mut removing = Vec::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = match api.list(&parameters).await {
            Ok(page) => page,
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
            Err(error) => return Err(UninstallError::List(Box::new(error))),
        };
        removing.extend(page.items.iter().filter_map(place_of_removal));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => break,
        }
    }
    refuse(&removing)
}

/// Which app is removed from which node; none if the Release stays.
fn place_of_removal(release: &Release) -> Option<String> {
    release.metadata.deletion_timestamp.as_ref()?;
    Some(format!(
        "{}/{} from {}",
        release.namespace().unwrap_or_default(),
        release.spec.deployment,
        release.spec.node_name
    ))
}

fn refuse(removing: &[String]) -> Result<(), UninstallError> {
    if removing.is_empty() {
        return Ok(());
    }
    let mut names = removing[..removing.len().min(NAMED)].join(", ");
    if removing.len() > NAMED {
        names.push_str(" and others");
    }
    Err(UninstallError::Removing {
        count: removing.len(),
        names,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_being_removed_is_no_reason() {
        assert!(refuse(&[]).is_ok());
    }

    #[test]
    fn what_is_being_removed_is_named_up_to_a_bound() {
        let all: Vec<String> = (0..30).map(|n| format!("web/app{n} from n1")).collect();
        let message = refuse(&all).unwrap_err().to_string();
        assert!(
            message.starts_with("30 apps are being removed"),
            "{message}"
        );
        assert!(
            message.contains("web/app19 from n1 and others;"),
            "{message}"
        );
        assert!(!message.contains("web/app20"), "{message}");
    }
}
