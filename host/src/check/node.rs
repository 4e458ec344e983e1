//! YAML or JSON as a tree in which every key and value knows its line and column.
//!
//! It exists because a plugin configuration is embedded in documents of which this program knows only
//! parts: a type for all of Envoy would be longer than Envoy's own. JSON is read as the YAML it is.
//!
//! Cost: one pass. Left out on purpose: what anchors and merges were written as; they are resolved.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number};
use serde_saphyr::{Location, Spanned};

use crate::gateway::yaml_problem;

/// Line and column in a file, from 1; 0 where unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: u64,
    pub(super) column: u64,
}

impl From<Location> for Place {
    fn from(location: Location) -> Self {
        Self { line: location.line(), column: location.column() }
    }
}

/// One value.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

/// What it is.
#[derive(Clone, Debug, Default)]
pub(super) enum Value {
    #[default]
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Node>),
    /// In the file's order, each with its key's place.
    Map(Vec<(String, Place, Node)>),
}

impl Node {
    /// All documents of a text.
    ///
    /// # Errors
    /// The place and the reason, where it is neither YAML nor JSON.
    pub(super) fn documents(text: &str) -> Result<Vec<Self>, (Place, String)> {
        let documents: Result<Vec<Spanned<Value>>, _> = serde_saphyr::from_multiple(text);
        documents.map(|documents| documents.into_iter().map(Self::from).collect()).map_err(|error| {
            let place = error.location().map(Place::from).unwrap_or_default();
            (place, yaml_problem(&error))
        })
    }

    /// The field of a map.
    pub(super) fn get(&self, name: &str) -> Option<&Self> {
        self.fields().iter().find(|(key, ..)| key == name).map(|(_, _, value)| value)
    }

    /// The field at the end of a path of fields.
    pub(super) fn at(&self, path: &[&str]) -> Option<&Self> {
        path.iter().try_fold(self, |node, name| node.get(name))
    }

    /// The text at the end of a path of fields.
    pub(super) fn text(&self, path: &[&str]) -> Option<&str> {
        match &self.at(path)?.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn fields(&self) -> &[(String, Place, Self)] {
        match &self.value {
            Value::Map(fields) => fields,
            _ => &[],
        }
    }

    pub(super) fn items(&self) -> &[Self] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    /// Where a path such as `actions[1].do` leads: the key's place, or that of the last part that is there.
    pub(super) fn place_of(&self, path: &str) -> Place {
        let (mut node, mut place) = (self, self.place);
        let parts = path.split(['.', '[', ']']).filter(|part| !part.is_empty());
        for part in parts {
            let field = node.fields().iter().find(|(key, ..)| key == part);
            let item = part.parse::<usize>().ok().and_then(|index| node.items().get(index));
            (node, place) = match (field, item) {
                (Some((_, key, value)), _) => (value, *key),
                (None, Some(item)) => (item, item.place),
                (None, None) => break,
            };
        }
        place
    }

    /// Without places.
    pub(super) fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Number(value) => value.clone().into(),
            Value::Text(value) => value.as_str().into(),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Map(fields) => {
                let fields = fields.iter().map(|(key, _, value)| (key.clone(), value.to_json()));
                serde_json::Value::Object(fields.collect::<Map<_, _>>())
            }
        }
    }
}

impl From<Spanned<Value>> for Node {
    fn from(spanned: Spanned<Value>) -> Self {
        Self { place: spanned.referenced.into(), value: spanned.value }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    /// JSON has no word for infinity: such a value is kept as the text that it is in JSON's eyes.
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or_else(|| Value::Text(value.to_string()), Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element::<Spanned<Value>>()? {
            list.push(item.into());
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(key) = entries.next_key::<Spanned<String>>()? {
            let value: Spanned<Value> = entries.next_value()?;
            fields.push((key.value, key.referenced.into(), value.into()));
        }
        Ok(Value::Map(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_knows_its_place_in_yaml_and_in_json() {
        let yaml = "a:\n  - b: 1.5\n    c: [x, null, true]\n---\nd: -2\n";
        let documents = Node::documents(yaml).unwrap();
        assert_eq!(documents.len(), 2);
        assert_eq!(documents[0].to_json(), serde_json::json!({"a": [{"b": 1.5, "c": ["x", null, true]}]}));
        assert_eq!(documents[0].place_of("a[0].c"), Place { line: 3, column: 5 });
        assert_eq!(documents[0].place_of("a[0].c[1]"), Place { line: 3, column: 12 });
        assert_eq!(documents[0].place_of("a[0].unknown.further"), Place { line: 2, column: 5 });
        assert_eq!(documents[1].place_of("d"), Place { line: 5, column: 1 });
        assert_eq!(documents[1].to_json(), serde_json::json!({"d": -2}));
        let json = Node::documents("{\n  \"a\": {\"b\": \"1\"}\n}").unwrap();
        assert_eq!(json[0].place_of("a.b"), Place { line: 2, column: 9 });
        assert_eq!(json[0].text(&["a", "b"]), Some("1"));
    }

    #[test]
    fn what_is_no_yaml_is_refused_at_its_line() {
        let (place, reason) = Node::documents("a: 1\nb: [\n").unwrap_err();
        assert!(place.line >= 2 && !reason.is_empty(), "{place:?} {reason}");
        let (place, reason) = Node::documents("a: 1\na: 2\n").unwrap_err();
        assert!(place.line == 2 && reason.contains("duplicate"), "{place:?} {reason}");
    }
}
