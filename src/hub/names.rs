//! The name of a folder in a repository of the Hub.

use anyhow::{Result, bail};
use hf_hub::{Repo, RepoType};

/// A folder in a repository of the Hub at one revision.
pub(super) struct RepoSource<'a> {
    pub(super) repo: &'a str,
    pub(super) revision: &'a str,
    /// The folder in the repository; empty for its root.
    pub(super) subfolder: &'a str,
    /// What the repository holds.
    pub(super) holds: Holds,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holds {
    /// A model.
    Model {
        /// The file that every folder of such a model has. A revision without it in the cache
        /// counts as not cached.
        config_file: &'static str,
        /// The config key of the source, such as `base.source`, for messages.
        option: &'static str,
    },
    /// A data set.
    Dataset,
}

impl RepoSource<'_> {
    /// The name for messages: `repo@revision`, followed by `/subfolder` if there is a subfolder.
    pub(super) fn label(&self) -> String {
        let Self { repo, revision, subfolder, .. } = self;
        let slash = if subfolder.is_empty() { "" } else { "/" };
        format!("{repo}@{revision}{slash}{subfolder}")
    }

    /// The path in the repository of the file `file` in the folder.
    pub(super) fn path_of(&self, file: &str) -> String {
        match self.subfolder {
            "" => file.to_owned(),
            subfolder => format!("{subfolder}/{file}"),
        }
    }

    /// The repository at `revision`, as the type of `hf-hub`.
    pub(super) fn repo_at(&self, revision: &str) -> Repo {
        let holds = match self.holds {
            Holds::Model { .. } => RepoType::Model,
            Holds::Dataset => RepoType::Dataset,
        };
        Repo::with_revision(self.repo.to_owned(), holds, revision.to_owned())
    }

    /// The path of the repository's files in addresses.
    pub(super) fn path(&self) -> impl Iterator<Item = &str> {
        let prefix = match self.holds {
            Holds::Model { .. } => None,
            Holds::Dataset => Some("datasets"),
        };
        prefix.into_iter().chain(self.repo.split('/'))
    }

    /// The path of the repository in addresses of the Hub's interface.
    pub(super) fn api_path(&self) -> impl Iterator<Item = &str> {
        let kind = match self.holds {
            Holds::Model { .. } => "models",
            Holds::Dataset => "datasets",
        };
        ["api", kind].into_iter().chain(self.repo.split('/'))
    }

    /// The config key that names the repository, for messages.
    pub(super) fn key(&self) -> String {
        match self.holds {
            Holds::Model { option, .. } => format!("{option}.hub"),
            Holds::Dataset => "hub".into(),
        }
    }

    /// What can be used instead of the Hub, for messages.
    pub(super) fn instead(&self) -> String {
        match self.holds {
            Holds::Model { option, .. } => {
                format!("use a folder: `{option} = {{ path = \"DIR\" }}`")
            }
            Holds::Dataset => "use files: `train = [\"FILE\"]`".into(),
        }
    }

    /// Refuses names that cannot exist. This also keeps all paths inside the cache.
    pub(super) fn check_names(&self) -> Result<()> {
        let Self { repo, revision, subfolder, .. } = self;
        let key = self.key();
        if repo.split('/').count() > 2 || !repo.split('/').all(is_name) {
            bail!(
                "`{repo}` is not the name of a repository\nhint: {}",
                match self.holds {
                    Holds::Model { option, .. } => format!(
                        "`{key}.repo` is like `Qwen/Qwen3-0.6B`; a folder is \
                         `{option} = {{ path = \"DIR\" }}`"
                    ),
                    Holds::Dataset => format!("`{key}.dataset` is like `openai/gsm8k`"),
                }
            );
        }
        let is_step =
            |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains("..");
        let odd = |c: char| c.is_control() || c.is_whitespace() || "\\:?*[~^".contains(c);
        if !revision.split('/').all(is_step) || revision.contains(odd) {
            bail!(
                "`{revision}` is not the name of a revision\n\
                 hint: `{key}.revision` is a branch (as a rule `main`), a tag or a commit"
            );
        }
        // the Hub has no such folders, and in an address these names would mean other folders
        let odd = |c: char| odd(c) || "#%".contains(c);
        if !subfolder.is_empty() && (!subfolder.split('/').all(is_step) || subfolder.contains(odd))
        {
            bail!(
                "`{subfolder}` is not the name of a folder\n\
                 hint: `{key}.subfolder` is a path in the repository, like `expert_0`"
            );
        }
        Ok(())
    }
}

/// Whether the name of an owner or of a repository may exist.
fn is_name(part: &str) -> bool {
    part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && !part.contains("..")
        && !part.contains("--")
}

/// Whether `text` is the name of a repository with its owner, such as `Qwen/Qwen3-0.6B`.
pub fn is_repo(text: &str) -> bool {
    text.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

/// Whether `revision` is a full commit hash: 40 hexadecimal digits.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}
