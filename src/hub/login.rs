//! Whether the Hub can be reached, and whether it accepts the token.

use anyhow::{Result, bail};
use serde::Deserialize;

use super::http::Http;
use super::settings::HubSettings;

/// Who the Hub takes a client for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Login {
    /// The client has no token. Public repositories can be read.
    Anonymous,
    /// The token belongs to the account of this name.
    Account(String),
    /// The Hub refuses the token.
    Refused,
}

/// The answer to `/api/whoami-v2`.
#[derive(Deserialize)]
struct WhoAmI {
    name: String,
}

/// Asks the Hub who the client is (`/api/whoami-v2`).
///
/// # Errors
/// If the Hub cannot be reached, or does not answer as the Hub does.
pub fn login(settings: &HubSettings) -> Result<Login> {
    let http = Http::new(settings)?;
    let url = http.url(["api", "whoami-v2"]);
    let mut response = match http.get(&http.agent(), &url, None) {
        Ok(response) => response,
        Err(error) => bail!("`{}`: {}", http.endpoint(), http.quoted(&error.to_string())),
    };
    match response.status().as_u16() {
        401 | 403 if http.has_token => Ok(Login::Refused),
        401 | 403 => Ok(Login::Anonymous),
        200 => match response.body_mut().read_json::<WhoAmI>() {
            Ok(answer) => Ok(Login::Account(http.quoted(&answer.name))),
            Err(_) => bail!("`{}` does not answer as the Hub does", http.endpoint()),
        },
        status => bail!("`{}` answers with the status {status}", http.endpoint()),
    }
}
