//! The applications that share the gateway: prompts, tools, models and client libraries.
//!
//! Each application is one fixed profile and one grammar. The clients differ as real ones do: in
//! header sets, key order, separators and escapes. What is left out on purpose: images, audio,
//! parallel tool calls and logprobs.

use super::dice::Dice;
use super::grammar::Grammar;
use super::json::{Escape, Json, Layout, Style};

/// The client library that an application was built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    /// `openai` for Python on httpx 0.28: compact JSON.
    Python,
    /// An older `openai` for Python: `json.dumps` defaults.
    PythonOld,
    /// `openai` for Node.
    Node,
    /// A hand-written Go client: `encoding/json`, no SDK headers.
    Go,
    /// `openai-java`: keys of a message in alphabetical order.
    Java,
}

impl Client {
    pub(super) fn style(self) -> Style {
        let (layout, escape) = match self {
            Self::Python | Self::Node | Self::Java => (Layout::Compact, Escape::Minimal),
            Self::PythonOld => (Layout::Spaced, Escape::Ascii),
            Self::Go => (Layout::Compact, Escape::Html),
        };
        Style { layout, escape }
    }

    /// Header fields as the library sends them, without `content-length`.
    pub(super) fn headers(self) -> Vec<(String, String)> {
        let fields: &[(&str, &str)] = match self {
            Self::Python => &[
                ("host", HOST),
                ("accept-encoding", "gzip, deflate"),
                ("connection", "keep-alive"),
                ("accept", "application/json"),
                ("content-type", "application/json"),
                ("user-agent", "OpenAI/Python 2.8.1"),
                ("x-stainless-lang", "python"),
                ("x-stainless-package-version", "2.8.1"),
                ("x-stainless-os", "Linux"),
                ("x-stainless-arch", "x64"),
                ("x-stainless-runtime", "CPython"),
                ("x-stainless-runtime-version", "3.12.8"),
                ("authorization", BEARER),
                ("x-stainless-async", "false"),
                ("x-stainless-retry-count", "0"),
                ("x-stainless-read-timeout", "600"),
            ],
            Self::PythonOld => &[
                ("host", HOST),
                ("accept", "application/json"),
                ("accept-encoding", "gzip, deflate"),
                ("connection", "keep-alive"),
                ("content-type", "application/json"),
                ("user-agent", "AsyncOpenAI/Python 1.35.7"),
                ("x-stainless-lang", "python"),
                ("x-stainless-package-version", "1.35.7"),
                ("x-stainless-os", "Linux"),
                ("x-stainless-arch", "x64"),
                ("x-stainless-runtime", "CPython"),
                ("x-stainless-runtime-version", "3.11.9"),
                ("authorization", BEARER),
                ("x-stainless-async", "async:asyncio"),
            ],
            Self::Node => &[
                ("host", HOST),
                ("accept", "application/json"),
                ("content-type", "application/json"),
                ("user-agent", "OpenAI/JS 6.9.1"),
                ("x-stainless-retry-count", "0"),
                ("x-stainless-lang", "js"),
                ("x-stainless-package-version", "6.9.1"),
                ("x-stainless-os", "Linux"),
                ("x-stainless-arch", "x64"),
                ("x-stainless-runtime", "node"),
                ("x-stainless-runtime-version", "v22.11.0"),
                ("authorization", BEARER),
                ("accept-language", "*"),
                ("sec-fetch-mode", "cors"),
            ],
            Self::Go => &[
                ("Host", HOST),
                ("User-Agent", "Go-http-client/1.1"),
                ("Accept", "application/json"),
                ("Authorization", BEARER),
                ("Content-Type", "application/json"),
            ],
            Self::Java => &[
                ("Authorization", BEARER),
                ("User-Agent", "OpenAIOkHttpClient/Java 4.8.0"),
                ("X-Stainless-Arch", "x64"),
                ("X-Stainless-Lang", "java"),
                ("X-Stainless-OS", "Linux"),
                ("X-Stainless-OS-Version", "6.1.0"),
                ("X-Stainless-Package-Version", "4.8.0"),
                ("X-Stainless-Runtime", "JRE"),
                ("X-Stainless-Runtime-Version", "21.0.5"),
                ("X-Stainless-Retry-Count", "0"),
                ("Content-Type", "application/json; charset=utf-8"),
                ("Host", HOST),
                ("Connection", "Keep-Alive"),
            ],
        };
        fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }
}

pub(super) const HOST: &str = "llm-gateway.example.internal";
/// A placeholder in the place of a key; not a credential.
pub(super) const BEARER: &str = "Bearer PLACEHOLDER-GATEWAY-KEY";

/// One application.
pub(super) struct App {
    pub(super) name: &'static str,
    pub(super) client: Client,
    /// Model asked for, and the dated one that answers.
    pub(super) model: &'static str,
    pub(super) model_answering: &'static str,
    /// The two deployments that answer, as `system_fingerprint`.
    pub(super) fingerprints: [&'static str; 2],
    pub(super) temperature: Option<&'static str>,
    pub(super) max_tokens: Option<u64>,
    pub(super) stream_percent: u64,
    pub(super) include_usage: bool,
    /// Chances in percent of one, two, three and four turns in a conversation.
    pub(super) turns_percent: [u64; 4],
    /// Share of the gateway's chat traffic, as a weight.
    pub(super) weight: u64,
    pub(super) tools: Vec<Json>,
    pub(super) grammar: Grammar,
}

const SHARED: &str = include_str!("grammars/shared.txt");

/// The applications in their fixed order.
pub(super) fn all() -> Vec<App> {
    vec![
        App {
            name: "shop-support",
            client: Client::Python,
            model: "gpt-4o-mini",
            model_answering: "gpt-4o-mini-2024-07-18",
            fingerprints: ["fp_51db84afab", "fp_560af6e559"],
            temperature: Some("0.3"),
            max_tokens: None,
            stream_percent: 50,
            include_usage: false,
            turns_percent: [50, 25, 15, 10],
            weight: 30,
            tools: vec![
                tool(
                    "lookup_order",
                    "Returns status, carrier, items and the estimated delivery date of one order.",
                    &[("order_number", "string", "The order number, for example KG-1234567.")],
                ),
                tool(
                    "find_product",
                    "Searches the catalogue and returns names, prices and availability.",
                    &[
                        ("query", "string", "Words to search for."),
                        ("max_results", "integer", "How many results to return, at most ten."),
                        ("in_stock", "boolean", "Return only articles that are in stock."),
                    ],
                ),
                tool(
                    "open_return",
                    "Registers a return and emails a prepaid label to the customer.",
                    &[
                        ("order_number", "string", "The order number, for example KG-1234567."),
                        ("item", "string", "The name of the article."),
                        ("reason", "string", "One of damaged, faulty, wrong_item, not_needed, missing_part."),
                    ],
                ),
            ],
            grammar: Grammar::parse(&[SHARED, include_str!("grammars/shop.txt")]),
        },
        App {
            name: "analytics",
            client: Client::Node,
            model: "gpt-4.1",
            model_answering: "gpt-4.1-2025-04-14",
            fingerprints: ["fp_daf5fcc80a", "fp_799e4ca3f1"],
            temperature: Some("0"),
            max_tokens: None,
            stream_percent: 60,
            include_usage: true,
            turns_percent: [60, 25, 10, 5],
            weight: 20,
            tools: vec![tool(
                "run_sql",
                "Runs one read-only SELECT statement on the warehouse and returns columns and rows.",
                &[("query", "string", "One SELECT statement in the PostgreSQL 15 dialect.")],
            )],
            grammar: Grammar::parse(&[SHARED, include_str!("grammars/analytics.txt")]),
        },
        App {
            name: "code-review",
            client: Client::Go,
            model: "gpt-4.1-mini",
            model_answering: "gpt-4.1-mini-2025-04-14",
            fingerprints: ["fp_6f2eabb9a5", "fp_4c2851f862"],
            temperature: Some("0.1"),
            max_tokens: Some(900),
            stream_percent: 0,
            include_usage: false,
            turns_percent: [80, 15, 5, 0],
            weight: 15,
            tools: vec![],
            grammar: Grammar::parse(&[SHARED, include_str!("grammars/review.txt")]),
        },
        App {
            name: "hr-policy",
            client: Client::PythonOld,
            model: "gpt-4o",
            model_answering: "gpt-4o-2024-08-06",
            fingerprints: ["fp_deacdd5f6f", "fp_cbf1785567"],
            temperature: Some("0.0"),
            max_tokens: Some(400),
            stream_percent: 70,
            include_usage: true,
            turns_percent: [75, 20, 5, 0],
            weight: 20,
            tools: vec![],
            grammar: Grammar::parse(&[SHARED, include_str!("grammars/hr.txt")]),
        },
        App {
            name: "summariser",
            client: Client::Java,
            model: "gpt-4.1-nano",
            model_answering: "gpt-4.1-nano-2025-04-14",
            fingerprints: ["fp_38343a2f8f", "fp_7c233bf9d1"],
            temperature: None,
            max_tokens: Some(600),
            stream_percent: 20,
            include_usage: false,
            turns_percent: [100, 0, 0, 0],
            weight: 15,
            tools: vec![],
            grammar: Grammar::parse(&[SHARED, include_str!("grammars/summary.txt")]),
        },
    ]
}

/// Draws an application by its share of the traffic.
pub(super) fn pick<'a>(apps: &'a [App], dice: &mut Dice) -> &'a App {
    let mut at = dice.below(apps.iter().map(|a| a.weight).sum());
    for app in apps {
        if at < app.weight {
            return app;
        }
        at -= app.weight;
    }
    &apps[0]
}

/// The grammars that belong to no chat application.
pub(super) fn rest_grammar() -> Grammar {
    Grammar::parse(&[SHARED, include_str!("grammars/rest.txt")])
}

pub(super) fn attack_grammar() -> Grammar {
    Grammar::parse(&[SHARED, include_str!("grammars/attacks.txt")])
}

/// A function tool (OpenAI chat completions, `tools[]`); the first parameter is required.
fn tool(name: &'static str, description: &'static str, parameters: &[(&'static str, &str, &str)]) -> Json {
    let properties = parameters
        .iter()
        .map(|(key, kind, about)| {
            (*key, Json::Object(vec![("type", Json::text(*kind)), ("description", Json::text(*about))]))
        })
        .collect();
    let required = parameters.iter().take(1).map(|(key, _, _)| Json::text(*key)).collect();
    let schema = Json::Object(vec![
        ("type", Json::text("object")),
        ("properties", Json::Object(properties)),
        ("required", Json::List(required)),
    ]);
    let function = Json::Object(vec![
        ("name", Json::text(name)),
        ("description", Json::text(description)),
        ("parameters", schema),
    ]);
    Json::Object(vec![("type", Json::text("function")), ("function", function)])
}
