//! Reads of one key and of many keys.

use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;

use crate::error::{Error, strange_reply};
use crate::execute::{GroupResult, RequestProgress};
use crate::key::Key;
use crate::keyspace::Keyspace;
use crate::tuning::{GET_KEY_BYTES_MAX, GET_KEYS_MAX};
use crate::value::Value;

impl Keyspace {
    /// Reads a key; `None` if it does not exist.
    ///
    /// # Errors
    /// `InvalidArgument` for a key over the limit, `NotFound` for a deleted keyspace,
    /// `Unavailable`, `Overloaded` or `DeadlineExceeded` when no answer came in time.
    pub async fn get(&self, key: impl Into<Key>) -> Result<Option<Value>, Error> {
        let key = key.into();
        key.check()?;
        let op = || Op::Get(v1::GetRequest { keys: vec![key.to_wire()] });
        match self.executor().run(key.hash(), self.begin_read(), key.key.len(), op).await? {
            Reply::Get(v1::GetReply { mut values }) if values.len() == 1 => {
                values.pop().and_then(|value| value.value).map(Value::from_wire).transpose()
            }
            _ => Err(strange_reply(false)),
        }
    }

    /// Reads many keys, all shards in parallel; the answers are in the order of the keys.
    ///
    /// # Errors
    /// As of [`Keyspace::get`]; one key that could not be read fails the whole call.
    pub async fn get_many<K: Into<Key>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Vec<Option<Value>>, Error> {
        let keys: Vec<Key> = keys.into_iter().map(Into::into).collect();
        keys.iter().try_for_each(Key::check)?;
        let hashes: Vec<u64> = keys.iter().map(Key::hash).collect();
        let mut values: Vec<Option<Value>> = vec![None; keys.len()];
        let mut failed: Option<Error> = None;
        let split = |positions: Vec<usize>, progress: &RequestProgress| {
            let most = GET_KEYS_MAX.min(progress.group_most);
            split_gets(positions, most, |at| keys[at].key.len())
        };
        let op = |positions: &[usize]| {
            let bytes = positions.iter().map(|at| keys[*at].key.len()).sum();
            (
                Op::Get(v1::GetRequest {
                    keys: positions.iter().map(|at| keys[*at].to_wire()).collect(),
                }),
                bytes,
            )
        };
        let done = |group: GroupResult| match group {
            Ok((positions, Reply::Get(reply))) if reply.values.len() == positions.len() => {
                for (at, value) in positions.into_iter().zip(reply.values) {
                    match value.value.map(Value::from_wire).transpose() {
                        Ok(value) => values[at] = value,
                        Err(error) => failed = Some(error),
                    }
                }
            }
            Err(error) => failed = Some(error),
            Ok(_) => failed = Some(strange_reply(false)),
        };
        self.executor()
            .run_many(keys.len(), self.begin_read(), |at| hashes[at], split, op, done)
            .await;
        failed.map_or(Ok(values), Err)
    }
}

/// Splits the keys of one shard into requests of at most `most` keys and a bounded size.
fn split_gets(
    positions: Vec<usize>,
    most: usize,
    bytes_of: impl Fn(usize) -> usize,
) -> Vec<Vec<usize>> {
    let mut requests: Vec<Vec<usize>> = Vec::new();
    let mut bytes = 0;
    for at in positions {
        bytes += bytes_of(at);
        match requests.last_mut() {
            Some(last) if last.len() < most && bytes <= GET_KEY_BYTES_MAX => last.push(at),
            _ => {
                bytes = bytes_of(at);
                requests.push(vec![at]);
            }
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gets_are_cut_by_number_and_by_bytes() {
        assert_eq!(split_gets(vec![0, 1, 2, 3, 4], 2, |_| 1), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(split_gets(vec![0, 1, 2], 9, |_| GET_KEY_BYTES_MAX / 2), [vec![0, 1], vec![2]]);
        assert_eq!(split_gets(vec![7], 1, |_| GET_KEY_BYTES_MAX * 2), [vec![7]]);
        assert!(split_gets(vec![], 5, |_| 1).is_empty());
    }
}
