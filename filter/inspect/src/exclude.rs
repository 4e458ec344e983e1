//! Messages that the operator excludes from inspection: by path, content-type and direction.
//!
//! What: [`Exclusions`] says, from headers alone, whether a message is left alone. Its verdict is then
//! `not_inspected` with reason `disabled`, so that what is switched off can be seen and counted.
//!
//! Why a set of matches and not the path is carried to the response: it is one word, whatever the path's
//! length.
//!
//! Cost: a few comparisons of short strings a message; nothing where nothing is excluded.
//!
//! Left out on purpose: regular expressions, methods, hosts. Attach the filter to fewer routes instead.

use alloc::string::String;
use alloc::vec::Vec;

use serde::Deserialize;

use crate::host::Direction;

/// Most exclusions of one configuration.
pub const MAX_EXCLUSIONS: usize = 64;

/// Messages to leave alone: those that agree with all that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Exclusion {
    /// The request's path without its query, exactly, or up to a final `*`. Counts for both messages.
    path: Option<String>,
    /// The message's content-type without parameters, exactly, or up to a final `*`.
    content_type: Option<String>,
    /// Only this message of an exchange.
    direction: Option<ExcludedDirection>,
}

/// Which message of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ExcludedDirection {
    /// From the client.
    Request,
    /// From the upstream.
    Response,
}

/// Why an exclusion was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExclusionError {
    /// It would exclude everything.
    #[error("it names nothing; give it a path, a content_type or a direction")]
    Empty,
    /// A path that no request has.
    #[error(
        "its path does not begin with / or *; paths are those of requests, such as /healthz or /static/*"
    )]
    Path,
    /// More than [`MAX_EXCLUSIONS`].
    #[error("there are more than {MAX_EXCLUSIONS}; join some with a final *")]
    TooMany,
}

/// The exclusions that agree with a path, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathMatches(u64);

/// All exclusions of a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions(Vec<Exclusion>);

impl Exclusions {
    /// Checked.
    ///
    /// # Errors
    /// [`ExclusionError`] and the index of the exclusion.
    pub fn new(list: Vec<Exclusion>) -> Result<Self, (usize, ExclusionError)> {
        for (index, exclusion) in list.iter().enumerate() {
            if index >= MAX_EXCLUSIONS {
                return Err((index, ExclusionError::TooMany));
            }
            if *exclusion == Exclusion::default() {
                return Err((index, ExclusionError::Empty));
            }
            if exclusion.path.as_ref().is_some_and(|path| !path.starts_with(['/', '*'])) {
                return Err((index, ExclusionError::Path));
            }
        }
        Ok(Self(list))
    }

    /// What the path of a request (query included or not) leaves open.
    pub fn of_path(&self, path: &[u8]) -> PathMatches {
        let path = path.split(|byte| matches!(byte, b'?' | b'#')).next().unwrap_or_default();
        let agrees = |exclusion: &Exclusion| {
            exclusion.path.as_ref().is_none_or(|pattern| agrees(pattern, path, |a, b| a == b))
        };
        let bits = self.0.iter().map(agrees).enumerate();
        PathMatches(bits.fold(0, |matches, (bit, agrees)| matches | u64::from(agrees) << bit))
    }

    /// Whether a message is excluded.
    pub fn exclude(&self, path: PathMatches, direction: Direction, content_type: Option<&[u8]>) -> bool {
        if path.0 == 0 {
            return false;
        }
        let essence = content_type.unwrap_or_default().split(|&byte| byte == b';').next();
        let essence = essence.unwrap_or_default().trim_ascii();
        self.0.iter().enumerate().any(|(bit, exclusion)| {
            path.0 >> bit & 1 == 1
                && exclusion.content_type.as_ref().is_none_or(|pattern| {
                    !essence.is_empty() && agrees(pattern, essence, <[u8]>::eq_ignore_ascii_case)
                })
                && match exclusion.direction {
                    None => true,
                    Some(ExcludedDirection::Request) => direction == Direction::Request,
                    Some(ExcludedDirection::Response) => direction == Direction::Response,
                }
        })
    }
}

/// Whether `value` is `pattern`, or begins with it where it ends in `*`.
fn agrees(pattern: &str, value: &[u8], same: impl Fn(&[u8], &[u8]) -> bool) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => value.get(..start.len()).is_some_and(|value| same(value, start.as_bytes())),
        None => same(value, pattern.as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    fn exclusions(json: &str) -> Exclusions {
        Exclusions::new(serde_json::from_str(json).unwrap()).unwrap()
    }

    #[test]
    fn all_that_is_given_has_to_agree() {
        let all = exclusions(
            r#"[{"path": "/healthz"}, {"path": "/static/*", "content_type": "Image/*"},
                {"content_type": "text/html", "direction": "response"}]"#,
        );
        let (request, response) = (Direction::Request, Direction::Response);
        for (path, direction, content_type, excluded) in [
            ("/healthz", request, None, true),
            ("/healthz?x=/v1", response, Some("text/plain"), true),
            ("/healthz/", request, None, false),
            ("/static/a.png", response, Some("image/png"), true),
            ("/static/a.js", response, Some("text/javascript"), false),
            ("/static/a.js", response, None, false),
            ("/v1/static/", response, Some("image/png"), false),
            ("/v1/chat", response, Some("TEXT/HTML; charset=utf-8"), true),
            ("/v1/chat", request, Some("text/html"), false),
        ] {
            let matches = all.of_path(path.as_bytes());
            let content_type = content_type.map(str::as_bytes);
            assert_eq!(all.exclude(matches, direction, content_type), excluded, "{path} {content_type:?}");
        }
        let none = Exclusions::default();
        assert!(!none.exclude(none.of_path(b"/"), request, None));
    }

    #[test]
    fn what_would_exclude_all_or_nothing_is_refused() {
        let new = |json| Exclusions::new(serde_json::from_str(json).unwrap()).unwrap_err();
        assert_eq!(new(r#"[{"path": "/a"}, {}]"#), (1, ExclusionError::Empty));
        assert_eq!(new(r#"[{"path": "a"}]"#), (0, ExclusionError::Path));
        let many = vec![Exclusion { path: Some("/".into()), ..Exclusion::default() }; 65];
        assert_eq!(Exclusions::new(many), Err((64, ExclusionError::TooMany)));
    }
}
