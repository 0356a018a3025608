//! The keys that clients show.

use std::fmt;

/// The keys that a server accepts. Only their hashes are kept, which are compared in constant time.
#[derive(Clone)]
pub struct Keys(Vec<blake3::Hash>);

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} key(s)", self.0.len())
    }
}

impl Keys {
    /// Accepts every client.
    pub const OPEN: Self = Self(vec![]);

    /// Accepts clients with one of these keys. Without keys, everyone is accepted.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self(keys.into_iter().map(|key| blake3::hash(key.as_bytes())).collect())
    }

    /// Whether everyone is accepted.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the value of an `Authorization` header names one of the keys.
    pub fn accept(&self, authorization: Option<&str>) -> bool {
        let (scheme, key) = authorization.and_then(|x| x.split_once(' ')).unwrap_or_default();
        let hash = blake3::hash(key.trim().as_bytes());
        // `|`, not `||`: each key is compared, whichever is right
        let known = self.0.iter().fold(false, |known, own| known | (*own == hash));
        self.is_open() || (scheme.eq_ignore_ascii_case("bearer") && known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_keys_are_accepted() {
        let keys = Keys::new(["one", "two"]);
        for right in ["Bearer one", "bearer two", "Bearer  two"] {
            assert!(keys.accept(Some(right)), "{right}");
        }
        for wrong in ["Bearer three", "Bearer", "Bearer ", "one", "Basic one", "Bearer one two", ""]
        {
            assert!(!keys.accept(Some(wrong)), "{wrong}");
        }
        assert!(!keys.accept(None));
        assert!(Keys::OPEN.accept(None));
    }
}
