import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist.answering import question_files
from qa_dist.answering.chunks import Asked, chunks, read_question
from qa_dist.answering.question_files import QuestionFiles, Unit, find_files, inside
from qa_dist.answering.question_records import Flaw
from qa_dist.common.errors import DataError
from tests.unit.answering.predicting import rows, write_all_formats, write_jsonl


def asked(path: Path) -> list[Asked | Flaw]:
    """Everything in a file, numbered from 1."""
    records = [record for unit in QuestionFiles([path]).units() for record in unit.parse()]
    return [read_question(record, number) for number, record in enumerate(records, 1)]


def questions(path: Path) -> list[Asked]:
    found = asked(path)
    assert all(isinstance(each, Asked) for each in found), found
    return [each for each in found if isinstance(each, Asked)]


def flaws(path: Path) -> list[tuple[str, str]]:
    return [(each.place, each.problem) for each in asked(path) if isinstance(each, Flaw)]


def test_every_format_holds_the_same_questions(tmp_path: Path) -> None:
    values = rows(5)
    values[3]["context"] = 'two lines,\nand "quotes"; a tab\t and é \u2028 too'
    for path in write_all_formats(tmp_path / "all", values):
        found = questions(path)
        assert [(each.id, each.question.question, *each.question.contexts) for each in found] == [
            (value["id"], value["question"], value["context"]) for value in values
        ], path
        packed = path.with_name(f"{path.name}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        if path.suffix != ".gz":
            assert [each[1:] for each in questions(packed)] == [each[1:] for each in found], packed


def test_the_whole_of_a_file_is_never_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of JSONL, CSV and Parquet a chunk takes what it needs: the digest says what was read."""
    monkeypatch.setattr(question_files, "_ROWS", 2)
    paths = write_all_formats(tmp_path / "all", rows(40))
    for path in paths:
        if path.suffix == ".json" and path.name != "c.json":
            continue
        files = QuestionFiles([path])
        first = next(chunks(files.units(), most_questions=3))
        assert [each.id for each in first.questions] == ["q0", "q1", "q2"]
        if path.suffix in (".jsonl", ".csv"):
            short = path.with_name(f"short-{path.name}")
            length = 3 + (path.suffix == ".csv")
            short.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:length]))
            whole = QuestionFiles([short])
            assert len(list(whole.units())) == 3
            assert files.sha256 == whole.sha256


def test_chunks_depend_on_numbers_and_characters_alone(tmp_path: Path) -> None:
    values = rows(10)
    values[4]["context"] = "w" * 500
    path = write_jsonl(tmp_path / "q.jsonl", values)
    cut = list(chunks(QuestionFiles([path]).units(), most_questions=4, most_characters=300))
    assert [[each.id for each in chunk.questions] for chunk in cut] == [
        ["q0", "q1", "q2", "q3"],
        ["q4"],
        ["q5", "q6", "q7", "q8"],
        ["q9"],
    ]
    assert [chunk.num_units for chunk in cut] == [4, 5, 9, 10]
    assert [chunk.is_short for chunk in cut] == [False, False, False, True]


def test_a_context_with_its_questions_in_a_line_and_several_passages(tmp_path: Path) -> None:
    """MRQA's files, and rows of passages under either name."""
    path = write_jsonl(
        tmp_path / "q.jsonl",
        [
            {"header": {"dataset": "X"}},
            {
                "context": "Mora lies on a lake.",
                "qas": [
                    {"qid": "m1", "question": "where?", "answers": ["on a lake"], "detected_answers": []},
                    {"qid": "m2", "question": "what?", "answers": ["Mora"], "detected_answers": []},
                ],
            },
            {"question": "which?", "contexts": ["one text", "another text"]},
            {"id": 7, "query": "which?", "context": ["one text", "another text"], "answer": "one"},
        ],
    )
    found = questions(path)
    assert [(each.id, each.question.contexts, each.references) for each in found] == [
        ("m1", ("Mora lies on a lake.",), ("on a lake",)),
        ("m2", ("Mora lies on a lake.",), ("Mora",)),
        ("3", ("one text", "another text"), None),
        ("7", ("one text", "another text"), ("one",)),
    ]
    assert found[1].place == "q.jsonl, line 2, context 1, question 2"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("shape", ["rows", "data", "alone", "beside"])
def test_a_list_of_contexts_in_a_document_is_refused_with_what_to_do(
    shape: str, indent: int | None, tmp_path: Path
) -> None:
    question = {"id": "a", "question": "Who?", "contexts": ["one text", "another text"]}
    value = {
        "rows": [question],
        "data": {"data": [question]},
        "alone": question,
        # The text alone would be read, and the list passed over.
        "beside": [{**question, "context": "one text"}],
    }[shape]
    path = tmp_path / "q.json"
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        asked(path)
    assert str(caught.value) == (
        f"{path} has a list of contexts for a question, which is not read of JSON documents; write a line of JSONL for "
        "each question, or a row for each context"
    )
    path.write_text(json.dumps([{**rows(1)[0], "context": 'the "contexts"'}], indent=indent), encoding="utf-8")
    assert len(asked(path)) == 1


def test_a_list_of_contexts_in_a_cell_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("id,question,contexts\n1,Who?,\"['one text', 'another text']\"\n2,Who?,[sic] one text\n")
    what = (
        "contexts is a list in a cell, which would be one text; write a line of JSONL for each question, or a row for"
    )
    assert flaws(path) == [("q.csv, line 2", f"{what} each context")]
    assert [each.id for each in asked(path) if isinstance(each, Asked)] == ["2"]


def test_a_context_with_contexts_beside_it_is_refused(tmp_path: Path) -> None:
    told = "it has a context and contexts beside it; leave out the one that is not to be read"
    path = write_jsonl(
        tmp_path / "q.jsonl",
        [
            {"question": "Who?", "context": "one text", "contexts": ["another text"]},
            {"question": "Who?", "passage": "one text", "contexts": []},
            {"question": "Who?", "context": "one text", "contexts": None},
            {"question": "Who?", "context": None, "contexts": ["another text"]},
        ],
    )
    assert flaws(path) == [("q.jsonl, line 1", told), ("q.jsonl, line 2", told)]
    kept = [each.question.contexts for each in asked(path) if isinstance(each, Asked)]
    assert kept == [("one text",), ("another text",)]
    path = tmp_path / "q.csv"
    path.write_text("question,context,contexts\nWho?,one text,3\nWho?,one text,\nWho?,,another text\n")
    assert flaws(path) == [("q.csv, line 2", told)]
    kept = [each.question.contexts for each in asked(path) if isinstance(each, Asked)]
    assert kept == [("one text",), ("another text",)]


def test_a_table_in_another_encoding_is_said_to_be_in_one(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("id,question,context\n1,Who?,a text\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"q.csv is not UTF-8: byte 0 is 0xff; convert the file to UTF-8$"):
        asked(path)


def test_every_bad_line_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    good = json.dumps(rows(1)[0]).encode()
    bad: list[tuple[bytes, str]] = [
        (b'{"id": "x", "question": ', "it is not JSON"),
        (b'{"question": "a", "question": "b", "context": "c"}', "more than once"),
        (b'{"question": "d\xe9j\xe0", "context": "c"}', "it is not UTF-8"),
        (b'["a list"]', "an entry is not an object"),
        (b'{"question": 3, "context": "c"}', "question is not a string"),
        (b'{"question": "a", "context": " \\t"}', "context is empty or blank"),
        (b'{"question": "", "context": "c"}', "question is empty or blank"),
        (b'{"question": "a", "contexts": []}', "context is not a string"),
        (b'{"question": "a", "contexts": ["b", 3]}', "context is not a string"),
        (b'{"question": "a", "context": "\\ud800"}', "half a surrogate pair"),
        (b'{"question": "a"}', "no question or no context"),
        (b'{"id": {}, "question": "a", "context": "c"}', "id is not a string"),
        (b'{"question": "a", "context": "c", "answers": true}', "answers is neither"),
        (b"{}", "no question or no context"),
    ]
    path.write_bytes(b"\n".join([good, *(line for line, _ in bad), b"", good]))
    found = asked(path)
    assert isinstance(found[0], Asked)
    assert isinstance(found[-1], Asked)
    assert found[-1].place == f"q.jsonl, line {len(bad) + 3}"
    assert len(found) == len(bad) + 2
    for number, ((_, problem), (place, told)) in enumerate(zip(bad, flaws(path), strict=True), 2):
        assert place == f"q.jsonl, line {number}"
        assert problem in told


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_bytes(b'id,question,context\n1,"two\nlines",text\n2,a,text,more\n3,d\xe9j\xe0,text\n4,,text\n5,a,text\n')
    assert flaws(path) == [
        ("q.csv, line 4", "a row has more values than the header has columns"),
        ("q.csv, line 5", "it is not UTF-8"),
        ("q.csv, line 6", "question is empty or blank"),
    ]
    assert [each.id for each in asked(path) if isinstance(each, Asked)] == ["1", "5"]


def test_tables_of_spreadsheets_and_of_pandas(tmp_path: Path) -> None:
    def table(*ids: str) -> Path:
        rows = ("When?,Ada built it in 1871.,1871.0,,", "How far?,It is 4.0 miles.,4.0,,", "Who?,Ada built it.,,,")
        text = "".join(f"{name},{row}\n,,,,,\n" for name, row in zip(ids, rows, strict=True))
        path = tmp_path / "q.csv.gz"
        path.write_bytes(gzip.compress(f"\ufeffid,question,context,answer,,\n{text}".encode()))
        return path

    found = questions(table("7.0", "9.0", "8.0"))
    assert [each.id for each in found] == ["7", "9", "8"]
    assert [each.references for each in found] == [("1871",), ("4.0",), None]
    # As training has it, where not all ids are such.
    for ids in (["1.0", "1.5", "2.0"], ["1", "1.0", "2.0"]):
        assert [each.id for each in questions(table(*ids))] == ids


def test_a_whole_document_may_be_called_jsonl(tmp_path: Path) -> None:
    values = rows(2)
    articles = {"data": [{"paragraphs": [{"context": "w0 stands", "qas": [{"id": "q0", "question": "what?"}]}]}]}
    path = tmp_path / "q.jsonl"
    for text, expected in (
        (json.dumps(values), ["q0", "q1"]),
        (json.dumps(values, indent=1), ["q0", "q1"]),
        (json.dumps(articles, indent=1), ["q0"]),
        (json.dumps(articles), ["q0"]),
    ):
        path.write_text(text, encoding="utf-8")
        assert [each.id for each in questions(path)] == expected


def test_badly_quoted_rows_are_named_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text(
        'id,question,context\n1,"two\nlines",text\n2,"He said "hi" when?",text\n3,a,text\n\n'
        '4,"a,text\n5,b,text\n6,"c",text\n7,d,text\n8,"e\n\nf",text\n9,g\rh,text\n10,i,text\n11,"j,text',
        encoding="utf-8",
    )
    assert flaws(path) == [
        ("q.csv, line 4", "it is not CSV (',' expected after '\"')"),
        ("q.csv, line 7", "it and what follows up to line 9 are not CSV (',' expected after '\"')"),
        ("q.csv, line 14", "it is not CSV (new-line character seen in unquoted field)"),
        ("q.csv, line 16", "it is not CSV (a quote is not closed)"),
    ]
    found = [each for each in asked(path) if isinstance(each, Asked)]
    assert [(each.id, each.place) for each in found] == [
        ("1", "q.csv, line 2"),
        ("3", "q.csv, line 5"),
        ("7", "q.csv, line 10"),
        ("8", "q.csv, line 11"),
        ("10", "q.csv, line 15"),
    ]


def test_a_header_that_is_no_csv_ends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text('question,"con"text\na,b\n', encoding="utf-8")
    with pytest.raises(DataError, match="is not CSV: ',' expected after '\"' at line 1; mend the file"):
        list(QuestionFiles([path]).units())


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/q.jsonl", "b/q.jsonl", "b/other.csv")]
    for path, content in zip(paths, ("{\n", "{\n", 'question,context\n"a"b,c\n'), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    files = QuestionFiles(paths)
    assert [unit.place for unit in files.units()] == ["a/q.jsonl, line 1", "b/q.jsonl, line 1", "other.csv, line 2"]
    # A journal has these: runs go on that were begun with them.
    assert files.names == ["q.jsonl", "q.jsonl", "other.csv"]


def damaged(folder: Path, what: str) -> tuple[Path, int]:
    """A file that cannot be read to its end, and how many questions stand before the damage."""
    path = write_jsonl(folder / "q.jsonl.gz", rows(2000))
    content = path.read_bytes()
    if what == "cut gzip":
        path.write_bytes(content[: len(content) // 2])
        return path, 500
    if what == "no gzip":
        path.write_bytes(gzip.decompress(content))
        return path, 0
    other = (
        folder / {"open quote": "q.csv", "no columns": "n.csv", "html": "page.html", "no Parquet": "q.parquet"}[what]
    )
    header = "question,context\n" if what == "open quote" else "name,place\n"
    texts = {
        "open quote": f'{header}a,b\n"c,d\ne,f\n',
        "no columns": f"{header}a,b\n",
        "html": "<html>\n<body>\n",
        "no Parquet": "PAR1 and nothing more",
    }
    other.write_text(texts[what], encoding="utf-8")
    return other, 1 if what == "open quote" else 0


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("cut gzip", "ends in the middle of its gzip stream"),
        ("no gzip", "is not gzip-compressed although"),
        ("open quote", "has a quote in the row at line 3 that is not closed before the end of the file at line 4"),
        ("no columns", "lacks context, question"),
        ("html", "is neither JSON, JSONL, CSV"),
        ("no Parquet", "is not Parquet"),
    ],
)
def test_damage_is_one_sentence_and_what_stands_before_it_is_given(tmp_path: Path, what: str, told: str) -> None:
    path, least = damaged(tmp_path, what)
    given: list[Unit] = []
    with pytest.raises(DataError, match=told) as caught:
        given.extend(QuestionFiles([path]).units())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(given) >= least


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_files, "LONGEST_UNIT", 1 << 20)
    for name, content in (("q.jsonl", b"x" * (1 << 21)), ("q.csv", b'question,context\na,"' + b"x\n" * (1 << 20))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="has 1 MiB or more in the row at line"):
            list(QuestionFiles([tmp_path / name]).units())


def test_folders_patterns_and_what_is_not_there(tmp_path: Path) -> None:
    paths = write_all_formats(tmp_path / "all", rows(2))
    (tmp_path / "all" / "notes.txt").write_text("no questions", encoding="utf-8")
    assert find_files(str(tmp_path / "all")) == sorted(paths)
    assert [path.name for path in find_files(str(tmp_path / "all" / "*.json"))] == ["c.json", "g.json", "h.json"]
    (tmp_path / "q[1].jsonl").write_text("{}", encoding="utf-8")
    assert find_files(str(tmp_path / "q[1].jsonl")) == [tmp_path / "q[1].jsonl"]
    (tmp_path / "empty").mkdir()
    for output, name, is_inside in (
        ("all/answers.jsonl.gz", "all", True),
        ("all/answers", "all", False),
        ("answers.jsonl", "all", False),
        ("all/answers.json", "all/*.json", True),
        ("answers.json", "all/*.json", False),
        ("answers.json", "**/*.json", True),
        ("all/more/answers.json", "**/*.json", True),
        ("all/more/answers.json", "more/**/*.json", False),
        ("all/more/answers.json", "*/*.json", False),
        ("all/../q[1].jsonl", "q[1].jsonl", True),
        ("q1.jsonl", "q[1].jsonl", False),
    ):
        assert inside(tmp_path / output, str(tmp_path / name)) is is_inside, (output, name)
    wrong: dict[str, str] = {"none.jsonl": "does not exist", "n*.jsonl": "no file matches", "empty": "without files"}
    for name, told in wrong.items():
        with pytest.raises(DataError, match=told):
            find_files(str(tmp_path / name))


def test_two_stars_stand_for_any_number_of_folders(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "q.jsonl" for folder in ("all", "all/more", "all/more/still")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("{}", encoding="utf-8")
    for pattern in ("**", "**/**"):
        assert find_files(str(tmp_path / "all" / pattern / "*.jsonl")) == sorted(paths)


def test_standard_input_is_read_as_it_comes(tmp_path: Path) -> None:
    values: list[Any] = rows(3)
    for path in write_all_formats(tmp_path / "all", values):
        with path.open("rb") as stream:
            found = [record for unit in QuestionFiles([], stream).units() for record in unit.parse()]
        ids = [
            each.id
            for number, record in enumerate(found, 1)
            if isinstance(each := read_question(record, number), Asked)
        ]
        assert ids == ["q0", "q1", "q2"], path
