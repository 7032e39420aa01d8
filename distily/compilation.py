"""torch.compile for functions that must also run where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch


class Compiled:
    """``function`` compiled at its first call, its backward too; or, where the compiler fails, as it is and from its beginning.

    ``refused``: why it is not compiled, in the compiler's words. What the function itself raises is raised.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function = function
        self.refused: str | None = None
        self._compiled = torch.compile(function, **options)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self.refused is None:
            try:
                with functorch.patch(force_non_lazy_backward_lowering=True):  # so that it fails here, not in the backward
                    return self._compiled(*arguments, **keywords)
            except torch._dynamo.exc.TorchDynamoException as error:
                outputs = self.function(*arguments, **keywords)
                self.refused = " ".join(str(error).split())[:200]
                return outputs
        return self.function(*arguments, **keywords)
