//! How long a client waits because of the filter: one request at a time, beside a filter that only reads.
//!
//! What: three medians. Of requests with 4 KiB of JSON and no body in the answer, the time to the answer; of
//! streams of events, the time from when the upstream sends the first one to when its first byte is at the
//! client, and from the request to that byte. The filter that only reads has whole bodies buffered for the
//! requests, as in `proxies`, and holds nothing for the streams: beside one that waits for the end of a
//! stream any other would be fast.
//!
//! Both proxies take turns of some dozens of requests, and the turns' medians are compared in pairs: at some
//! hundred microseconds a request, a machine's pace changes more often than that.
//!
//! Cost: a third of a millisecond a request, a millisecond more a stream.
//!
//! Left out on purpose: load. What a queue adds is in `gateway` and in the requests a second.

use std::net::SocketAddr;
use std::time::Duration;

use super::BenchError;
use super::load::{Asked, Caller, Took, Upstream};
use super::rounds::median;

/// Requests a turn.
const TURN: usize = 50;

/// A proxy by name, and where it listens.
pub(super) type Target = (&'static str, SocketAddr);

/// Medians of the turns, each proxy's own, in us.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Beside {
    pub(super) driftlock_us: f64,
    pub(super) reading_us: f64,
    /// How much longer it takes through Driftlock.
    pub(super) added_us: f64,
    /// How many times as long.
    pub(super) ratio: f64,
}

/// Asks these of both by turns. `of` picks what is compared, of the same requests.
pub(super) fn beside<const N: usize>(
    driftlock: Target,
    reading: Target,
    upstream: &Upstream,
    asked: &[Asked],
    turns: usize,
    of: [fn(&Took) -> Duration; N],
) -> Result<[Beside; N], BenchError> {
    let connect = |(name, address): Target| Caller::connect(name, address, upstream, asked);
    let (mut ours, mut theirs) = (connect(driftlock)?, connect(reading)?);
    let turn = |caller: &mut Caller<'_>| -> Result<[f64; N], BenchError> {
        let took = (0..TURN).map(|_| caller.ask()).collect::<Result<Vec<Took>, BenchError>>()?;
        Ok(of.map(|of| median(took.iter().map(|took| of(took).as_secs_f64() * 1e6).collect())))
    };
    // The first of each warms caches and is not counted.
    turn(&mut ours)?;
    turn(&mut theirs)?;
    let mut pairs = Vec::new();
    for index in 0..turns.max(1) {
        // Neither always follows the other.
        pairs.push(if index % 2 == 0 {
            let first = turn(&mut ours)?;
            (first, turn(&mut theirs)?)
        } else {
            let first = turn(&mut theirs)?;
            (turn(&mut ours)?, first)
        });
    }
    Ok(std::array::from_fn(|i| {
        let of_pairs = |value: fn(f64, f64) -> f64| {
            median(
                pairs
                    .iter()
                    .filter_map(|(ours, theirs)| Some(value(*ours.get(i)?, *theirs.get(i)?)))
                    .collect(),
            )
        };
        Beside {
            driftlock_us: of_pairs(|ours, _| ours),
            reading_us: of_pairs(|_, theirs| theirs),
            added_us: of_pairs(|ours, theirs| ours - theirs),
            ratio: of_pairs(|ours, theirs| ours / theirs),
        }
    }))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use super::super::load::asked;
    use super::*;

    /// Passes everything on after a while.
    fn slow(upstream: SocketAddr, by: Duration) -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let copy = move |mut from: TcpStream, mut to: TcpStream, by: Duration| {
            thread::spawn(move || {
                let mut bytes = [0; 1 << 16];
                while let Ok(count @ 1..) = from.read(&mut bytes) {
                    thread::sleep(by);
                    to.write_all(&bytes[..count]).unwrap();
                }
            })
        };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(upstream).unwrap();
                server.set_nodelay(true).unwrap();
                client.set_nodelay(true).unwrap();
                // Only answers are late.
                copy(client.try_clone().unwrap(), server.try_clone().unwrap(), Duration::ZERO);
                copy(server, client, by);
            }
        });
        address
    }

    #[test]
    fn what_a_proxy_adds_is_measured() {
        let stream = b"data: {\"a\": 1}\n\ndata: [DONE]\n\n".to_vec();
        let asked = asked("/", vec![(b"{}".to_vec(), Vec::new()), (b"{}".to_vec(), stream)]);
        let upstream = Upstream::start(&asked).unwrap();
        let slow = ("slow", slow(upstream.address, Duration::from_millis(20)));
        let direct = ("direct", upstream.address);
        let [whole] = beside(slow, direct, &upstream, &asked[..1], 1, [|took| took.whole]).unwrap();
        assert!(whole.added_us > 10_000.0 && whole.driftlock_us > whole.reading_us, "{whole:?}");
        assert!(whole.reading_us < 10_000.0, "{whole:?}");
        let both: [fn(&Took) -> Duration; 2] = [|took| took.first_byte, |took| took.to_first_byte];
        let [first, to_first] = beside(slow, direct, &upstream, &asked[1..], 1, both).unwrap();
        // The upstream's pause is behind the first event.
        assert!(first.ratio > 2.0 && first.reading_us < 10_000.0, "{first:?}");
        assert!(to_first.driftlock_us >= first.driftlock_us && to_first.reading_us >= first.reading_us);
        let [all] = beside(direct, slow, &upstream, &asked[1..], 1, [|took| took.whole]).unwrap();
        assert!(all.driftlock_us >= 1_000.0 && all.added_us < 0.0, "{all:?}");
    }
}
