"""``exprgen evaluate``: synthetic cells beside real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exprgen.cli._files import check_place, new_file, read_cells

if TYPE_CHECKING:
    from argparse import Namespace

    import pandas as pd

__all__ = ["run"]


def run(arguments: Namespace) -> str:
    """Compare, write the report, and return the models' table."""
    out, paths = arguments.out, arguments.synthetic
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        arguments.parser.error("argument synthetic: files of several models need several names")
    if out is not None:
        check_place(out, "--out", overwrite=arguments.overwrite)
    train, test = read_cells(arguments.train), read_cells(arguments.test)
    synthetic = {name: read_cells(path) for name, path in zip(names, paths, strict=True)}

    from exprgen.tl import evaluate

    report = evaluate(
        train,
        test,
        synthetic,
        groupby=arguments.groupby,
        layer=arguments.layer,
        metrics=arguments.metrics,
        baselines=arguments.baselines,
        n_repeats=arguments.n_repeats,
        max_cells=arguments.max_cells,
        seed=arguments.seed,
        progress_bar=not arguments.quiet,
    )
    if out is not None:
        with new_file(out, overwrite=arguments.overwrite) as file:
            file.write_text(_as_text(report, out.suffix.lower()), "utf-8")
    return _short(report[report["kind"] == "model"]).to_string(index=False) + "\n"


def _short(report: pd.DataFrame) -> pd.DataFrame:
    """What a screen has room for: value and control, each with its spread over repeats."""
    import pandas as pd

    def with_spread(value: str, spread: str) -> list[str]:
        pairs = zip(report[value], report[spread], strict=True)
        return [f"{v:.3f}" if s != s else f"{v:.3f} ± {s:.3f}" for v, s in pairs]

    return pd.DataFrame(
        {
            "model": report["model"],
            "metric": report["metric"],
            "synthetic vs real": with_spread("value", "spread"),
            "real vs real": with_spread("control", "control_spread"),
            "better": report["better"],
            "verdict": report["verdict"],
        }
    )


def _as_text(report: pd.DataFrame, suffix: str) -> str:
    """All of the report as CSV, as JSON with its settings, or what is short of it as Markdown."""
    import pandas as pd

    if suffix == ".csv":
        return report.to_csv(index=False)
    if suffix == ".json":
        whole = {"settings": report.attrs, "rows": report.to_dict("records")}
        return pd.Series(whole).to_json(indent=1, force_ascii=False) + "\n"
    table = _short(report)
    rows = [list(table), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
