//! Dates from a Unix time, without a clock and without a time zone.
//!
//! The proleptic Gregorian calendar by Howard Hinnant's `civil_from_days`; a few integer
//! operations. Only what the generator prints: ISO dates, dates in words, and HTTP's IMF-fixdate
//! (RFC 9110 section 5.6.7). Leap seconds do not exist here, as in Unix time.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// 1970-01-01 was a Thursday.
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

const DAY_S: u64 = 86_400;

/// Year, month 1..=12, day 1..=31 of a count of days since 1970-01-01.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

/// The day's forms, joined by `|`: `2026-11-12|12 November 2026|November 12|Thursday`.
pub(crate) fn day_record(unix_s: u64) -> String {
    let days = unix_s / DAY_S;
    let (year, month, day) = civil_from_days(days);
    let name = MONTHS[(month - 1) as usize];
    let weekday = WEEKDAYS[(days % 7) as usize];
    format!("{year:04}-{month:02}-{day:02}|{day} {name} {year}|{name} {day}|{weekday}")
}

/// HTTP's date: `Thu, 12 Nov 2026 08:30:00 GMT`.
pub(super) fn imf_fixdate(unix_s: u64) -> String {
    let days = unix_s / DAY_S;
    let (year, month, day) = civil_from_days(days);
    let weekday = &WEEKDAYS[(days % 7) as usize][..3];
    let name = &MONTHS[(month - 1) as usize][..3];
    let (hour, minute, second) = (unix_s % DAY_S / 3_600, unix_s % 3_600 / 60, unix_s % 60);
    format!("{weekday}, {day:02} {name} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
}

pub(super) fn days_before(unix_s: u64, days: u64) -> u64 {
    unix_s.saturating_sub(days * DAY_S)
}

pub(super) fn days_after(unix_s: u64, days: u64) -> u64 {
    unix_s + days * DAY_S
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_match_the_calendar() {
        assert_eq!(imf_fixdate(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT", "RFC 9110's own example");
        assert_eq!(day_record(951_782_400), "2000-02-29|29 February 2000|February 29|Tuesday");
        assert_eq!(day_record(0), "1970-01-01|1 January 1970|January 1|Thursday");
    }
}
