"""Reading csv, tsv, jsonl and plain text; batches by length."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from xlmr_ext.data import (
    MAX_LABELS,
    DataError,
    LabelledTexts,
    LengthBatches,
    check_vocabulary,
    guess_format,
    json_objects,
    label_ids,
    label_list,
    read_labelled,
    read_rows,
    text_lines,
    training_labels,
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def texts(folder: Path, name: str, content: str | bytes, **options: object) -> list[str]:
    return [row.text for row in read_rows(write(folder, name, content), **options)]  # type: ignore[arg-type]


def test_csv_reads_quotes_line_breaks_and_empty_texts(tmp_path: Path) -> None:
    content = 'label,text\na,"one, ""two""\nthree"\nb,\n\n c ,plain\r\n'
    data = read_labelled(write(tmp_path, "d.csv", content))
    assert data.texts == ['one, "two"\nthree', "", "plain"]
    assert data.labels == ["a", "b", "c"]
    # Lines of the file, not rows: the first row spans two, and a blank line is skipped.
    assert data.lines == [2, 4, 6]
    assert data.where(2) == f"{tmp_path / 'd.csv'}:6"


def test_tsv_splits_on_tab_and_line_feed_only(tmp_path: Path) -> None:
    odd = 'a "quoted\u2028 text\u0085 with\x0b odd\x1c breaks'
    data = read_labelled(write(tmp_path, "d.tsv", f"text\tlabel\n{odd}\tx\r\n\n\ty\n"))
    assert data.texts == [odd, ""]
    assert data.labels == ["x", "y"]


def test_tsv_of_texts_alone_keeps_empty_lines(tmp_path: Path) -> None:
    assert texts(tmp_path, "d.tsv", "text\na\n\nb\n") == ["a", "", "b"]


def test_jsonl_reads_strings_and_integers_as_labels(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b", "label": 3, "other": None}, {"label": "x", "text": ""}]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    data = read_labelled(write(tmp_path, "d.jsonl", content))
    assert data.texts == ["a\u2028b", ""]
    assert data.labels == ["3", "x"]
    assert data.lines == [1, 3]


def test_plain_text_is_one_text_a_line() -> None:
    stream = io.BytesIO("a\r\n\nb\tc,d\u2028\nlast".encode())
    assert [row.text for row in read_rows(stream, format="txt")] == [
        "a",
        "",
        "b\tc,d\u2028",
        "last",
    ]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.txt"])
def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    body = {"d.jsonl": '{"text": "a\ufeff"}\n', "d.txt": "a\ufeff\n"}.get(name, "text\na\ufeff\n")
    assert texts(tmp_path, name, "\ufeff" + body) == ["a\ufeff"]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.txt"])
def test_nul_and_lone_surrogates_pass_through(tmp_path: Path, name: str) -> None:
    if name == "d.jsonl":
        assert texts(tmp_path, name, '{"text": "a\\u0000b\\ud800c"}\n') == ["a\0b\ud800c"]
    else:
        assert texts(tmp_path, name, "a\0b\n" if name == "d.txt" else "text\na\0b\n") == ["a\0b"]


def test_nul_in_csv_where_the_csv_module_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xlmr_ext.data._CSV_REFUSES_NUL", True)
    data = read_labelled(write(tmp_path, "d.csv", 'text,label\n"a\0,",b\0c\n'))
    assert (data.texts, data.labels) == (["a\0,"], ["b\0c"])


def test_columns_by_name_and_pairs(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", "id,category,premise,hypothesis\n7,yes,p,h\n")
    data = read_labelled(
        path, text_column="premise", pair_column="hypothesis", label_column="category"
    )
    assert (data.texts, data.pairs, data.labels) == (["p"], ["h"], ["yes"])


def test_a_field_of_a_million_characters(tmp_path: Path) -> None:
    assert texts(tmp_path, "d.csv", "text\n" + "x" * 1_000_000 + "\n") == ["x" * 1_000_000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "text,category\na,b\n", r"d\.csv:1: has no column 'label'; its columns are"),
        ("d.tsv", "text,label\na,b\n", r"d\.tsv:1: has no column 'text'; its columns are 'text,l"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"d\.jsonl:2: has no column"),
        ("d.csv", "text,label,label\na,b,c\n", r"d\.csv:1: has more than one column 'label'"),
        ("d.csv", "text,label\na,b\na,b,c\n", r"d\.csv:3: 3 columns, expected 2"),
        ("d.csv", "text,label\na,b\na\n", r"d\.csv:3: 1 columns, expected 2"),
        ("d.tsv", "text\tlabel\na\tb\tc\n", r"d\.tsv:2: 3 columns, expected 2"),
        ("d.csv", 'text,label\na,b\n"open,c\nd,e\n', r"d\.csv:3: malformed csv"),
        ("d.csv", 'text,label\n"a"b,c\n', r"d\.csv:2: malformed csv"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": \n', r"d\.jsonl:2: malformed JSON"),
        ("d.jsonl", "[" * 100_000, r"d\.jsonl:1: malformed JSON"),
        ("d.jsonl", '["a"]\n', r"d\.jsonl:1: expected a JSON object, got list"),
        ("d.jsonl", '{"text": null, "label": 1}\n', r"d\.jsonl:1: column 'text' .* got null"),
        ("d.jsonl", '{"text": "a", "label": 1.5}\n', r"d\.jsonl:1: a label must be .* float 1.5"),
        ("d.jsonl", '{"text": "a", "label": NaN}\n', r"d\.jsonl:1: a label must be .* float nan"),
        ("d.jsonl", '{"text": "a", "label": true}\n', r"d\.jsonl:1: a label must be .* bool"),
        ("d.csv", "text,label\na, \n", r"d\.csv:2: the label is empty"),
        ("d.csv", b"text,label\na,b\n\xff,c\n", r"d\.csv:3: not UTF-8 \(byte 0xff at position 0"),
        ("d.csv", "text,label\na,b\n".encode("utf-16"), r"d\.csv:1: not UTF-8 .* UTF-16"),
        ("d.csv", "", r"d\.csv is empty, expected a header"),
        ("d.tsv", "", r"d\.tsv is empty, expected a header"),
        ("d.csv", "text,label\n", r"d\.csv has no rows"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path, name, content))


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path: Path) -> None:
    assert texts(tmp_path, "d.txt", b"a\xffb\n", errors="replace") == ["a\ufffdb"]


def test_rows_are_read_one_at_a_time() -> None:
    stream = io.BytesIO(b'{"text": "a"}\n' * 1000 + b"broken\n")
    rows = read_rows(stream, format="jsonl", name="s")
    assert next(rows).text == "a"
    assert stream.tell() < 100
    with pytest.raises(DataError, match="s:1001: malformed JSON"):
        list(rows)


def test_formats_by_suffix() -> None:
    assert [guess_format(f"a.{s}") for s in ("CSV", "tsv", "jsonl", "ndjson", "txt")] == [
        "csv",
        "tsv",
        "jsonl",
        "jsonl",
        "txt",
    ]
    with pytest.raises(ValueError, match=r"a\.xlsx by its suffix '\.xlsx': expected one of \.csv"):
        guess_format("a.xlsx")


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain text, which has no column 'label'"):
        read_labelled(write(tmp_path, "d.txt", "a\n"))


def test_labels_sort_as_numbers_where_all_are() -> None:
    assert label_list(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert label_list(["10", "9", "x"]) == ["10", "9", "x"]


def test_a_label_that_the_model_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    data = read_labelled(write(tmp_path, "dev.csv", "text,label\na,x\nb,z\n"))
    assert label_ids(data, ["z", "x"]) == [1, 0]
    with pytest.raises(
        DataError, match=r"dev\.csv:3: label 'z' is not one of .* 2 labels: 'x', 'y'"
    ):
        label_ids(data, ["x", "y"])


def test_labels_to_learn_are_two_or_more_but_no_million(tmp_path: Path) -> None:
    read = read_labelled(write(tmp_path, "d.csv", "text,label\na,10\nb,9\n"))
    assert training_labels(read) == ["9", "10"]
    one = read_labelled(write(tmp_path, "one.csv", "text,label\na,x\n\nb,x\n"))
    with pytest.raises(
        DataError, match=r"one\.csv has one class only, 'x', from .*one\.csv:2 to .*one\.csv:4:"
    ):
        training_labels(one)
    texts = ["a"] * MAX_LABELS
    assert len(training_labels(LabelledTexts(texts, [str(n) for n in range(MAX_LABELS)]))) == 4096
    many = LabelledTexts([*texts, "a"], [str(n) for n in range(MAX_LABELS + 1)], source="m.csv")
    with pytest.raises(DataError, match=r"m\.csv\[4096\]: '4096' is label number 4097, .* 4096"):
        training_labels(many)


def test_a_million_labels_are_refused_at_the_line_that_is_too_much(tmp_path: Path) -> None:
    # The rest, which would be an error of another kind, is not read.
    lines = [f"w,{row}" for row in range(10_000)] + ["broken"]
    path = write(tmp_path, "ids.csv", "text,label\n" + "\n".join(lines))
    with pytest.raises(DataError, match=rf"ids\.csv:{MAX_LABELS + 2}: '4096' is label number 4097"):
        read_labelled(path)


def test_objects_are_read_one_at_a_time() -> None:
    stream = io.BytesIO('\ufeff{"a": 1}\n\n{"b": [2]}\n3\n'.encode())
    rows = json_objects(text_lines(stream, "d.jsonl"), "d.jsonl")
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, {"b": [2]})]
    with pytest.raises(DataError, match=r"d\.jsonl:4: expected a JSON object, got int 3"):
        next(rows)


def test_rows_from_python() -> None:
    data = LabelledTexts.of([("a", "x"), ("b", 1)])
    assert (data.texts, data.labels, data.where(1)) == (["a", "b"], ["x", "1"], "data[1]")
    with pytest.raises(TypeError, match=r"data\[0\]: text must be a str, got int"):
        LabelledTexts.of([(1, "x")])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"data\[0\] must be a \(text, label\) pair, got str"):
        LabelledTexts.of(["ab"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="labels of data has 1 entries, expected 2"):
        LabelledTexts(["a", "b"], ["x"])


def test_length_batches_cover_every_row_once_and_follow_the_seed() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(103)]
    sampler = LengthBatches(lengths, 8, seed=1, bucket_batches=4)
    batches = sampler.epoch(1)
    assert len(batches) == len(sampler) == 13
    assert sorted(row for batch in batches for row in batch) == list(range(103))
    assert sorted(map(len, batches)) == [7, *[8] * 12]
    assert LengthBatches(lengths, 8, seed=1, bucket_batches=4).epoch(1) == batches
    assert sampler.epoch(2) != batches
    assert LengthBatches(lengths, 8, seed=2, bucket_batches=4).epoch(1) != batches


def test_length_batches_hold_rows_of_similar_length_in_mixed_order() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(400)]

    def spread(bucket_batches: int) -> float:
        batches = LengthBatches(lengths, 8, seed=1, bucket_batches=bucket_batches).epoch(1)
        spans = [max(lengths[r] for r in b) - min(lengths[r] for r in b) for b in batches]
        return sum(spans) / len(spans)

    assert spread(8) < spread(1) / 3
    means = [
        sum(lengths[r] for r in b) / len(b)
        for b in LengthBatches(lengths, 8, seed=1, bucket_batches=50).epoch(1)
    ]
    assert means != sorted(means)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0, "seed": 1}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1, "seed": -1}, "seed must not be negative, got -1"),
        ({"batch_size": 1, "seed": 1, "bucket_batches": 0}, "bucket_batches must be at least 1"),
    ],
)
def test_length_batches_check_their_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthBatches([1], **options)  # type: ignore[misc]


def test_ids_beyond_the_vocabulary_are_an_error() -> None:
    check_vocabulary([[0, 9], [], [2]], 10)
    for bad in (10, -1):
        with pytest.raises(ValueError, match=f"token id {bad} is outside .* vocabulary of 10"):
            check_vocabulary([[0, bad, 2]], 10)


def test_sib200_rows_are_all_read(data_dir: Path) -> None:
    files = sorted(data_dir.glob("sib200/*/test.tsv"))
    assert files
    for path in files:
        data = read_labelled(path, label_column="category")
        assert len(data) == 204
        assert len(label_list(data.labels)) == 7
