//! The API of a JSON body or an event stream whose path says nothing, from its outermost keys.
//!
//! MCP and A2A servers, custom gateways and proxies choose their own paths. The first bytes of such a body are
//! kept (they pass on meanwhile) until a key decides, the document or the first event ends, or `MAX_SNIFFED_BYTES` are read. So
//! the answer depends on the bytes alone, not on how they are cut.
//!
//! Cost: these bytes are read twice. Left out on purpose: values, which anyone can send.

use super::style::ApiStyle;
use crate::json::{Container, Handler, Scalar, Tokenizer};
use crate::sse::{self, EventReader};

/// Most bytes that are kept until the style is decided.
pub(crate) const MAX_SNIFFED_BYTES: usize = 2048;

/// Keys that decide only together with another.
const MODEL: u8 = 1;
const INPUT: u8 = 2;
const PROMPT: u8 = 4;
const QUERY: u8 = 8;
const METHOD: u8 = 16;
const PARAMS: u8 = 32;
const MESSAGES_OF_ANTHROPIC: u8 = 64;
const VARIABLES: u8 = 128;

/// Follows the outermost keys of a document (or of the first one in an array).
#[derive(Debug)]
pub(crate) struct Sniffer {
    tokenizer: Tokenizer,
    keys: Keys,
}

#[derive(Debug, Default)]
struct Keys {
    request: bool,
    depth: u8,
    /// Depth of the outermost object.
    object: Option<u8>,
    seen: u8,
    /// `Some(None)`: of no API known here.
    decided: Option<Option<ApiStyle>>,
}

impl Sniffer {
    pub(crate) fn new(request: bool) -> Self {
        Self { tokenizer: Tokenizer::new(false), keys: Keys { request, ..Keys::default() } }
    }

    /// Reads more of the document; the answer, once there is one.
    pub(crate) fn push(&mut self, chunk: &[u8]) -> Option<Option<ApiStyle>> {
        if self.keys.decided.is_none() {
            self.tokenizer.push(chunk, 0, &mut self.keys);
            if self.tokenizer.error().is_some() {
                self.keys.decided.get_or_insert(None);
            }
        }
        self.keys.decided
    }
}

/// The same of the first event with data in a stream of them.
#[derive(Debug)]
pub(crate) struct EventSniffer {
    framing: EventReader,
    first: FirstEvent,
}

#[derive(Debug)]
struct FirstEvent {
    sniffer: Sniffer,
    has_data: bool,
    decided: Option<Option<ApiStyle>>,
}

impl EventSniffer {
    pub(crate) fn new(request: bool) -> Self {
        let first = FirstEvent { sniffer: Sniffer::new(request), has_data: false, decided: None };
        Self { framing: EventReader::new(), first }
    }

    /// Reads more of the stream; the answer, once there is one.
    pub(crate) fn push(&mut self, chunk: &[u8]) -> Option<Option<ApiStyle>> {
        self.framing.push(chunk, 0, &mut self.first);
        self.first.decided
    }
}

impl sse::Handler for FirstEvent {
    fn data(&mut self, piece: &[u8], _: u64) {
        self.has_data = true;
        if self.decided.is_none() {
            self.decided = self.sniffer.push(piece);
        }
    }

    fn other(&mut self, _: &[u8], _: u64) {}
    fn other_end(&mut self) {}

    fn event_end(&mut self, _: u64) {
        if self.has_data {
            self.decided.get_or_insert(None);
        }
    }
}

impl Keys {
    fn seen(&mut self, bit: u8) {
        self.seen |= bit;
        let both = |bits: u8| self.seen & bits == bits;
        let style = if both(MODEL | INPUT) {
            ApiStyle::OpenAiResponses
        } else if both(MODEL | PROMPT) {
            ApiStyle::OpenAiCompletions
        } else if both(QUERY | VARIABLES) {
            ApiStyle::GraphQl
        } else if both(METHOD | PARAMS) {
            ApiStyle::JsonRpc
        } else {
            return;
        };
        self.decided.get_or_insert(Some(style));
    }

    fn decide(&mut self, style: ApiStyle) {
        self.decided.get_or_insert(Some(style));
    }
}

impl Handler for Keys {
    fn begin(&mut self, container: Container, _: usize) {
        self.depth = self.depth.saturating_add(1);
        if self.object.is_none() && container == Container::Object {
            self.object = Some(self.depth);
        }
    }

    fn end(&mut self, _: Container, _: usize) {
        if self.object == Some(self.depth) {
            self.decided.get_or_insert(None);
        }
        self.depth = self.depth.saturating_sub(1);
        if self.depth == 0 {
            self.decided.get_or_insert(None);
        }
    }

    fn key(&mut self, key: Option<&[u8]>) {
        let Some(key) = key.filter(|_| self.object == Some(self.depth)) else { return };
        match key {
            b"jsonrpc" => self.decide(ApiStyle::JsonRpc),
            b"anthropic_version" => self.seen |= MESSAGES_OF_ANTHROPIC,
            b"messages" if self.request => self.decide(if self.seen & MESSAGES_OF_ANTHROPIC > 0 {
                ApiStyle::AnthropicMessages
            } else {
                ApiStyle::OpenAiChat
            }),
            b"contents" | b"systemInstruction" | b"generationConfig" if self.request => {
                self.decide(ApiStyle::Gemini);
            }
            b"chat_history" if self.request => self.decide(ApiStyle::CohereChat),
            b"model" if self.request => self.seen(MODEL),
            b"input" if self.request => self.seen(INPUT),
            b"prompt" if self.request => self.seen(PROMPT),
            b"query" if self.request => self.seen(QUERY),
            b"variables" | b"operationName" if self.request => self.seen(VARIABLES),
            b"method" => self.seen(METHOD),
            b"params" => self.seen(PARAMS),
            b"choices" if !self.request => self.decide(ApiStyle::OpenAiChat),
            b"candidates" if !self.request => self.decide(ApiStyle::Gemini),
            _ => {}
        }
    }

    fn key_begin(&mut self, _: usize) {}
    fn string_begin(&mut self, _: usize) -> bool {
        false
    }
    fn text(&mut self, _: &[u8], _: usize) {}
    fn escape(&mut self, _: &[u8], _: &[u8], _: u64) {}
    fn string_end(&mut self, _: usize) {}
    fn scalar_begin(&mut self, _: usize) {}
    fn scalar_end(&mut self, _: usize, _: Scalar) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn style(request: bool, body: &str) -> Option<ApiStyle> {
        let mut sniffer = Sniffer::new(request);
        body.as_bytes().iter().find_map(|byte| sniffer.push(&[*byte])).flatten()
    }

    #[test]
    fn outermost_keys_decide() {
        for (body, expected) in [
            (r#"{"model":"m","messages":[]}"#, Some(ApiStyle::OpenAiChat)),
            (r#"{"anthropic_version":"x","messages":[]}"#, Some(ApiStyle::AnthropicMessages)),
            (r#"{"contents":[]}"#, Some(ApiStyle::Gemini)),
            (r#"{"method":"tools/call","params":{},"jsonrpc":"2.0"}"#, Some(ApiStyle::JsonRpc)),
            (r#"[{"id":1,"jsonrpc":"2.0"}]"#, Some(ApiStyle::JsonRpc)),
            (r#"{"input":"x","model":"m"}"#, Some(ApiStyle::OpenAiResponses)),
            (r#"{"query":"{a}","variables":{}}"#, Some(ApiStyle::GraphQl)),
            (r#"{"query":"shoes"}"#, None),
            (r#"{"order":{"messages":[]},"model":"m"}"#, None),
            (r#"["messages"]"#, None),
            (r#"{"a":oops,"messages":[]}"#, None),
        ] {
            assert_eq!(style(true, body), expected, "{body}");
        }
        assert_eq!(style(false, r#"{"choices":[]}"#), Some(ApiStyle::OpenAiChat));
        assert_eq!(style(false, r#"{"messages":[]}"#), None);
    }
}
