//! Costs of a bucket: prices, and an estimate of a month from measured requests.
//!
//! **Invariant:** pure, and no value is invented: a quantity that was not measured is `None`, never
//! zero. Each process counts its own requests since it opened the bucket, so each is extrapolated
//! over its own time, and the months are added, not the counts.
//!
//! Counting ([`crate::Bucket::usage`]), the size of the bucket and the report belong to other
//! modules.

use std::time::Duration;

use crate::bucket::{RequestCounts, Usage};

/// The month of the bills.
pub const MONTH: Duration = Duration::from_secs(30 * 24 * 3600);
/// Shortest measurement that represents a month; in less time the start dominates.
pub const MEASURED_MIN: Duration = Duration::from_secs(3600);

const GIB: f64 = (1u64 << 30) as f64;

/// Prices of a provider. The default is S3 Standard in us-east-1, read from within its region.
/// DELETE requests are free everywhere.
#[derive(Debug, Clone, PartialEq)]
pub struct Prices {
    /// The currency of all prices, as displayed.
    pub currency: String,
    /// 1,000 PUT requests; each part of a large upload counts as one, and so do its begin and end.
    pub put_per_1000: f64,
    /// 1,000 GET or HEAD requests.
    pub get_per_1000: f64,
    /// 1,000 LIST requests.
    pub list_per_1000: f64,
    /// One GiB stored for a month.
    pub gib_month: f64,
    /// One GiB read from the bucket.
    pub egress_gib: f64,
}

impl Default for Prices {
    fn default() -> Self {
        Self {
            currency: "USD".to_owned(),
            put_per_1000: 0.005,
            get_per_1000: 0.0004,
            list_per_1000: 0.005,
            gib_month: 0.023,
            egress_gib: 0.0,
        }
    }
}

impl Prices {
    fn of_requests(&self, counts: &RequestCounts) -> f64 {
        let thousands = |requests: u64| requests as f64 / 1000.0;
        thousands(counts.put) * self.put_per_1000
            + thousands(counts.get.saturating_add(counts.head)) * self.get_per_1000
            + thousands(counts.list) * self.list_per_1000
    }

    fn of_egress(&self, counts: &RequestCounts) -> f64 {
        counts.bytes_read as f64 / GIB * self.egress_gib
    }
}

/// Estimated costs of a month at the measured rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// All requests; `None` when no process was measured.
    pub requests: Option<f64>,
    /// Cost of the stored bytes; `None` when the size of the bucket is unknown.
    pub storage: Option<f64>,
    /// Cost of the bytes read from the bucket; `None` when no process was measured.
    pub egress: Option<f64>,
    /// The sum; `None` when a part of it is unknown.
    pub total: Option<f64>,
    /// Number of processes that were measured.
    pub processes: usize,
    /// The shortest measurement among them.
    pub measured: Duration,
    /// `measured` is less than [`MEASURED_MIN`]: the requests of the start weigh too much.
    pub is_short: bool,
}

/// Extrapolates to a 30-day month. Processes without a known time are left out.
pub fn estimate(usages: &[Usage], stored_bytes: Option<u64>, prices: &Prices) -> Estimate {
    let timed: Vec<&Usage> = usages.iter().filter(|usage| !usage.elapsed.is_zero()).collect();
    let measured = timed.iter().map(|usage| usage.elapsed).min().unwrap_or_default();
    let monthly = |price: fn(&Prices, &RequestCounts) -> f64| {
        let of = |usage: &&Usage| {
            price(prices, &usage.counts) * MONTH.as_secs_f64() / usage.elapsed.as_secs_f64()
        };
        (!timed.is_empty()).then(|| timed.iter().map(of).sum::<f64>())
    };
    let (requests, egress) = (monthly(Prices::of_requests), monthly(Prices::of_egress));
    let storage = stored_bytes.map(|bytes| bytes as f64 / GIB * prices.gib_month);
    Estimate {
        requests,
        storage,
        egress,
        total: requests
            .zip(storage)
            .zip(egress)
            .map(|((requests, storage), egress)| requests + storage + egress),
        processes: timed.len(),
        measured,
        is_short: measured < MEASURED_MIN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn usage(counts: RequestCounts, elapsed: Duration) -> Usage {
        Usage { counts, elapsed }
    }

    fn assert_close(estimated: Option<f64>, wanted: f64) {
        let estimated = estimated.expect("a process was measured");
        assert!((estimated - wanted).abs() < 1e-9, "{estimated} instead of {wanted}");
    }

    #[test]
    fn nothing_is_made_up_before_anything_was_measured() {
        let busy = RequestCounts { put: 1000, ..RequestCounts::default() };
        for usages in [&[][..], &[usage(busy, Duration::ZERO)]] {
            let estimate = estimate(usages, Some(1 << 30), &Prices::default());
            assert_eq!((estimate.requests, estimate.egress, estimate.total), (None, None, None));
            assert_eq!(
                (estimate.processes, estimate.measured, estimate.is_short),
                (0, Duration::ZERO, true)
            );
            assert_close(estimate.storage, 0.023);
        }
    }

    #[test]
    fn an_idle_cluster_pays_for_what_it_stores_alone() {
        let estimate =
            estimate(&[usage(RequestCounts::default(), HOUR)], Some(100 << 30), &Prices::default());
        assert_close(estimate.requests, 0.0);
        assert_close(estimate.egress, 0.0);
        assert_close(estimate.storage, 2.3);
        assert_close(estimate.total, 2.3);
        assert!(!estimate.is_short);
    }

    #[test]
    fn every_kind_has_its_price() {
        let prices = Prices {
            put_per_1000: 1.0,
            get_per_1000: 10.0,
            list_per_1000: 100.0,
            gib_month: 0.0,
            egress_gib: 7.0,
            ..Prices::default()
        };
        let counts = RequestCounts {
            put: 1000,
            get: 1000,
            head: 1000,
            list: 1000,
            delete: 1_000_000,
            bytes_read: 2 << 30,
            bytes_written: 1 << 40,
        };
        let estimate = estimate(&[usage(counts, MONTH)], Some(1 << 40), &prices);
        assert_close(estimate.requests, 1.0 + 2.0 * 10.0 + 100.0);
        assert_close(estimate.egress, 14.0);
        assert_close(estimate.storage, 0.0);
        assert_close(estimate.total, 135.0);
    }

    #[test]
    fn each_process_is_extrapolated_over_its_own_time() {
        // One chunk every 10 s for a day, and a process that has just begun to do the same.
        let old = usage(RequestCounts { put: 8640, ..RequestCounts::default() }, 24 * HOUR);
        let young = usage(RequestCounts { put: 360, ..RequestCounts::default() }, HOUR);
        let month = 259_200.0 / 1000.0 * 0.005;
        assert_close(estimate(&[old], Some(0), &Prices::default()).requests, month);
        let both = estimate(&[old, young], Some(0), &Prices::default());
        assert_close(both.requests, 2.0 * month);
        assert_eq!((both.processes, both.measured), (2, HOUR));
    }

    #[test]
    fn a_process_that_has_just_started_makes_the_estimate_a_rough_one() {
        let long = usage(RequestCounts::default(), 24 * HOUR);
        let short = usage(
            RequestCounts { put: 5, ..RequestCounts::default() },
            HOUR - Duration::from_secs(1),
        );
        assert!(!estimate(&[long], Some(0), &Prices::default()).is_short);
        assert!(estimate(&[long, short], Some(0), &Prices::default()).is_short);
    }

    #[test]
    fn a_size_that_nobody_knows_leaves_the_total_open() {
        let estimate = estimate(&[usage(RequestCounts::default(), HOUR)], None, &Prices::default());
        assert_eq!((estimate.storage, estimate.total), (None, None));
        assert_close(estimate.requests, 0.0);
    }
}
