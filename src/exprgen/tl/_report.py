r"""The report: every value beside its control, and whether noise explains the difference.

Per model and metric, with the mean and standard deviation over repeats of the value
:math:`(v, s_v)` and of the control :math:`(c, s_c)`,

.. math:: \text{noise} = \max\left(s_c, \sqrt{(s_c^2 + s_v^2)/2}\right), \qquad
          \text{deviation} =
          \frac{\text{worse}(v - c) - \max(0, \text{worse}(t - c))}{\text{noise}},

where *worse* turns the sign so that positive is worse (absolute value where 1, say, is best), and
:math:`t` is the value of training cells in the model's place. Two halves of one set differ less
than two sets: what both halves have in common, chance gave to the set, and a model can only know
the training cells. Repeats are not averaged out of the noise for the same reason: they share
cells.

A value is ``"not told apart"`` up to a deviation of 3, ``"close"`` beyond it but within the
tolerance of its metric (a difference that is there and small), else ``"off"``. Tolerances are this
project's goals for its models where there are such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exprgen.tl._names import check_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

__all__ = ["COLUMNS", "METRICS", "N_NOISE", "RULE", "Metric", "assemble", "check_metrics"]

N_NOISE = 3.0
RULE = (
    f"off (flag): worse than the control, and than training cells, by more than {N_NOISE:g} x "
    "noise, and worse than the control by more than the tolerance; noise = max(control_spread, "
    "rms(spread, control_spread))"
)

COLUMNS = [
    "model", "metric", "value", "spread", "control", "control_spread", "excess", "n", "better",
    "train_excess", "tolerance", "deviation", "verdict", "flag", "kind", "family", "note",
]  # fmt: skip


class Metric(NamedTuple):
    """How a row is read: its family, the better direction, and what still counts as small."""

    family: str
    better: str  # "lower", "higher", or "near" a number
    tolerance: float
    is_relative: bool = False  # the tolerance is a share of the control

    def worse(self, value: float, control: float) -> float:
        """How much worse than the control, in the metric's unit."""
        if self.better == "lower":
            return value - control
        return control - value if self.better == "higher" else abs(value - control)

    def allowed(self, control: float) -> float:
        """Differences up to this are small."""
        return self.tolerance * abs(control) if self.is_relative else self.tolerance


METRICS = {
    "missing groups": Metric("composition", "lower", 0.0),
    "RF-PC": Metric("classifier", "lower", 0.03),
    "RF-gene": Metric("classifier", "lower", 0.05),
    "LR-gene": Metric("classifier", "lower", 0.05),
    "QC": Metric("classifier", "lower", 0.06),
    "MMD": Metric("distance", "lower", 0.08, is_relative=True),
    "energy distance": Metric("distance", "lower", 0.05),
    "sliced Wasserstein": Metric("distance", "lower", 0.05, is_relative=True),
    "Wasserstein": Metric("distance", "lower", 0.02, is_relative=True),
    "precision": Metric("neighbours", "higher", 0.02, is_relative=True),
    "recall": Metric("neighbours", "higher", 0.02, is_relative=True),
    "density": Metric("neighbours", "near 1", 0.05, is_relative=True),
    "coverage": Metric("neighbours", "higher", 0.02, is_relative=True),
    "local mixing": Metric("neighbours", "near 1", 0.03),
    "variance ratio": Metric("variation", "near 1", 0.1),
    "log-total variance": Metric("variation", "near 1", 0.15),
    "gene correlation": Metric("genes", "higher", 0.03),
    "gene correlation overall": Metric("genes", "higher", 0.03),
    "mean correlation": Metric("genes", "higher", 0.01),
    "mean agreement": Metric("genes", "higher", 0.01),
    "sd agreement": Metric("genes", "higher", 0.02),
    "zero agreement": Metric("genes", "higher", 0.01),
    "zero fraction difference": Metric("genes", "lower", 0.005),
    "fold-change slope": Metric("fold changes", "near 1", 0.04),
    "fold-change rank correlation": Metric("fold changes", "higher", 0.02),
    "DE overlap": Metric("fold changes", "higher", 0.05, is_relative=True),
    "interval coverage": Metric("calibration", "near 0.9", 0.01),
    "intervals within 3 points": Metric("calibration", "higher", 0.1, is_relative=True),
    "PIT distance": Metric("calibration", "lower", 0.1, is_relative=True),
    "CRPS": Metric("calibration", "lower", 0.02, is_relative=True),
    "interval score": Metric("calibration", "lower", 0.02, is_relative=True),
    "interval width": Metric("calibration", "near the control", 0.05, is_relative=True),
    "nearest-neighbour ratio": Metric("memorisation", "near 1", 0.03),
    "membership AUC": Metric("memorisation", "lower", 0.02),
    "membership z of worst group": Metric("memorisation", "lower", 1.0),
    "train-on-synthetic F1": Metric("downstream", "higher", 0.015, is_relative=True),
}
"""All rows of the report, in their order."""

FAMILIES = tuple(dict.fromkeys(metric.family for metric in METRICS.values()))


def check_metrics(wanted: str | Iterable[str] | None) -> list[str] | None:
    """Names of metrics and families to keep; None for all."""
    if wanted is None:
        return None
    names = check_names(wanted, "metrics")
    unknown = [name for name in names if name not in METRICS and name not in FAMILIES]
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(
            f"metrics has {got}; allowed are the families {', '.join(FAMILIES)} and the metrics "
            f"{', '.join(METRICS)}."
        )
    return names


def is_wanted(name: str, wanted: list[str] | None) -> bool:
    """Whether a metric belongs into the report: what is asked for, and always what is missing."""
    asked = wanted is None or name in wanted or METRICS[name].family in wanted
    return asked or name == "missing groups"


def assemble(
    values: pd.DataFrame,
    *,
    wanted: list[str] | None,
    kinds: dict[str, str],
    notes: dict[tuple[str, str], str],
) -> pd.DataFrame:
    """One row per model and metric.

    Parameters
    ----------
    values
        One row per model, role, metric and repeat.
    wanted
        As :func:`check_metrics` gives it.
    kinds
        ``"model"`` or ``"baseline"`` by model, in the order of the report.
    notes
        By model and metric.
    """
    import pandas as pd

    def of(role: str, **statistics: Any) -> pd.DataFrame:
        part = values[values["role"] == role]
        return part.groupby(["model", "metric"], sort=False)["value"].agg(**statistics)

    table = of("value", value=_mean, spread=_sd)
    table = table.join(of("control", control=_mean, control_spread=_sd))
    table = table.join(of("train", train=_mean))
    table["n"] = values.groupby(["model", "metric"])["n"].first()
    rows = [
        _row(model, metric, table.loc[(model, metric)], kinds[model], notes)
        for model in kinds
        for metric in METRICS
        if (model, metric) in table.index and is_wanted(metric, wanted)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(
    model: str, name: str, found: pd.Series, kind: str, notes: dict[tuple[str, str], str]
) -> dict[str, Any]:
    metric = METRICS[name]
    value, spread, control, control_spread = (
        float(found[key]) for key in ("value", "spread", "control", "control_spread")
    )
    train = float(found["train"])
    worse, explained = metric.worse(value, control), metric.worse(train, control)
    noise = _noise(spread, control_spread)
    beyond = worse - (explained if explained > 0 else 0.0)
    # Without any noise (no group is ever missing among real cells) any difference is one.
    deviation = beyond / noise if noise > 0 else (beyond and np.sign(beyond) * np.inf)
    if np.isnan(control):
        verdict = "no control"
    elif np.isnan(value):
        verdict = "undefined"
    elif deviation <= N_NOISE:
        verdict = "not told apart"
    else:
        verdict = "close" if worse <= metric.allowed(control) else "off"
    return {
        "model": model,
        "metric": name,
        "value": value,
        "spread": spread,
        "control": control,
        "control_spread": control_spread,
        "excess": value - control,
        "n": int(found["n"]),
        "better": metric.better,
        "train_excess": train - control,
        "tolerance": metric.allowed(control),
        "deviation": float(deviation),
        "verdict": verdict,
        "flag": verdict in ("off", "undefined"),
        "kind": kind,
        "family": metric.family,
        "note": notes.get((model, name), ""),
    }


def _noise(spread: float, control_spread: float) -> float:
    """Standard deviation that chance gives a difference; the model's counts where it is larger."""
    known = [s for s in (control_spread, spread) if np.isfinite(s)]
    if not known:
        return float("nan")
    return max(known[0], float(np.sqrt(np.mean(np.square(known)))))


def _mean(x: pd.Series) -> float:
    return float(np.mean(x))  # nan where a repeat has none


def _sd(x: pd.Series) -> float:
    # A ratio to cells that do not vary is infinite, and has no spread.
    return float(np.std(x, ddof=1)) if len(x) > 1 and np.isfinite(x).all() else float("nan")
