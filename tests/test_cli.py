"""The command line gives what the library gives, and says in a line what is wrong.

The oracle of a command is the call that it stands for, with the same seed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import exprgen
from exprgen.__main__ import main
from exprgen._conditions import ConditionSchema
from exprgen._errors import TrainingStoppedWarning
from exprgen.cli._conditions import typed
from exprgen.cli._messages import in_options
from exprgen.cli._parser import parser

PROJECT = Path(__file__).resolve().parents[1]
GUIDE = PROJECT / "docs" / "user_guide" / "command_line.md"
ROLES = ["--condition", "cell_type", "--continuous", "dose", "--batch", "batch"]
SETUP = {
    "categorical_condition_keys": ["cell_type"],
    "continuous_condition_keys": ["dose"],
    "batch_key": "batch",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with cells of training and of test, and a model that a command has trained."""
    home = tmp_path_factory.mktemp("cli")
    cells = exprgen.datasets.simulate_latent(
        200, n_vars=30, n_types=2, n_batches=2, doses=[0, 1, 2], seed=0
    )
    del cells.uns
    cells[::2].copy().write_h5ad(home / "train.h5ad")
    cells[1::2].copy().write_h5ad(home / "test.h5ad")
    line = f"train @train.h5ad {' '.join(ROLES)} --max-epochs 2 --seed 3 --quiet"
    done = run(f"{line} --out @model --history @history.csv", home)
    assert done == 0
    return home


@pytest.fixture(scope="module")
def model(home) -> exprgen.NBVAE:
    return exprgen.NBVAE.load(home / "model", adata=False)


def run(line: str, home: Path, out: Path | None = None) -> int:
    """A command as it is typed; ``@`` is the folder of inputs, ``OUT`` that of results."""
    return main(shlex.split(line.replace("@", f"{home}/").replace("OUT", str(out))))


# What comes out ---------------------------------------------------------------------------


def test_train_is_the_library_s(home, model):
    cells = ad.read_h5ad(home / "train.h5ad")
    exprgen.NBVAE.setup_anndata(cells, **SETUP)
    by_library = exprgen.NBVAE(cells, seed=3)
    by_library.train(2, progress_bar=False)
    assert model._fingerprint() == by_library._fingerprint()
    history = pd.read_csv(home / "history.csv", index_col="epoch")
    expected = by_library.history_["elbo_validation"].iloc[:, 0]
    np.testing.assert_allclose(history["elbo_validation"], expected.astype(float), rtol=1e-6)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_sample_is_the_library_s(home, model, tmp_path, suffix):
    line = "sample @model --condition cell_type=type_0 --condition dose=1 --n-obs 40 --seed 5"
    assert run(f"{line} --out OUT/new.{suffix}", home, tmp_path) == 0
    read = ad.read_h5ad if suffix == "h5ad" else ad.read_zarr
    drawn = read(tmp_path / f"new.{suffix}")
    expected = model.sample({"cell_type": "type_0", "dose": 1.0}, n_obs=40, seed=5)
    np.testing.assert_array_equal(drawn.X.toarray(), expected.X.toarray())
    pd.testing.assert_frame_equal(drawn.obs, expected.obs, check_categorical=False)
    assert os.listdir(tmp_path) == [f"new.{suffix}"]  # nothing hidden is left


def test_conditions_from_a_table_and_from_cells(home, model, tmp_path):
    (tmp_path / "rows.tsv").write_text("cell_type\tbatch\ntype_1\tbatch_0\ntype_0\tbatch_1\n")
    line = "sample @model --conditions OUT/rows.tsv --condition dose=2 --n-obs 3 --out OUT/a.h5ad"
    assert run(line, home, tmp_path) == 0
    rows = {"cell_type": ["type_1", "type_0"], "batch": ["batch_0", "batch_1"], "dose": 2.0}
    expected = model.sample(rows, n_obs=3, seed=0)  # the command's seed, if none is given
    drawn = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(drawn.X.toarray(), expected.X.toarray())

    assert run("sample @model --conditions @test.h5ad --out OUT/b.h5ad", home, tmp_path) == 0
    expected = model.sample(ad.read_h5ad(home / "test.h5ad"), seed=0)
    drawn = ad.read_h5ad(tmp_path / "b.h5ad")
    np.testing.assert_array_equal(drawn.X.toarray(), expected.X.toarray())


def test_predict_is_the_library_s(home, model, tmp_path):
    cells = ad.read_h5ad(home / "test.h5ad")
    expected = model.predict(cells, n_samples=20, quantiles=(0.1, 0.9), seed=0, copy=True)
    line = "predict @model @test.h5ad --n-samples 20 --quantiles 0.1,0.9 --out OUT/cells"
    assert run(f"{line}.h5ad", home, tmp_path) == 0
    predicted = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert run(f"{line}.zarr", home, tmp_path) == 0
    stored = ad.read_zarr(tmp_path / "cells.zarr")
    for slot in ("exprgen_mean", "exprgen_std", "exprgen_q10", "exprgen_q90"):
        for found in (predicted, stored):
            np.testing.assert_array_equal(found.layers[slot], expected.layers[slot])

    genes = list(cells.var_names[[4, 2]])
    line = f"predict @model @test.h5ad --genes {','.join(genes)} --n-samples 20 --out OUT/g.csv"
    assert run(line, home, tmp_path) == 0
    table = pd.read_csv(tmp_path / "g.csv")
    assert len(table) == 2 * cells.n_obs
    some = model.predict(cells, genes=genes, n_samples=20, seed=0, copy=True)
    for position, gene in enumerate(genes):
        mean = table.loc[table["gene"] == gene, "mean"]
        np.testing.assert_allclose(mean, some.obsm["exprgen_mean"][:, position], rtol=1e-6)
    of_first = table[table["row"].astype(str) == cells.obs_names[0]]
    assert set(of_first["cell_type"]) == {cells.obs["cell_type"].iloc[0]}


@pytest.mark.parametrize("suffix", ["csv", "json", "md"])
def test_evaluate_is_the_library_s(home, model, tmp_path, capsys, suffix):
    train, test = (ad.read_h5ad(home / f"{name}.h5ad") for name in ("train", "test"))
    synthetic = model.sample(test, n_obs=2, seed=0)
    synthetic.write_h5ad(tmp_path / "new.h5ad")
    options = "--groupby cell_type --metrics variation --no-baselines --n-repeats 2"
    line = f"evaluate @train.h5ad @test.h5ad OUT/new.h5ad {options} --out OUT/report.{suffix}"
    assert run(line, home, tmp_path) == 0
    expected = exprgen.tl.evaluate(
        train, test, {"new": synthetic}, groupby="cell_type", layer=None, metrics="variation",
        baselines=False, n_repeats=2, progress_bar=False,
    )  # fmt: skip
    shown = capsys.readouterr().out
    ratio = expected.set_index("metric").loc["variance ratio"]
    assert f"{ratio['value']:.3f} ± " in shown
    assert f"{ratio['control']:.3f} ± " in shown
    text = (tmp_path / f"report.{suffix}").read_text("utf-8")
    if suffix == "csv":
        found = pd.read_csv(tmp_path / "report.csv")["value"]
    elif suffix == "json":
        report = json.loads(text)
        assert report["settings"]["n_repeats"] == 2
        found = [row["value"] for row in report["rows"]]
    else:
        assert all(f"| {name} |" in text for name in expected["metric"])
        return
    np.testing.assert_allclose(np.array(found, float), expected["value"], rtol=1e-6)


def test_cells_stay_in_the_file_and_a_run_is_taken_up(home, model, tmp_path):
    options = f"{' '.join(ROLES)} --max-epochs 2 --seed 3 --checkpoint-dir OUT/state --resume"
    for name in ("a", "b"):  # the second finds the run finished
        line = f"train @train.h5ad --backed {options} --out OUT/{name}"
        assert run(line, home, tmp_path) == 0
        again = exprgen.NBVAE.load(tmp_path / name, adata=False)
        assert again._fingerprint() == model._fingerprint()


def test_hybrid_has_a_mean(home, tmp_path):
    line = "train @train.h5ad --model hybrid --mean group --condition cell_type --max-epochs 1"
    assert run(f"{line} --out OUT/hybrid", home, tmp_path) == 0
    hybrid = exprgen.HybridResidualModel.load(tmp_path / "hybrid", adata=False)
    assert type(hybrid.mean).__name__ == "GroupMeans"
    assert run("sample OUT/hybrid --n-obs 5 --out OUT/new.h5ad", home, tmp_path) == 0


@pytest.mark.filterwarnings("ignore:.*looks continuous")
@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        ([1, 2, 3], "2", 2),
        ([1.0, 2.0], "2", 2.0),
        (["1", "2", "2"], "2", "2"),
        ([True, False, True], "true", True),
        (["NA", "B", "B"], "NA", "NA"),
        (["B", "T", "T"], "C", "C"),  # for the model to refuse
        ([1, 2, 3], "B", "B"),
    ],
)
def test_text_becomes_the_model_s_label(column, text, value):
    schema = ConditionSchema.fit(pd.DataFrame({"a": column * 9}), categorical=["a"])
    (found,) = typed({"a": [text]}, schema)["a"]
    assert found == value
    assert isinstance(found, type(value))


def test_vectors_of_a_table(tmp_path):
    vectors = np.arange(6.0).reshape(3, 2)
    schema = ConditionSchema.fit(pd.DataFrame(index=list("abc")), embedding=("drug", vectors))
    columns = typed({"drug_0": ["0.5", "1"], "drug_1": ["2", "3e-1"]}, schema)
    assert list(columns) == ["drug"]
    np.testing.assert_array_equal(columns["drug"], [[0.5, 2.0], [1.0, 0.3]])


# What is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("train @none.h5ad --out OUT/m", r"There is no file .*none\.h5ad"),
        ("train @text.h5ad --out OUT/m", r"text\.h5ad cannot be read as cells"),
        ("train @text.zarr --out OUT/m", r"text\.zarr cannot be read as cells"),
        ("train @train.h5ad --condition celltype --out OUT/m", "--condition: .*'cell_type'"),
        ("train @train.h5ad --layer raw --out OUT/m", "--layer 'raw' is not in"),
        ("train @train.h5ad --density-epochs 2 --out OUT/m", "--density-epochs is for models"),
        ("train @train.h5ad --out @model", r"--out .* exists\. .* --overwrite"),
        ("train @train.h5ad --out @test.h5ad", "a model needs a folder"),
        ("train @train.h5ad --out @test.h5ad/m", "nothing can be written"),
        ("sample @none --out OUT/a.h5ad", "holds no model of exprgen"),
        ("sample @damaged --out OUT/a.h5ad", r"model\.pt is corrupted"),
        ("sample @foreign --out OUT/a.h5ad", "manifest.json is corrupted"),
        ("sample @model --out @test.h5ad", r"--out .* exists"),
        ("sample @model --condition cell_type=B --condition dose=1 --out OUT/a.h5ad",
         "--condition cell_type: .* 'B' .* Known: 'type_0', 'type_1'"),
        ("sample @model --condition celltype=B --out OUT/a.h5ad", "'celltype'. Did you mean"),
        ("sample @model --condition dose=high --out OUT/a.h5ad", "--condition dose must be a num"),
        ("sample @model --condition dose=1 --out OUT/a.h5ad", "lack 'cell_type'"),
        ("sample @model --marginalize dosis --out OUT/a.h5ad", "--marginalize names 'dosis'"),
        ("sample @model --conditions @none.csv --out OUT/a.h5ad", r"no file .*none\.csv"),
        ("sample @model --conditions @empty.csv --out OUT/a.h5ad", "cannot be read as a table"),
        ("sample @model --conditions @header.csv --out OUT/a.h5ad", "no row of conditions"),
        ("sample @model --conditions @rows.csv --condition dose=1 --out OUT/a.h5ad", "leave out"),
        ("predict @model @test.h5ad --genes nope --out OUT/a.csv", "unknown: 'nope'"),
        ("predict @model @test.h5ad --of mean --out OUT/a.csv", "--n-cells"),
        ("evaluate @train.h5ad @train.h5ad @test.h5ad", "test's very cells"),
        ("evaluate @train.h5ad @test.h5ad @test.h5ad --layer a", "has no layer 'a'.*no --layer"),
    ],
)  # fmt: skip
def test_problems_are_one_line_and_leave_nothing(home, damaged, tmp_path, capsys, line, complaint):
    before = sorted(path.name for path in home.iterdir())
    assert run(line + " --quiet", home, tmp_path) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"error: [^\n]*{complaint}[^\n]*\n", said.err), said.err
    assert os.listdir(tmp_path) == []
    assert sorted(path.name for path in home.iterdir()) == before


@pytest.fixture(scope="module")
def damaged(home) -> None:
    """Files that are not what they are taken for."""
    for name in ("text.h5ad", "empty.csv"):
        (home / name).touch()
    (home / "text.zarr").mkdir()
    (home / "header.csv").write_text("cell_type,dose\n")
    (home / "rows.csv").write_text("cell_type,dose\ntype_0,1\n")
    for name, broken in (("damaged", "model.pt"), ("foreign", "manifest.json")):
        (home / name).mkdir()
        for file in (home / "model").iterdir():
            (home / name / file.name).write_bytes(file.read_bytes())
        content = (home / name / broken).read_bytes()
        (home / name / broken).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "COMMAND"),
        ("trane a.h5ad", "invalid choice: 'trane'"),
        ("train a.h5ad", "required: --out"),
        ("train a.csv --out m", "'a.csv' must end in .h5ad or .zarr"),
        ("train a.h5ad --out m --model nbvea", "--model: .*'nbvea'. Did you mean 'nbvae'"),
        ("train a.h5ad --out m --mean ridge", "--mean: only --model hybrid"),
        ("train a.h5ad --out m --resume", "--resume: give --checkpoint-dir"),
        ("train a.h5ad --out m --max-epochs 0", "--max-epochs: expected a whole number from 1"),
        ("train a.h5ad --out m --max-epoch 1", "unrecognized arguments: --max-epoch"),
        ("sample m --out a.h5ad --condition B", "--condition: expected KEY=VALUE"),
        ("sample m --out a.h5ad --condition a=1 --condition a=2", "a is given twice"),
        ("sample m --out a.h5ad --condition a=1 --conditions c.h5ad", "not beside cells"),
        ("predict m --out a.csv", "give either cells, or conditions"),
        ("predict m c.h5ad --quantiles low --out a.csv", "--quantiles: expected numbers"),
        ("evaluate a.h5ad b.h5ad c.h5ad d/c.h5ad", "several names"),
        ("evaluate a.h5ad b.h5ad c.h5ad --out a.txt", "must end in .csv or .json or .md"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(home, capsys, line, complaint):
    with pytest.raises(SystemExit) as stop:
        run(line, home)
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: [^\n]*{complaint}[^\n]* --help\)\n", capsys.readouterr().err)


def test_results_are_replaced_when_asked(home, tmp_path, capsys):
    (tmp_path / "a.h5ad").write_text("mine")
    line = "sample @model --marginalize cell_type --marginalize dose --out OUT/a.h5ad"
    assert run(line, home, tmp_path) == 1
    assert (tmp_path / "a.h5ad").read_text() == "mine"
    assert run(f"{line} --overwrite", home, tmp_path) == 0
    assert ad.read_h5ad(tmp_path / "a.h5ad").n_obs == 1


def test_warnings_and_tracebacks(home, tmp_path, capsys):
    line = "sample @model --condition cell_type=type_0 --condition dose=7 --quiet"
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as a user has it
        assert run(f"{line} --out OUT/a.h5ad", home, tmp_path) == 0
    said = capsys.readouterr().err.splitlines()
    assert said
    assert all(text.startswith("warning: ") for text in said)
    assert "trained on 0 to 2" in said[0]
    assert len(said) == len(set(said))
    assert run("sample @none --out OUT/b.h5ad --traceback", home, tmp_path) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("error: ")


def test_interrupted_training_is_saved_and_told(home, tmp_path, capsys, monkeypatch):
    train = exprgen.NBVAE.train

    def stopped(self, *args, **kwargs):
        train(self, *args, **kwargs)
        warnings.warn("Training was stopped.", TrainingStoppedWarning, stacklevel=1)

    monkeypatch.setattr(exprgen.NBVAE, "train", stopped)
    line = "train @train.h5ad --condition cell_type --max-epochs 1 --out OUT/m --quiet"
    assert run(line, home, tmp_path) == 130
    assert "Training was stopped." in capsys.readouterr().err
    assert exprgen.NBVAE.load(tmp_path / "m", adata=False).is_trained_


def test_options_stand_for_arguments():
    options = {
        "overwrite": "--overwrite",
        "batch_key": "--batch",
        "of": "--of",
        "layer": "--layer",
    }
    for message, expected in (
        (KeyError("batch_key: no 'x'"), "--batch: no 'x'"),
        ("replace it by overwrite=True.", "replace it by --overwrite."),
        ("of='mean' of\n two", "--of 'mean' of two"),
        ("or layer=None for .X", "or no --layer for .X"),
        ("my_batch_key and conditions['a b']", "my_batch_key and --condition a b"),
        ("layer must be 'a'; a layer must", "--layer must be 'a'; a layer must"),
        (MemoryError(), "MemoryError"),
    ):
        assert in_options(message, options) == expected


# What is taught ---------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """Words of the commands in a text, lines that end in a backslash joined."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.strip() for line in lines if re.match(r"\s*(exprgen|run) (?!\(\))\S", line)]
    return [shlex.split(line)[1:] for line in found]


def _subparsers():
    return parser()._subparsers._group_actions[0].choices


def test_every_option_is_explained_in_a_line_and_examples_are_right():
    texts = [parser().format_help(), GUIDE.read_text("utf-8")]
    texts += [(PROJECT / "README.md").read_text("utf-8")]
    for name, command in _subparsers().items():
        for action in command._actions:
            assert 0 < len(action.help) < 80, (name, action.dest)
        assert any(words[0] == name for words in commands(command.description)), name
        texts.append(command.description)
    script = (PROJECT / "examples" / "pipeline.sh").read_text("utf-8")
    texts.append(re.sub(r'"\$(train|test)"', r"\1.h5ad", script))
    for text in texts:
        found = commands(text)
        assert found
        for words in found:
            parser().parse_args(words)  # exits if it cannot be understood


def test_the_guide_s_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("exprgen.models._train.default_max_epochs", lambda n_train: 1)
    text = GUIDE.read_text("utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    for words in commands(text):
        fewer = {"evaluate": ["--metrics", "variation"], "predict": ["--n-samples", "5"]}
        assert main([*words, *fewer.get(words[0], []), "--quiet"]) == 0
    for name in ("model", "synthetic.h5ad", "report.csv", "annotated.h5ad", "any.zarr"):
        assert (tmp_path / name).exists()


def test_help_is_fast_and_loads_nothing_heavy():
    script = """
import sys, time
start = time.perf_counter()
from exprgen.__main__ import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
heavy = "torch scvi scanpy anndata pandas numpy matplotlib sklearn numba".split()
sys.stderr.write(f"{time.perf_counter() - start} {[n for n in heavy if n in sys.modules]}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    seconds, _, loaded = done.stderr.partition(" ")
    assert "--checkpoint-dir" in done.stdout
    assert float(seconds) < 1
    assert loaded == "['numpy']"


@pytest.mark.slow
def test_a_pipeline_needs_no_python(pbmc, tmp_path):
    """Three processes, from blood cells to a report."""
    cells = pbmc[:, pbmc.X.sum(0).A1 > 50]
    cells[::2].copy().write_h5ad(tmp_path / "train.h5ad")
    cells[1::2].copy().write_h5ad(tmp_path / "test.h5ad")

    def exprgen(line: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "exprgen", *shlex.split(line)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    trained = exprgen("train train.h5ad --condition cell_type --max-epochs 2 --out model")
    assert trained.stdout == ""
    assert "Epoch 2/2" in trained.stderr
    exprgen("sample model --conditions test.h5ad --n-obs 2 --out synthetic.h5ad")
    report = exprgen(
        "evaluate train.h5ad test.h5ad synthetic.h5ad --groupby cell_type --metrics distance"
        " --no-baselines --n-repeats 2 --out report.csv"
    )
    assert "energy distance" in report.stdout
    assert ad.read_h5ad(tmp_path / "synthetic.h5ad").n_obs == cells[1::2].n_obs * 2
    assert len(pd.read_csv(tmp_path / "report.csv")) == 5
