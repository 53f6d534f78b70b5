"""Tables over many ranks, in TorchRec: each rank owns rows of every table.

sharder = RaggedSharder(partial(optim.Adagrad, lr=0.05))
plan = ragged_plan(model, max_bytes_per_rank="2 GB")
model = DistributedModelParallel(model, plan=plan, sharders=[sharder])
growth = tables(model).grow(every=50)
"""

from .plan import RaggedSharding, ragged_plan
from .shards import RaggedBagSharder, RaggedCollection, RaggedSharder
from .table import ShardedTable
from .tables import Tables, tables

__all__ = [
    "RaggedBagSharder",
    "RaggedCollection",
    "RaggedSharder",
    "RaggedSharding",
    "ShardedTable",
    "Tables",
    "ragged_plan",
    "tables",
]
