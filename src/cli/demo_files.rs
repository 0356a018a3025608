//! The demo's files, which the binary holds: its config, its base and its data.
//!
//! They are 3.2 MB, an eighth of the binary, and are held as they are: gzip would make 2.1 MB of
//! them, at the cost of a step of the build, and packages are compressed anyway.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;

/// The files of one folder, with their contents.
macro_rules! files {
    ($($path:literal),* $(,)?) => {
        [$(($path, include_bytes!(concat!("../../", $path)))),*]
    };
}

/// The config of the demo, in the folder that the files are unpacked to.
pub const CONFIG: &str = "configs/moe.toml";
/// The base of the demo.
pub const BASE: &str = "demo/base";

/// Each file's path in the repository, and its content.
const FILES: [(&str, &[u8]); 13] = files![
    "configs/moe.toml",
    "demo/base/config.json",
    "demo/base/model.safetensors",
    "demo/base/tokenizer.json",
    "demo/base/tokenizer_config.json",
    "demo/data/arithmetic.train.jsonl",
    "demo/data/arithmetic.validation.jsonl",
    "demo/data/code.train.jsonl",
    "demo/data/code.validation.jsonl",
    "demo/data/data2text.train.jsonl",
    "demo/data/data2text.validation.jsonl",
    "demo/data/verse.train.jsonl",
    "demo/data/verse.validation.jsonl",
];

/// Writes the files below `dir`, under the paths that they have in the repository, so that the
/// config's own paths hold.
pub fn unpack(dir: &Path) -> Result<()> {
    for (path, content) in FILES {
        let file = dir.join(path);
        fs_err::create_dir_all(file.parent().expect("it lies in a folder"))?;
        fs_err::write(file, content)?;
    }
    Ok(())
}

/// The folders that [`unpack`] makes.
pub fn folders() -> BTreeSet<&'static str> {
    FILES.iter().filter_map(|(path, _)| path.split('/').next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_files_of_the_demo_are_unpacked() -> Result<()> {
        let dir = tempfile::tempdir()?;
        unpack(dir.path())?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut count = 0;
        for folder in ["demo/base", "demo/data"] {
            for entry in fs_err::read_dir(root.join(folder))? {
                let entry = entry?;
                let unpacked = dir.path().join(folder).join(entry.file_name());
                assert_eq!(fs_err::read(unpacked)?, fs_err::read(entry.path())?);
                count += 1;
            }
        }
        assert_eq!(count + 1, FILES.len(), "no file is left in the binary that is gone");
        assert_eq!(folders(), ["configs", "demo"].into());
        Ok(())
    }
}
