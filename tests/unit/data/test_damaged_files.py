"""Files of data with damage: one sentence, or examples that are sound."""

import gzip
import io
from pathlib import Path

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from qa_dist.common.errors import DataError
from qa_dist.data.checking import validate
from qa_dist.data.formats import parse
from qa_dist.data.records import Example
from tests.unit.data.layout_writers import WRITERS
from tests.unit.data_fixtures import row as good_row


def read_or_refused(content: bytes, name: str) -> list[Example] | None:
    """The examples in the bytes of a file, which are sound; None of a file that is refused, in one sentence."""
    refused = ""
    try:
        reading = parse(content, Path(name))
    except DataError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(f"{name} ")
        assert "\n" not in refused
        return None
    for for_training in (False, True):
        examples, report = validate(reading, for_training=for_training)
        assert report.num_records == len(examples) + report.num_invalid
        report.text().encode()
        for example in examples:
            for answer in example.answers:
                assert answer.text.strip()
                assert example.context[answer.start_char : answer.end_char] == answer.text
    return examples


@given(content=st.binary(max_size=60), name=st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.parquet", "a.gz", "a"]))
def test_bytes_of_no_file_hold_no_example(content: bytes, name: str) -> None:
    assert not read_or_refused(content, name), "60 bytes hold no question with its context"


def files_of_each_kind() -> dict[str, tuple[str, bytes]]:
    """A name and the bytes of a good file, by what it is called here."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    good = [
        good_row("a"),
        good_row("b", answers={"text": ["lake", "deep"], "answer_start": [15, 33]}),
        good_row("c", context="Émile čte 🦉 u jezera.", answers={"text": ["jezera"], "answer_start": [14]}),
    ]
    files = {kind: (name, write(good).encode()) for kind, (name, write, _) in WRITERS.items()}
    binary = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(good), binary)
    return {**files, "Parquet": ("a.parquet", binary.getvalue()), "gzip": ("a.json.gz", files["SQuAD"][1])}


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with up to three places in which a bit is flipped, or bytes are cut out, there twice, or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content) - 1))
        part = content[start : start + draw(st.integers(1, 40))]
        change = draw(st.sampled_from(["flip", "cut", "double", "insert"]))
        if change == "flip":
            put = bytes([part[0] ^ 1 << draw(st.integers(0, 7)), *part[1:]])
        elif change == "insert":
            put = draw(st.binary(min_size=1, max_size=4)) + part
        else:
            put = b"" if change == "cut" else part * 2
        content = content[:start] + put + content[start + len(part) :]
        assume(content)
    return content


@pytest.mark.parametrize("kind", [*WRITERS, "Parquet", "gzip"])
def test_a_damaged_file_is_one_sentence_or_sound_examples(kind: str) -> None:
    name, content = files_of_each_kind()[kind]
    packed = gzip.compress(content, mtime=0) if kind == "gzip" else content
    assert len(read_or_refused(packed, name) or ()) == 3
    outcomes = set()

    @settings(max_examples=100)
    @given(data=st.data())
    def damage(data: st.DataObject) -> None:
        # Damage before the compression gets past its checksum.
        if kind == "gzip" and data.draw(st.booleans()):
            bad = gzip.compress(data.draw(damaged(content)), mtime=0)
        else:
            bad = data.draw(damaged(packed))
        assume(bad != packed)
        # Without a suffix the bytes say what they are.
        examples = read_or_refused(bad, data.draw(st.sampled_from([name, "a.gz" if kind == "gzip" else "a"])))
        outcome = "refused" if examples is None else "read" if examples else "nothing in it"
        event(outcome)
        outcomes.add(outcome)

    damage()
    assert outcomes >= {"refused", "read"}, "what never happens is not looked at"
