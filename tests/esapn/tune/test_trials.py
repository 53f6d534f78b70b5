"""trials.csv: what is written is read again."""

from __future__ import annotations

import math

import pytest

from esapn.config import ConfigError
from esapn.tune.trials import COLUMNS, append, mend, read
from esapn.tune.walk import Walked

WALKS = [
    Walked(
        "counts-6.25%,hops=tails",
        "0",
        2,
        {"row_lr": 0.4, "row_accumulator": 0.0, "move_every": 20},
        (0.3, 0.2, 1 / 3, 0.1),
        0.71234,
        4096,
        1.5,
    ),
    Walked("esapn", "own", 0, {"row_lr": 2.0}, (0.5, math.nan), 0.5, 12, 0.1),
]


def test_walks_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "trials.csv"
    assert read(path) == []
    for walk in WALKS:
        append(path, walk)
    first, second = read(path)
    assert first == WALKS[0]
    assert second.stopped and math.isnan(second.losses[1]) and len(second.losses) == 2
    assert second.settings == {"row_lr": 2.0}
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_line_cut_off_is_left_out_and_the_file_goes_on(tmp_path):
    path = tmp_path / "trials.csv"
    for walk in WALKS:
        append(path, walk)
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert read(path) == WALKS[:1] and path.read_text() == whole[:-9]
    mend(path)
    append(path, WALKS[1])
    assert path.read_text() == whole
    mend(path)
    assert path.read_text() == whole
    # Even the heading may be cut.
    path.write_text(whole[:9])
    assert read(path) == []
    mend(path)
    append(path, WALKS[0])
    assert read(path) == WALKS[:1]


HEADING = ",".join(COLUMNS) + "\n"
LINE = "esapn,0,0,0.4,0.1,0.1,,,,,0.3,0.2,0.2,0.1,0.5,8,1.0\n"


def test_a_line_by_hand(tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text(HEADING + LINE)
    (walk,) = read(path)
    assert walk.losses == (0.3, 0.2, 0.2, 0.1) and walk.settings["init_std"] == 0.1


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n",
        "one line without an end",
        "method,mine\nx,1\ny,2",
        "\0\n",
        HEADING + "esapn,0\n",
        HEADING + LINE.replace("0.3,0.2,0.2,0.1", ",,,"),  # no losses
        HEADING + LINE.replace("0.3,0.2,0.2,0.1", "0.3,,0.2,0.1"),  # a gap
        HEADING + LINE.replace("0.4,0.1,0.1", ",,"),  # no settings
        HEADING + LINE.replace("0.4,0.1,0.1", "nan,0.1,0.1"),
        HEADING + LINE.replace("0.1,,,,", "0.1,,inf,,"),
        HEADING + LINE.replace("0.1,,,,", "0.1,,,inf,"),
        HEADING + LINE.replace("\n", ",more\n"),
    ],
)
def test_another_file_is_refused_and_left_as_it_is(text, tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(path)
    assert path.read_text() == text
