"""Files as people, spreadsheets and scripts leave them: read exactly, or refused in one line that says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdam_training.errors import DatasetError
from cdam_training.tables import Table, read_table


def table(folder: Path, content: str | bytes, name: str = "data.csv") -> Table:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


def cells(found: Table) -> list[dict[str, Any]]:
    return [dict(record.cells) for record in found.records]


PLAIN = [{"image": "a.png", "label": "cat"}, {"image": "b.png", "label": "dog"}]


@pytest.mark.parametrize(
    "content",
    [
        "image,label\na.png,cat\nb.png,dog\n",
        "image,label\na.png,cat\nb.png,dog",
        "\ufeffimage,label\na.png,cat\nb.png,dog\n",
        "image,label\r\na.png,cat\r\nb.png,dog\r\n",
        "image, label \na.png,cat\n\n,\nb.png,dog\n \n",
        '"image","label"\n"a.png","cat"\n"b.png","dog"\n',
    ],
    ids=["plain", "no last line end", "BOM", "CRLF", "empty rows", "quoted"],
)
def test_csv_files_that_are_the_same(tmp_path: Path, content: str) -> None:
    found = table(tmp_path, content)
    assert (found.kind, found.columns) == ("csv", ("image", "label"))
    assert cells(found) == PLAIN


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_manifests_that_are_the_same(tmp_path: Path, end: str) -> None:
    lines = ['\ufeff{"image": "a.png", "label": "cat"}', "", '{"label": "dog", "image": "b.png"}']
    found = table(tmp_path, end.join(lines), "data.jsonl")
    assert (found.kind, found.columns) == ("jsonl", ("image", "label"))
    assert cells(found) == PLAIN
    assert [record.line for record in found.records] == [1, 3]


def test_lines_are_where_rows_begin(tmp_path: Path) -> None:
    found = table(tmp_path, 'image,note\na.png,"one\ntwo, three"\n\nb.png,""\n')
    assert [(record.line, record.cells["note"]) for record in found.records] == [(2, "one\ntwo, three"), (5, "")]


def test_line_separators_within_json_are_text(tmp_path: Path) -> None:
    found = table(tmp_path, '{"image": "a.png", "label": "a\u2028b"}\n{"image": "b.png"}\n', "data.jsonl")
    assert [record.cells.get("label") for record in found.records] == ["a\u2028b", None]


def test_columns_without_a_name_are_passed_over(tmp_path: Path) -> None:
    found = table(tmp_path, ",image,label,\n0,a.png,cat,\n1,b.png,dog,x\n")
    assert found.columns == ("image", "label")
    assert cells(found) == PLAIN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.csv: its first line must name the columns, and is empty"),
        ("\n\n", "data.csv: its first line must name the columns, and is empty"),
        ("image,label\n", "data.csv: has no rows"),
        ("image,label\n,\n", "data.csv: has no rows"),
        ("image;label\na.png;cat\n", "data.csv: has semicolons between its columns; save it with commas"),
        ("image\tlabel\na.png\tcat\n", "data.csv: has tabs between its columns; save it with commas"),
        ("image,label,image\na,b,c\n", "data.csv: two columns of the same name: 'image'"),
        ("image,label, label\na,b,c\n", "data.csv: two columns of the same name: 'label'"),
        (
            "image,label\na.png,cat\nb.png,dog, brown\n",
            "data.csv, line 3: 3 cells, but 2 columns; a cell with a comma in it must be in double quotes",
        ),
        (
            "image,label\na.png\n",
            "data.csv, line 2: 1 cells, but 2 columns; a cell with a comma in it must be in double quotes",
        ),
        ('image,label\na.png,"cat\n', "data.csv, line 2: is no CSV: unexpected end of data"),
        ('image,label\n"a"b.png,cat\n', "data.csv, line 2: is no CSV: ',' expected after '\"'"),
        (b"image,label\na.png,caf\xe9\n", "data.csv: is not in UTF-8; spreadsheets save it as 'CSV UTF-8'"),
        ("image,label\na.png,cat\n".encode("utf-16"), "data.csv: is not in UTF-8; spreadsheets save it as 'CSV UTF-8'"),
    ],
)
def test_csv_files_that_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DatasetError) as error:
        table(tmp_path, content)
    assert str(error.value) == f"{tmp_path}/{message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.jsonl: has no rows"),
        ('[{"image": "a.png"}]', "data.jsonl, line 1: must be one JSON object, {...}, on each line"),
        ('{"image": "a.png"}\n"b.png"', "data.jsonl, line 2: must be one JSON object, {...}, on each line"),
        ('{"image": "a.png"}\n{"image": b}', "data.jsonl, line 2: is no JSON: Expecting value at character 11"),
        ('{"image": "a", "image": "b"}', "data.jsonl, line 1: two values of the same name: 'image'"),
        ('{\n  "image": "a.png"\n}', "data.jsonl, line 1: is no JSON: "),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DatasetError) as error:
        table(tmp_path, content, "data.jsonl")
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nested", ["[" * 200_000, '{"a":' * 200_000, f'{{"a": {"1" * 5000}}}'])
def test_a_manifest_that_no_parser_reads_is_refused(tmp_path: Path, nested: str) -> None:
    with pytest.raises(DatasetError, match=r"data.jsonl, line 1: is no JSON"):
        table(tmp_path, nested, "data.jsonl")


@pytest.mark.parametrize("name", ["data.xlsx", "data.tsv", "data", "data.json"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=r"must be a folder of classes, or end in .csv, .jsonl, .ndjson"):
        table(tmp_path, "image,label\na,b\n", name)


def test_a_missing_column_is_named_with_the_one_that_is_meant(tmp_path: Path) -> None:
    found = table(tmp_path, "image,labels\na.png,cat\n")
    with pytest.raises(DatasetError, match=r"data.csv: no column 'label'; did you mean 'labels'\?"):
        found.require(["image", "label"])
    with pytest.raises(DatasetError, match=r"data.csv: no column 'scan'; there are image, labels"):
        found.require(["scan"])


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1", 1.0), (" -2.5 ", -2.5), ("1e3", 1000.0), ("+.5", 0.5), ("3.", 3.0), ("007", 7.0)],
)
def test_numbers(tmp_path: Path, cell: str, value: float) -> None:
    found = table(tmp_path, f"image,size\na.png,{cell}\n")
    assert found.number(found.records[0], "size") == value


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("large", "'large' is no number"),
        ('"1,5"', "'1,5' is no number; the decimal sign is a point"),
        ("1_000", "'1_000' is no number"),
        ("٣", "'٣' is no number"),
        ("0x10", "'0x10' is no number"),
        ("NaN", "'NaN' is not finite"),
        ("-inf", "'-inf' is not finite"),
        ("1e999", "'1e999' is too large"),
        ("x" * 100, f"'{'x' * 36}... is no number"),
    ],
)
def test_what_is_no_number(tmp_path: Path, cell: str, message: str) -> None:
    found = table(tmp_path, f"image,size\na.png,{cell}\n")
    with pytest.raises(DatasetError) as error:
        found.number(found.records[0], "size")
    assert str(error.value) == f"{tmp_path}/data.csv, line 2, column 'size': {message}"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("null", "is empty"),
        ("true", "True is no number"),
        ("NaN", "nan is not finite"),
        ("-Infinity", "-inf is not finite"),
        ("[1]", "[1] is no single value"),
        ('{"a": 1}', "{'a': 1} is no single value"),
        ("1e999", "inf is not finite"),
    ],
)
def test_json_that_is_no_number(tmp_path: Path, cell: str, message: str) -> None:
    found = table(tmp_path, f'{{"size": {cell}}}', "data.jsonl")
    with pytest.raises(DatasetError) as error:
        found.number(found.records[0], "size")
    assert str(error.value) == f"{tmp_path}/data.jsonl, line 1, column 'size': {message}"


@pytest.mark.parametrize(("cell", "value"), [("1", 1), ("2.5", 2.5), ("-1e3", -1000), ('"7"', 7)])
def test_json_numbers(tmp_path: Path, cell: str, value: float) -> None:
    found = table(tmp_path, f'{{"size": {cell}}}', "data.jsonl")
    assert found.number(found.records[0], "size") == value


@pytest.mark.parametrize(
    ("cell", "value"), [("0", False), ("1", True), ("1.0", True), ("0.0", False), ("TRUE", True), ("False", False)]
)
def test_flags(tmp_path: Path, cell: str, value: bool) -> None:
    found = table(tmp_path, f"image,sick\na.png,{cell}\n")
    assert found.flag(found.records[0], "sick") is value
    found = table(tmp_path, f'{{"sick": {cell.lower()}}}', "data.jsonl")
    assert found.flag(found.records[0], "sick") is value


@pytest.mark.parametrize("cell", ["yes", "2", "-1", "0.5", "t"])
def test_what_is_no_flag(tmp_path: Path, cell: str) -> None:
    found = table(tmp_path, f"image,sick\na.png,{cell}\n")
    with pytest.raises(DatasetError, match=r"line 2, column 'sick': '.*' is none of 0, 1, true and false"):
        found.flag(found.records[0], "sick")


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "escape\x1b", "line\u2028end", "next\x85line"])
def test_names_are_on_one_line(tmp_path: Path, name: str) -> None:
    found = table(tmp_path, f'image,label\na.png,"{name}"\n')
    with pytest.raises(DatasetError, match=r"line 2, column 'label': .* has line breaks or control characters"):
        found.name(found.records[0], "label")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text('ab",\n\r;\0 ', max_size=60).map(str.encode)))
@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    message = ""
    try:
        found = table(tmp_path, content, name)
        assert all(set(record.cells) <= set(found.columns) for record in found.records)
    except DatasetError as error:
        message = str(error)
    assert "\n" not in message
