"""Make a subpackage callable, so that one name is both the package and its main function.

``narrowboat.stream`` is a package (``import narrowboat.stream.session``) and the function that users call
(``nb.stream(model, ...)``). Python binds a subpackage onto its parent the moment anything imports it, so a
function of that name would win or lose by import order. A module that can be called has no such race.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module whose call goes to the function that ``__call_target__`` names (``"package.module:function"``)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, _, function = self.__call_target__.partition(":")
        return getattr(importlib.import_module(module), function)(*args, **kwargs)


def make_callable(module_name: str, target: str) -> None:
    """Let the loaded module ``module_name`` be called as ``target``, imported on the first call."""
    module = sys.modules[module_name]
    module.__dict__["__call_target__"] = target
    module.__class__ = CallableModule
