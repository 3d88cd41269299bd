"""The evaluation report at a glance: which models differ from real cells, in what, how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exprgen._errors import name_some
from exprgen.pl._style import finish, make_axes
from exprgen.tl._names import check_names

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["evaluation"]


class _Shade(NamedTuple):
    """A colour, its text's, and up to which deviation it stands."""

    face: str
    text: str
    label: str
    up_to: float


_NOT_APART = _Shade("#E3EAF0", "#24384A", "not told apart (within 3 × noise)", np.inf)
_CLOSE = _Shade("#FBEBCB", "#4A3A12", "close (more, but within tolerance)", np.inf)
_OFF = (
    _Shade("#F5B56B", "#3A2105", "off: 3 to 10 × noise", 10),
    _Shade("#E36C0A", "white", "10 to 30", 30),
    _Shade("#8F2D04", "white", "over 30", np.inf),
)
_NONE = _Shade("white", "#8C8C8C", "undefined", np.inf)
_ARROWS = {"lower": "↓", "higher": "↑"}
_FAMILY_GAP = 0.45
_CELL = (0.78, 0.215)  # inches


def evaluation(
    report: pd.DataFrame | AnnData,
    *,
    key: str = "evaluation",
    models: str | Sequence[str] | None = None,
    metrics: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Plot models by metrics: values, and how far outside real-vs-real noise they lie.

    A row is a metric (↓ lower is better, ↑ higher, → a number), a column a model; baselines
    stand apart, to the right. The first column is the control, real against real cells, ± its
    spread. Pale blue cells are no further from the control than noise explains; pale yellow ones
    are, but within the metric's tolerance; orange to brown ones (bold) are flagged.

    Parameters
    ----------
    report
        From :func:`exprgen.tl.evaluate`, or the AnnData that it was kept in.
    key
        The ``key_added`` under which the AnnData has it.
    models
        Which (a name or several), in this order; None for all.
    metrics
        Metrics or families (a name or several), which keep their order; None for all.
    ax
        Axes to draw on.
    show, return_fig
        Show the figure; return it instead of the axes.

    Returns
    -------
    Axes, or Figure

    Raises
    ------
    KeyError
        No report under ``key``, or a column, model or metric that the report has not.
    TypeError
        An argument is of another type.
    ValueError
        No rows, no models or metrics, or two rows for one model and metric.
    """
    _check_axes(ax)
    table = _table(report, key)
    table, columns, names = _chosen(table, models, metrics)
    rows = _positions(table)
    height, width = max(rows.values()) + 1, len(columns) + 1 + 0.3 * _has_gap(columns)
    size = (max(_CELL[0] * (width + 0.6) + 2.6, 5.0), _CELL[1] * height + 1.5)
    figure, panels = make_axes(None if ax is None else [ax], 1, n_cols=1, size=size)
    panel = panels[0]
    for entry in table.drop_duplicates("metric").itertuples():
        _cell(panel, 0, rows[entry.metric], _control(entry), _Shade("white", "#444444", "", 0))
    for entry in table.itertuples():
        shade = _shade(entry)
        text = "–" if np.isnan(entry.value) else _number(entry.value)
        _cell(panel, columns[entry.model], rows[entry.metric], text, shade, bold=entry.flag)
    _finish_axes(panel, table, rows, columns, names, width)
    _legend(panel, n_cols=5 if size[0] > 8 else 2)
    finish(figure, panels, show=show, return_fig=return_fig)
    return figure if return_fig else panel


def _table(report: pd.DataFrame | AnnData, key: str) -> pd.DataFrame:
    import pandas as pd

    if hasattr(report, "uns"):
        entry = report.uns.get(key)
        if not isinstance(entry, Mapping) or "report" not in entry:
            raise KeyError(
                f"adata.uns has no evaluation report under {key!r}. Run tl.evaluate(..., "
                f"key_added={key!r}), or name the key it was kept under."
            )
        report = entry["report"]
    if not isinstance(report, pd.DataFrame):
        raise TypeError(
            "report must be the table from tl.evaluate, or the AnnData that it was kept in, got "
            f"{type(report).__name__}."
        )
    needed = ["model", "metric", "value", "control", "control_spread", "deviation", "verdict"]
    needed += ["flag", "kind", "family", "better"]
    missing = [name for name in needed if name not in report]
    if missing:
        raise KeyError(
            f"report has no column {name_some(missing)}; give what tl.evaluate returned."
        )
    if report.empty:
        raise ValueError("report has no rows; give what tl.evaluate returned.")
    twice = report[report.duplicated(["model", "metric"])]
    if len(twice):
        named = [f"{entry.model}: {entry.metric}" for entry in twice.itertuples()]
        raise ValueError(
            f"report has rows for the same model and metric: {name_some(named)}. Give one report, "
            "or rename the models of others."
        )
    return report


def _chosen(
    table: pd.DataFrame, models: str | Sequence[str] | None, metrics: str | Sequence[str] | None
) -> tuple[pd.DataFrame, dict[str, float], dict[str, str]]:
    """The rows to draw, the position of every model, and its kind."""
    kinds = dict(zip(table["model"], table["kind"], strict=True))
    known = {"models": list(kinds), "metrics": [*table["metric"], *table["family"]]}
    models, metrics = (
        given if given is None else check_names(given, argument)
        for argument, given in (("models", models), ("metrics", metrics))
    )
    for argument, given in (("models", models), ("metrics", metrics)):
        if given == []:
            raise ValueError(f"{argument} is empty; name some, or leave {argument}=None for all.")
        wrong = [name for name in given or () if name not in known[argument]]
        if wrong:
            raise KeyError(
                f"{argument} has {name_some(wrong)}, which the report has not; it has "
                f"{', '.join(dict.fromkeys(known[argument]))}."
            )
    if metrics is not None:
        table = table[table["metric"].isin(metrics) | table["family"].isin(metrics)]
    order = list(kinds) if models is None else list(models)
    order.sort(key=lambda name: kinds[name] == "baseline")  # stable: baselines to the right
    table = table[table["model"].isin(order)]
    gap = {
        name: 0.3 * (kinds[name] == "baseline" and kinds[order[0]] != "baseline") for name in order
    }
    columns = {name: 1.15 + i + gap[name] for i, name in enumerate(order)}
    return table, columns, kinds


def _check_axes(ax: object) -> None:
    from matplotlib.axes import Axes

    if not (ax is None or isinstance(ax, Axes)):
        raise TypeError(f"ax must be matplotlib axes, or None, got {type(ax).__name__}.")


def _has_gap(columns: Mapping[str, float]) -> bool:
    return bool(max(columns.values()) > len(columns) + 0.2)


def _positions(table: pd.DataFrame) -> dict[str, float]:
    """Height of every metric; families stand apart."""
    found: dict[str, float] = {}
    at, previous = 0.0, None
    for metric, family in table[["metric", "family"]].drop_duplicates().itertuples(index=False):
        at += _FAMILY_GAP * (previous is not None and family != previous)
        found[metric] = at
        at, previous = at + 1, family
    return found


def _shade(entry: Any) -> _Shade:
    if np.isnan(entry.value) or np.isnan(entry.deviation):
        return _NONE
    if entry.verdict == "off":
        return next(shade for shade in _OFF if entry.deviation <= shade.up_to)
    return {"not told apart": _NOT_APART, "close": _CLOSE}.get(entry.verdict, _NONE)


def _cell(ax: Axes, x: float, y: float, text: str, shade: _Shade, *, bold: bool = False) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x + 0.02, y + 0.05), 0.96, 0.9, facecolor=shade.face, linewidth=0))
    weight = "bold" if bold else "normal"
    ax.text(
        x + 0.5, y + 0.5, text, ha="center", va="center_baseline", fontsize=7.5,
        color=shade.text, fontweight=weight,
    )  # fmt: skip


def _control(entry: Any) -> str:
    if np.isnan(entry.control):
        return "–"
    if not entry.control_spread > 0:
        return _number(entry.control)
    return f"{_number(entry.control)} ± {entry.control_spread:.2g}"


def _number(value: float) -> str:
    size = abs(value)
    if size < 0.02:
        text = f"{value:.2g}"
    else:
        text = f"{value:.3f}" if size < 1 else f"{value:.2f}" if size < 100 else f"{value:.0f}"
    return text.replace("-", "−")


def _finish_axes(
    ax: Axes,
    table: pd.DataFrame,
    rows: Mapping[str, float],
    columns: Mapping[str, float],
    kinds: Mapping[str, str],
    width: float,
) -> None:
    better = dict(zip(table["metric"], table["better"], strict=True))
    labels = [f"{name} {_direction(better[name])}" for name in rows]
    ax.set_yticks([y + 0.5 for y in rows.values()], labels, fontsize=8.5)
    ax.set_xticks(
        [0.5, *(x + 0.5 for x in columns.values())],
        ["real vs real", *columns],
        rotation=35, ha="left", rotation_mode="anchor", fontsize=9,
    )  # fmt: skip
    for label, name in zip(ax.get_xticklabels()[1:], columns, strict=True):
        label.set_color("#777777" if kinds[name] == "baseline" else "black")
        label.set_fontstyle("italic" if kinds[name] == "baseline" else "normal")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_xlim(-0.25, width + 0.2)
    ax.set_ylim(max(rows.values()) + 1.1, -0.1)
    ax.spines[:].set_visible(False)
    heights: dict[str, list[float]] = {}
    for metric, family in table[["metric", "family"]].drop_duplicates().itertuples(index=False):
        heights.setdefault(family, []).append(rows[metric])
    for family, at in heights.items():
        ax.text(
            width + 0.3, (min(at) + max(at) + 1) / 2, family, fontsize=8, color="#777777",
            va="center", ha="left",
        )  # fmt: skip


def _direction(better: str) -> str:
    if better in _ARROWS:
        return _ARROWS[better]
    return "→ " + better.removeprefix("near ").removeprefix("the ").replace("0.", ".")


def _legend(ax: Axes, n_cols: int) -> None:
    from matplotlib.patches import Patch

    shades = (_NOT_APART, _CLOSE, *_OFF)
    handles = [Patch(facecolor=shade.face, label=shade.label) for shade in shades]
    # As wide as the figure, whose labels and names leave the axes the smaller part of it.
    ax.figure.legend(
        handles=handles, loc="outside lower center", ncols=n_cols, frameon=False, fontsize=8,
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
