//! Memory bounds. One test, so that no other thread allocates meanwhile.
#![allow(missing_docs)]

use driftlock_fuzz::memory;

const CHAT_REQUEST: u8 = 2;
const CHAT_RESPONSE: u8 = 3;
const JSON: u8 = 0;
const EVENTS: u8 = 1;

/// A body of `head` and then `piece` over and over, cut into pieces of `cut` bytes.
fn body(direction: u8, kind: u8, cut: u8, head: &[u8], piece: &[u8]) {
    let head = [&(head.len() as u16).to_be_bytes()[..], head].concat();
    // A choice of 0 modulo 4 would be a snapshot.
    memory::holds(&[&[direction, kind, 1, cut - 1], &head[..], piece].concat());
}

#[test]
fn hostile_bytes_stay_within_bounds() {
    for cut in [1, 7, 255] {
        let chat = |head: &[u8], piece: &[u8]| body(CHAT_REQUEST, JSON, cut, head, piece);
        chat(br#"{"messages":[{"content":""#, b"all of this waits for a role ");
        chat(br#"{"messages":[{"content":""#, br"\n");
        chat(br#"{"messages":[{"content":[""#, br#"a",""#);
        chat(br#"{"messages":["#, br#"{"role":"user","content":"x"},"#);
        chat(br#"{"messages":[{"tool_calls":["#, br#"{"function":{"name":"f","arguments":"x"}},"#);
        chat(b"", b"[");
        chat(b"{\"", b"a key without end ");
        chat(br#"{"url":""#, b"iVBORw0KGgo");
        chat(b"not JSON", b" at all");
        let stream = |piece: &[u8]| body(CHAT_RESPONSE, EVENTS, cut, b"", piece);
        stream(b"data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"index\":0}]}\n\n");
        stream(b"data: {\"id\":1,\"choices\":[{\"delta\":{\"content\":\"x\"},\"index\":0}]}\n\ndata: {\"x\":[1,2,3]}\n\n");
        stream(b": comment\n");
        stream(b"data: 1\n");
        let line = |head: &[u8], piece: &[u8]| body(CHAT_RESPONSE, EVENTS, cut, head, piece);
        line(br#"data: {"choices":[{"delta":{"content":""#, br"\n");
        line(br#"data: {"choices":[{"delta":{"content":""#, b"text");
        line(br#"data: {"choices":["#, br#"{"delta":{"content":"x"},"index":7},"#);
        line(
            br#"data: {"choices":[{"delta":{"tool_calls":["#,
            br#"{"index":1,"function":{"arguments":"x"}},"#,
        );
        line(b"data: [", b"1,");
        line(b"", b":");
        // Shapes that differ, each with many values.
        let shapes: Vec<u8> = (440..500)
            .flat_map(|values| [&b"data: [1"[..], &b",1".repeat(values), b"]\n\n"].concat())
            .collect();
        line(b"", &shapes);
    }
    // Many streams with nothing in them, and a damaged table.
    let streams: Vec<u8> = (0..2000u32)
        .flat_map(|i| [&[2, 0][..], &[(i >> 7) as u8, (i & 0x7f) as u8], &[0; 10]].concat())
        .collect();
    memory::holds(&[&[0, 1][..], &2000u32.to_le_bytes(), &streams].concat());
    for at in 0..600u16 {
        let [high, low] = at.to_be_bytes();
        memory::holds(&[0, 2, 4, high, low, 0xff]);
        memory::holds(&[0, 2, 3, high, low, 0xff]);
    }
}
