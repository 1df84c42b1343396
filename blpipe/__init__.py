"""blpipe: pipeline-parallel training with BackLink (arXiv 2205.07141)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blpipe.models.blocks import blocks_of

__version__ = "0.1.0"
__all__ = ["blocks_of"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `python -m blpipe --help` need not wait for it.
    if name == "blocks_of":
        from blpipe.models.blocks import blocks_of
        return blocks_of
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
