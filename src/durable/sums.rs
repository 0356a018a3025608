//! BLAKE3 sums of the files in a folder, by which damage and changes are noticed when a file is
//! opened. They protect from accidents: who changes a file on purpose can change its sum as well.
//!
//! ```text
//! { "format": 1, "blake3": { "config.toml": "<64 hexadecimal digits>", .. } }
//! ```

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// The file in a folder that lists the sums of the others.
pub(crate) const SUMS: &str = "checksums.json";
/// The version of its format.
const FORMAT: u32 = 1;
/// How much is read at a time, which is enough to keep all cores busy.
const CHUNK_BYTES: usize = 1 << 24;

#[derive(Debug, Serialize, Deserialize)]
struct Listed {
    format: u32,
    blake3: BTreeMap<String, String>,
}

/// The BLAKE3 sum of a file, in hexadecimal digits. All cores hash it.
pub(crate) fn of_file(path: &Path) -> Result<String> {
    let mut file = fs_err::File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = Vec::new();
    loop {
        chunk.clear();
        if file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk)? == 0 {
            return Ok(hasher.finalize().to_hex().to_string());
        }
        hasher.update_rayon(&chunk);
    }
}

/// Writes the sums of all files in `dir`, which has no folders in it.
pub fn write(dir: &Path) -> Result<()> {
    let mut blake3 = BTreeMap::new();
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        blake3.insert(name, of_file(&entry.path())?);
    }
    let text = serde_json::to_string_pretty(&Listed { format: FORMAT, blake3 })? + "\n";
    super::write(&dir.join(SUMS), text.as_bytes())
}

/// Checks a file of `dir` against its sum. A folder without sums is not checked.
///
/// # Errors
/// Sums of another format, a file that is not listed, and a file with another sum.
pub fn check(dir: &Path, name: &str) -> Result<()> {
    let sums = dir.join(SUMS);
    if !sums.exists() {
        return Ok(());
    }
    let text = fs_err::read_to_string(&sums)?;
    let listed: Listed =
        serde_json::from_str(&text).with_context(|| format!("`{}` is damaged", sums.display()))?;
    if listed.format != FORMAT {
        let (path, found) = (sums.display(), listed.format);
        bail!("`{path}` has format {found}, this version reads {FORMAT}");
    }
    match listed.blake3.get(name) {
        Some(sum) => check_file(&dir.join(name), sum, "take a copy, or another checkpoint"),
        None => bail!("`{}` does not list `{name}`, which is beside it", sums.display()),
    }
}

/// Checks a file against its sum. `hint` says what can be done if it has another.
pub(crate) fn check_file(path: &Path, expected: &str, hint: &str) -> Result<()> {
    let found = of_file(path)?;
    if found != *expected {
        bail!(
            "`{}` is not the file that was written: BLAKE3 `{}..`, not `{}..`\nhint: it is damaged \
             or was changed; {hint}",
            path.display(),
            &found[..12],
            expected.get(..12).unwrap_or(expected)
        );
    }
    Ok(())
}
