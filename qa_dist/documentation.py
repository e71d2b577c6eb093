"""Generated parts of the documentation: `python -m qa_dist.documentation FILE ...` rewrites them in place."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from qa_dist.common.command import run
from qa_dist.common.errors import UserError
from qa_dist.compatibility import compatibility_table, refusal_table
from qa_dist.config.options import GROUPS
from qa_dist.config.parsing import option_table
from qa_dist.doctor import DoctorConfig
from qa_dist.evaluate import EvaluateConfig
from qa_dist.memory.estimate import EstimateConfig

PROG = "qa_dist.documentation"
_PART = re.compile(r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- end of generated part -->)", re.DOTALL)


def parts() -> dict[str, str]:
    """Every generated part by name, as Markdown."""
    return {
        "options": option_table(
            {
                **GROUPS,
                "evaluate only": EvaluateConfig,
                "estimate only": EstimateConfig,
                "doctor only": DoctorConfig,
            }
        ),
        "compatibility": compatibility_table(),
        "refusals": refusal_table(),
    }


def regenerated(text: str) -> str:
    """`text` with each generated part as it should be.

    Raises:
        UserError: It marks a part that nobody generates.
    """
    known = parts()

    def part(match: re.Match[str]) -> str:
        if match["name"] not in known:
            raise UserError(f"nothing generates the part {match['name']}; the parts are {', '.join(known)}")
        return f"{match[1]}\n{known[match['name']]}\n{match[3]}"

    return _PART.sub(part, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the files named on the command line."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        for word in words:
            path = Path(word)
            try:
                path.write_text(regenerated(path.read_text(encoding="utf-8")), encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise UserError(f"{path} cannot be rewritten ({error}); name a text file") from error
        return 0

    return run(PROG, work)


if __name__ == "__main__":
    sys.exit(main())
