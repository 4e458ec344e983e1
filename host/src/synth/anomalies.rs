//! The injected anomalies, each with the bytes that make it one.
//!
//! | label | what happens | where |
//! |---|---|---|
//! | `jailbreak` | a role-play that overrides the system prompt, alone or after an ordinary question | request, last `user` unit |
//! | `exfiltration` | the answer dumps records, a configuration or an encoded blob | response, `assistant` unit |
//! | `repetition` | the answer falls into a loop and is cut off | response, `assistant` unit; its stop reason in `envelope` |
//! | `model_swap` | another model answers: other style, other id, other `model` | response, `assistant` and `envelope` units |
//! | `sql_injection` | a payload in the path or query of an ordinary GET | request, `target` unit |
//! | `path_traversal` | the same with a way out of a folder | request, `target` unit |
//! | `script_injection` | the same with a script for a browser | request, `target` unit |
//! | `indirect_injection` | what a tool returned gives the model orders | request, last `tool_result` unit |
//!
//! Texts are written for this project and random where they look secret: no real key, no real
//! person. Spans are byte offsets in the unit's decoded text (the message's content, not its JSON
//! escapes). The `target` unit is the method, a space and the path with its query as sent, still
//! percent-encoded: `GET /api/orders/4711?page=2`.

use driftlock_inspect::content::{ApiStyle, BodyParser, Role, Unit};
use memchr::memmem;

use super::apps::{self, App};
use super::chat::{Backend, Completion, Message, Reply};
use super::conversation::{self, Twist};
use super::dice::Dice;
use super::grammar::{Grammar, Scene};
use super::parameters::Style;
use super::{Direction, Span, Traffic, chat, rest, styles};
use crate::capture::{self, HttpRequest, HttpResponse};
use crate::units::{self, Reading};

/// The kinds of anomaly, in the order in which a run injects them.
pub const FAMILIES: [&str; 5] = ["jailbreak", "exfiltration", "repetition", "model_swap", "sql_injection"];

/// Those and the ones that only parameters ask for.
pub const ALL_FAMILIES: [&str; 8] = [
    "jailbreak",
    "exfiltration",
    "repetition",
    "model_swap",
    "sql_injection",
    "path_traversal",
    "script_injection",
    "indirect_injection",
];

const OPEN: char = '⟦';
const CLOSE: char = '⟧';

pub(super) struct Anomaly {
    pub(super) application: &'static str,
    pub(super) request: HttpRequest,
    pub(super) response: HttpResponse,
    pub(super) spans: Vec<Span>,
}

/// An exchange in the style of an API.
pub(super) fn through(
    style: Style,
    completion: &Completion<'_>,
    dice: &mut Dice,
) -> (HttpRequest, HttpResponse) {
    match (styles::request(style, completion), styles::response(style, completion, dice)) {
        (Some(request), Some(response)) => (request, response),
        _ => {
            let request = chat::request(completion.app, completion.messages, completion.streamed);
            (request, chat::response(completion, dice))
        }
    }
}

/// Name and text of another model's answer.
pub(super) fn other_model(traffic: &Traffic, unix_s: u64, dice: &mut Dice) -> (String, String) {
    let mut scene = Scene::new(&traffic.attacks, unix_s);
    let style = scene.expand("swap", dice);
    let (text, _) = unmark(&scene.expand(&style, dice));
    (scene.expand("swap.model", dice), text)
}

/// Draws an anomaly of a family.
pub(super) fn draw(traffic: &Traffic, family: &str, api: Style, unix_s: u64, dice: &mut Dice) -> Anomaly {
    let attacks = &traffic.attacks;
    let app = apps::pick(&traffic.apps, dice);
    let app_with_tools = if app.tools.is_empty() { &traffic.apps[0] } else { app };
    let mut scene = Scene::new(attacks, unix_s);
    match family {
        "jailbreak" => {
            let marked = scene.expand("jailbreak", dice);
            let (payload, _) = unmark(&marked);
            let lead =
                if dice.percent(40) { ordinary_question(app, unix_s, dice) + "\n\n" } else { String::new() };
            let span = lead.len()..lead.len() + payload.len();
            let conversation = conversation::draw(app, unix_s, Twist::UserSays(&(lead + &payload)), dice);
            let index = conversation.messages.iter().filter(|m| matches!(m, Message::User(_))).count() - 1;
            let spans = vec![Span {
                direction: Direction::Request,
                unit: "user".to_owned(),
                index,
                start: span.start,
                end: span.end,
            }];
            completion(app, api, unix_s, conversation, false, Backend::Own, spans, dice)
        }
        "exfiltration" => {
            let (text, marks) = unmark(&scene.expand("exfil", dice));
            let conversation = conversation::draw(app, unix_s, Twist::ModelSays(&text), dice);
            completion(app, api, unix_s, conversation, false, Backend::Own, assistant(marks), dice)
        }
        "repetition" => {
            let looped = stuck(attacks, app, unix_s, dice);
            let len = looped.len();
            let conversation = conversation::draw(app, unix_s, Twist::ModelTrailsOff(&looped), dice);
            let end = match &conversation.reply {
                Reply::Text(text) => text.len(),
                Reply::Call(_) => 0,
            };
            let spans = assistant(vec![(end - len, end)]);
            completion(app, api, unix_s, conversation, true, Backend::Own, spans, dice)
        }
        "model_swap" => {
            let style = scene.expand("swap", dice);
            let (text, marks) = unmark(&scene.expand(&style, dice));
            let conversation = conversation::draw(app, unix_s, Twist::ModelSays(&text), dice);
            let backend = Backend::Swapped { model: scene.expand("swap.model", dice) };
            let mut anomaly =
                completion(app, api, unix_s, conversation, false, backend, assistant(marks), dice);
            // Another model answers in another envelope: all of it is injected.
            anomaly.spans.push(Span {
                direction: Direction::Response,
                unit: "envelope".to_owned(),
                index: 0,
                start: 0,
                end: anomaly.response.body.len(),
            });
            anomaly
        }
        "indirect_injection" => {
            let (payload, _) = unmark(&scene.expand("injected_order", dice));
            let mut conversation = loop {
                // Only some turns have a tool.
                let app_turn = conversation::draw(app_with_tools, unix_s, Twist::ModelSays("Done."), dice);
                if app_turn.messages.iter().any(|m| matches!(m, Message::ToolResult { .. })) {
                    break app_turn;
                }
            };
            let results = conversation.messages.iter_mut().filter_map(|m| match m {
                Message::ToolResult { content, .. } => Some(content),
                _ => None,
            });
            let mut spans = Vec::new();
            if let Some((index, content)) = results.enumerate().last() {
                content.push('\n');
                let start = content.len();
                content.push_str(&payload);
                let unit = "tool_result".to_owned();
                spans.push(Span { direction: Direction::Request, unit, index, start, end: content.len() });
            }
            completion(app_with_tools, api, unix_s, conversation, false, Backend::Own, spans, dice)
        }
        _ => {
            let marked = match family {
                "path_traversal" => scene.expand("traversal.target", dice),
                "script_injection" => scene.expand("script.target", dice),
                _ => Scene::new(&traffic.rest, unix_s).expand("sqli.target", dice),
            };
            let (target, marks) = unmark(&marked);
            let (request, response) = rest::lookup(&traffic.rest, target, unix_s, dice);
            let method_len = request.method.len() + 1;
            let spans = marks
                .into_iter()
                .map(|(start, end)| Span {
                    direction: Direction::Request,
                    unit: "target".to_owned(),
                    index: 0,
                    start: method_len + start,
                    end: method_len + end,
                })
                .collect();
            Anomaly { application: super::REST, request, response, spans }
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "the parts of one exchange")]
fn completion(
    app: &App,
    api: Style,
    unix_s: u64,
    conversation: conversation::Conversation,
    cut_off: bool,
    backend: Backend,
    mut spans: Vec<Span>,
    dice: &mut Dice,
) -> Anomaly {
    let streamed = dice.percent(app.stream_percent);
    let completion = Completion {
        app,
        unix_s,
        messages: &conversation.messages,
        reply: &conversation.reply,
        cut_off,
        streamed,
        backend,
    };
    let (request, response) = through(api, &completion, dice);
    let read = read(&request, &response);
    spans.extend(said_again(&spans, &read));
    if cut_off {
        spans.extend(stop_reasons(&read));
    }
    Anomaly { application: app.name, request, response, spans }
}

fn assistant(marks: Vec<(usize, usize)>) -> Vec<Span> {
    marks
        .into_iter()
        .map(|(start, end)| Span {
            direction: Direction::Response,
            unit: "assistant".to_owned(),
            index: 0,
            start,
            end,
        })
        .collect()
}

/// What the filter makes of an answer.
fn read(request: &HttpRequest, response: &HttpResponse) -> Reading {
    let content_type = capture::header(&response.headers, "content-type").map(str::as_bytes);
    let parser = BodyParser::for_response(ApiStyle::of_path(request.target.as_bytes()), content_type);
    units::read(parser, &response.body, response.body.len())
}

/// The same spans in the units that say a streamed answer again, as the Responses API's last events do.
fn said_again(spans: &[Span], read: &Reading) -> Vec<Span> {
    let assistant = |index| Unit { role: Role::Assistant, index };
    let Some(first) = read.units.get(&assistant(0)) else { return Vec::new() };
    let again = (1..).map_while(|index| Some((index, read.units.get(&assistant(index))?)));
    again
        .filter(|(_, text)| *text == first)
        .flat_map(|(index, _)| {
            let of_answer = spans.iter().filter(|span| span.unit == Role::Assistant.as_str());
            of_answer.map(move |span| Span { index: index.into(), ..span.clone() })
        })
        .collect()
}

/// What answers that were cut off say of it, and no other.
const STOP_REASONS: [&str; 6] =
    ["length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "incomplete", "response.incomplete"];

/// Where the envelope of an answer that was cut off says so.
fn stop_reasons(read: &Reading) -> Vec<Span> {
    let envelopes = read.units.iter().filter(|(unit, _)| unit.role == Role::Envelope);
    let place = |(unit, text): (&Unit, &Vec<u8>), reason: &str| -> Vec<Span> {
        let quoted = format!("\"{reason}\"");
        let places = memmem::find_iter(text, quoted.as_bytes()).map(|at| at + 1);
        let span = |start| Span {
            direction: Direction::Response,
            unit: unit.role.as_str().to_owned(),
            index: unit.index.into(),
            start,
            end: start + reason.len(),
        };
        places.map(span).collect()
    };
    envelopes
        .flat_map(|envelope| STOP_REASONS.into_iter().flat_map(move |reason| place(envelope, reason)))
        .collect()
}

/// An ordinary user message of the application, for an attack to hide behind.
fn ordinary_question(app: &App, unix_s: u64, dice: &mut Dice) -> String {
    let mut scene = Scene::new(&app.grammar, unix_s);
    let kind = scene.expand("turns", dice);
    scene.expand(&format!("{kind}.user"), dice)
}

/// The loop: a phrase of its own or, one time in four, a sentence of the application's own answers.
fn stuck(attacks: &Grammar, app: &App, unix_s: u64, dice: &mut Dice) -> String {
    let phrase = if dice.percent(25) {
        let mut scene = Scene::new(&app.grammar, unix_s);
        let sentence = scene.expand("refuse", dice);
        sentence.split_inclusive(". ").next().unwrap_or(&sentence).replace('\n', " ")
    } else {
        Scene::new(attacks, unix_s).expand("loop", dice)
    };
    let target_bytes = dice.between(700, 2_400) as usize;
    phrase.repeat(target_bytes / phrase.len() + 2)
}

/// Removes the marks and gives the byte ranges between them.
fn unmark(marked: &str) -> (String, Vec<(usize, usize)>) {
    let mut text = String::with_capacity(marked.len());
    let mut ranges = Vec::new();
    let mut start = 0;
    for c in marked.chars() {
        match c {
            OPEN => start = text.len(),
            CLOSE => ranges.push((start, text.len())),
            c => text.push(c),
        }
    }
    (text, ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_become_byte_ranges() {
        assert_eq!(unmark("é⟦ab⟧c⟦d⟧"), ("éabcd".to_owned(), vec![(2, 4), (5, 6)]));
        assert_eq!(unmark("none"), ("none".to_owned(), vec![]));
    }
}
