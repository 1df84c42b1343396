"""blpipe: pipeline-parallel training with BackLink (arXiv 2205.07141)."""

__version__ = "0.1.0"
