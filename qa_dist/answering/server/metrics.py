"""What the server counts, as Prometheus reads it. No text of a request is in it."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from qa_dist.answering.server.batching import Worker

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_QUESTIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one server; what a process uses (`process_...`) is among them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "qa_dist_requests",
            "Requests that got a response, by path and status",
            ("path", "status"),
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "qa_dist_request_seconds",
            "From the head of a request for answers to its response",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batch_questions = Histogram(
            "qa_dist_batch_questions", "Questions of a batch", buckets=_QUESTIONS, registry=self._registry
        )
        self._batch_seconds = Histogram(
            "qa_dist_batch_seconds", "Seconds that a batch took", buckets=_SECONDS, registry=self._registry
        )
        self._waiting = Gauge("qa_dist_waiting_requests", "Requests that wait for the device", registry=self._registry)
        self._characters = Gauge(
            "qa_dist_waiting_characters", "Characters that wait for the device", registry=self._registry
        )
        ProcessCollector(registry=self._registry)

    def watch(self, worker: Worker) -> None:
        """Show what waits for a worker."""
        self._waiting.set_function(lambda: worker.num_waiting_requests)
        self._characters.set_function(lambda: worker.num_waiting_characters)

    def count_batch(self, num_questions: int, seconds: float) -> None:
        self._batch_questions.observe(num_questions)
        self._batch_seconds.observe(seconds)

    def count_response(self, path: str, status: int, seconds: float) -> None:
        """Count a response; only requests for answers are timed."""
        self._requests.labels(path, str(status)).inc()
        if path == "/answer":
            self._request_seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it in the text format of Prometheus."""
        return prometheus_client.generate_latest(self._registry)
