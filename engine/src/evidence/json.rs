//! Verdicts to JSON text, the bytes that serde_json would write.
//!
//! What: a serde serialiser for what verdicts are made of: structs, lists, strings, whole numbers and
//! decimals. Why: every message gives a verdict, and on short ones writing it cost half as much as scoring
//! them; names of fields need no escaping, and nearly all decimals are whole thousandths or millionths, so
//! neither a table of escapes nor a search for the shortest digits is needed. The property test below holds
//! it to serde_json.
//!
//! Cost: about a nanosecond a byte. Left out on purpose: maps, and what no verdict has; those are
//! [`NotInVerdicts`].

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::{self, Display};

use serde::ser::{Error, Impossible, SerializeSeq, SerializeStruct, SerializeTuple, SerializeTupleStruct};
use serde::{Serialize, Serializer};

/// What a verdict takes, nearly always.
const USUAL_BYTES: usize = 1024;

/// Something that no verdict holds, such as a map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a verdict holds {0}, which its JSON text has no form for; please report this")]
pub struct NotInVerdicts(String);

impl Error for NotInVerdicts {
    fn custom<T: Display>(message: T) -> Self {
        Self(format!("{message}"))
    }
}

/// The JSON text of a value.
pub(super) fn write(value: &impl Serialize) -> Result<String, NotInVerdicts> {
    let mut text = Text(Vec::with_capacity(USUAL_BYTES));
    value.serialize(&mut text)?;
    String::from_utf8(text.0).map_err(NotInVerdicts::custom)
}

struct Text(Vec<u8>);

impl Text {
    fn raw(&mut self, text: &[u8]) {
        self.0.extend_from_slice(text);
    }

    fn string(&mut self, text: &str) {
        self.0.push(b'"');
        // All of it, without stopping early: many bytes at once.
        let plain = |plain, byte| plain & (byte >= b' ') & (byte != b'"') & (byte != b'\\');
        if text.bytes().fold(true, plain) {
            self.raw(text.as_bytes());
        } else {
            text.bytes().for_each(|byte| self.escaped(byte));
        }
        self.0.push(b'"');
    }

    fn escaped(&mut self, byte: u8) {
        let short = match byte {
            b'"' | b'\\' => byte,
            0x08 => b'b',
            0x09 => b't',
            0x0a => b'n',
            0x0c => b'f',
            0x0d => b'r',
            0..0x20 => {
                let digit = |nibble: u8| if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
                return self.raw(&[b'\\', b'u', b'0', b'0', digit(byte >> 4), digit(byte & 15)]);
            }
            _ => return self.0.push(byte),
        };
        self.raw(&[b'\\', short]);
    }

    fn whole(&mut self, mut number: u64) {
        let mut digits = [0; 20];
        let mut len = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
            len += 1;
            if number == 0 {
                break;
            }
        }
        self.raw(digits.get(digits.len() - len..).unwrap_or_default());
    }

    /// The shortest decimal that reads as this f64. One of at most fifteen digits is the only one so short,
    /// so where `number` is the f64 nearest to n/1000, that is what is written.
    fn decimal(&mut self, number: f64) -> bool {
        if number == 0.0 && number.is_sign_positive() {
            self.raw(b"0.0");
            return true;
        }
        // Smaller ones have an exponent, larger ones more digits.
        if !(1e-5..1e8).contains(&number) {
            return false;
        }
        let thousandths = (number * 1e3 + 0.5) as u64;
        if thousandths as f64 / 1e3 == number {
            self.whole(thousandths / 1000);
            self.places([thousandths / 100 % 10, thousandths / 10 % 10, thousandths % 10]);
            return true;
        }
        let millionths = (number * 1e6 + 0.5) as u64;
        if millionths as f64 / 1e6 == number {
            self.whole(millionths / 1_000_000);
            let place = |one: u64| millionths / one % 10;
            self.places([place(100_000), place(10_000), place(1000), place(100), place(10), place(1)]);
            return true;
        }
        false
    }

    /// The digits behind the point, without zeros at the end but the first.
    fn places<const N: usize>(&mut self, digits: [u64; N]) {
        let kept = digits.iter().rposition(|&digit| digit != 0).map_or(1, |last| last + 1);
        self.0.push(b'.');
        digits.iter().take(kept).for_each(|&digit| self.0.push(b'0' + digit as u8));
    }
}

/// A list or a struct under way.
struct Parts<'a> {
    text: &'a mut Text,
    first: bool,
    close: u8,
}

impl Parts<'_> {
    fn separate(&mut self) {
        if !core::mem::replace(&mut self.first, false) {
            self.text.0.push(b',');
        }
    }

    fn item(&mut self, value: &(impl Serialize + ?Sized)) -> Result<(), NotInVerdicts> {
        self.separate();
        value.serialize(&mut *self.text)
    }

    fn close(self) {
        self.text.0.push(self.close);
    }
}

impl SerializeSeq for Parts<'_> {
    type Ok = ();
    type Error = NotInVerdicts;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotInVerdicts> {
        self.item(value)
    }

    fn end(self) -> Result<(), NotInVerdicts> {
        self.close();
        Ok(())
    }
}

impl SerializeTuple for Parts<'_> {
    type Ok = ();
    type Error = NotInVerdicts;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotInVerdicts> {
        self.item(value)
    }

    fn end(self) -> Result<(), NotInVerdicts> {
        self.close();
        Ok(())
    }
}

impl SerializeTupleStruct for Parts<'_> {
    type Ok = ();
    type Error = NotInVerdicts;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), NotInVerdicts> {
        self.item(value)
    }

    fn end(self) -> Result<(), NotInVerdicts> {
        self.close();
        Ok(())
    }
}

impl SerializeStruct for Parts<'_> {
    type Ok = ();
    type Error = NotInVerdicts;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), NotInVerdicts> {
        self.separate();
        // Names of fields: letters and underlines.
        self.text.0.push(b'"');
        self.text.raw(key.as_bytes());
        self.text.raw(b"\":");
        value.serialize(&mut *self.text)
    }

    fn end(self) -> Result<(), NotInVerdicts> {
        self.close();
        Ok(())
    }
}

fn not<T>(what: &str) -> Result<T, NotInVerdicts> {
    Err(NotInVerdicts::custom(what))
}

impl<'a> Serializer for &'a mut Text {
    type Ok = ();
    type Error = NotInVerdicts;
    type SerializeSeq = Parts<'a>;
    type SerializeTuple = Parts<'a>;
    type SerializeTupleStruct = Parts<'a>;
    type SerializeTupleVariant = Impossible<(), NotInVerdicts>;
    type SerializeMap = Impossible<(), NotInVerdicts>;
    type SerializeStruct = Parts<'a>;
    type SerializeStructVariant = Impossible<(), NotInVerdicts>;

    fn serialize_bool(self, value: bool) -> Result<(), NotInVerdicts> {
        self.raw(if value { b"true" } else { b"false" });
        Ok(())
    }

    fn serialize_i8(self, value: i8) -> Result<(), NotInVerdicts> {
        self.serialize_i64(value.into())
    }

    fn serialize_i16(self, value: i16) -> Result<(), NotInVerdicts> {
        self.serialize_i64(value.into())
    }

    fn serialize_i32(self, value: i32) -> Result<(), NotInVerdicts> {
        self.serialize_i64(value.into())
    }

    fn serialize_i64(self, value: i64) -> Result<(), NotInVerdicts> {
        if value < 0 {
            self.0.push(b'-');
        }
        self.whole(value.unsigned_abs());
        Ok(())
    }

    fn serialize_u8(self, value: u8) -> Result<(), NotInVerdicts> {
        self.serialize_u64(value.into())
    }

    fn serialize_u16(self, value: u16) -> Result<(), NotInVerdicts> {
        self.serialize_u64(value.into())
    }

    fn serialize_u32(self, value: u32) -> Result<(), NotInVerdicts> {
        self.serialize_u64(value.into())
    }

    fn serialize_u64(self, value: u64) -> Result<(), NotInVerdicts> {
        self.whole(value);
        Ok(())
    }

    fn serialize_f32(self, _: f32) -> Result<(), NotInVerdicts> {
        not("an f32")
    }

    fn serialize_f64(self, value: f64) -> Result<(), NotInVerdicts> {
        if !value.is_finite() {
            self.raw(b"null");
        } else if !self.decimal(value) {
            // Of these two, only the second writes exponents, and below 1e-4 already.
            let plain = (1e-5..1e-4).contains(&value.abs());
            let text = if plain { format!("{value}") } else { format!("{value:?}") };
            match text.split_once('e') {
                Some((digits, exponent)) if !exponent.starts_with('-') => {
                    self.raw(digits.as_bytes());
                    self.raw(b"e+");
                    self.raw(exponent.as_bytes());
                }
                _ => self.raw(text.as_bytes()),
            }
        }
        Ok(())
    }

    fn serialize_char(self, value: char) -> Result<(), NotInVerdicts> {
        self.string(value.encode_utf8(&mut [0; 4]));
        Ok(())
    }

    fn serialize_str(self, value: &str) -> Result<(), NotInVerdicts> {
        self.string(value);
        Ok(())
    }

    fn serialize_bytes(self, _: &[u8]) -> Result<(), NotInVerdicts> {
        not("raw bytes")
    }

    fn serialize_none(self) -> Result<(), NotInVerdicts> {
        self.serialize_unit()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), NotInVerdicts> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), NotInVerdicts> {
        self.raw(b"null");
        Ok(())
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), NotInVerdicts> {
        self.serialize_unit()
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
    ) -> Result<(), NotInVerdicts> {
        self.string(name);
        Ok(())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), NotInVerdicts> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<(), NotInVerdicts> {
        not("an enum's contents")
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Parts<'a>, NotInVerdicts> {
        self.0.push(b'[');
        Ok(Parts { text: self, first: true, close: b']' })
    }

    fn serialize_tuple(self, len: usize) -> Result<Parts<'a>, NotInVerdicts> {
        self.serialize_seq(Some(len))
    }

    fn serialize_tuple_struct(self, _: &'static str, len: usize) -> Result<Parts<'a>, NotInVerdicts> {
        self.serialize_seq(Some(len))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, NotInVerdicts> {
        not("an enum's contents")
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, NotInVerdicts> {
        not("a map")
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Parts<'a>, NotInVerdicts> {
        self.0.push(b'{');
        Ok(Parts { text: self, first: true, close: b'}' })
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStructVariant, NotInVerdicts> {
        not("an enum's contents")
    }

    fn collect_str<T: Display + ?Sized>(self, value: &T) -> Result<(), NotInVerdicts> {
        let mut text = String::new();
        fmt::write(&mut text, format_args!("{value}")).map_err(NotInVerdicts::custom)?;
        self.string(&text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Serialize)]
    struct Inner {
        text: String,
        number: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        perhaps: Option<u16>,
    }

    #[derive(Debug, Serialize)]
    struct Outer {
        signed: i64,
        unsigned: u64,
        pair: [u32; 2],
        numbers: Vec<f64>,
        inner: Vec<Inner>,
        one: Option<Inner>,
        flag: bool,
        letter: char,
    }

    fn number() -> impl Strategy<Value = f64> {
        prop_oneof![
            any::<f64>(),
            any::<u64>().prop_map(f64::from_bits),
            (0u64..1 << 53).prop_map(|n| n as f64 / 1000.0),
            (0u64..1 << 22).prop_map(|n| n as f64 / 1000.0),
            (0u64..1 << 22).prop_map(|n| n as f64 / 1e6),
            // Neighbours of decimals.
            (0u64..1 << 22, -2i64..3).prop_map(|(n, off)| {
                f64::from_bits((n as f64 / 1000.0).to_bits().saturating_add_signed(off) & !(1 << 63))
            }),
            (0u32..4000, -9i32..18).prop_map(|(n, exponent)| f64::from(n) * 10f64.powi(exponent)),
            Just(-0.0),
        ]
    }

    prop_compose! {
        fn inner()(text in ".{0,12}|[\\x00-\\x7f]{0,12}", number in number(), perhaps in any::<Option<u16>>())
            -> Inner { Inner { text, number, perhaps } }
    }

    proptest! {
        #[test]
        fn the_text_is_serde_jsons(
            (signed, unsigned, pair, flag, letter) in any::<(i64, u64, [u32; 2], bool, char)>(),
            numbers in prop::collection::vec(number(), 0..6),
            inner in prop::collection::vec(inner(), 0..4),
            one in prop::option::of(inner()),
        ) {
            let value = Outer { signed, unsigned, pair, numbers, inner, one, flag, letter };
            prop_assert_eq!(write(&value).unwrap(), serde_json::to_string(&value).unwrap());
        }
    }

    #[test]
    fn what_has_no_form_is_refused_and_not_left_out() {
        let map = alloc::collections::BTreeMap::from([("a", 1)]);
        assert!(write(&map).is_err() && write(&[map]).is_err());
        assert!(write(&Some(1f32)).is_err());
    }
}
