"""core.data_reader: every format gives the same rows, damage stays where it is, memory stays bounded."""

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbot.core.data_formats import normalise, recognise
from llmbot.core.data_reader import find_sources, read_rows
from llmbot.core.data_rows import MAX_ROW_BYTES, Row
from llmbot.core.errors import DataError

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(lambda t: t.strip() == t)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=8)


def write(path: Path, rows: list[dict]) -> Path:
    "Write rows with libraries that are not ours."
    kind = "".join(path.suffixes)
    if kind == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == ".jsonl.gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if kind == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(yaml.safe_dump(rows, allow_unicode=True), encoding="utf-8")
    return path


@settings(max_examples=25, deadline=None)
@given(ROWS, st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet", ".yaml"]))
def test_formats_give_the_same_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], kind: str) -> None:
    path = write(tmp_path_factory.mktemp("rows") / f"rows{kind}", rows)
    found = list(read_rows([str(path)]))
    assert [row.problem for row in found] == [None] * len(rows)
    assert [row.record for row in found] == rows
    assert [row.location.row for row in found] == list(range(1, len(rows) + 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=30), min_size=1, max_size=20))
def test_any_bytes_are_rows_or_problems(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    "Whatever stands in a file, good lines before and after it are read."
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    junk = [line.replace(b"\n", b"") for line in lines]
    path.write_bytes(b"\n".join([b'{"text": "first"}', *junk, b'{"text": "last"}']))
    found = list(read_rows([str(path)]))
    assert found[0].record == {"text": "first"}
    assert found[-1].record == {"text": "last"}
    assert found[-1].location.line == len(junk) + 2
    assert all((row.record is None) != (row.problem is None) for row in found)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.sampled_from([".json", ".csv", ".yaml", ".txt", ".parquet", ".json.gz"]))
def test_any_bytes_raise_nothing_but_data_errors(tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: str) -> None:
    path = tmp_path_factory.mktemp("rows") / f"rows{kind}"
    path.write_bytes(data)
    refusal = ""
    try:
        assert all(isinstance(row, Row) for row in read_rows([str(path)]))
    except DataError as exc:
        refusal = str(exc)
    assert not refusal or str(path) in refusal


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt", ".json"])
def test_a_line_of_ten_megabytes(tmp_path: Path, kind: str) -> None:
    "It is one problem with a place and a size, and the rows around it are read."
    path, long = tmp_path / f"rows{kind}", "x" * 10_000_000
    lines = {
        ".jsonl": ['{"text": "a"}', json.dumps({"text": long}), '{"text": "b"}'],
        ".csv": ["text", "a", long, "b"],
        ".txt": ["a", long, "b"],
        ".json": ['[{"text": "a"},', json.dumps({"text": long}) + ",", '{"text": "b"}]'],
    }[kind]
    path.write_text("\n".join(lines))
    found = list(read_rows([str(path)]))
    assert [row.record["text"].strip() for row in found if row.record] == ["a", "b"]
    [problem] = [row for row in found if row.problem]
    assert "8.4 MB" in problem.problem
    assert problem.location.line == lines.index(next(line for line in lines if len(line) > 1000)) + 1
    assert len(problem.excerpt) < 200


def test_memory_is_bounded(tmp_path: Path) -> None:
    "A file of 30 MB in one list is read with a few."
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write("[\n" + ",\n".join(json.dumps({"text": f"{i} " + "word " * 200}) for i in range(30_000)) + "]")
    tracemalloc.start()
    count = sum(1 for row in read_rows([str(path)]) if row.record)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000
    assert peak < 6e6 < path.stat().st_size


@pytest.mark.parametrize(("name", "content", "message"), [
    ("rows.jsonl", b"", "is empty"),
    ("rows.parquet", b"PAR1 not really", "not a Parquet file"),
    ("rows.yaml", b"a: [1, 2", "not YAML"),
    ("rows.yaml", b"- a\n- \xff\n", "line 2: the text is not UTF-8"),
    ("rows.json", b"3", "must hold a list"),
    ("rows.csv", b"a,a\n1,2\n", "must name the columns"),
    ("rows.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
    ("rows.bin", b"x", "unknown kind of file"),
    ("rows.jsonl.gz", b"no gzip", "cannot be read"),
])  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows([str(tmp_path / name)]))
    assert name in str(caught.value)


def test_gzip_cut_in_half(tmp_path: Path) -> None:
    whole = gzip.compress(b"\n".join(json.dumps({"text": str(i) * 50}).encode() for i in range(1000)))
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows([str(tmp_path / "rows.jsonl.gz")]))


def test_sources(tmp_path: Path) -> None:
    "Directories are read in sorted order; what is no data is named; what is missing is refused at once."
    for name in ("b.jsonl", "a/c.csv", "notes.pdf", ".hidden.jsonl", "README.md", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\nx\n")
    sources = find_sources([str(tmp_path)])
    assert [Path(name).name for name in sources.names] == ["c.csv", "b.jsonl", "d.txt"]
    assert sorted(Path(name).name for name in sources.ignored) == ["README.md", "notes.pdf"]
    for paths, message in (([], "There is no data"), ([str(tmp_path / "none")], "no such file"), (["squad"], "hf:squad")):
        with pytest.raises(DataError, match=message):
            read_rows(paths)
    (tmp_path / "only").mkdir()
    with pytest.raises(DataError, match="holds no data"):
        read_rows([str(tmp_path / "only")])


def test_hub_offline() -> None:
    with pytest.raises(DataError, match=r"hf:nobody/nothing: .*network"):
        list(read_rows(["hf:nobody/nothing"]))


def test_data_sets_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A data set as `datasets` knows it, here in a local directory, with and without a split of its own."
    monkeypatch.chdir(tmp_path.parent)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split, "completion": "x"}))
    for name, split in ((f"hf:{tmp_path}", "train"), (f"hf:{tmp_path}@test", "test"), (f"hf:./{tmp_path.name}", "train")):
        [row] = read_rows([name])
        assert row.record == {"prompt": split, "completion": "x"}
        assert str(row.location) == f"{name}, row 1"
    with pytest.raises(DataError, match=f"hf:{tmp_path.name}@test means the data set on the hub.* hf:./{tmp_path.name};"):
        read_rows([f"hf:{tmp_path.name}@test"])


def test_json_lines_and_objects_in_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": ')
    found = list(read_rows([str(path)]))
    assert [row.record for row in found] == [{"text": "a"}, {"text": "b"}, None]
    assert "cut off" in found[2].problem
    path.write_text(json.dumps({"version": "1", "rows": [{"text": "a"}]}))
    assert [row.record for row in read_rows([str(path)])] == [{"text": "a"}]


PROMPT, GOOD, BAD = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "?"})


@pytest.mark.parametrize("record", [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "?"},
    {"prompt": [PROMPT], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [PROMPT, GOOD], "rejected": [PROMPT, BAD]},
    {"prompt": "Hi", "chosen": [PROMPT, GOOD], "rejected": [PROMPT, BAD]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
     "rejected": {"from": "gpt", "value": "?"}},
    {"messages": [PROMPT], "chosen": GOOD, "rejected": BAD},
])  # fmt: skip
def test_preferences_agree(record: dict) -> None:
    "Six ways to write one preference."
    assert recognise(record) == "preference"
    assert normalise(record, "preference") == [{"kind": "preference", "prompt": [PROMPT], "chosen": [GOOD], "rejected": [BAD]}]


@pytest.mark.parametrize("record", [
    {"messages": [PROMPT, GOOD]},
    {"conversations": [PROMPT, GOOD]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"conversations": ["Hi", "Hello"]},
    {"prompt": "Hi", "completion": "Hello"},
    {"prompt": [PROMPT], "completion": [GOOD]},
    {"question": "Hi", "answer": "Hello"},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"instruction": "Hi", "input": None, "output": "Hello", "system": ""},
])  # fmt: skip
def test_conversations_agree(record: dict) -> None:
    assert normalise(record, recognise(record)) == [{"kind": "chat", "messages": [PROMPT, GOOD]}]


@pytest.mark.parametrize(("record", "message"), [
    ({"a": 1}, "it has 'a'"),
    ({}, "it has no columns"),
    ({"messages": "Hi"}, "no known format"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "ShareGPT turn needs"),
    ({"conversations": [{"from": "function_call", "value": "{"}]}, "not JSON"),
    ({"messages": [PROMPT, GOOD], "tools": "{"}, "'tools' is not JSON"),
    ({"prompt": "x", "completion": ["y"]}, "'role' and 'content'"),
    ({"instruction": "x", "output": {"a": 1}}, "'output' must be text"),
    ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ({"prompt": {"replies": [], "role": "x"}}, "a tree needs"),
])  # fmt: skip
def test_records_that_fit_nothing(record: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        normalise(record, recognise(record))


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.sampled_from(["messages", "conversations", "role", "content", "from", "value", "prompt", "completion", "chosen",
                                          "rejected", "text", "label", "tools", "instruction", "output", "replies", "history"]), inner),
       max_leaves=12))  # fmt: skip
def test_any_record_is_examples_or_a_data_error(record: object) -> None:
    if not isinstance(record, dict):
        return
    try:
        for example in normalise(record, recognise(record)):
            assert example["kind"] in ("chat", "text", "preference")
    except DataError:
        pass


def test_limit_is_what_the_docs_say() -> None:
    assert MAX_ROW_BYTES == 8 * 2**20
