//! Which API a message belongs to, decided from its path before any byte is read.
//!
//! Gateways put prefixes before the providers' paths (`/openai/deployments/x/…`), so only the end of a path
//! counts. The style names the stream a message is judged in and the shape in which a refusal is answered; the
//! meaning of keys inside a body is one table for all of them (`schema`), since compatible servers mix them.
//!
//! Cost: some comparisons of the path's end. Left out on purpose: hosts, which a gateway rewrites.

/// How a body is read; part of the stream key, so it is known before the first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ApiStyle {
    /// OpenAI chat completions and compatible.
    OpenAiChat,
    /// OpenAI responses.
    OpenAiResponses,
    /// OpenAI completions (legacy).
    OpenAiCompletions,
    /// OpenAI embeddings.
    OpenAiEmbeddings,
    /// Messages of an OpenAI assistants thread.
    OpenAiThreads,
    /// Anthropic messages, their batches and token counts.
    AnthropicMessages,
    /// Gemini generateContent, streamGenerateContent, countTokens and batches.
    Gemini,
    /// Gemini embedContent and Vertex predict.
    GeminiEmbeddings,
    /// Bedrock converse and converse-stream.
    BedrockConverse,
    /// Bedrock invoke and invoke-with-response-stream: the body is the model maker's.
    BedrockInvoke,
    /// Cohere chat (v1 and v2) and generate.
    CohereChat,
    /// Cohere embed and rerank.
    CohereEmbeddings,
    /// Ollama chat and generate.
    Ollama,
    /// Ollama embeddings.
    OllamaEmbeddings,
    /// JSON-RPC 2.0 of the Model Context Protocol and of Agent2Agent.
    JsonRpc,
    /// GraphQL over HTTP.
    GraphQl,
    /// Any other JSON.
    Json,
    /// Any other server-sent events.
    Sse,
    /// `application/x-www-form-urlencoded`.
    Form,
    /// `multipart/…`.
    Multipart,
    /// Any other text.
    Text,
    /// Decided by the first byte, JSON or text.
    Unlabelled,
}

/// Whose error shape a client of the style understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each is its name")]
pub enum Provider {
    OpenAi,
    Anthropic,
    Google,
    Bedrock,
    Cohere,
    Ollama,
    JsonRpc,
    GraphQl,
    /// No API known.
    None,
}

/// How the documents of a body stand in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Framing {
    /// One document, or no documents at all.
    Whole,
    /// Server-sent events.
    Sse,
    /// One JSON document after the other.
    JsonLines,
    /// AWS event-stream messages.
    AwsEventStream,
}

impl Framing {
    /// What follows the style's name in stream keys: a streamed answer has another envelope than a whole one.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Whole => "",
            Self::Sse => ".sse",
            Self::JsonLines => ".ndjson",
            Self::AwsEventStream => ".eventstream",
        }
    }
}

impl ApiStyle {
    /// Every style.
    pub const ALL: [Self; 22] = [
        Self::OpenAiChat,
        Self::OpenAiResponses,
        Self::OpenAiCompletions,
        Self::OpenAiEmbeddings,
        Self::OpenAiThreads,
        Self::AnthropicMessages,
        Self::Gemini,
        Self::GeminiEmbeddings,
        Self::BedrockConverse,
        Self::BedrockInvoke,
        Self::CohereChat,
        Self::CohereEmbeddings,
        Self::Ollama,
        Self::OllamaEmbeddings,
        Self::JsonRpc,
        Self::GraphQl,
        Self::Json,
        Self::Sse,
        Self::Form,
        Self::Multipart,
        Self::Text,
        Self::Unlabelled,
    ];

    /// The name in stream keys, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OpenAiChat => "openai.chat",
            Self::OpenAiResponses => "openai.responses",
            Self::OpenAiCompletions => "openai.completions",
            Self::OpenAiEmbeddings => "openai.embeddings",
            Self::OpenAiThreads => "openai.threads",
            Self::AnthropicMessages => "anthropic.messages",
            Self::Gemini => "gemini",
            Self::GeminiEmbeddings => "gemini.embeddings",
            Self::BedrockConverse => "bedrock.converse",
            Self::BedrockInvoke => "bedrock.invoke",
            Self::CohereChat => "cohere.chat",
            Self::CohereEmbeddings => "cohere.embeddings",
            Self::Ollama => "ollama",
            Self::OllamaEmbeddings => "ollama.embeddings",
            Self::JsonRpc => "jsonrpc",
            Self::GraphQl => "graphql",
            Self::Json => "json",
            Self::Sse => "sse",
            Self::Form => "form",
            Self::Multipart => "multipart",
            Self::Text => "text",
            Self::Unlabelled => "unlabelled",
        }
    }

    /// Whose clients speak it.
    pub fn provider(self) -> Provider {
        match self {
            Self::OpenAiChat
            | Self::OpenAiResponses
            | Self::OpenAiCompletions
            | Self::OpenAiEmbeddings
            | Self::OpenAiThreads => Provider::OpenAi,
            Self::AnthropicMessages => Provider::Anthropic,
            Self::Gemini | Self::GeminiEmbeddings => Provider::Google,
            Self::BedrockConverse | Self::BedrockInvoke => Provider::Bedrock,
            Self::CohereChat | Self::CohereEmbeddings => Provider::Cohere,
            Self::Ollama | Self::OllamaEmbeddings => Provider::Ollama,
            Self::JsonRpc => Provider::JsonRpc,
            Self::GraphQl => Provider::GraphQl,
            Self::Json | Self::Sse | Self::Form | Self::Multipart | Self::Text | Self::Unlabelled => {
                Provider::None
            }
        }
    }

    /// The bodies are JSON with a schema that is known.
    pub fn has_schema(self) -> bool {
        self.provider() != Provider::None
    }

    /// The API that a request path (query included or not) belongs to, if its schema is known.
    pub fn of_path(path: &[u8]) -> Option<Self> {
        let path = path.split(|byte| matches!(byte, b'?' | b'#')).next().unwrap_or_default();
        let path = path.strip_suffix(b"/").unwrap_or(path);
        let last = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let before = path.get(..path.len() - last.len()).unwrap_or_default();
        // Google's and Vertex's methods follow a colon.
        let method = last.iter().position(|byte| *byte == b':').and_then(|at| last.get(at + 1..));
        if let Some(method) = method {
            match method {
                b"generateContent" | b"streamGenerateContent" | b"countTokens" | b"batchGenerateContent" => {
                    return Some(Self::Gemini);
                }
                b"embedContent" | b"batchEmbedContents" | b"asyncBatchEmbedContent" | b"predict" => {
                    return Some(Self::GeminiEmbeddings);
                }
                b"rawPredict" | b"streamRawPredict" => return Some(Self::AnthropicMessages),
                _ => {}
            }
        }
        let model = || before.windows(7).any(|window| window == b"/model/");
        let in_thread = || before.windows(9).any(|window| window == b"/threads/");
        Some(match last {
            b"completions" if before.ends_with(b"/chat/") => Self::OpenAiChat,
            b"completions" => Self::OpenAiCompletions,
            b"responses" => Self::OpenAiResponses,
            b"input_tokens" | b"compact" if before.ends_with(b"/responses/") => Self::OpenAiResponses,
            b"messages" if in_thread() => Self::OpenAiThreads,
            b"messages" if before.ends_with(b"/v1/") => Self::AnthropicMessages,
            b"count_tokens" | b"batches" if before.ends_with(b"/messages/") => Self::AnthropicMessages,
            b"converse" | b"converse-stream" if model() => Self::BedrockConverse,
            b"invoke" | b"invoke-with-response-stream" if model() => Self::BedrockInvoke,
            b"chat" | b"generate" if before.ends_with(b"/api/") => Self::Ollama,
            b"embed" | b"embeddings" if before.ends_with(b"/api/") => Self::OllamaEmbeddings,
            b"embeddings" => Self::OpenAiEmbeddings,
            b"chat" | b"generate" if before.ends_with(b"/v1/") || before.ends_with(b"/v2/") => {
                Self::CohereChat
            }
            b"embed" | b"rerank" if before.ends_with(b"/v1/") || before.ends_with(b"/v2/") => {
                Self::CohereEmbeddings
            }
            b"mcp" | b"a2a" => Self::JsonRpc,
            b"graphql" => Self::GraphQl,
            _ => return None,
        })
    }
}
