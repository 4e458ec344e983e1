//! The published JSON Schema against the parser: neither can change without the other.
//!
//! Three ways: the fields of every object are those that the parser names when it meets an unknown one;
//! every default leaves the configuration as it is; every minimum and maximum is taken, and what lies
//! beyond is refused. Beside that a list of documents on which a validator and the parser agree.

use std::collections::BTreeSet;

use driftlock_inspect::config::Config;
use serde_json::{Map, Value, json};

const SCHEMA: &str = include_str!("../../config.schema.json");

fn schema() -> Value {
    serde_json::from_str(SCHEMA).unwrap()
}

fn parse(document: &Value) -> Result<Config, String> {
    Config::parse(document.to_string().as_bytes()).map_err(|error| error.to_string())
}

/// A step from a document to a value inside.
#[derive(Clone, Debug)]
enum Step {
    Field(String),
    First,
}

/// An object's schema and where such objects stand.
type Level = (Vec<Step>, Map<String, Value>);

/// With `$ref` taken in; what stands beside it counts more.
fn resolved(schema: &Value, root: &Value) -> Map<String, Value> {
    let own = schema.as_object().unwrap();
    let Some(reference) = own.get("$ref") else { return own.clone() };
    let pointer = reference.as_str().unwrap().trim_start_matches('#');
    let mut all = root.pointer(pointer).unwrap().as_object().unwrap().clone();
    all.extend(own.clone());
    all
}

/// All objects with fields in the schema.
fn levels(at: &[Step], schema: &Value, root: &Value, out: &mut Vec<Level>) {
    let schema = resolved(schema, root);
    if let Some(items) = schema.get("items") {
        levels(&[at, &[Step::First]].concat(), items, root, out);
    }
    if let Some(properties) = schema.get("properties") {
        for (name, property) in properties.as_object().unwrap() {
            levels(&[at, &[Step::Field(name.clone())]].concat(), property, root, out);
        }
        out.push((at.to_vec(), schema));
    }
}

/// A document that has `value` at that place, and all that is required on the way.
fn document(at: &[Step], value: Value, schema: &Value, root: &Value) -> Value {
    let schema = resolved(schema, root);
    match at.split_first() {
        None => value,
        Some((Step::First, rest)) => json!([document(rest, value, &schema["items"], root)]),
        Some((Step::Field(name), rest)) => {
            let mut object = Map::new();
            for required in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
                let example = match required.as_str() {
                    Some("messages") => json!(1000),
                    Some("do") => json!(["redact", "block"]),
                    _ => json!("c"),
                };
                object.insert(required.as_str().unwrap().to_owned(), example);
            }
            object.insert(name.clone(), document(rest, value, &schema["properties"][name], root));
            Value::Object(object)
        }
    }
}

#[test]
fn every_object_has_the_fields_that_the_parser_knows() {
    let root = schema();
    let mut all = Vec::new();
    levels(&[], &root, &root, &mut all);
    assert!(all.len() >= 7, "{}", all.len());
    for (at, schema) in all {
        assert_eq!(schema["additionalProperties"], false, "{at:?}");
        let here = [at.as_slice(), &[Step::Field("unheard_of".to_owned())]].concat();
        let mut with_field = root.clone();
        // The place has to exist for the document to be made.
        let pointer: String = at
            .iter()
            .map(|step| match step {
                Step::Field(name) => format!("/properties/{name}"),
                Step::First => "/items".to_owned(),
            })
            .collect();
        let place = with_field.pointer_mut(&pointer).unwrap();
        place["properties"]["unheard_of"] = json!({});
        let error = parse(&document(&here, json!(0), &with_field, &with_field)).unwrap_err();
        let (_, expected) = error.split_once("unknown field `unheard_of`, expected ").expect(&error);
        let expected = expected.split(" at line").next().unwrap();
        let known: BTreeSet<&str> = expected.split('`').skip(1).step_by(2).collect();
        let published: BTreeSet<&str> =
            schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(published, known, "{at:?}");
    }
}

#[test]
fn every_default_and_every_bound_is_the_parsers() {
    let root = schema();
    let mut all = Vec::new();
    levels(&[], &root, &root, &mut all);
    let mut checked = 0;
    for (at, schema) in all {
        for (name, property) in schema["properties"].as_object().unwrap() {
            let property = resolved(property, &root);
            assert!(property.contains_key("description"), "{at:?} {name}");
            let place = [at.as_slice(), &[Step::Field(name.clone())]].concat();
            let with = |value: Value| parse(&document(&place, value, &root, &root));
            if let Some(default) = property.get("default") {
                // The same as without the field.
                let mut without = document(&place, default.clone(), &root, &root);
                let pointer: String = at
                    .iter()
                    .map(|step| match step {
                        Step::Field(name) => format!("/{name}"),
                        Step::First => "/0".to_owned(),
                    })
                    .collect();
                without.pointer_mut(&pointer).unwrap().as_object_mut().unwrap().remove(name);
                assert_eq!(with(default.clone()), parse(&without), "{at:?} {name}");
                checked += 1;
            }
            for (bound, beyond) in [("minimum", -1.0), ("maximum", 1.0)] {
                let Some(value) = property.get(bound).filter(|_| name != "messages") else { continue };
                let mut good = document(&place, value.clone(), &root, &root);
                if name == "alpha" {
                    // A thousand messages, the default, teach too little for the least alpha.
                    good["pull"] = json!({"cluster": "c"});
                }
                parse(&good).unwrap_or_else(|error| panic!("{at:?} {name} {bound}: {error}"));
                let outside = match value.as_i64() {
                    Some(value) => json!(value + beyond as i64),
                    None => json!(value.as_f64().unwrap() * if beyond < 0.0 { 0.5 } else { 1.5 }),
                };
                assert!(with(outside).is_err(), "{at:?} {name} beyond its {bound}");
                checked += 1;
            }
        }
    }
    assert!(checked > 25, "{checked}");
}

#[test]
fn a_validator_and_the_parser_agree() {
    let validator = jsonschema::validator_for(&schema()).unwrap();
    let cases = [
        (json!({}), true),
        (json!([]), false),
        (json!({"name": "edge.1_a-b", "alpha": 0.01, "learn": {"messages": 1000}}), true),
        (json!({"name": "a/b"}), false),
        (json!({"name": ""}), false),
        (json!({"name": "a".repeat(65)}), false),
        (json!({"alpha": "0.01"}), false),
        (json!({"alpha": 1}), false),
        (json!({"learn": {}}), false),
        (json!({"learn": {"messages": 1000.5}}), false),
        (json!({"learn": {"messages": 1000, "more": 1}}), false),
        (json!({"baseline": 1}), false),
        (json!({"share": null}), false),
        (json!({"pull": {"cluster": "c", "sha256": "ab".repeat(32)}, "learn": null}), true),
        (json!({"pull": {"cluster": "c", "sha256": "ab"}}), false),
        (json!({"pull": {"cluster": "c d"}}), false),
        (json!({"pull": {"cluster": "c", "path": "v1"}}), false),
        (json!({"pull": {}}), false),
        (json!({"observations": {"cluster": "c", "max_batch_bytes": 4096}}), true),
        (json!({"observations": {"cluster": "c", "interval_s": 1}}), false),
        (
            json!({"exclude": [{"path": "/healthz"}, {"content_type": "image/*", "direction": "response"}]}),
            true,
        ),
        (json!({"exclude": [{}]}), false),
        (json!({"exclude": [{"path": "healthz"}]}), false),
        (json!({"exclude": [{"direction": "both"}]}), false),
        (json!({"exclude": {"path": "/"}}), false),
        (json!({"exclude": vec![json!({"path": "/"}); 65]}), false),
        (json!({"limits": {"max_body_bytes": -1}}), false),
        (json!({"limits": null}), false),
        (json!({"uninspectable": "Pass"}), false),
        (json!({"report": {"log": "always", "filter_state": "never"}}), true),
        (json!({"report": {"log": true}}), false),
    ];
    for (document, good) in cases {
        assert_eq!(validator.is_valid(&document), good, "the schema on {document}");
        assert_eq!(parse(&document).is_ok(), good, "the parser on {document}");
    }
}
