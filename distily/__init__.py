"""Distily distils any Hugging Face causal language model into a smaller, a 1.58-bit or a differently shaped student."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from distily.hookspecs import hookimpl

if TYPE_CHECKING:
    from distily.run import distill as distill

__all__ = ["CONTRACT_VERSION", "__version__", "distill", "hookimpl"]

CONTRACT_VERSION = "1.0"
"""Version of the plugin contract (hooks and the modules that they name). Additions raise the second number. What is
taken away or changed raises the first, after one release in which the old form still works and warns."""

try:
    __version__ = version("distily")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    """``distily.distill`` on demand: importing the package loads neither torch nor transformers."""
    if name == "distill":
        from distily.run import distill

        return distill
    raise AttributeError(f"module 'distily' has no attribute {name!r}")
