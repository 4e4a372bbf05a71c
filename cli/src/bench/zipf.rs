//! Random ranks by Zipf's law: rank 1 is the most popular, rank `k` is drawn in proportion to
//! `1 / k^theta`.
//!
//! The method is rejection-inversion (Hörmann and Derflinger, "Rejection-inversion to generate
//! variates from monotone discrete distributions", 1996): without a table, so that the number of
//! ranks may grow during a run, as the workload of the latest records needs.

/// The skew that YCSB uses.
pub(super) const YCSB_THETA: f64 = 0.99;

/// A Zipf distribution of ranks from 1 to `n`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Zipf {
    n: u64,
    theta: f64,
    /// The integral at 1.5, less 1.
    low: f64,
    /// The integral at `n` + 0.5.
    high: f64,
    /// Ranks closer than this to the drawn point are accepted without evaluating the integral.
    near: f64,
}

impl Zipf {
    /// Creates a distribution of ranks from 1 to `n` (at least 1), with a skew of `theta` above 0
    /// and other than 1.
    pub(super) fn new(n: u64, theta: f64) -> Zipf {
        assert!(n >= 1 && theta > 0.0 && theta != 1.0, "there is no such distribution");
        let mut zipf = Zipf { n, theta, low: 0.0, high: 0.0, near: 0.0 };
        zipf.low = zipf.integral(1.5) - 1.0;
        zipf.high = zipf.integral(n as f64 + 0.5);
        zipf.near = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.weight(2.0));
        zipf
    }

    /// Returns the number of ranks.
    pub(super) fn ranks(&self) -> u64 {
        self.n
    }

    /// Draws the next rank. `uniform` draws numbers from 0 (inclusive) to 1 (exclusive).
    pub(super) fn rank(&self, mut uniform: impl FnMut() -> f64) -> u64 {
        loop {
            let point = self.high + uniform() * (self.low - self.high);
            let x = self.inverse(point);
            let rank = (x.round() as u64).clamp(1, self.n);
            let k = rank as f64;
            if k - x <= self.near || point >= self.integral(k + 0.5) - self.weight(k) {
                return rank;
            }
        }
    }

    fn weight(&self, x: f64) -> f64 {
        x.powf(-self.theta)
    }

    fn integral(&self, x: f64) -> f64 {
        let rest = 1.0 - self.theta;
        (x.powf(rest) - 1.0) / rest
    }

    fn inverse(&self, y: f64) -> f64 {
        let rest = 1.0 - self.theta;
        // Rounding may leave a point slightly below the smallest value that has a root.
        (1.0 + y * rest).max(0.0).powf(1.0 / rest)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rand::{RngExt, SeedableRng, rngs::SmallRng};

    use super::*;

    #[test]
    fn ranks_follow_the_law() {
        const DRAWS: usize = 400_000;
        let zipf = Zipf::new(1_000, YCSB_THETA);
        let mut rng = SmallRng::seed_from_u64(1);
        let mut counts = vec![0u64; 1_001];
        for _ in 0..DRAWS {
            counts[zipf.rank(|| rng.random()) as usize] += 1;
        }
        assert_eq!(counts[0], 0);
        let total: f64 = (1..=1_000).map(|k| f64::from(k).powf(-YCSB_THETA)).sum();
        for k in [1usize, 2, 3, 10, 100] {
            let expected = DRAWS as f64 * (k as f64).powf(-YCSB_THETA) / total;
            let found = counts[k] as f64;
            assert!(
                (found - expected).abs() < 6.0 * expected.sqrt(),
                "rank {k}: {found} drawn, {expected} expected"
            );
        }
    }

    #[test]
    fn ends_of_the_range_are_inside() {
        for n in [1, 2, u64::MAX >> 12] {
            let zipf = Zipf::new(n, YCSB_THETA);
            for edge in [0.0, 0.5, 1.0 - f64::EPSILON] {
                assert!((1..=n).contains(&zipf.rank(|| edge)), "{n} {edge}");
            }
        }
    }
}
