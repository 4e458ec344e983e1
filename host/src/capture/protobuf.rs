//! The protobuf wire format, as far as reading a few fields needs it.
//!
//! [`Fields`] walks one message's fields without copying. It is a screen of code against a dependency
//! with a code generator, for the dozen fields of Envoy's tap messages that a capture reads. Unknown
//! fields are stepped over, as the format asks for; groups (deprecated) are refused.
//!
//! Source: protobuf.dev, "Encoding".

/// One field's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value<'a> {
    /// Wire types 0, 1 and 5.
    Number(u64),
    /// Wire type 2: bytes, a string or a message.
    Bytes(&'a [u8]),
}

/// Takes a varint off the front.
pub(super) fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// The fields of a message, in order: number and value. `Err` once where the bytes are no message.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

/// The bytes are not a protobuf message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the protobuf message breaks off or is damaged")]
pub(super) struct Damaged;

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), Damaged>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or(Damaged))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let tag = varint(&mut self.0)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut self.0)?),
            1 => Value::Number(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
            2 => {
                let length = usize::try_from(varint(&mut self.0)?).ok()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Number(u64::from(u32::from_le_bytes(self.take(4)?.try_into().ok()?))),
            _ => return None,
        };
        Some((tag >> 3, value))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encoding_guides_own_examples() {
        let fields = |bytes| Fields(bytes).collect::<Result<Vec<_>, _>>();
        assert_eq!(fields(&[0x08, 0x96, 0x01]).unwrap(), [(1, Value::Number(150))]);
        assert_eq!(
            fields(&[0x12, 0x07, b't', b'e', b's', b't', b'i', b'n', b'g']).unwrap(),
            [(2, Value::Bytes(b"testing"))]
        );
        assert_eq!(fields(&[0x0d, 1, 0, 0, 0]).unwrap(), [(1, Value::Number(1))]);
    }

    #[test]
    fn every_cut_of_a_message_is_damaged_or_shorter() {
        let message = [0x08, 0x96, 0x01, 0x12, 0x02, b'o', b'k'];
        for cut in [1, 2, 4, 5, 6] {
            assert_eq!(Fields(&message[..cut]).last(), Some(Err(Damaged)), "cut at {cut}");
        }
        assert_eq!(Fields(&[0x0b]).last(), Some(Err(Damaged)), "a group");
        assert_eq!(Fields(&[0xff; 11]).last(), Some(Err(Damaged)), "a varint without end");
    }
}
