//! Errors in OpenAI's form: a status, and `{"error": {"message", "type", "param", "code"}}`.

use std::fmt;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Seconds after which a client may try again when the queue is full.
const RETRY_AFTER_SECS: &str = "1";

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The status of the response.
    pub status: StatusCode,
    /// What was found, and what would be right.
    pub message: String,
    /// The field of the request that is at fault, if it is one.
    pub param: Option<String>,
    /// What programs tell errors apart by.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// An error without a field.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: Some(code) }
    }

    /// A request that is wrong as a whole.
    pub fn invalid(message: impl Into<String>) -> Self {
        let status = StatusCode::BAD_REQUEST;
        Self { status, message: message.into(), param: None, code: None }
    }

    /// A field with a wrong value.
    pub fn field(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::invalid(message) }
    }

    /// A field that is right for OpenAI, but has an effect that dylora does not have.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// A server that ends.
    pub fn shutting_down() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "the server is shutting down")
    }

    /// A text that ended without a reason.
    pub(crate) fn internal() -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::new(status, "internal_error", "the model failed; the server's log says more")
    }

    /// OpenAI's `type`.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body of the response.
    pub fn json(&self) -> Value {
        json!({
            "error": {
                "message": self.message,
                "type": self.kind(),
                "param": self.param,
                "code": self.code,
            }
        })
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status, self.message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(&self.json());
        *response.status_mut() = self.status;
        let mut add = |name, value| response.headers_mut().insert(name, value);
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => {
                add(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECS));
            }
            StatusCode::UNAUTHORIZED => {
                add(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // another try would take as long
            StatusCode::GATEWAY_TIMEOUT => {
                let name = header::HeaderName::from_static("x-should-retry");
                add(name, HeaderValue::from_static("false"));
            }
            _ => {}
        }
        response
    }
}

/// A response with status 200.
pub(crate) fn json_response(json: &Value) -> Response {
    let mut response = Response::new(Body::from(json.to_string()));
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
