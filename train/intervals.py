"""Measures of a text with an interval: sums kept by document, and the documents drawn again and again.

The tokens of a document are not independent of each other, so documents are resampled, not tokens: the percentile
bootstrap of Efron (1979). Memory is bounded: with more than `UNITS` documents, those of equal number modulo `UNITS` are
drawn together, which leaves them independent.

Shapes: U units, R resamples (the first is the text itself), N values, W width of a column.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

UNITS, RESAMPLES = 2048, 1000


@dataclass(frozen=True)
class Metric:
    """A measure and its 95% interval; NaN where it cannot be told."""

    metric: str
    value: float
    low: float
    high: float


class DocumentSums:
    """Columns of sums, a row for each document (or unit of them)."""

    def __init__(self) -> None:
        self._columns_UW: dict[str, Tensor] = {}
        self.documents: set[int] = set()

    def add(self, documents_N: Tensor, **values: Tensor) -> None:
        """Adds values, (N,) or (N, W), to the rows of their documents."""
        documents_N = documents_N.cpu()
        self.documents.update(documents_N.tolist())
        for name, value in values.items():
            value_NW = value.detach().cpu().double().reshape(len(documents_N), -1)
            if name not in self._columns_UW:
                self._columns_UW[name] = torch.zeros(UNITS, value_NW.shape[1], dtype=torch.float64)
            self._columns_UW[name].index_add_(0, documents_N % UNITS, value_NW)

    def total(self, name: str) -> Tensor:
        """The sum of a column over all documents, (W,)."""
        return self._columns_UW[name].sum(0) if name in self._columns_UW else torch.zeros(1, dtype=torch.float64)

    def metrics(self, formulas: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]], seed: int) -> list[Metric]:
        """The value of each formula, and its interval. A formula takes sums, (R,) or (R, W), by column to (R,)."""
        used_U = torch.tensor(sorted({document % UNITS for document in self.documents}))
        drawn = torch.randint(len(used_U), (RESAMPLES, len(used_U)), generator=torch.Generator().manual_seed(seed))
        times_RU = torch.ones(RESAMPLES + 1, len(used_U), dtype=torch.float64)
        times_RU[1:] = 0
        times_RU[1:].scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
        sums = {name: (times_RU @ column[used_U]).squeeze(1) for name, column in self._columns_UW.items()}
        measured = [_metric(name, formula(sums)) for name, formula in formulas.items()]
        # One document alone would always be drawn again: that says nothing of others.
        return measured if len(used_U) > 1 else [replace(each, low=math.nan, high=math.nan) for each in measured]


def _metric(name: str, values_R: Tensor) -> Metric:
    value = float(values_R[0])
    resampled = values_R[1:][torch.isfinite(values_R[1:])]
    if not len(resampled) or not math.isfinite(value):
        return Metric(name, value, math.nan, math.nan)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Metric(name, value, min(low, value), max(high, value))


def share(name: str, count: int, of: int) -> Metric:
    """A share of things that are taken as independent, with its interval after Wilson (1927)."""
    z, value = 1.959964, count / of
    middle, width = value + z * z / (2 * of), z * math.sqrt(value * (1 - value) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return Metric(name, value, max(0.0, min((middle - width) / scale, value)), max((middle + width) / scale, value))
