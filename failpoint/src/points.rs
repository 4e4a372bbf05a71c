//! The failpoints by name, each with the moment at which it is reached.
//!
//! **Invariant:** names are unique, and say server part, step and side.

/// A place in the code of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    name: &'static str,
    moment: &'static str,
}

impl Point {
    /// Returns the name: `part.step.side`.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Returns the moment in words.
    pub const fn moment(self) -> &'static str {
        self.moment
    }
}

macro_rules! points {
    ($($constant:ident = $name:literal, $moment:literal;)*) => {
        $(
            #[doc = $moment]
            pub const $constant: Point = Point { name: $name, moment: $moment };
        )*

        /// Every failpoint.
        pub const ALL: &[Point] = &[$($constant),*];
    };
}

points! {
    MASTER_PREPARE_BEFORE = "master.prepare.before", "the version with which a plan prepares is decided and not written";
    MASTER_PREPARE_AFTER = "master.prepare.after", "the version with which a plan prepares is written, and shown to nobody";
    MASTER_TAIL_BEFORE = "master.tail.before", "the version with which targets load and follow, or a seal is undone, is decided and not written";
    MASTER_TAIL_AFTER = "master.tail.after", "that version is written, and shown to nobody";
    MASTER_SEALING_BEFORE = "master.sealing.before", "the version that seals is decided and not written";
    MASTER_SEALING_AFTER = "master.sealing.after", "the version that seals is written, and shown to nobody";
    MASTER_COMMITTED_BEFORE = "master.committed.before", "the commit is decided and not written";
    MASTER_COMMITTED_AFTER = "master.committed.after", "the commit is written, and shown to nobody";
    MASTER_DROPPING_BEFORE = "master.dropping.before", "the version that ends a quarantine is decided and not written";
    MASTER_DROPPING_AFTER = "master.dropping.after", "the version that ends a quarantine is written, and shown to nobody";
    MASTER_REST_BEFORE = "master.rest.before", "a version without a plan (its end, members, primaries) is decided and not written";
    MASTER_REST_AFTER = "master.rest.after", "a version without a plan is written, and shown to nobody";
    SOURCE_CHECKPOINT_MADE = "source.checkpoint.made", "a source has its checkpoint in the bucket, and has not reported it";
    SOURCE_EXPORT_BEGUN = "source.export.begun", "a source begins to write its export";
    SOURCE_EXPORT_WRITTEN = "source.export.written", "the tables of an export are on the disk, and none is uploaded";
    SOURCE_EXPORT_HALF = "source.export.half", "half of the tables of an export are uploaded";
    SOURCE_EXPORT_UPLOADED = "source.export.uploaded", "all tables of an export are uploaded, and its manifest is not";
    SOURCE_SEAL_BEFORE = "source.seal.before", "a replica has the version that seals, and has recorded no seal";
    SOURCE_SEAL_RECORDED = "source.seal.recorded", "a replica has recorded its seal, and has not reported it";
    SOURCE_UNSEAL_BEFORE = "source.unseal.before", "a replica is to lift its seal";
    SOURCE_RELEASE_BEFORE = "source.release.before", "a replica has the commit, and still owns what it gives away";
    SOURCE_RELEASE_AFTER = "source.release.after", "a replica has given its bands away, and has not reported it";
    SOURCE_SHIPPED = "source.shipped", "a retired source has shipped its log to the end, and has not reported it";
    TARGET_ARRIVING = "target.arriving", "a survivor has recorded the bands that will come, and loads nothing yet";
    TARGET_DOWNLOAD_HALF = "target.download.half", "a target has downloaded what comes from one source";
    TARGET_INGEST_BEFORE = "target.ingest.before", "a target has rewritten its rows, and has ingested none";
    TARGET_INGEST_AFTER = "target.ingest.after", "a target has recorded its ingest, and shipped no manifest of it";
    TARGET_MANIFEST_SHIPPED = "target.manifest.shipped", "a target has shipped its first manifest, and follows nobody yet";
    TARGET_CAUGHT_UP = "target.caught_up", "a target holds all that a source has sent so far";
    TARGET_OPEN_BEFORE = "target.open.before", "a target has the commit, and has opened nothing";
    TARGET_OPEN_AFTER = "target.open.after", "a target has opened what arrived, and has not reported it";
    COPY_ADOPTED = "copy.adopted", "a replica from the bucket has the base as its database, and no log yet";
    COPY_JOINED = "copy.joined", "a replica from the bucket has taken the log that is there";
    CLEANUP_FILES = "cleanup.files", "the whole files of a range that is removed are gone, which nothing records yet";
    CLEANUP_CLEARING = "cleanup.clearing", "the range that is removed is recorded as clearing, and still there";
    CLEANUP_COMPACTED = "cleanup.compacted", "nothing of the range is left, which nothing records yet";
    REMOVAL_BEFORE = "removal.before", "a replica that is removed is stopped, and all of its files are there";
    REMOVAL_AFTER = "removal.after", "the files of a removed replica are gone";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_is_a_file_name_of_its_own_and_has_a_moment() {
        let names: BTreeSet<&str> = ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), ALL.len());
        for point in ALL {
            let is_name = |c: char| c.is_ascii_lowercase() || c == '.' || c == '_';
            assert!(point.name().chars().all(is_name), "{point:?}");
            assert!(point.name().contains('.') && !point.moment().is_empty(), "{point:?}");
        }
    }
}
