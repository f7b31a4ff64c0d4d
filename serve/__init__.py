"""What answers. The package can be called, too: `heliograph.serve(bundle)` is `here.serve`."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .here import Served


class _Room(ModuleType):
    def __call__(self, bundle: Any, **options: Any) -> "Served":
        from .here import serve

        return serve(bundle, **options)


sys.modules[__name__].__class__ = _Room
