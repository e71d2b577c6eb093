"""The `qa-dist` command: every entry point under one name."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "prepare": "build the feature store of a data set, once",
    "train": "train on this process (several: accelerate launch -m qa_dist.train)",
    "evaluate": "score a trained model",
    "score": "score a predictions file as the official SQuAD scripts do",
    "merge": "fold an adapter into its base model",
    "estimate": "the memory that a run will take, by part, and the token budget that fits",
    "doctor": "look at this machine: devices, versions, communication, disks, limits",
    "recipes": "recipes, launcher configurations and scripts: list, show, copy and check them",
    "bench": "measure speed and memory, beside transformers' Trainer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qa-dist COMMAND ...`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        # qa_dist/recipes is the folder of the recipes themselves.
        module = "recipe_command" if words[0] == "recipes" else words[0]
        code: int = importlib.import_module(f"qa_dist.{module}").main(words[1:])
        return code
    asked = not words or words[0] in ("-h", "--help")
    listing = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    usage = f"usage: qa-dist COMMAND [options]\n\n{listing}\n\nqa-dist COMMAND --help lists the options of a command.\n"
    if asked:
        sys.stdout.write(usage)
        return 0
    sys.stderr.write(f"qa-dist: error: {words[0]!r} is no command; use one of {', '.join(COMMANDS)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
