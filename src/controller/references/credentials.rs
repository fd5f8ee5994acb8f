//! What Secrets hold for the source and the routes of a spec: parsed, so that what cannot be used is told before any
//! node gets it. Pure.

use super::{Content, Contents, Object};
use crate::api::DeploymentSpec;
use crate::api::deployment::{GitSource, Process};
use crate::api::reasons::Reason;
use crate::api::release::Purpose;
use crate::certificate::{self, ServerCertificate};
use crate::controller::observed::LookupFailure;
use crate::controller::sealing::SecretValue;
use crate::git_credential::{self, GitCredential};
use crate::seal::data::{SecretData, to_bytes};

/// What the source is read with; nothing if everybody may read it.
///
/// # Errors
/// `ReferenceNotFound`: the Secret is not there, or will not do for the url.
pub fn git_credential(
    source: &GitSource,
    contents: &Contents,
) -> Result<Option<GitCredential>, LookupFailure> {
    let Some(reference) = &source.secret_ref else {
        return Ok(None);
    };
    let (place, name) = ("spec.source.git.secretRef", &reference.name);
    let data = data_of(name, place, contents)?;
    let credential =
        GitCredential::parse(&source.url, data).map_err(|error| unusable(name, place, &error))?;
    Ok(Some(credential))
}

/// The secrets that the Releases of a spec carry for its source and its routes.
///
/// # Errors
/// `ReferenceNotFound`: a Secret is not there, or cannot be used.
pub fn credentials(
    spec: &DeploymentSpec,
    contents: &Contents,
) -> Result<Vec<SecretValue>, LookupFailure> {
    let mut values = Vec::new();
    for (purpose, name, place) in wanted(spec) {
        let data = data_of(&name, &place, contents)?;
        match purpose {
            // No variable of a process is one of these.
            Purpose::Env => continue,
            Purpose::Git => {
                if let Some(source) = &spec.source.git {
                    git_credential(source, contents)?;
                }
            }
            Purpose::Tls => {
                ServerCertificate::parse(data).map_err(|error| unusable(&name, &place, &error))?;
            }
        }
        let value = to_bytes(data, keys_of(purpose));
        let Some(digests) = &contents.digests else {
            return Err(super::resolve::without_digests());
        };
        values.push(SecretValue {
            digest: Some(digests.digest_in_namespace(purpose.as_str(), value.expose())),
            purpose,
            name,
            value: Some(value),
        });
    }
    Ok(values)
}

/// The same, as far as they are known; of the others what nodes were given before stays.
pub fn known_credentials(spec: &DeploymentSpec, contents: &Contents) -> Vec<SecretValue> {
    let known = credentials(spec, contents).unwrap_or_default();
    let stays = |(purpose, name, _)| {
        let known = known
            .iter()
            .find(|k| k.purpose == purpose && k.name == name);
        known.cloned().unwrap_or(SecretValue {
            purpose,
            name,
            digest: None,
            value: None,
        })
    };
    wanted(spec).into_iter().map(stays).collect()
}

/// The Secrets that a spec names for its source and its routes, each once, with what for and where.
pub(super) fn wanted(spec: &DeploymentSpec) -> Vec<(Purpose, String, String)> {
    let git = spec.source.git.iter().flat_map(|git| &git.secret_ref);
    let git = git.map(|reference| {
        let place = "spec.source.git.secretRef".to_owned();
        (Purpose::Git, reference.name.clone(), place)
    });
    let tls = spec.processes.iter().filter_map(|process: &Process| {
        let tls = process.route.as_ref()?.tls.as_ref()?;
        let place = format!("spec.processes[{}].route.tls.secretName", process.name);
        Some((Purpose::Tls, tls.secret_name.clone(), place))
    });
    let mut wanted: Vec<(Purpose, String, String)> = Vec::new();
    for (purpose, name, place) in git.chain(tls) {
        if wanted.iter().all(|(p, n, _)| (*p, n) != (purpose, &name)) {
            wanted.push((purpose, name, place));
        }
    }
    wanted
}

/// The keys of a Secret that are used.
pub(super) fn keys_of(purpose: Purpose) -> &'static [&'static str] {
    match purpose {
        Purpose::Env => &[],
        Purpose::Git => &git_credential::KEYS,
        Purpose::Tls => &certificate::KEYS,
    }
}

fn data_of<'a>(
    name: &str,
    place: &str,
    contents: &'a Contents,
) -> Result<&'a SecretData, LookupFailure> {
    let message = match contents.objects.get(&Object::secret(name)) {
        Some(Content::Held(data)) => return Ok(data),
        Some(Content::TooLarge) => return Err(super::resolve::too_large()),
        Some(Content::Forbidden) => format!(
            "{place}: the controller may not read the Secret {name}; its ClusterRole, or a Role in this namespace, needs get on secrets"
        ),
        Some(Content::Absent) | None => format!(
            "{place}: there is no Secret {name} in the Deployment's namespace; create it, or change the name"
        ),
    };
    Err(super::resolve::not_found(message))
}

fn unusable(name: &str, place: &str, error: &dyn std::error::Error) -> LookupFailure {
    LookupFailure {
        reason: Reason::ReferenceNotFound,
        message: format!("{place}: the Secret {name} cannot be used: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::references::digests::Digests;
    use crate::controller::testing::deployment_spec;
    use crate::seal::{DigestKey, SecretBytes};
    use serde_json::json;

    fn spec() -> DeploymentSpec {
        let mut spec = serde_json::to_value(deployment_spec()).unwrap_or_default();
        spec["source"]["git"]["url"] = json!("https://git.example.com/shop.git");
        spec["source"]["git"]["secretRef"] = json!({"name": "git"});
        spec["processes"][0]["route"] = json!({"hosts": ["a.test"], "tls": {"secretName": "tls"}});
        serde_json::from_value(spec).unwrap_or_else(|e| panic!("{e}"))
    }

    fn held(pairs: &[(&str, &str)]) -> Content {
        let bytes = |text: &str| SecretBytes::new(text.as_bytes().to_vec());
        let pairs = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), bytes(value)));
        Content::Held(pairs.collect())
    }

    fn contents(git: Content, tls: Content) -> Contents {
        Contents {
            objects: [(Object::secret("git"), git), (Object::secret("tls"), tls)].into(),
            digests: Some(Digests::new(DigestKey::generate(), "web", "shop")),
        }
    }

    fn certificate() -> Content {
        let key = rcgen::KeyPair::generate().unwrap_or_else(|e| panic!("{e}"));
        let parameters = rcgen::CertificateParams::default();
        let certificate = parameters
            .self_signed(&key)
            .unwrap_or_else(|e| panic!("{e}"));
        held(&[
            ("tls.crt", &certificate.pem()),
            ("tls.key", &key.serialize_pem()),
        ])
    }

    #[test]
    fn what_cannot_be_used_is_told_before_any_node_gets_it_and_what_it_has_stays() {
        let password = || held(&[("username", "u"), ("password", "p"), ("other", "x")]);
        let good = credentials(&spec(), &contents(password(), certificate()));
        let good = good.unwrap_or_else(|e| panic!("{e}"));
        let names: Vec<_> = good.iter().map(|v| (v.purpose, v.name.as_str())).collect();
        assert_eq!(names, [(Purpose::Git, "git"), (Purpose::Tls, "tls")]);
        let git = good[0].value.as_ref().map(|v| v.expose().to_vec());
        let git = String::from_utf8_lossy(&git.unwrap_or_default()).into_owned();
        assert!(
            git.contains("password") && !git.contains("other"),
            "{git:?}"
        );
        for (case, git, tls, says) in [
            (
                "absent",
                Content::Absent,
                certificate(),
                "spec.source.git.secretRef: there is no Secret git",
            ),
            (
                "half",
                held(&[("username", "u")]),
                certificate(),
                "the Secret git cannot be used: it has no key password",
            ),
            (
                "forbidden",
                password(),
                Content::Forbidden,
                "route.tls.secretName: the controller may not read the Secret tls",
            ),
            (
                "broken",
                password(),
                held(&[("tls.crt", "x"), ("tls.key", "y")]),
                "the Secret tls cannot be used: its key tls.crt",
            ),
        ] {
            let contents = contents(git, tls);
            let failure = credentials(&spec(), &contents).err();
            let failure = failure.unwrap_or_else(|| panic!("{case}: taken"));
            assert_eq!(failure.reason, Reason::ReferenceNotFound, "{case}");
            assert!(failure.message.contains(says), "{case}: {failure}");
            let known = known_credentials(&spec(), &contents);
            assert_eq!(known.len(), 2, "{case}");
            assert!(known.iter().any(|value| value.digest.is_none()), "{case}");
        }
    }
}
