//! Warnings about the two clocks by which ages are judged: the store's and the collector's. The
//! earlier of the two times counts as now, so that a clock that is ahead makes no object older.

use std::time::Duration;

use crate::bucket::ObjectInfo;

/// Difference between the store's clock and the collector's that raises a warning.
const APART_MIN: Duration = Duration::from_secs(15 * 60);

/// Warns when the two clocks are too far apart.
pub(super) fn apart(store_us: u64, clock_us: u64) -> Option<String> {
    let apart = Duration::from_micros(store_us.abs_diff(clock_us));
    let (early, late) =
        if store_us < clock_us { ("bucket's", "master's") } else { ("master's", "bucket's") };
    (apart > APART_MIN).then(|| {
        format!(
            "the {late} clock is {} s ahead of the {early}: set the one that is wrong; until then ages are counted by \
             the {early}",
            apart.as_secs()
        )
    })
}

/// Warns about objects whose time is in the future.
pub(super) fn of_the_future(objects: &[ObjectInfo], now_us: u64) -> Option<String> {
    let from = now_us.saturating_add(APART_MIN.as_micros() as u64);
    let future: Vec<&ObjectInfo> =
        objects.iter().filter(|object| object.modified_us > from).collect();
    let first = future.first()?;
    Some(format!(
        "{} objects are of a time in the future, {} by {} s: none of them is collected before it comes",
        future.len(),
        first.key,
        (first.modified_us - now_us) / 1_000_000
    ))
}
