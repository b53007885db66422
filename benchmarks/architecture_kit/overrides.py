"""Configurations whose defaults alone do not make a model that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _of(name: str, **values: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**values)

    return make


OVERRIDES: dict[str, Callable[[], Any]] = {
    "autoformer": _of("AutoformerConfig", prediction_length=8, context_length=24),
    "informer": _of("InformerConfig", prediction_length=8, context_length=24),
    "time_series_transformer": _of("TimeSeriesTransformerConfig", prediction_length=8, context_length=24),
}
