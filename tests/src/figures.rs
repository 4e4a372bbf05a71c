//! Figures of several runs in one.

/// Returns the smallest value that this part of all does not exceed; 0 without values.
pub fn percentile(mut values: Vec<f64>, part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = ((values.len() as f64 * part).ceil() as usize).max(1) - 1;
    values.get(at).or(values.last()).copied().unwrap_or_default()
}

/// Returns the median: the smallest value that half of all do not exceed.
pub fn median(values: Vec<f64>) -> f64 {
    percentile(values, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let of = |values: &[f64], part| percentile(values.to_vec(), part);
        assert_eq!(of(&[], 0.5), 0.0);
        assert_eq!(of(&[3.0], 0.99), 3.0);
        assert_eq!(of(&[4.0, 1.0, 3.0, 2.0], 0.5), 2.0);
        assert_eq!(of(&[4.0, 1.0, 3.0, 2.0], 0.99), 4.0);
        assert_eq!(of(&[4.0, 1.0, 3.0, 2.0], 0.0), 1.0);
        assert_eq!(median(vec![2.0, 9.0, 1.0]), 2.0);
    }
}
