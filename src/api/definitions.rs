//! The CustomResourceDefinitions, as `kari crd` prints them and `crds/` holds them.
//!
//! What the derived schema gets wrong for an API server is put right here:
//! `nullable` beside a default would *store* a null that does not decode, and
//! rules in a Release's template would cost on every write of a controller that
//! has checked the object already.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::Value;

use super::{Deployment, Release};

/// A definition that could not be made; a fault of the program.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    /// The schema is not JSON of the expected shape.
    #[error("the derived definition does not have the expected shape")]
    Shape(#[from] serde_json::Error),
    /// The YAML could not be written.
    #[error("the definition could not be written as YAML")]
    Yaml(#[from] serde_saphyr::ser_error::Error),
}

/// The definitions of all kinds, in the order in which they are applied.
pub fn definitions() -> Result<Vec<CustomResourceDefinition>, DefinitionError> {
    [Deployment::crd(), Release::crd()]
        .into_iter()
        .map(mend)
        .collect()
}

/// The definitions as YAML documents, each with the name of the file that holds it.
pub fn definitions_as_yaml() -> Result<Vec<(String, String)>, DefinitionError> {
    definitions()?
        .into_iter()
        .map(|definition| {
            let file = format!(
                "{}.yaml",
                definition.metadata.name.clone().unwrap_or_default()
            );
            let value = serde_json::to_value(&definition)?;
            Ok((file, serde_saphyr::to_string(&value)?))
        })
        .collect()
}

fn mend(definition: CustomResourceDefinition) -> Result<CustomResourceDefinition, DefinitionError> {
    let mut value = serde_json::to_value(definition)?;
    strip_nullable(&mut value);
    replace_formats(&mut value);
    let is_release = value.pointer("/spec/names/kind") == Some(&Value::from("Release"));
    if let Some(versions) = value
        .pointer_mut("/spec/versions")
        .and_then(Value::as_array_mut)
    {
        for version in versions {
            let Some(schema) = version.pointer_mut("/schema/openAPIV3Schema") else {
                continue;
            };
            if is_release {
                if let Some(template) = schema.pointer_mut("/properties/spec/properties/template") {
                    strip_rules(template);
                    resolve_variables(template);
                }
            } else if let Some(rules) = schema
                .get_mut("x-kubernetes-validations")
                .and_then(Value::as_array_mut)
            {
                // A rule at the root does not ratchet by itself: without this, tightening it would
                // refuse status writes on old objects.
                for rule in rules.iter_mut().filter_map(Value::as_object_mut) {
                    rule.insert("optionalOldSelf".to_owned(), Value::Bool(true));
                }
            }
        }
    }
    Ok(serde_json::from_value(value)?)
}

/// Takes `nullable` away everywhere: an absent field is absent, never null.
fn strip_nullable(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.get("nullable") == Some(&Value::Bool(true)) {
                map.remove("nullable");
            }
            map.values_mut().for_each(strip_nullable);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nullable),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Writes unsigned formats, which OpenAPI does not have, as the signed one that holds their range.
fn replace_formats(value: &mut Value) {
    match value {
        Value::Object(map) => {
            let signed = match map.get("format").and_then(Value::as_str) {
                Some("uint16") => Some("int32"),
                Some("uint32" | "uint64") => Some("int64"),
                _ => None,
            };
            if let Some(signed) = signed {
                map.insert("format".to_owned(), Value::from(signed));
            }
            map.values_mut().for_each(replace_formats);
        }
        Value::Array(items) => items.iter_mut().for_each(replace_formats),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// A template has values where a Deployment may have references: nothing is left to look up, and a value
/// from elsewhere may be longer than one that is written down. Their sum is bounded where they are read.
fn resolve_variables(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.remove("valueFrom").is_some()
                && let Some(plain) = map.get_mut("value").and_then(Value::as_object_mut)
            {
                plain.remove("maxLength");
            }
            map.values_mut().for_each(resolve_variables);
        }
        Value::Array(items) => items.iter_mut().for_each(resolve_variables),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn strip_rules(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("x-kubernetes-validations");
            map.values_mut().for_each(strip_rules);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_rules),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
