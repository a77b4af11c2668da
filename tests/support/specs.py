"""The checkpoints that conftest's fixtures make."""

from .make_checkpoint import Spec

TINY = Spec(experts=4, hidden=256, intermediate=128, layers=2, shards=3, vocab_size=64)
MANY_SHARDS = Spec(layers=2, experts=3, hidden=256, intermediate=128, shards=3, vocab_size=128)
SMALL_SHARD_NBYTES = 500_000
"""Of `MANY_SHARDS` this makes so many shards that a run can be stopped between them."""
