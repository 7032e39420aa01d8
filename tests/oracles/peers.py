"""Peers that need a push to be imported. torchvision's wheels for CUDA do not load beside torch for CPUs, and break transformers."""

from __future__ import annotations

import importlib
import sys
import types
from functools import cache
from typing import Any


class _Absent(types.ModuleType):
    """Stands for a package that a peer imports by name and whose parts the functions used here never call."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, _Finder, is_package=True)

    @staticmethod
    def create_module(spec: Any) -> types.ModuleType:
        return _Absent(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        pass


@cache
def torchdistill_losses() -> Any:
    """torchdistill's own ``losses.mid_level``; only while it is imported does an empty torchvision stand in for the absent one."""
    importlib.import_module("transformers")  # it looks for torchvision itself
    before = set(sys.modules)
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
    try:
        return importlib.import_module("torchdistill.losses.mid_level")
    finally:
        sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]
