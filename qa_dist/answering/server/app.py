"""The application: `POST /answer`, `/health`, `/metrics`, `/openapi.json`, and the pages `/` and `/docs`."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import qa_dist
from qa_dist.answering.records import InvalidQuestionError, record_of
from qa_dist.answering.server.batching import QuestionError, QueueClosedError, QueueFullError, Worker
from qa_dist.answering.server.guard import FAILED, Guard, log_failure
from qa_dist.answering.server.limits import Limits
from qa_dist.answering.server.messages import (
    AnswerRequest,
    AnswerResponse,
    ErrorResponse,
    RefusedError,
    read_request,
)
from qa_dist.answering.server.metrics import CONTENT_TYPE, Metrics
from qa_dist.answering.server.pages import Page, load_page
from qa_dist.common.errors import DataError

if TYPE_CHECKING:
    from qa_dist.answering.records import Answer, Question

PATHS = ("/", "/answer", "/docs", "/health", "/metrics", "/openapi.json")

_DISCARDED = 8
"""A body of up to so many times the limit is read and thrown away before it is refused.

Most clients send all of a request before they read the response, and would see a broken connection instead.
"""

_MAX_DIGITS = 18

_STUCK = 4
"""A batch in work for so many times the limit of a request is a device that no longer answers."""

_MANY_FAILED = 16
"""So many questions that fail one after the other are a device or a model that is broken."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON"},
    401: {"model": ErrorResponse, "description": "The key is missing or wrong"},
    408: {"model": ErrorResponse, "description": "The body took too long"},
    413: {"model": ErrorResponse, "description": "Body, text or number of questions above the limit"},
    415: {"model": ErrorResponse, "description": "The content type is not application/json"},
    422: {"model": ErrorResponse, "description": "JSON, but no questions that can be answered"},
    429: {"model": ErrorResponse, "description": "Too much waits; Retry-After says for how long"},
    503: {"model": ErrorResponse, "description": "No turn within the time limit, or the server is stopping"},
    504: {"model": ErrorResponse, "description": "Begun, but not answered within the time limit"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the paths do.

    Attributes:
        worker: Answers questions.
        limits: What a request may be.
        model: Name of the model, for people.
        keys: Any of these is to be in the header `Authorization: Bearer KEY`; none: everybody may ask.
        metrics: Counts.
    """

    worker: Worker
    limits: Limits
    model: str
    keys: Collection[bytes]
    metrics: Metrics

    async def answer(self, request: Request) -> Response:
        """Answer questions about texts."""
        self._check_key(request)
        _check_content_type(request)
        try:
            body = await self._read_body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        questions, top_k = read_request(body, self.limits)
        answers = await self._answers(request, questions, top_k)
        if answers is None:
            # The client has gone; nobody reads this.
            return Response(status_code=499)
        return JSONResponse({"answers": [record_of(found, with_nbest=top_k > 1) for found in answers]})

    async def health(self) -> Response:
        """Say whether questions are answered, by which model, and within which limits."""
        status = "ok"
        if not self.worker.is_alive:
            status = "the worker has ended"
        elif self.worker.busy_seconds > _STUCK * self.limits.request_seconds:
            status = "the device does not answer"
        elif self.worker.num_failed_in_a_row >= _MANY_FAILED:
            status = "every question fails"
        limits = {
            "max_body_bytes": self.limits.max_body_bytes,
            "max_context_characters": self.limits.max_context_characters,
            "max_questions": self.limits.max_questions,
            "max_top_k": self.limits.max_top_k,
        }
        content = {
            "status": status,
            "model": self.model,
            "version": qa_dist.__version__,
            "needs_api_key": bool(self.keys),
            "limits": limits,
        }
        return JSONResponse(content, status_code=200 if status == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Count requests, batches, seconds and what the process uses, as Prometheus reads it."""
        self._check_key(request)
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    def _check_key(self, request: Request) -> None:
        """Refuse a request without a key, in a time that says nothing of the right ones."""
        if not self.keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise RefusedError(
                401, "a key is needed; send it in the header Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
            )

    async def _read_body(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            RefusedError: It is too long, or took too long.
            ClientDisconnect: The client has gone.
        """
        most = self.limits.max_body_bytes
        close = {"Connection": "close"}
        too_long = RefusedError(413, f"the body is longer than {most:,} bytes; send fewer or shorter texts", close)
        declared = request.headers.get("content-length", "0")
        # More digits than these are too many, whatever follows them.
        length = int(declared[:_MAX_DIGITS]) if declared.isascii() and declared.isdigit() else 0
        if length > most and (length > _DISCARDED * most or "expect" in request.headers):
            raise too_long
        reading = asyncio.ensure_future(_read_parts(request, most))
        try:
            # Unlike a timeout around the reading, this takes a body that came while the server itself stood still.
            await asyncio.wait((reading,), timeout=self.limits.receive_seconds)
            if not reading.done():
                seconds = self.limits.receive_seconds
                raise RefusedError(408, f"the body was not there after {seconds:g} s; send it at once", close)
            body = reading.result()
        finally:
            reading.cancel()
        if body is None:
            raise too_long
        return body

    async def _answers(self, request: Request, questions: "list[Question]", top_k: int) -> "list[list[Answer]] | None":
        """The answers of each question; None if the client went away meanwhile.

        Raises:
            RefusedError: There are none within the time limit, or a question cannot be answered.
        """
        try:
            waiting = self.worker.submit(questions, top_k)
        except QueueFullError as error:
            retry = {"Retry-After": str(error.retry_seconds)}
            raise RefusedError(429, f"too much waits already; try again in {error.retry_seconds} s", retry) from None
        except QueueClosedError:
            raise RefusedError(503, "the server is stopping", {"Connection": "close"}) from None
        answers = asyncio.wrap_future(waiting.future)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait(
                (answers, gone), timeout=self.limits.request_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if answers.done():
                return answers.result()
            if gone.done():
                return None
        except QuestionError as error:
            raise _refusal(error, len(questions)) from error
        finally:
            gone.cancel()
            answers.cancel()
        seconds = self.limits.request_seconds
        if waiting.num_taken:
            raise RefusedError(504, f"this took longer than {seconds:g} s; ask less at once")
        raise RefusedError(503, f"its turn did not come within {seconds:g} s; try again later", {"Retry-After": "5"})


def _refusal(error: QuestionError, num_questions: int) -> RefusedError:
    """What the client is told about a question that could not be answered."""
    cause = error.__cause__
    place = f'item {error.index} of "questions": ' if num_questions > 1 else ""
    if isinstance(cause, InvalidQuestionError):
        return RefusedError(422, place + cause.problem)
    if isinstance(cause, DataError):
        return RefusedError(422, place + str(cause))
    log_failure(cause or error)
    return RefusedError(500, place + "the server failed at this question; its log says more")


async def _read_parts(request: Request, most: int) -> bytes | None:
    """All of a body; None if it has more than `most` bytes.

    Raises:
        ClientDisconnect: The client has gone.
    """
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            body += part
        elif size > _DISCARDED * most:
            break
    return bytes(body) if size <= most else None


async def _disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_content_type(request: Request) -> None:
    """Refuse what is not plain JSON, among it all that a form of another site could send."""
    kind, _, parameter = request.headers.get("content-type", "").lower().partition(";")
    is_utf_8 = parameter.replace('"', "").strip() in ("", "charset=utf-8", "charset=utf8")
    if kind.strip() != "application/json" or not is_utf_8:
        raise RefusedError(415, "the content type is not application/json in UTF-8; set Content-Type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusedError(415, "the body is compressed; send it as it is")


def make_app(service: Service, *, hosts: Collection[str], close_seconds: float) -> Guard:
    """The ASGI application.

    Args:
        service: What the paths do.
        hosts: Names in the header `Host` that are answered; empty: any.
        close_seconds: How long the worker may take, when the server stops, for what waits.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.close, close_seconds)

    app = FastAPI(
        title="qa_dist",
        version=qa_dist.__version__,
        summary="Answers to questions, as they stand in a text",
        docs_url=None,
        # A path with a slash too many is none of these, which is said as JSON; a redirection would have no body.
        redirect_slashes=False,
        redoc_url=None,
        lifespan=lifespan,
    )
    body = {"required": True, "content": {"application/json": {"schema": AnswerRequest.model_json_schema()}}}
    app.add_api_route(
        "/answer",
        service.answer,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": AnswerResponse, "description": "An answer per question"}, **_ERRORS},
        openapi_extra={"requestBody": body},
    )
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    # Apart from GET, which the description of the interface names: what watches a server may ask for the head alone.
    app.add_api_route("/health", service.health, methods=["HEAD"], response_model=None, include_in_schema=False)
    app.add_api_route("/metrics", service.show_metrics, methods=["GET"], response_model=None)
    for path, name in (("/", "page.html"), ("/docs", "docs.html")):
        app.add_api_route(path, _shown(load_page(name)), methods=["GET", "HEAD"], include_in_schema=False)
    app.add_exception_handler(RefusedError, _show_refusal)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_exception_handler(Exception, _show_failure)
    return Guard(app, hosts=hosts, paths=PATHS, metrics=service.metrics)


def _shown(page: Page) -> Any:
    """An endpoint that shows a page."""

    async def show() -> Response:
        headers = {"Content-Security-Policy": page.security_policy, "Cache-Control": "no-cache"}
        return Response(page.content, media_type="text/html; charset=utf-8", headers=headers)

    return show


async def _show_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse({"error": str(error)}, status_code=error.status, headers=error.headers)


async def _show_failure(request: Request, error: Exception) -> Response:
    """What is our mistake; `Guard` logs it."""
    return JSONResponse({"error": FAILED}, status_code=500)


async def _show_http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    sentences = {
        404: f"there is nothing at this path; the paths are {', '.join(PATHS)}",
        405: "this path does not take that method; /answer takes POST, the others GET",
    }
    sentence = sentences.get(error.status_code, str(error.detail))
    return JSONResponse({"error": sentence}, status_code=error.status_code, headers=error.headers)
