//! The connections: how they are accepted, how long a client may take, and how all of it ends.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};

use super::http::{App, router};
use super::limits::Limits;

/// Time between two looks at the flag that ends the server.
const POLL: Duration = Duration::from_millis(50);
/// Time to wait when no connection can be accepted, for example without free file descriptors.
const RETRY: Duration = Duration::from_millis(100);
/// Longest time that answers have to be read when their texts are complete.
const CLOSE: Duration = Duration::from_secs(5);
/// The most that is kept of a connection, in each direction, in bytes.
const BUFFER: usize = 64 << 10;

/// Serves until one of `stop` is set and running texts have ended.
pub async fn serve(listener: TcpListener, app: Arc<App>, stop: [&AtomicBool; 2]) {
    let places = Arc::new(Semaphore::new(app.limits.max_connections));
    let router = router(&app);
    let (closing, is_closing) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut drained = pin!(drain(&app, stop));
    let is_drained = loop {
        let accept = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        tokio::select! {
            is_drained = &mut drained => break is_drained,
            (accepted, place) = accept => match accepted {
                Ok((stream, _)) => {
                    let (router, is_closing) = (router.clone(), is_closing.clone());
                    let app = app.clone();
                    connections.spawn(async move {
                        let _place = place;
                        app.metrics.connections.fetch_add(1, Ordering::Relaxed);
                        connection(stream, router, app.limits, is_closing).await;
                        app.metrics.connections.fetch_sub(1, Ordering::Relaxed);
                    });
                }
                Err(error) => {
                    tracing::debug!("cannot accept a connection: {error}");
                    sleep(RETRY).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    };
    drop(listener);
    let _ = closing.send(true);
    if is_drained {
        let all = async { while connections.join_next().await.is_some() {} };
        let _ = timeout(CLOSE, all).await;
    }
    connections.shutdown().await;
}

/// Waits until one of `stop` is set, and then until no text is left. Returns whether none is.
async fn drain(app: &App, stop: [&AtomicBool; 2]) -> bool {
    while !stop.iter().any(|flag| flag.load(Ordering::Relaxed)) {
        sleep(POLL).await;
    }
    app.is_draining.store(true, Ordering::Relaxed);
    let num_places = app.limits.num_places();
    let num_texts = num_places - app.places.available_permits();
    tracing::info!("shutting down; {num_texts} text(s) are still running");
    let all = app.places.acquire_many(num_places as u32);
    let is_drained = timeout(app.limits.drain_time, all).await.is_ok();
    if !is_drained {
        let num_texts = num_places - app.places.available_permits();
        let secs = app.limits.drain_time.as_secs_f64();
        tracing::warn!("{num_texts} text(s) did not end within {secs} s and are cancelled");
    }
    is_drained
}

async fn connection(
    stream: TcpStream,
    router: Router,
    limits: Limits,
    mut is_closing: watch::Receiver<bool>,
) {
    // pieces of text are small and must not wait for each other
    let _ = stream.set_nodelay(true);
    let stream = TokioIo::new(Stalling::new(stream, limits.write_time));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_time)
        .max_buf_size(BUFFER)
        .serve_connection(stream, TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let closing = async {
        let _ = is_closing.wait_for(|is_closing| *is_closing).await;
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = closing => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended: {error}");
    }
}

/// A connection that fails if its client reads nothing for too long.
struct Stalling {
    stream: TcpStream,
    longest: Duration,
    /// Runs while a write waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Stalling {
    fn new(stream: TcpStream, longest: Duration) -> Self {
        Self { stream, longest, deadline: None }
    }

    /// The result of a write, which fails if it has waited for too long.
    fn watch<T>(
        &mut self,
        result: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.deadline = None;
            return result;
        }
        let longest = self.longest;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(longest)));
        ready!(deadline.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Stalling {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stalling {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(result, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.watch(result, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(result, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
