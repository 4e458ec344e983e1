//! Times as captures write them, to nanoseconds since the Unix epoch.
//!
//! RFC 3339 (HAR, tap JSON, Envoy's access log) and the common log format's date (nginx, Apache). A few
//! integer operations, no time zone data: both formats carry their offset. Leap seconds do not exist, as
//! in Unix time; times before 1970 are refused.

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar (Hinnant's `days_from_civil`).
fn days(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let year_of_era = y.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn number(text: &str) -> Option<i64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) { None } else { text.parse().ok() }
}

fn unix_ns(date: [i64; 3], clock: [i64; 3], nanos: i64, offset_s: i64) -> Option<u64> {
    let [year, month, day] = date;
    let [hour, minute, second] = clock;
    let plausible = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60
        && (1970..2500).contains(&year);
    if !plausible {
        return None;
    }
    let seconds = days(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second - offset_s;
    u64::try_from(seconds.checked_mul(1_000_000_000)?.checked_add(nanos)?).ok()
}

/// `+01:00`, `-0530`, `Z`: seconds east of Greenwich.
fn offset(text: &str) -> Option<i64> {
    if matches!(text, "Z" | "z") {
        return Some(0);
    }
    let (sign, digits) = text.split_at_checked(1)?;
    let digits: String = digits.chars().filter(|c| *c != ':').collect();
    let (hours, minutes) = digits.split_at_checked(2)?;
    let seconds = number(hours)? * 3_600 + number(minutes)? * 60;
    match sign {
        "+" => Some(seconds),
        "-" => Some(-seconds),
        _ => None,
    }
}

/// `2026-11-12T08:30:00.123Z` (RFC 3339 section 5.6); any number of decimals, those past the ninth count
/// for nothing.
pub(super) fn rfc3339(text: &str) -> Option<u64> {
    let (date, rest) = text.split_at_checked(10)?;
    let rest = rest.strip_prefix(['T', 't', ' '])?;
    let (clock, rest) = rest.split_at_checked(8)?;
    let mut date = date.split('-').map(number);
    let mut clock = clock.split(':').map(number);
    let (nanos, zone) = match rest.strip_prefix('.') {
        None => (0, rest),
        Some(fraction) => {
            let end = fraction.find(|c: char| !c.is_ascii_digit())?;
            let (digits, zone) = fraction.split_at(end);
            let nine: String = digits.chars().chain("000000000".chars()).take(9).collect();
            (number(&nine)?, zone)
        }
    };
    let date = [date.next()??, date.next()??, date.next()??];
    let clock = [clock.next()??, clock.next()??, clock.next()??];
    unix_ns(date, clock, nanos, offset(zone)?)
}

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// `12/Nov/2026:08:30:00 +0000`: `%d/%b/%Y:%T %z` of nginx and Apache.
pub(super) fn common_log(text: &str) -> Option<u64> {
    let (stamp, zone) = text.split_once(' ')?;
    let mut parts = stamp.split(['/', ':']);
    let day = number(parts.next()?)?;
    let name = parts.next()?;
    let month = MONTHS.iter().position(|month| *month == name)? as i64 + 1;
    let mut rest = parts.map(number);
    let year = rest.next()??;
    let clock = [rest.next()??, rest.next()??, rest.next()??];
    unix_ns([year, month, day], clock, 0, offset(zone)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_give_the_same_instant() {
        let expected = Some(784_111_777_000_000_000);
        assert_eq!(rfc3339("1994-11-06T08:49:37Z"), expected);
        assert_eq!(rfc3339("1994-11-06T09:49:37.000+01:00"), expected);
        assert_eq!(common_log("06/Nov/1994:08:49:37 +0000"), expected);
        assert_eq!(common_log("06/Nov/1994:03:19:37 -0530"), expected);
        assert_eq!(rfc3339("2000-02-29T00:00:00.0123456789Z"), Some(951_782_400_012_345_678));
        assert_eq!(rfc3339("1970-01-01T00:00:00Z"), Some(0));
    }

    #[test]
    fn what_is_no_time_is_none() {
        for bad in ["", "1994-11-06", "1994-13-06T08:49:37Z", "1994-11-06T08:49:37", "1994-11-06T08:4x:37Z"] {
            assert_eq!(rfc3339(bad), None, "{bad}");
        }
        for bad in ["", "06/Foo/1994:08:49:37 +0000", "06/Nov/1994:08:49:37", "é/é"] {
            assert_eq!(common_log(bad), None, "{bad}");
        }
    }
}
