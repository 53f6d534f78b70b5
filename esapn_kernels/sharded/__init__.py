"""Tables over many ranks, in TorchRec: each rank owns rows of every table.

    sharder = RaggedSharder(partial(optim.Adagrad, lr=0.05))
    plan = ragged_plan(model, max_bytes_per_rank="2 GB")
    model = DistributedModelParallel(model, plan=plan, sharders=[sharder])
    growth = tables(model).grow(every=50)
    ...
    save(model, "run/step-1000", optimizer=dense, growth=growth)

``make sharded`` builds an environment with TorchRec; docs/sharded.md is the guide. Only
:func:`read` and :func:`update`, which open a checkpoint on one machine, work without TorchRec.
"""

import importlib
from typing import Any

_ROOMS = {
    "RaggedBagSharder": "sharders",
    "RaggedCollection": "shards",
    "RaggedSharder": "sharders",
    "RaggedSharding": "plan",
    "ShardedTable": "table",
    "Tables": "model_tables",
    "load": "checkpoint",
    "ragged_plan": "plan",
    "read": "reading",
    "save": "checkpoint",
    "save_changes": "checkpoint",
    "tables": "model_tables",
    "update": "reading",
}

__all__ = list(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        room = importlib.import_module(f".{_ROOMS[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("torchrec", "fbgemm_gpu"):
            raise
        raise ModuleNotFoundError(
            f"esapn_kernels.sharded.{name} needs TorchRec, which `make sharded` installs: see "
            "docs/sharded.md",
            name=error.name,
        ) from None
    found = getattr(room, name)
    globals()[name] = found
    return found
