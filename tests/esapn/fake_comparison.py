"""A comparison's folder with made-up runs, for the tests of its statistics, figures and page.

``python tests/esapn/fake_comparison.py DIR`` writes a full one, whose page a browser can show. The
losses follow a plain rule: ``BASE[label] + 0.0004 seed + NOISE[(seed + place) % 5]``.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

SIZES = (2, 4, 8, 16, 64, 128)
USERS, ITEMS = 6040, 3706
EVENTS, TRAIN = 1_000_000, 750_000
FIXED = 4 * 128 * (USERS + ITEMS)
NOISE = (0.00010, -0.00005, 0.00002, -0.00009, 0.00004)

# label: (family, share of fixed-128's bytes, loss of the binary task, events per second)
TUNED = {
    "esapn": ("esapn", 0.91, 0.1820, 5_200),
    "esapn-rich": ("esapn", 0.081, 0.17885, 5_600),
    "fixed-2": ("fixed", 1 / 64, 0.18200, 16_000),
    "fixed-4": ("fixed", 1 / 32, 0.18120, 15_800),
    "fixed-8": ("fixed", 1 / 16, 0.17970, 15_500),
    "fixed-16": ("fixed", 1 / 8, 0.17940, 15_000),
    "fixed-64": ("fixed", 1 / 2, 0.17870, 12_000),
    "fixed-128": ("fixed", 1.0, 0.17850, 9_000),
    "thresholds-1": ("thresholds", 0.050, 0.17950, 11_000),
    "thresholds-4": ("thresholds", 0.074, 0.17910, 10_800),
    "thresholds-16": ("thresholds", 0.160, 0.17890, 10_500),
    "power-0.3": ("power", 0.060, 0.17960, 11_200),
    "power-0.6": ("power", 0.110, 0.17925, 11_000),
    "random-0.01": ("random", 0.045, 0.18010, 9_000),
    "random-0.1": ("random", 0.400, 0.17905, 8_000),
    "always": ("always", 0.950, 0.17880, 7_500),
    "never": ("never", 1 / 64, 0.18190, 13_000),
    "biases": ("biases", 0.010, 0.18220, 40_000),
}
PAPER = {
    "esapn": ("esapn", 0.910, 0.18320, 5_000),
    "fixed-222": ("fixed", 222 / 128, 0.18520, 7_800),
    "fixed-128": ("fixed", 1.0, 0.18450, 8_200),
    "darts": ("darts", 222 / 128, 0.18600, 4_200),
    "autoemb": ("autoemb", 222 / 128, 0.18640, 3_900),
    "biases": ("biases", 0.010, 0.18220, 40_000),
}
# Families whose rows keep the size that they begin with.
ONE_SIZE = ("fixed", "biases", "darts", "autoemb")
METHODS = {"paper": PAPER, "tuned": TUNED}
REFERENCE = {"paper": "esapn", "tuned": "esapn-rich"}


def loss_of(task: str, mode: str, label: str, seed: int) -> float:
    place = list(METHODS[mode]).index(label)
    loss = METHODS[mode][label][2] + 0.0004 * seed + NOISE[(seed + 2 * place) % 5]
    return loss if task == "binary" else 6.4 * loss


def _rows(label: str, family: str, share: float, n: int) -> dict[str, int]:
    """A number of IDs at each size whose dims are about ``share`` of n x 128."""
    if family == "biases":
        return {}
    if share > 1:
        return {"222": n}
    if family == "fixed":
        return {label.partition("-")[2]: n}
    rows, left = dict.fromkeys(map(str, SIZES), 0), n
    top = min(n, int(n * max(share - 0.04, 0)))
    rows["128"], left = top, n - top
    for size, part in ((64, 0.04), (16, 0.08), (8, 0.15), (4, 0.3)):
        rows[str(size)] = int(left * part)
    rows["2"] = n - sum(rows.values())
    return rows


def run_record(task: str, mode: str, label: str, seed: int) -> dict:
    """What the file of a run holds."""
    family, share, _, speed = METHODS[mode][label]
    measures = _measures(task, loss_of(task, mode, label, seed))
    serving = int(FIXED * share) + (0 if family == "fixed" else 1_000 * seed)
    seconds = EVENTS / speed * (1 + 0.01 * seed)
    by_frequency, sizes_by_frequency = _frequencies(family, share, measures, seed)
    return {
        "task": task,
        "mode": mode,
        "label": label,
        "family": family,
        "seed": seed,
        "config": {
            "method": family,
            "task": task,
            "batch_size": 500,
            "lr": 0.001,
            "sizes": list(SIZES),
            "seed": seed,
            "label": label,
        },
        "data": {"name": "ml-1m", "sha256": "ab" * 32},
        "train": measures | {"events": TRAIN},
        "test": measures,
        "memory": _memory(label, family, share, serving),
        "bytes": {
            "serving": serving,
            "serving_peak": int(1.01 * serving),
            "serving_mean": int(0.8 * serving),
            "training": 3 * serving,
            "fixed128": FIXED,
        },
        "log": _log(label, family, share, measures, serving, seed),
        "by_frequency": by_frequency,
        "sizes_by_frequency": sizes_by_frequency,
        "cpu_seconds": seconds,
        "wall_seconds": 1.02 * seconds,
        "events_per_second": EVENTS / seconds / 1.02,
        "peak_rss": 412_000_000 + 1_000_000 * seed,
        "info": {"torch": "2.13.0", "python": "3.11.4"},
    }


def _measures(task: str, loss: float) -> dict:
    """The accuracy falls as the loss rises."""
    highest, lowest_loss, slope = (
        (0.7310, 0.1785, 1.9) if task == "binary" else (0.46, 1.1424, 0.38)
    )
    accuracy = highest - slope * (loss - lowest_loss)
    measures = {"events": EVENTS - TRAIN, "accuracy": accuracy, "loss": loss}
    if task == "binary":
        return measures | {"log_loss": loss * 2.95, "auc": accuracy + 0.07}
    return measures | {"log_loss": loss}


def _memory(label: str, family: str, share: float, serving: int) -> dict:
    memory = {}
    for side, n in (("user", USERS), ("item", ITEMS)):
        rows = _rows(label, family, share, n)
        payload = 4 * sum(int(d) * c for d, c in rows.items()) or 8 * n
        memory[side] = {
            "rows_per_size": rows,
            "payload": payload,
            "slack": 64,
            "locations": 4 * n,
            "chain": 37_000 if family == "esapn" else 0,
            "optimizer": payload,
            "serving": serving * n // (USERS + ITEMS),
            "fixed": 512 * n,
        }
    return memory


def _log(
    label: str, family: str, share: float, measures: dict, serving: int, seed: int
) -> list[dict]:
    """Twenty windows; rows that can grow do so with the root of the events."""
    log = []
    for k in range(1, 21):
        grown = share if family in ONE_SIZE else share * (k / 20) ** 0.5
        line = {
            "events": EVENTS * k // 20,
            "loss": measures["loss"] + 0.03 * math.exp(-k / 4) + 0.0004 * math.sin(7 * k + seed),
            "accuracy": measures["accuracy"] - 0.05 * math.exp(-k / 4),
            "mean_user_size": 128 * grown,
            "mean_item_size": 128 * grown,
            "serving_bytes": int(serving * grown / share),
        }
        for side, n in (("user", USERS), ("item", ITEMS)):
            line[f"{side}_rows"] = list(_rows(label, family, grown, n).values())
        log.append(line)
    return log


def _frequencies(family: str, share: float, measures: dict, seed: int) -> tuple[dict, dict]:
    """Measures by running frequency and sizes by final frequency, in buckets of powers of two."""
    loss, accuracy = measures["loss"], measures["accuracy"]
    cold = 0.04 if family in ("fixed", "darts", "autoemb") else 0.034
    grows = family in ("esapn", "thresholds", "power")
    by_frequency, sizes = {}, {}
    for side, buckets in (("user", 11), ("item", 12)):
        by_frequency[side] = [
            {
                "from": 2**b,
                "to": 2 ** (b + 1),
                "events": 40 + 30 * b * b,
                "loss": loss + cold * math.exp(-b / 2.5) - 0.002 + 0.0003 * math.sin(3 * b + seed),
                "accuracy": accuracy - 0.1 * math.exp(-b / 2.5),
            }
            for b in range(buckets)
        ]
        sizes[side] = [
            {
                "from": 2**b,
                "to": 2 ** (b + 1),
                "ids": 900 - 70 * b,
                "mean_size": min(128, 2 * 1.6**b) if grows else 128 * share,
            }
            for b in range(buckets)
        ]
    return by_frequency, sizes


def write_comparison(
    folder: Path,
    *,
    tasks=("binary", "multiclass"),
    modes=("paper", "tuned"),
    seeds=(0, 1, 2, 3, 4),
    labels=None,
    skip=(),
    change=None,
) -> Path:
    """Write the folder without the runs ``skip``, each record as ``change(record)`` leaves it."""
    (folder / "runs").mkdir(parents=True)
    header = {
        "data": {
            "name": "ml-1m",
            "sha256": "ab" * 32,
            "events": EVENTS,
            "users": USERS,
            "items": ITEMS,
            "train_events": TRAIN,
            "counts": {"dropped": 0},
        },
        "order": "shuffle",
        "tasks": list(tasks),
        "modes": list(modes),
        "seeds": list(seeds),
        "methods": [
            {
                "label": label,
                "family": row[0],
                "mode": mode,
                "text": f"what {label} does",
                "options": {"size": 4} if label == "fixed-4" else {},
            }
            for mode in modes
            for label, row in METHODS[mode].items()
            if labels is None or label in labels
        ],
        "reference": {mode: REFERENCE[mode] for mode in modes},
        "started": "2026-05-01T10:00:00+00:00",
        "info": {
            "torch": "2.13.0",
            "python": "3.11.4",
            "cpu": "AMD EPYC, 2 cores",
            "commit": "0123abc",
            "devices": [],
        },
    }
    (folder / "compare.json").write_text(json.dumps(header))
    for task in tasks:
        for method in header["methods"]:
            for seed in seeds:
                name = f"{task}-{method['mode']}-{method['label']}-s{seed}"
                if name in skip:
                    continue
                record = run_record(task, method["mode"], method["label"], seed)
                if change is not None:
                    change(record)
                (folder / "runs" / f"{name}.json").write_text(json.dumps(record))
    return folder


if __name__ == "__main__":
    write_comparison(
        Path(sys.argv[1]), skip={"multiclass-tuned-always-s4", "multiclass-tuned-always-s3"}
    )
