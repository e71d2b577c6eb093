"""How much one client may ask of the server, and for how long."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may be.

    Attributes:
        max_body_bytes: Bytes of a request's body.
        max_context_characters: Characters of one context.
        max_questions: Questions of one request, or contexts of one question.
        max_top_k: Answers that may be asked for per question.
        request_seconds: From the end of a request's body to its answer.
        receive_seconds: For the head of a request to arrive, for its body, and for a client to take an answer.
        max_connections: Connections of all clients.
    """

    max_body_bytes: int = 2**20
    max_context_characters: int = 100_000
    max_questions: int = 64
    max_top_k: int = 20
    request_seconds: float = 30.0
    receive_seconds: float = 10.0
    max_connections: int = 512
