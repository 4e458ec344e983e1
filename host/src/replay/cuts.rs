//! Where bodies are cut on their way into the inspection.
//!
//! A proxy hands bodies over in pieces that depend on the network; no verdict may. A replay with a seed
//! cuts every body at drawn places, so that an auditor can see it: the digest is the same for every seed.
//!
//! Cost: one mixing step a piece.

/// Envoy reads bodies in pieces of about this size.
pub(super) const CHUNK_BYTES: usize = 32 << 10;

/// How the bodies of one exchange are cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cuts {
    /// Longest piece.
    max_bytes: usize,
    /// SplitMix64's state; none for pieces of `max_bytes`.
    draws: Option<u64>,
}

impl Cuts {
    /// Not at all.
    pub(super) fn whole() -> Self {
        Self { max_bytes: usize::MAX, draws: None }
    }

    /// In pieces of [`CHUNK_BYTES`].
    pub(super) fn chunks() -> Self {
        Self { max_bytes: CHUNK_BYTES, draws: None }
    }

    /// At places drawn from `seed` for the recording of this number; as they are for seed 0.
    pub(super) fn seeded(self, seed: u64, row: u64) -> Self {
        let mixed = seed ^ row.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self { draws: (seed != 0).then_some(mixed), ..self }
    }

    /// Calls `take` with each piece, and whether it is the last; not at all for an empty body.
    pub(super) fn each(&mut self, mut body: &[u8], mut take: impl FnMut(&[u8], bool)) {
        while !body.is_empty() {
            let length = self.next().min(body.len());
            let (piece, rest) = body.split_at(length);
            take(piece, rest.is_empty());
            body = rest;
        }
    }

    fn next(&mut self) -> usize {
        let Some(state) = &mut self.draws else { return self.max_bytes };
        // SplitMix64 (Steele, Lea and Flood, 2014). A quarter of the pieces are of a few bytes.
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let longest = if z & 3 == 0 { 8 } else { 4096 };
        1 + ((z >> 8) % longest) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_up_the_body_and_seeds_differ() {
        let body: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        let pieces = |cuts: Cuts| {
            let mut pieces = Vec::new();
            let mut cuts = cuts;
            cuts.each(&body, |piece, last| pieces.push((piece.to_owned(), last)));
            pieces
        };
        let all = [Cuts::whole(), Cuts::chunks(), Cuts::whole().seeded(1, 5), Cuts::whole().seeded(2, 5)];
        let all = all.map(pieces);
        for pieces in &all {
            assert_eq!(pieces.iter().flat_map(|(piece, _)| piece.clone()).collect::<Vec<u8>>(), body);
            assert_eq!(pieces.iter().filter(|(_, last)| *last).count(), 1);
        }
        assert_eq!((all[0].len(), all[1].len()), (1, 4));
        assert_ne!(all[2], all[3]);
        let mut none = Cuts::whole();
        none.each(&[], |_, _| panic!("no body, no piece"));
    }
}
