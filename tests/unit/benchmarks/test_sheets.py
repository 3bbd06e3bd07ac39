"""What benchmarks share: journals, tables, documents."""

from pathlib import Path

import pytest

from benchmarks.sheets import Column, Journal, Results, common_header, header_of, insert, lines, markdown, together
from cdam.statistics import Statistics


def test_a_journal_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path, {"model": "m", "sizes": (1, 2)})
    journal.add({"id": "a", "value": 1})
    again = Journal(path, {"model": "m", "sizes": (1, 2)})
    again.add({"id": "b", "value": 2})
    assert again.known == {"a", "b"}
    assert [line["value"] for line in lines(path)] == [1, 2]
    assert header_of(path) == {"model": "m", "sizes": [1, 2]}


def test_half_a_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).add({"id": "a"})
    with path.open("a") as file:
        file.write('{"id": "b", "val')
    journal = Journal(path)
    assert journal.known == {"a"}
    journal.add({"id": "c"})
    assert [line["id"] for line in lines(path)] == ["a", "c"]


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"model": "one"})
    with pytest.raises(
        ValueError, match=r"journal.jsonl: begun with model 'one', not 'two': name another, or remove it$"
    ):
        Journal(path, {"model": "two"})
    plain = tmp_path / "plain.jsonl"
    Journal(plain).add({"id": "a"})
    with pytest.raises(ValueError, match="begun with model None, not 'two'"):
        Journal(plain, {"model": "two"})


def test_journals_of_one_thing_are_read_together(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}of2.jsonl" for k in (0, 1)]
    first, second = (Journal(path, {"model": "m", "protocol": "p"}) for path in paths)
    first.add({"id": "a"})
    second.add({"id": "b"})
    assert [line["id"] for line in together(paths)] == ["a", "b"]
    assert common_header(paths) == {"model": "m", "protocol": "p"}
    assert (together([]), common_header([])) == ([], {})
    second.add({"id": "a"})
    with pytest.raises(ValueError, match=r"1of2.jsonl: a is in .*0of2.jsonl, too: remove one of them$"):
        together(paths)
    other = tmp_path / "other.jsonl"
    Journal(other, {"model": "m", "protocol": "q"})
    with pytest.raises(ValueError, match=r"other.jsonl: of another protocol than .*0of2.jsonl: remove one of them$"):
        together([paths[0], other])


def results() -> Results:
    """Three samples of two methods and both anchors, of one metric: clear cut, all the same or mixed."""
    statistics = Statistics(4)
    for k in range(3):
        rows = [(0, 0, "q", 1.0), (1, 0, "q", 2.0), (2, 0, "q", 0.25), (3, 0, "q", 3.0)]
        statistics.add(str(k), rows + [(m, 0, "p", float((m + k) % 2)) for m in range(4)])
    return Results(["cdam", "attention"], ["random", "mask"], statistics.table())


def test_a_table() -> None:
    columns = [
        Column("Q", 0, "q", 1, 1, {"cdam": 12.25, "attention": -3}),
        Column("low", 0, "q", -1),
        Column("P", 0, "p", 1),
    ]
    table = markdown(results(), columns).splitlines()
    assert table[0] == "| | Q | paper | low | P |"
    assert table[2].startswith("| `cdam` | 1.0 ± 0.0 | **12.25** | **1.00 ± 0.00** | ")
    assert table[3].startswith("| `attention` | **2.0 ± 0.0** | -3 | 2.00 ± 0.00 | ")
    assert table[4].startswith("| *random* | 0.2 ± 0.0 |  | 0.25 ± 0.00 | ")  # never in bold
    assert table[6] == ("| better; mask against random | higher; fit |  | lower; **unfit** | higher; **unfit** |")


def test_blocks_of_a_document() -> None:
    document = "a\n<!-- x -->\nold\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    expected = "a\n<!-- x -->\n| \\1 |\n<!-- /x -->\nb\n<!-- y -->\n2\n<!-- /y -->\n"
    assert insert(document, {"x": "| \\1 |", "y": "2"}) == expected
    with pytest.raises(ValueError, match=r"^the document has no block 'z'$"):
        insert(document, {"z": ""})
