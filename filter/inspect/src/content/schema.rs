//! What the keys of the known APIs mean: one table for all of them.
//!
//! Compatible servers, gateways and Bedrock's invoke carry one maker's schema behind another's path, so a key's
//! meaning depends on where it stands, hardly ever on the path. What no line here names is envelope: scored
//! under that name, never dropped. Sources: the API references of OpenAI (chat completions, responses,
//! completions, embeddings, threads), Anthropic (messages, batches), Google (generateContent, embedContent,
//! Vertex predict), Amazon Bedrock (converse, invoke with the makers' bodies), Cohere (v1, v2), Ollama, the
//! Model Context Protocol (2025-06-18), Agent2Agent (0.3) and GraphQL over HTTP; and what recorded servers send.
//!
//! Cost: one comparison tree per key. Left out on purpose: types and required fields; a wrong one is for the
//! server to refuse.

use super::style::ApiStyle;
use crate::json::Container;

/// Which body of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Request,
    Response,
    /// An answer in pieces: texts of one kind, choice and block are one unit.
    Stream,
}

/// What a scored text is; also the lane that joins the pieces of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// By the role of its message.
    Spoken,
    System,
    User,
    Assistant,
    Refusal,
    Transcript,
    Reasoning,
    ReasoningContent,
    ReasoningDetail,
    Call,
    LegacyCall,
    Result,
    /// A query in a query language.
    Query,
    /// By the type of its event (OpenAI responses), a piece or all of it again.
    Delta,
    Repeat,
    RepeatedCall,
}

/// Token counts an answer reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tokens {
    Input,
    Output,
    Total,
    Cached,
    Reasoning,
}

/// A short string that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Role,
    /// `type` of an item of the responses API.
    ItemType,
    /// `type` of an event.
    EventType,
    /// `type` of a document: plain text is no media.
    MediaType,
    Model,
    Finish,
}

/// The meaning of a value, from its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Other,
    /// A document, or an element of a batch of them.
    Top,
    /// A whole document inside an event.
    Inner,
    Params,
    RpcResult,
    RpcStatus,
    Artifacts,
    Artifact,
    Batch,
    Messages,
    Message(Kind),
    Input,
    /// A system prompt, or items.
    Instructions,
    Output,
    Item,
    /// A string, an object with parts, or a list of either.
    Content(Kind),
    /// Text with its citations.
    Cited(Kind),
    /// An element of such a list.
    Part(Kind),
    /// Content inside an event that repeats what came in pieces.
    RepeatedContent,
    Delta,
    Block,
    ToolCalls {
        whole: bool,
    },
    ToolCall {
        whole: bool,
    },
    Function {
        whole: bool,
    },
    LegacyCall,
    /// The result of a call, as an object.
    ToolResult,
    Details,
    Choices,
    Choice,
    /// Any value: a string's text, else its JSON source.
    Raw(Kind),
    /// Base64 as a string, else any value.
    Data(Kind),
    /// Inside such a source.
    InRaw,
    Text(Kind),
    ChoiceIndex,
    CallIndex,
    BlockIndex,
    Thought,
    Done,
    Error,
    Captured(Field),
    /// Where media are, in a content part or an answer.
    Media(Kind),
    Blob {
        media: bool,
    },
    Padding,
    /// A list of numbers, counted, or of such lists; and an object of them.
    Vector,
    Vectors,
    Usage,
    Tokens(Tokens),
}

/// Keys whose strings may hold base64 media.
fn is_media_key(key: &[u8]) -> bool {
    matches!(
        key,
        b"url"
            | b"image_url"
            | b"file_url"
            | b"video_url"
            | b"document_url"
            | b"data"
            | b"file_data"
            | b"b64_json"
            | b"bytes"
            | b"blob"
            | b"partial_image_b64"
            | b"bytesBase64Encoded"
    )
}

/// Keys whose strings are opaque to all but their maker.
fn is_opaque_key(key: &[u8]) -> bool {
    matches!(
        key,
        b"signature"
            | b"thought_signature"
            | b"thoughtSignature"
            | b"encrypted_content"
            | b"encrypted_index"
            | b"redactedContent"
    )
}

/// What decides beside the place: the body's style and which one it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schema {
    pub(crate) style: ApiStyle,
    pub(crate) mode: Mode,
}

impl Schema {
    /// The meaning of the value under `key` of an object that means `place`.
    pub(crate) fn child(self, place: Place, key: Option<&[u8]>) -> Place {
        if place == Place::InRaw {
            return Place::InRaw;
        }
        let Some(key) = key else { return Place::Other };
        match place {
            Place::Top | Place::Inner => self.of_top(place, key),
            Place::Params => match key {
                b"name" | b"uri" => Place::Text(Kind::Call),
                b"arguments" | b"argument" => Place::Raw(Kind::Call),
                b"data" => Place::Raw(Kind::Result),
                b"message" => Place::Message(Kind::Spoken),
                _ => self.of_top(place, key),
            },
            Place::RpcResult => match key {
                b"content" | b"contents" => Place::Content(Kind::Result),
                b"structuredContent" => Place::Raw(Kind::Result),
                b"messages" | b"history" => Place::Messages,
                b"message" => Place::Message(Kind::Spoken),
                b"role" => Place::Captured(Field::Role),
                b"parts" => Place::Content(Kind::Spoken),
                b"status" => Place::RpcStatus,
                b"artifacts" => Place::Artifacts,
                b"artifact" => Place::Artifact,
                b"task" | b"statusUpdate" | b"artifactUpdate" => Place::RpcResult,
                b"model" => Place::Captured(Field::Model),
                _ => Place::Other,
            },
            Place::RpcStatus if key == b"message" => Place::Message(Kind::Spoken),
            Place::Artifact if key == b"parts" => Place::Content(Kind::Assistant),
            Place::Batch => match key {
                b"requests" | b"inputConfig" | b"input_config" => Place::Batch,
                _ => Place::Other,
            },
            Place::Message(kind) => self.of_message(kind, key),
            Place::Item => match key {
                b"type" => Place::Captured(Field::ItemType),
                b"name" => Place::Text(Kind::Call),
                b"arguments" | b"input" | b"code" | b"action" | b"operation" | b"queries" => {
                    Place::Raw(Kind::Call)
                }
                b"output" => Place::Content(Kind::Result),
                b"results" | b"outputs" => Place::Raw(Kind::Result),
                b"summary" => Place::Content(Kind::Reasoning),
                b"text" | b"prompt" => Place::Content(Kind::Spoken),
                b"result" => Place::Blob { media: true },
                _ if is_media_key(key) => Place::Blob { media: true },
                _ if is_opaque_key(key) => Place::Blob { media: false },
                _ => self.of_message(Kind::Spoken, key),
            },
            Place::Output => match key {
                b"message" => Place::Message(Kind::Assistant),
                b"text" => Place::Text(Kind::Assistant),
                b"choices" => Place::Choices,
                _ => Place::Other,
            },
            // Servers with structured output put an object of their own there.
            Place::Content(_) if matches!(key, b"name" | b"input") => Place::Other,
            Place::Content(kind) | Place::Part(kind) => self.of_part(kind, key),
            Place::Delta => match key {
                b"text" => Place::Text(Kind::Assistant),
                b"partial_json" => Place::Text(Kind::Call),
                b"thinking" => Place::Text(Kind::Reasoning),
                b"toolUse" => Place::Function { whole: false },
                b"toolResult" => Place::Content(Kind::Result),
                b"reasoningContent" => Place::Content(Kind::Reasoning),
                b"message" => Place::Message(Kind::Assistant),
                b"stop_reason" | b"finish_reason" => Place::Captured(Field::Finish),
                b"usage" => Place::Usage,
                b"image" => Place::Media(Kind::Assistant),
                _ if is_opaque_key(key) => Place::Blob { media: false },
                _ => Place::Other,
            },
            // The beginning of a block that is streamed: its `input` is empty and comes in pieces.
            Place::Block => match key {
                b"input" => Place::Other,
                _ => self.of_part(Kind::Assistant, key),
            },
            Place::ToolCall { whole } => match key {
                b"function" | b"custom" => Place::Function { whole },
                b"index" => Place::CallIndex,
                b"name" => Place::Text(Kind::Call),
                b"parameters" => Place::Raw(Kind::Call),
                _ => Place::Other,
            },
            Place::Function { .. } => match key {
                b"name" => Place::Text(Kind::Call),
                b"arguments" | b"input" | b"args" | b"parameters" | b"code" => Place::Raw(Kind::Call),
                _ => Place::Other,
            },
            Place::LegacyCall if matches!(key, b"name" | b"arguments") => Place::Text(Kind::LegacyCall),
            Place::ToolResult => match key {
                b"response" => Place::Raw(Kind::Result),
                b"content" | b"output" => Place::Content(Kind::Result),
                _ => Place::Other,
            },
            Place::Details => match key {
                b"text" | b"summary" => Place::Text(Kind::ReasoningDetail),
                _ if is_media_key(key) || is_opaque_key(key) => Place::Blob { media: false },
                _ => Place::Other,
            },
            Place::Choice => match key {
                b"message" if self.mode != Mode::Stream => Place::Message(Kind::Assistant),
                b"delta" if self.mode == Mode::Stream => Place::Message(Kind::Assistant),
                b"text" | b"outputText" => Place::Text(Kind::Assistant),
                b"content" | b"data" => Place::Content(Kind::Assistant),
                b"document" => Place::Content(Kind::Result),
                b"index" => Place::ChoiceIndex,
                b"finish_reason" | b"finishReason" | b"completionReason" | b"stop_reason" => {
                    Place::Captured(Field::Finish)
                }
                b"embeddings" => Place::Vector,
                b"bytesBase64Encoded" => Place::Blob { media: true },
                b"prompt" => Place::Text(Kind::Assistant),
                _ => Place::Other,
            },
            Place::Media(kind) => match key {
                b"text" | b"content" => Place::Content(kind),
                b"transcript" => Place::Text(Kind::Transcript),
                b"source" | b"file" => Place::Media(kind),
                b"type" => Place::Captured(Field::MediaType),
                b"data" => Place::Data(kind),
                _ if is_media_key(key) => Place::Blob { media: true },
                _ => Place::Other,
            },
            Place::Cited(kind) if key == b"content" => Place::Content(kind),
            Place::Blob { media } if is_media_key(key) => Place::Blob { media },
            Place::Vectors => Place::Vector,
            Place::Usage => Self::of_usage(key),
            _ => Place::Other,
        }
    }

    fn of_top(self, place: Place, key: &[u8]) -> Place {
        let answer = self.mode != Mode::Request;
        let pieces = self.mode == Mode::Stream && place == Place::Top;
        match key {
            b"messages" | b"contents" | b"chat_history" => Place::Messages,
            b"instructions" => Place::Instructions,
            b"system"
            | b"preamble"
            | b"systemInstruction"
            | b"system_instruction"
            | b"systemPrompt"
            | b"template" => Place::Content(Kind::System),
            b"params" => Place::Params,
            b"result" => Place::RpcResult,
            b"requests" | b"batch" => Place::Batch,
            b"request" | b"generateContentRequest" => Place::Inner,
            b"documents" | b"tool_results" => Place::Raw(Kind::Result),
            b"input" => Place::Input,
            b"model" | b"modelVersion" => Place::Captured(Field::Model),
            b"images" => Place::Media(Kind::User),
            _ if answer => self.of_answer(key, pieces),
            b"prompt" | b"suffix" | b"texts" | b"inputs" | b"inputText" | b"singleEmbeddingParams" => {
                Place::Content(Kind::User)
            }
            b"message" => Place::Content(Kind::User),
            b"query" if self.style == ApiStyle::GraphQl => Place::Text(Kind::Query),
            b"query" => Place::Text(Kind::User),
            b"variables" if self.style == ApiStyle::GraphQl => Place::Raw(Kind::User),
            b"instances" => Place::Input,
            b"role" => Place::Captured(Field::Role),
            b"content" => Place::Content(Kind::Spoken),
            _ => Place::Other,
        }
    }

    /// Keys of answers, whole or an event of a stream (`pieces`).
    fn of_answer(self, key: &[u8], pieces: bool) -> Place {
        let responses = self.style == ApiStyle::OpenAiResponses;
        match key {
            b"choices" | b"candidates" | b"results" | b"outputs" | b"completions" | b"generations"
            | b"predictions" => Place::Choices,
            b"usage"
            | b"usageMetadata"
            | b"usage_metadata"
            | b"meta"
            | b"amazon-bedrock-invocationMetrics"
            | b"metadata" => Place::Usage,
            b"stop_reason" | b"stopReason" | b"finish_reason" | b"finishReason" | b"done_reason" => {
                Place::Captured(Field::Finish)
            }
            b"error" => Place::Error,
            b"embedding" | b"embeddings" | b"context" => Place::Vector,
            b"message" => Place::Message(Kind::Assistant),
            b"content" => Place::Content(Kind::Assistant),
            b"output" => Place::Output,
            b"data" => Place::Messages,
            b"text" if responses && pieces => Place::Text(Kind::Repeat),
            b"text" | b"completion" | b"generation" | b"generated_text" | b"outputText" => {
                Place::Text(Kind::Assistant)
            }
            b"thinking" => Place::Text(Kind::Reasoning),
            b"tool_calls" => Place::ToolCalls { whole: true },
            b"prompt_eval_count" | b"inputTextTokenCount" | b"prompt_token_count" => {
                Place::Tokens(Tokens::Input)
            }
            b"eval_count" | b"generation_token_count" => Place::Tokens(Tokens::Output),
            b"done" | b"is_finished" => Place::Done,
            b"response" if !responses && self.style != ApiStyle::CohereChat => Place::Text(Kind::Assistant),
            _ if pieces => Self::of_event(key),
            _ => Place::Other,
        }
    }

    /// Keys of the events of a stream.
    fn of_event(key: &[u8]) -> Place {
        match key {
            b"type" | b"event_type" => Place::Captured(Field::EventType),
            b"index" | b"contentBlockIndex" | b"output_index" => Place::BlockIndex,
            b"delta" => Place::Delta,
            b"content_block" => Place::Block,
            b"start" => Place::Delta,
            b"response" => Place::Inner,
            b"item" => Place::Item,
            b"part" => Place::RepeatedContent,
            b"refusal" | b"transcript" => Place::Text(Kind::Repeat),
            b"arguments" | b"code" => Place::Text(Kind::RepeatedCall),
            b"obfuscation" | b"p" => Place::Padding,
            b"partial_image_b64" => Place::Blob { media: true },
            b"internalServerException" | b"modelStreamErrorException" | b"throttlingException" => {
                Place::Error
            }
            _ => Place::Other,
        }
    }

    fn of_message(self, kind: Kind, key: &[u8]) -> Place {
        match key {
            b"role" if kind == Kind::Spoken => Place::Captured(Field::Role),
            b"content" | b"parts" | b"message" => Place::Content(kind),
            b"refusal" => Place::Text(Kind::Refusal),
            b"reasoning" => Place::Text(Kind::Reasoning),
            b"reasoning_content" => Place::Text(Kind::ReasoningContent),
            b"thinking" | b"tool_plan" => Place::Text(Kind::Reasoning),
            b"reasoning_details" => Place::Details,
            b"tool_calls" => Place::ToolCalls { whole: self.style == ApiStyle::Ollama },
            b"function_call" => Place::LegacyCall,
            b"tool_results" => Place::Raw(Kind::Result),
            b"audio" | b"images" => Place::Media(kind),
            b"embedding" if self.mode != Mode::Request => Place::Vector,
            b"b64_json" => Place::Blob { media: true },
            b"model" if self.mode != Mode::Request => Place::Captured(Field::Model),
            b"usage" if self.mode != Mode::Request => Place::Usage,
            b"stop_reason" if self.mode != Mode::Request => Place::Captured(Field::Finish),
            _ => Place::Other,
        }
    }

    /// Keys of a content part (OpenAI, Mistral), block (Anthropic, Bedrock, MCP) or part (Gemini, A2A).
    fn of_part(self, kind: Kind, key: &[u8]) -> Place {
        match key {
            b"text" | b"refusal" | b"parts" | b"value" | b"guardContent" | b"resource" => {
                Place::Content(kind)
            }
            b"thinking" | b"reasoningContent" | b"reasoningText" => Place::Content(Kind::Reasoning),
            b"content" | b"searchResult" | b"stdout" | b"stderr" => Place::Content(Kind::Result),
            b"citationsContent" => Place::Cited(kind),
            b"variables" => Place::Raw(kind),
            b"name" if kind != Kind::Result => Place::Text(Kind::Call),
            b"input" => Place::Raw(Kind::Call),
            b"json" => Place::Raw(kind),
            b"toolUse" => Place::Function { whole: false },
            b"functionCall" | b"function_call" | b"executableCode" | b"executable_code" => {
                Place::Function { whole: true }
            }
            b"functionResponse"
            | b"function_response"
            | b"toolResult"
            | b"codeExecutionResult"
            | b"code_execution_result" => Place::ToolResult,
            b"thought" => Place::Thought,
            b"inlineData" | b"inline_data" | b"input_audio" | b"file" | b"source" | b"video" | b"image"
            | b"audio" | b"document" => Place::Media(kind),
            b"data" => Place::Data(kind),
            _ if is_media_key(key) => Place::Blob { media: true },
            _ if is_opaque_key(key) => Place::Blob { media: false },
            _ => Place::Other,
        }
    }

    fn of_usage(key: &[u8]) -> Place {
        Place::Tokens(match key {
            b"prompt_tokens" | b"input_tokens" | b"promptTokenCount" | b"inputTokens"
            | b"inputTokenCount" => Tokens::Input,
            b"completion_tokens"
            | b"output_tokens"
            | b"candidatesTokenCount"
            | b"outputTokens"
            | b"outputTokenCount" => Tokens::Output,
            b"total_tokens" | b"totalTokenCount" | b"totalTokens" => Tokens::Total,
            b"cached_tokens"
            | b"cache_read_input_tokens"
            | b"cachedContentTokenCount"
            | b"cacheReadInputTokens"
            | b"cacheReadInputTokenCount"
            | b"prompt_cache_hit_tokens" => Tokens::Cached,
            b"reasoning_tokens" | b"thoughtsTokenCount" => Tokens::Reasoning,
            b"prompt_tokens_details"
            | b"input_tokens_details"
            | b"completion_tokens_details"
            | b"output_tokens_details"
            | b"tokens"
            | b"usage" => return Place::Usage,
            _ => return Place::Other,
        })
    }
}

impl Place {
    /// The meaning of an array's elements.
    pub(crate) fn element(self) -> Self {
        match self {
            Self::Messages => Self::Message(Kind::Spoken),
            Self::Choices => Self::Choice,
            Self::ToolCalls { whole } => Self::ToolCall { whole },
            Self::Artifacts => Self::Artifact,
            Self::Output | Self::Instructions => Self::Item,
            Self::Batch => Self::Inner,
            Self::Content(kind) => Self::Part(kind),
            same
            @ (Self::Top | Self::Media(_) | Self::Details | Self::Input | Self::Vector | Self::InRaw) => same,
            _ => Self::Other,
        }
    }

    /// What a container found at this place means: an object where an array belongs has no meaning.
    pub(crate) fn opened(self, container: Container) -> Self {
        let object = container == Container::Object;
        match self {
            Self::Raw(_) | Self::Data(_) | Self::InRaw => Self::InRaw,
            Self::RepeatedContent => Self::Content(Kind::Repeat),
            Self::Part(kind) if !object => Self::Content(kind),
            Self::Vector if object => Self::Vectors,
            Self::Input if object => Self::Item,
            Self::Messages if object => Self::Message(Kind::Spoken),
            // Cohere streams one call at a time, not in a list.
            Self::ToolCalls { whole } if object => Self::ToolCall { whole },
            Self::Top
            | Self::Input
            | Self::Output
            | Self::Content(_)
            | Self::Part(_)
            | Self::Media(_)
            | Self::Batch
            | Self::Vector
            | Self::Details => self,
            Self::Messages
            | Self::Choices
            | Self::ToolCalls { .. }
            | Self::Artifacts
            | Self::Instructions
                if !object =>
            {
                self
            }
            Self::Inner
            | Self::Params
            | Self::RpcResult
            | Self::RpcStatus
            | Self::Artifact
            | Self::Message(_)
            | Self::Item
            | Self::Delta
            | Self::Block
            | Self::ToolCall { .. }
            | Self::Function { .. }
            | Self::LegacyCall
            | Self::ToolResult
            | Self::Cited(_)
            | Self::Choice
            | Self::Blob { .. }
            | Self::Usage
                if object =>
            {
                self
            }
            _ => Self::Other,
        }
    }

    /// What a string at this place is scored as.
    pub(crate) fn scored(self) -> Option<Kind> {
        match self {
            Self::Text(kind) | Self::Content(kind) | Self::Part(kind) | Self::Raw(kind) => Some(kind),
            Self::Input => Some(Kind::User),
            Self::Instructions => Some(Kind::System),
            Self::Output => Some(Kind::Assistant),
            Self::Delta => Some(Kind::Delta),
            Self::RepeatedContent => Some(Kind::Repeat),
            _ => None,
        }
    }

    /// Texts inside are units of their own even in a stream.
    pub(crate) fn is_whole(self) -> bool {
        matches!(
            self,
            Self::Inner
                | Self::Item
                | Self::Content(Kind::Repeat)
                | Self::ToolCall { whole: true }
                | Self::Function { whole: true }
        )
    }

    /// Has a speaker of its own.
    pub(crate) fn is_message(self) -> bool {
        matches!(
            self,
            Self::Message(_) | Self::Item | Self::RpcResult | Self::Top | Self::Inner | Self::Params
        )
    }

    /// All of a tool call is inside.
    pub(crate) fn is_call(self) -> bool {
        matches!(
            self,
            Self::ToolCall { .. }
                | Self::LegacyCall
                | Self::Function { .. }
                | Self::Item
                | Self::Params
                | Self::Part(_)
        )
    }
}
