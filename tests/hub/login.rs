//! Asking the Hub who the client is.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;

use anyhow::Result;
use dylora::hub::{HubSettings, Login, login};

use super::{CONFIG, dead_endpoint, fault, hub};

#[test]
fn a_refusal_means_a_bad_token_or_none() -> Result<()> {
    let (hub, _dir, settings) = hub(&[CONFIG])?;
    hub.refuse("whoami-v2", 401, "");
    assert_eq!(login(&settings)?, Login::Anonymous);
    let settings = HubSettings { token: Some("hf_secret".into()), ..settings };
    assert_eq!(login(&settings)?, Login::Refused);
    let requests = hub.take_requests();
    assert!(requests.iter().all(|request| request.line.ends_with("api/whoami-v2")));
    Ok(())
}

#[test]
fn the_hub_says_whose_token_it_is() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let server = std::thread::spawn(move || -> Result<Vec<String>> {
        let (mut stream, _) = listener.accept()?;
        let lines = BufReader::new(stream.try_clone()?).lines();
        let head = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let body = r#"{"type": "user", "name": "ada"}"#;
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        Ok(head)
    });
    let settings =
        HubSettings { token: Some("hf_secret".into()), ..HubSettings::new(endpoint, "cache") };
    assert_eq!(login(&settings)?, Login::Account("ada".into()));
    let head = server.join().expect("the server does not panic")?;
    assert!(head.iter().any(|line| line.to_lowercase().starts_with("authorization: bearer hf_")));
    Ok(())
}

#[test]
fn a_hub_that_is_away_or_is_none_is_an_error_with_its_address() -> Result<()> {
    let settings = HubSettings::new(dead_endpoint()?, "cache");
    let message = fault(login(&settings), &settings);
    assert!(message.starts_with("`HUB`: "), "{message}");
    let (hub, _dir, settings) = hub(&[CONFIG])?;
    hub.refuse("whoami-v2", 503, "");
    assert_eq!(fault(login(&settings), &settings), "`HUB` answers with the status 503");
    Ok(())
}
