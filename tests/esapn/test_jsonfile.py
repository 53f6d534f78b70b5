"""JSON files: whole or as they were."""

from __future__ import annotations

import json

import pytest

from esapn.jsonfile import read_json, write_json


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": [1, 2]})
    before = path.read_bytes()
    assert json.loads(before) == {"a": [1, 2]} and before.endswith(b"\n")
    with pytest.raises(TypeError):
        write_json(path, {"a": [1, 2, object()]})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        write_json(tmp_path / "absent" / "result.json", {})


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "[" * 200_000, "\x80"])
def test_what_is_no_object_reads_as_an_empty_one(text, tmp_path):
    path = tmp_path / "note.json"
    path.write_text(text, encoding="latin-1")
    assert read_json(path) == read_json(tmp_path) == {}
