"""blpipe: pipeline-parallel training with BackLink (arXiv 2205.07141)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blpipe.errors import CheckpointError, PeerLostError, StageError, StoppedError, UserError

if TYPE_CHECKING:
    from blpipe.api import evaluate, state_dict, train
    from blpipe.models.blocks import blocks_of

__version__ = "0.1.0"
__all__ = ["CheckpointError", "PeerLostError", "StageError", "StoppedError", "UserError", "blocks_of", "evaluate",
           "state_dict", "train"]

_WHERE = {"blocks_of": "blpipe.models.blocks", "evaluate": "blpipe.api", "state_dict": "blpipe.api",
          "train": "blpipe.api"}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `python -m blpipe --help` need not wait for it.
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
