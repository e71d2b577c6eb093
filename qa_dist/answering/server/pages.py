"""Pages for a browser. Each is one file that loads nothing else, and its policy lets only its own script run."""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Page:
    """A page as it is sent.

    Attributes:
        content: HTML in UTF-8.
        security_policy: Value of the header Content-Security-Policy.
    """

    content: bytes
    security_policy: str


def load_page(name: str) -> Page:
    """A page of this folder.

    Its policy names its scripts and styles by their hashes: whatever gets into the page later, by whatever mistake,
    does not run. It talks to this server alone.
    """
    content = (resources.files("qa_dist.answering.server") / name).read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_hashes('script', content)}",
        f"style-src {_hashes('style', content)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    return Page(content, "; ".join(policy))


def _hashes(tag: str, content: bytes) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), content, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)
