//! Conversations: turns drawn from an application's grammar, cut at the point where a request is sent.
//!
//! A conversation is one to four turns; each is a question, perhaps a tool call with its result, and
//! an answer. The request holds everything up to the cut and the response what comes next, so every
//! exchange stands alone. That two exchanges continue one conversation is left out on purpose:
//! exchanges can then be drawn, dropped and reordered freely.

use super::apps::App;
use super::chat::{Call, Message, Reply};
use super::dice::Dice;
use super::grammar::Scene;

pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    pub(super) reply: Reply,
}

/// What an attack changes in a conversation.
#[derive(Clone, Copy)]
pub(super) enum Twist<'t> {
    None,
    /// The last user message holds this text, and the model declines in the application's own words.
    UserSays(&'t str),
    /// The model answers in text, and with this one.
    ModelSays(&'t str),
    /// As `ModelSays`, after the beginning of the answer that the application would have given.
    ModelTrailsOff(&'t str),
}

/// Draws a conversation, cut before the model's next message.
pub(super) fn draw(app: &App, unix_s: u64, twist: Twist<'_>, dice: &mut Dice) -> Conversation {
    let mut scene = Scene::new(&app.grammar, unix_s);
    let mut messages = vec![Message::System(scene.expand("system", dice))];
    let turns = turn_count(app, dice);
    for turn in 1..=turns {
        let kind = scene.expand("turns", dice);
        let asked = scene.expand(&format!("{kind}.user"), dice);
        let is_last = turn == turns;
        if is_last && let Twist::UserSays(text) = twist {
            messages.push(Message::User(text.to_owned()));
            return Conversation { messages, reply: Reply::Text(scene.expand("refuse", dice)) };
        }
        messages.push(Message::User(asked));
        let tool = format!("{kind}.tool");
        let has_tool = app.grammar.has(&tool);
        if has_tool {
            let call = Call {
                id: format!("call_{}", dice.base62(24)),
                name: scene.expand(&tool, dice),
                arguments: scene.expand(&format!("{kind}.args"), dice),
            };
            if is_last && matches!(twist, Twist::None) && dice.percent(50) {
                return Conversation { messages, reply: Reply::Call(call) };
            }
            let content = scene.expand(&format!("{kind}.result"), dice);
            messages.push(Message::Call(call.clone()));
            messages.push(Message::ToolResult { call_id: call.id, content });
        }
        let answer = scene.expand(&format!("{kind}.answer"), dice);
        if is_last {
            let text = match twist {
                Twist::ModelSays(text) => text.to_owned(),
                Twist::ModelTrailsOff(text) => opening(&answer).to_owned() + text,
                Twist::None | Twist::UserSays(_) => answer,
            };
            return Conversation { messages, reply: Reply::Text(text) };
        }
        messages.push(Message::Assistant(answer));
        scene.next_turn();
    }
    unreachable!("a conversation has at least one turn")
}

fn turn_count(app: &App, dice: &mut Dice) -> usize {
    let mut at = dice.below(100);
    for (i, chance) in app.turns_percent.iter().enumerate() {
        if at < *chance {
            return i + 1;
        }
        at -= chance;
    }
    1
}

/// The first words of an answer, at most 90 bytes, with the space after them.
fn opening(answer: &str) -> &str {
    let end = answer.char_indices().map(|(at, _)| at).take_while(|at| *at < 90).last().unwrap_or(0);
    answer[..end].rfind(' ').map_or("", |space| &answer[..=space])
}
