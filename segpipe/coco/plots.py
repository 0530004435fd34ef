"""Pictures of an evaluation as PNG: precision over recall, and which categories are taken for which."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from segpipe.coco.figures import Figures

# Ranks in COCOeval's list of IoU thresholds .50, .55, ... .95.
_SHOWN_IOUS = {0: "0.50", 5: "0.75", 9: "0.95"}
_MAX_LABEL = 18


def draw_precision(figures: Mapping[str, Figures], *, title: str) -> bytes:
    """Return a PNG with one panel for each kind of IoU: precision over recall, mean of all categories.

    Args:
        figures: `segm` and `bbox`, or one of them.
        title: of the picture.
    """
    figure = Figure(figsize=(6 * len(figures), 5), dpi=100, layout="constrained")
    figure.suptitle(title)
    for panel, (kind, found) in zip(np.atleast_1d(figure.subplots(1, len(figures))), figures.items(), strict=True):
        recall = np.linspace(0, 1, found.precision.shape[1])
        for rank, iou in _SHOWN_IOUS.items():
            values = found.precision[rank, :, :, 0, -1]
            values = values[:, (values > -1).all(axis=0)]  # categories that the annotations have
            if values.size:
                panel.plot(recall, values.mean(axis=1), label=f"IoU {iou}, AP {values.mean():.3f}")
        name = {"segm": "masks", "bbox": "boxes"}[kind]
        panel.set(xlabel="recall", ylabel="precision", title=name, xlim=(0, 1), ylim=(0, 1.02))
        panel.grid(visible=True, alpha=0.3)
        panel.legend()
    return _png(figure)


def draw_confusion(counts: npt.NDArray[np.int64], names: Sequence[str], *, shown: Sequence[int], title: str) -> bytes:
    """Return a PNG of what the instances of some categories were taken for.

    Args:
        counts: (K + 1, K + 1) as `count_confusions` returns it.
        names: K category names.
        shown: ranks of the categories with a row of their own; each column is one that occurs in a row, or missed.
        title: of the picture.
    """
    rows = [*shown, len(names)]
    taken_for = [index for index in range(len(names)) if index in shown or counts[shown, index].any()]
    columns = [*taken_for[:24], len(names)]
    part = counts[np.ix_(rows, columns)]
    shares = part / np.maximum(1, counts[rows].sum(axis=1, keepdims=True))
    labels = [*(_short(name) for name in names), "nothing"]
    size = (max(6.0, 3 + 0.6 * len(columns)), max(4.0, 2 + 0.45 * len(rows)))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [labels[index] for index in columns], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [labels[index] for index in rows])
    axes.set(xlabel="taken for", ylabel="is", title=title)
    for (row, column), count in np.ndenumerate(part):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
    return _png(figure)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…"


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
