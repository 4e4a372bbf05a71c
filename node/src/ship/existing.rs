//! The object that a shipper finds under the name of the object it is about to create.
//!
//! Such an object was shipped before a crash that preceded the write of `ship.json`, or by an
//! attempt whose answer was lost; or the object is damaged; or another process ships a copy of this
//! replica.
//!
//! **Invariant:** an existing object is used in place of the new one only when it belongs to the
//! same place and agrees with the new one.

use std::fmt::Display;

use super::error::ShipError;

/// Returns the existing object when it agrees with `ours`.
pub(super) fn take_existing<T, P: PartialEq>(
    key: &str,
    existing: Result<T, impl Display>,
    ours: &T,
    place: impl Fn(&T) -> P,
    agrees: impl Fn(&T, &T) -> bool,
) -> Result<T, ShipError> {
    // An unreadable object, or one that belongs elsewhere, is no history of this replica at all.
    let in_the_way = |what: String| ShipError::InTheWay { key: key.to_owned(), what };
    let existing = existing.map_err(|error| in_the_way(error.to_string()))?;
    if place(&existing) != place(ours) {
        return Err(in_the_way("it belongs elsewhere".to_owned()));
    }
    // Another history of this replica must not stand for this one.
    if !agrees(&existing, ours) {
        return Err(ShipError::Foreign(key.to_owned()));
    }
    Ok(existing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_object_stands_for_the_new_one_only_when_it_agrees_with_it() {
        let take = |existing: Result<(u8, u8), &str>| {
            take_existing(
                "a key",
                existing,
                &(1, 2),
                |object| object.0,
                |existing, ours| existing.1 >= ours.1,
            )
        };
        assert!(matches!(take(Ok((1, 3))), Ok((1, 3))));
        assert!(matches!(take(Ok((1, 1))), Err(ShipError::Foreign(key)) if key == "a key"));
        assert!(
            matches!(take(Ok((0, 2))), Err(ShipError::InTheWay { what, .. }) if what == "it belongs elsewhere")
        );
        assert!(
            matches!(take(Err("damaged")), Err(ShipError::InTheWay { what, .. }) if what == "damaged")
        );
    }
}
