//! Matchers of what gives access: keys, tokens, passwords.
//!
//! Each takes the front of a window and returns (bytes before the secret, its bytes, its tail).

use super::automaton::{BASE64, BASE64_URL, BEARER, DASH_LOW, DIGIT, UPPER, USER_INFO, WORD, is};
use super::token::{HORIZON, Shape, Tail, Word};

type Found = Option<Shape>;

/// Longest label before `PRIVATE KEY`, e.g. `ENCRYPTED `.
const MAX_PEM_LABEL: usize = 32;
/// Longest user information that is looked for.
const MAX_USER_INFO: usize = 160;
/// Longest URL scheme.
const MAX_SCHEME: usize = 16;
/// Fewest characters of a bearer token.
const MIN_BEARER: usize = 16;
/// Fewest characters of Basic credentials (`a:b` and more).
const MIN_BASIC: usize = 8;

/// `BEGIN … PRIVATE KEY-----` behind a dash, the body and the line that ends it.
pub(super) fn private_key(word: &Word<'_>) -> Found {
    if word.left.last != b'-' || !word.has(0, b"BEGIN ") {
        return None;
    }
    let label = word.slice(6, 6 + MAX_PEM_LABEL + 11);
    let end = label.iter().position(|&b| !is(b, UPPER | DIGIT) && b != b' ').unwrap_or(label.len());
    let label = label.get(..end).unwrap_or_default();
    let known = label.ends_with(b"PRIVATE KEY") || label.ends_with(b"PRIVATE KEY BLOCK");
    (known && word.has(6 + end, b"-----")).then_some((0, 6 + end + 5, Tail::PemBody(0)))
}

/// `scheme://user:password@` without the scheme, or what follows `Basic `.
pub(super) fn password(word: &Word<'_>) -> Found {
    if word.after == b':' && word.len <= MAX_SCHEME && word.has(word.len, b"://") {
        let from = word.len + 3;
        let end = word.run(from, USER_INFO).min(from + MAX_USER_INFO + 1);
        let at = word.slice(from, end).iter().rposition(|&b| b == b'@')?;
        let user_info = word.slice(from, from + at);
        let colon = user_info.iter().position(|&b| b == b':')?;
        return (colon + 1 < user_info.len()).then_some((from, at, Tail::None));
    }
    if word.len != 5 || word.after != b' ' || !word.slice(0, 5).eq_ignore_ascii_case(b"Basic") {
        return None;
    }
    let end = word.run(6, BASE64).min(6 + HORIZON);
    let body = word.slice(6, end);
    (body.len() >= MIN_BASIC && holds_colon(body)).then_some((6, body.len(), Tail::Padded(BASE64)))
}

/// Whether base64 text decodes to printable text with a colon in it, as credentials do.
fn holds_colon(encoded: &[u8]) -> bool {
    let (mut bits, mut held, mut colon) = (0u32, 0u32, false);
    for &byte in encoded {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            _ => 63,
        };
        bits = (bits << 6 | u32::from(value)) & 0xfff;
        held += 6;
        if held >= 8 {
            held -= 8;
            let decoded = (bits >> held & 0xff) as u8;
            if decoded < b' ' || decoded == 0x7f {
                return false;
            }
            colon |= decoded == b':';
        }
    }
    colon
}

/// What follows `Bearer` and a space: at least 16 characters, a digit among them.
pub(super) fn bearer(word: &Word<'_>) -> Found {
    if word.len != 6 || word.after != b' ' || !word.slice(0, 6).eq_ignore_ascii_case(b"Bearer") {
        return None;
    }
    let end = word.run(7, BEARER).min(7 + HORIZON);
    let body = word.slice(7, end);
    let token = body.len() >= MIN_BEARER && body.iter().any(|&b| is(b, DIGIT));
    token.then_some((7, body.len(), Tail::Padded(BEARER)))
}

/// What an issuer's keys look like.
struct KeyShape {
    prefix: &'static [u8],
    /// Kinds of byte behind the prefix.
    body: u16,
    /// How many of them at least.
    min: usize,
    /// Whether to ask for a digit and for ten letters and digits in a row, since the prefix alone could
    /// be of a name with hyphens.
    random: bool,
}

const fn key(prefix: &'static [u8], body: u16, min: usize, random: bool) -> KeyShape {
    KeyShape { prefix, body, min, random }
}

/// By issuer. Where one prefix starts another, either finds the key.
const KEYS: [KeyShape; 34] = [
    // OpenAI, Anthropic, OpenRouter and those who copied them: sk-proj-, sk-svcacct-, sk-ant-, sk-or-.
    key(b"sk-", BASE64_URL, 20, true),
    // Stripe.
    key(b"sk_live_", WORD, 16, false),
    key(b"sk_test_", WORD, 16, false),
    key(b"rk_live_", WORD, 16, false),
    key(b"rk_test_", WORD, 16, false),
    key(b"whsec_", WORD, 16, true),
    // Google.
    key(b"AIza", BASE64_URL, 35, false),
    key(b"ya29.", BASE64_URL, 20, false),
    key(b"GOCSPX-", BASE64_URL, 20, false),
    // GitHub, GitLab.
    key(b"ghp_", WORD, 30, false),
    key(b"gho_", WORD, 30, false),
    key(b"ghu_", WORD, 30, false),
    key(b"ghs_", WORD, 30, false),
    key(b"ghr_", WORD, 30, false),
    key(b"github_pat_", BASE64_URL, 22, false),
    key(b"glpat-", BASE64_URL, 20, false),
    // Slack.
    key(b"xoxb-", BASE64_URL, 10, false),
    key(b"xoxp-", BASE64_URL, 10, false),
    key(b"xoxa-", BASE64_URL, 10, false),
    key(b"xoxr-", BASE64_URL, 10, false),
    key(b"xoxs-", BASE64_URL, 10, false),
    key(b"xoxe-", BASE64_URL, 10, false),
    key(b"xoxe.", BASE64_URL, 10, false),
    key(b"xapp-", BASE64_URL, 10, false),
    // Hugging Face, npm, Groq, xAI, Perplexity, Replicate, NVIDIA.
    key(b"hf_", WORD, 30, false),
    key(b"npm_", WORD, 30, false),
    key(b"gsk_", WORD, 30, false),
    key(b"xai-", WORD, 30, false),
    key(b"pplx-", WORD, 30, false),
    key(b"r8_", WORD, 30, false),
    key(b"nvapi-", BASE64_URL, 30, false),
    // SendGrid, Shopify, DigitalOcean.
    key(b"SG.", BASE64_URL, 16, false),
    key(b"shpat_", WORD, 30, false),
    key(b"dop_v1_", WORD, 30, false),
];

/// A key of [`KEYS`], or an AWS access key: `AKIA` and its like with 16 capitals and digits.
pub(super) fn api_key(word: &Word<'_>) -> Found {
    const AWS: [&[u8]; 4] = [b"AKIA", b"ASIA", b"ABIA", b"ACCA"];
    if word.len == 20 && AWS.iter().any(|prefix| word.has(0, prefix)) {
        let capitals = word.slice(4, 20).iter().all(|&b| is(b, UPPER | DIGIT));
        return capitals.then_some((0, 20, Tail::None));
    }
    let separated = matches!(word.after, b'-' | b'_' | b'.') && word.len <= 6;
    if !separated && !word.has(0, b"AIza") {
        return None;
    }
    KEYS.iter().find_map(|shape| {
        let from = shape.prefix.len();
        (shape.prefix.first() == Some(&word.first) && word.has(0, shape.prefix)).then_some(())?;
        let end = word.run(from, shape.body).min(from + HORIZON);
        let body = word.slice(from, end);
        let random = !shape.random
            || body.iter().any(|&b| is(b, DIGIT))
                && body.split(|&b| is(b, DASH_LOW)).any(|part| part.len() >= 10);
        (body.len() >= shape.min && random).then_some((0, end, Tail::Run(shape.body)))
    })
}
