"""Curves of a fine-tuning as a PNG: the losses of each step, smoothed, and the AP after each epoch."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_SHOWN_FIGURES = ("segm AP", "segm AP50", "bbox AP")


def draw_curves(steps: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """Return a PNG of 1200 x 500 px.

    Args:
        steps: entries with `step` and `losses`.
        epochs: entries with `step` and `figures`; may be empty.
        title: of the picture.
    """
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    figure.suptitle(title)
    losses, quality = figure.subplots(1, 2)
    for name in sorted({name for entry in steps for name in entry["losses"]}):
        points = [(entry["step"], entry["losses"][name]) for entry in steps if name in entry["losses"]]
        numbers, values = zip(*points, strict=True)
        losses.plot(numbers, _smooth(np.asarray(values)), label=name, linewidth=2 if name == "L" else 1)
    losses.set(xlabel="step", ylabel="loss, running mean", yscale="log")
    if steps:
        losses.legend()
    for name in _SHOWN_FIGURES:
        points = [(entry["step"], entry["figures"][name]) for entry in epochs if name in entry["figures"]]
        if points:
            quality.plot(*zip(*points, strict=True), label=name, marker=".")
    quality.set(xlabel="step", ylabel="on the validation images", ylim=(0, None))
    if quality.lines:
        quality.legend()
    else:
        quality.text(0.5, 0.5, "not measured: no validation data", ha="center", transform=quality.transAxes)
    for axes in (losses, quality):
        axes.grid(visible=True, alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean of each value and those before it, as many as a twentieth of all."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    smoothed: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed
