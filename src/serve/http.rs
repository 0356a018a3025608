//! The HTTP endpoints: who may ask, what a request may hold, and which part answers it.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream::unfold;
use percent_encoding::percent_decode_str;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::answer::Answer;
use super::error::{ApiError, json_response};
use super::keys::Keys;
use super::limits::Limits;
use super::live::Order;
use super::metrics::Metrics;
use super::models::ServedModel;
use super::request::{Ask, Endpoint};
use super::token_text::TokenTexts;
use super::{chat, completions};

/// Time after which a stream without news sends a comment, so that proxies keep it open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What the tasks that answer requests share.
#[derive(Debug)]
pub(crate) struct App {
    /// The model.
    pub model: ServedModel,
    /// The texts of its tokens.
    pub texts: TokenTexts,
    /// The limits.
    pub limits: Limits,
    /// The keys of clients.
    pub keys: Keys,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The way to the thread that owns the model.
    pub orders: SyncSender<Vec<Order>>,
    /// Room for texts that are generated or wait.
    pub places: Arc<Semaphore>,
    /// The tokens that end a completion.
    pub end_tokens: Arc<[i64]>,
    /// The tokens that end an answer in a chat.
    pub chat_end_tokens: Arc<[i64]>,
    /// Whether the server ends, so that it takes no new requests.
    pub is_draining: AtomicBool,
    /// When the server started.
    pub started: SystemTime,
}

/// The endpoints.
pub fn router(app: &Arc<App>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), admit))
        .with_state(app.clone())
}

/// The name of an endpoint in metrics.
fn endpoint_name(path: &str) -> &'static str {
    match path {
        "/health" => "/health",
        "/metrics" => "/metrics",
        "/v1/completions" => "/v1/completions",
        "/v1/chat/completions" => "/v1/chat/completions",
        _ if path == "/v1/models" || path.starts_with("/v1/models/") => "/v1/models",
        _ => "other",
    }
}

/// Lets a request through if its client may ask, and counts the response.
async fn admit(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let endpoint = endpoint_name(request.uri().path());
    let authorization = request.headers().get(header::AUTHORIZATION);
    let authorization = authorization.and_then(|value| value.to_str().ok());
    let is_known = endpoint == "/health" || app.keys.accept(authorization);
    let is_draining = app.is_draining.load(Ordering::Relaxed);
    let started = Instant::now();
    let mut response = match (is_known, is_draining && endpoint != "/metrics") {
        (false, _) => {
            let message = "the API key is missing or wrong: `Authorization: Bearer KEY`";
            let status = StatusCode::UNAUTHORIZED;
            ApiError::new(status, "invalid_api_key", message).into_response()
        }
        (true, true) => ApiError::shutting_down().into_response(),
        (true, false) => next.run(request).await,
    };
    if is_draining {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let status = response.status();
    app.metrics.responded(endpoint, status);
    tracing::debug!("{endpoint}: {status} after {:.3} s", started.elapsed().as_secs_f64());
    response
}

async fn unknown_path(request: Request) -> ApiError {
    let message = format!("there is no endpoint `{}`", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "unknown_url", message)
}

async fn wrong_method(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("`{path}` does not take `{method}`");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

async fn health() -> Response {
    json_response(&json!({"status": "ok"}))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let num_texts = app.limits.num_places() - app.places.available_permits();
    let active = app.metrics.active.load(Ordering::Relaxed);
    app.metrics.waiting.store((num_texts as u64).saturating_sub(active), Ordering::Relaxed);
    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
    ([(header::CONTENT_TYPE, kind)], app.metrics.to_string()).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Response {
    json_response(&app.model.list(app.started, app.limits.context))
}

async fn model(State(app): State<Arc<App>>, uri: Uri) -> Result<Response, ApiError> {
    let name = uri.path().trim_start_matches("/v1/models/");
    let name = percent_decode_str(name).decode_utf8_lossy();
    let entry = app.model.describe(&name, app.started, app.limits.context)?;
    Ok(json_response(&entry))
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    generate(app, request, Endpoint::Completions).await
}

async fn chat_completions(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(app, request, Endpoint::Chat).await
}

/// Answers a request for texts. If its client goes away, this future is dropped, and so are the
/// receivers of the texts, which ends them.
async fn generate(
    app: Arc<App>,
    request: Request,
    endpoint: Endpoint,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    if app.places.available_permits() == 0 {
        return Err(queue_full(&app.limits));
    }
    check_headers(request.headers(), &app.limits)?;
    let body = read_body(request.into_body(), &app.limits).await?;
    let ask = {
        let app = app.clone();
        // a long prompt takes the tokenizer milliseconds, in which others must not wait
        let parse = spawn_blocking(move || match endpoint {
            Endpoint::Completions => completions::parse(&body, &app.model, &app.limits),
            Endpoint::Chat => chat::parse(&body, &app.model, &app.limits),
        });
        parse.await.map_err(|_| ApiError::internal())??
    };
    let place = take_place(&app, &ask)?;
    let answer = order(&app, ask, place, received)?;
    match answer.is_stream() {
        true => Ok(stream(answer)),
        false => Ok(json_response(&answer.whole().await?)),
    }
}

/// Checks what the headers say of a body.
fn check_headers(headers: &HeaderMap, limits: &Limits) -> Result<(), ApiError> {
    let header = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let kind = header(header::CONTENT_TYPE).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    // a page in a browser cannot send this type to another site without being asked
    if !essence.eq_ignore_ascii_case("application/json") {
        let message = format!(
            "`Content-Type` must be `application/json`, got `{kind}`; for curl, add \
             `-H 'Content-Type: application/json'`"
        );
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Err(ApiError::new(status, "unsupported_media_type", message));
    }
    let bytes = header(header::CONTENT_LENGTH).and_then(|bytes| bytes.parse::<u64>().ok());
    match bytes {
        Some(bytes) if bytes > limits.max_body_bytes as u64 => Err(too_large(limits)),
        _ => Ok(()),
    }
}

/// The body of a request.
async fn read_body(body: Body, limits: &Limits) -> Result<Bytes, ApiError> {
    match timeout(limits.body_time, to_bytes(body, limits.max_body_bytes)).await {
        Ok(Ok(body)) => Ok(body),
        // the connection's own faults end it, so that nobody reads this answer
        Ok(Err(_)) => Err(too_large(limits)),
        Err(_) => {
            let secs = limits.body_time.as_secs_f64();
            let message = format!("the body was not complete after {secs} s");
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message))
        }
    }
}

fn too_large(limits: &Limits) -> ApiError {
    let message = format!("the body must have at most {} bytes", limits.max_body_bytes);
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

fn take_place(app: &App, ask: &Ask) -> Result<OwnedSemaphorePermit, ApiError> {
    // both readers check that the server has so many places
    let num = ask.num_choices() as u32;
    app.places.clone().try_acquire_many_owned(num).map_err(|_| queue_full(&app.limits))
}

fn queue_full(limits: &Limits) -> ApiError {
    let message = format!(
        "the queue is full: at most {} texts wait while {} are generated; try again later",
        limits.max_waiting, limits.max_texts
    );
    ApiError::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
}

/// Orders the texts of a request.
fn order(
    app: &App,
    ask: Ask,
    place: OwnedSemaphorePermit,
    received: Instant,
) -> Result<Answer, ApiError> {
    let num = ask.num_choices();
    // a whole answer keeps all of its pieces in any case
    let unread = match ask.common.is_stream {
        true => app.limits.max_unread,
        false => num * app.limits.context,
    };
    // each text has room for its last piece
    let (sender, receiver) = mpsc::channel(unread + num);
    let times = [received, received + app.limits.request_time];
    let end_tokens = match ask.endpoint {
        Endpoint::Completions => &app.end_tokens,
        Endpoint::Chat => &app.chat_end_tokens,
    };
    let orders = ask.orders(end_tokens, &sender, place, times);
    app.orders.try_send(orders).map_err(|error| match error {
        TrySendError::Full(_) => queue_full(&app.limits),
        TrySendError::Disconnected(_) => ApiError::internal(),
    })?;
    Ok(Answer::new(ask, receiver, app.texts.clone(), app.model.expert_names()))
}

/// An answer as server-sent events.
fn stream(mut answer: Answer) -> Response {
    answer.begin_stream();
    let events = unfold(answer, |mut answer| async {
        let event = Event::default().data(answer.next().await?);
        Some((Ok::<_, Infallible>(event), answer))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // nginx would collect the events otherwise
    let name = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(name, HeaderValue::from_static("no"));
    response
}
