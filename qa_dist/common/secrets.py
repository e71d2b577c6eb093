"""Secrets in text: what looks like one, and the text without it.

Access tokens belong into environment variables such as HF_TOKEN, which nothing here writes anywhere. But one can end up
in an option by mistake, and options end up in logs, in config.yaml and in run.json.
"""

import os
import re

_MASK = "***"
_NAMED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
_SHORTEST = 8
"""Shorter values of the variables above occur in text by chance."""

_PATTERNS = (
    # Tokens of the Hugging Face hub: of users, and of organisations.
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    # https://user:password@host
    re.compile(r"(?<=://)[^/@\s]+(?=@)"),
    # ?token=..., &api_key=...
    re.compile(r"(?<=[?&])(?:access_token|token|api_key|apikey|password|secret|sig|signature)=[^&\s]+", re.IGNORECASE),
)


def masked(text: str) -> str:
    """`text` with everything that looks like a token or password replaced by three stars."""
    for name in _NAMED:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            text = text.replace(value, _MASK)
    for pattern in _PATTERNS:
        text = pattern.sub(_MASK, text)
    return text
