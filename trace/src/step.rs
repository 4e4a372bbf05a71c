//! The span of a step of a plan, which whoever writes the version that ends the step exports: the
//! master, or a node that undoes a seal which nobody decided.

use opentelemetry::KeyValue;
use vasto_core::catalog::Catalog;
use vasto_core::plan::{Plan, Step};

use crate::operation::Past;

fn name_of(plan: &Plan) -> &'static str {
    match (plan.step, plan.paused) {
        (Step::Prepare, false) => "step prepare",
        (Step::Prepare, true) => "step prepare, paused",
        (Step::Tail, false) => "step tail",
        (Step::Tail, true) => "step tail, paused",
        (Step::Sealing, _) => "step sealing",
        (Step::Committed, _) => "step committed",
    }
}

/// Returns the span of the step that a plan of `before` was in, from the time (microseconds since
/// 1970) at which the step began to the time of the version that ended it.
pub fn step_ended(before: &Catalog, plan: &Plan, since_us: u64, until_us: u64) -> Past {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let mut attributes = vec![
        KeyValue::new("vasto.keyspace", before.name.clone()),
        KeyValue::new("vasto.version", number(before.version.0)),
        KeyValue::new("vasto.sources", number(plan.sources.len() as u64)),
        KeyValue::new("vasto.targets", number(plan.targets.len() as u64)),
    ];
    if plan.seals_undone > 0 {
        attributes.push(KeyValue::new("vasto.seals_undone", i64::from(plan.seals_undone)));
    }
    if let Some(rate) = plan.max_rate {
        attributes.push(KeyValue::new("vasto.max_rate", number(rate)));
    }
    Past { name: name_of(plan).into(), from_us: since_us, to_us: until_us, attributes, error: None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vasto_core::catalog::KeyspaceSpec;
    use vasto_core::ids::{KeyspaceId, NodeId};
    use vasto_core::reconcile::start_resize;

    use super::*;

    #[test]
    fn a_step_lasts_from_its_version_to_the_one_that_ends_it() {
        let spec = KeyspaceSpec::default();
        let first = Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1)]], 1, 1);
        let growing = start_resize(&first, 2, &[vec![NodeId(2)]], 20, 2).unwrap();
        let mut plan = growing.plan.clone().unwrap();
        (plan.step, plan.paused, plan.seals_undone) = (Step::Tail, true, 2);
        let past = step_ended(&growing, &plan, 20, 90);
        assert_eq!((past.name.as_ref(), past.from_us, past.to_us), ("step tail, paused", 20, 90));
        assert!(past.attributes.contains(&KeyValue::new("vasto.seals_undone", 2i64)), "{past:?}");
        assert!(past.attributes.contains(&KeyValue::new("vasto.version", 2i64)), "{past:?}");
    }
}
