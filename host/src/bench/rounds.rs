//! Two pieces of work by turns, in short rounds.
//!
//! On a machine that others use, what is measured a second later is measured on another machine. So the
//! two are measured in each other's neighbourhood, a few milliseconds each, and the median of the rounds'
//! ratios counts. The clock is the thread's processor time, as the work has one thread and waits for
//! nothing: by the wall's clock the longer of the two would be interrupted more often.

use std::time::{Duration, Instant};

use cpu_time::ThreadTime;

use super::BenchError;

/// Rounds that are made whatever they cost.
const LEAST_ROUNDS: usize = 5;

/// Seconds of processor time that each took, by round.
#[derive(Debug, Default)]
pub(super) struct Turns {
    first_s: Vec<f64>,
    second_s: Vec<f64>,
}

impl Turns {
    /// How many times as long the second took as the first.
    pub(super) fn ratio(&self) -> f64 {
        median(self.first_s.iter().zip(&self.second_s).map(|(first, second)| second / first).collect())
    }

    /// The first's seconds a round.
    pub(super) fn first_s(&self) -> f64 {
        median(self.first_s.clone())
    }

    /// The second's seconds a round.
    pub(super) fn second_s(&self) -> f64 {
        median(self.second_s.clone())
    }
}

/// Runs both by turns for about as long as `budget`, after a round of each that is not counted.
pub(super) fn by_turns(
    budget: Duration,
    first: impl FnMut() -> Result<(), BenchError>,
    second: impl FnMut() -> Result<(), BenchError>,
) -> Result<Turns, BenchError> {
    by_turns_on(|| Ok(ThreadTime::try_now()?.as_duration()), budget, first, second)
}

fn by_turns_on(
    clock: impl Fn() -> Result<Duration, BenchError>,
    budget: Duration,
    mut first: impl FnMut() -> Result<(), BenchError>,
    mut second: impl FnMut() -> Result<(), BenchError>,
) -> Result<Turns, BenchError> {
    first()?;
    second()?;
    let begin = Instant::now();
    let mut turns = Turns::default();
    while turns.first_s.len() < LEAST_ROUNDS || begin.elapsed() < budget {
        // Neither always follows the other.
        if turns.first_s.len().is_multiple_of(2) {
            turns.first_s.push(seconds(&clock, &mut first)?);
            turns.second_s.push(seconds(&clock, &mut second)?);
        } else {
            turns.second_s.push(seconds(&clock, &mut second)?);
            turns.first_s.push(seconds(&clock, &mut first)?);
        }
    }
    Ok(turns)
}

fn seconds(
    clock: impl Fn() -> Result<Duration, BenchError>,
    work: &mut impl FnMut() -> Result<(), BenchError>,
) -> Result<f64, BenchError> {
    let begin = clock()?;
    work()?;
    // A clock that did not move must not divide.
    Ok(clock()?.saturating_sub(begin).as_secs_f64().max(1e-9))
}

/// The middle value, the upper one of two; 0 of none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::thread;

    use super::*;

    #[test]
    fn one_interrupted_round_does_not_move_the_ratio() {
        let now = Cell::new(Duration::ZERO);
        let work = |ms: u64| {
            now.set(now.get() + Duration::from_millis(ms));
            Ok(())
        };
        let mut round = 0;
        let first = || {
            round += 1;
            // The fourth is interrupted.
            work(if round == 4 { 60 } else { 2 })
        };
        let turns = by_turns_on(|| Ok(now.get()), Duration::ZERO, first, || work(6)).unwrap();
        assert_eq!(turns.first_s.len(), LEAST_ROUNDS);
        assert_eq!((turns.ratio(), turns.first_s(), turns.second_s()), (3.0, 0.002, 0.006));
    }

    #[test]
    fn waiting_is_not_counted() {
        let wait = || {
            thread::sleep(Duration::from_millis(20));
            Ok(())
        };
        let turns = by_turns(Duration::ZERO, wait, || Ok(())).unwrap();
        assert!(turns.first_s() < 0.010, "{}", turns.first_s());
    }
}
