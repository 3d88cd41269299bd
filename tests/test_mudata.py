"""Several modalities: one is modelled, the others condition; rows M01 to M05 of the catalogue.

The oracle throughout is the *twin*: one AnnData into which the conditions of all modalities were
put by hand, cell by cell. A model of the MuData must be the model of its twin, bit by bit.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from faults import (
    MODELS,
    N_OBS,
    OF_COUNTS,
    PATHS,
    TINY,
    TINY_PATH,
    VERBS,
    WRITING,
    assert_same,
    digest,
    latent_of,
    layer_of,
    make_cells,
    refused,
    untouched,
    warned,
)
from mudata import MuData
from scipy import sparse

from exprgen import NBVAE, ExprFlow, tl
from exprgen._errors import CovariateError, DataQualityWarning, GeneMismatchError, SetupError
from exprgen.datasets import simulate_nb
from exprgen.models import GenerativeModel

parametrize = pytest.mark.parametrize

SAID = {
    "modality": "rna",
    "layer": "counts",
    "batch_key": "rna:batch",
    "donor_key": "donor",
    "categorical_condition_keys": ["cell_type", "prot:leiden"],
    "continuous_condition_keys": ["rna:dose"],
    "condition_embedding_key": "prot",
}
TWIN = {
    "layer": "counts",
    "batch_key": "batch",
    "donor_key": "donor",
    "categorical_condition_keys": ["cell_type", "prot:leiden"],
    "continuous_condition_keys": ["dose"],
    "condition_embedding_key": "prot",
}


def several(**modalities: AnnData) -> MuData:
    """A MuData, without what mudata says of repeated names and of its own next version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MuData(modalities)


def make_mdata(n_obs: int = N_OBS) -> MuData:
    """RNA, and protein of the same cells in another order; donor and cell type are of all."""
    rna = make_cells(n_obs)
    rng = np.random.default_rng(0)
    levels = rng.normal(rna.obs["cell_type"].cat.codes.to_numpy()[:, None], 0.3, (n_obs, 4))
    prot = AnnData(sparse.csr_matrix(levels), obs=pd.DataFrame(index=rna.obs_names))
    prot.obs["leiden"] = pd.Categorical(rng.permutation(["high", "low"] * (n_obs // 2)))
    prot.obsm["X_pca"] = levels[:, :2]
    mdata = several(rna=rna, prot=prot[rng.permutation(n_obs)].copy())
    mdata.obs[["cell_type", "donor"]] = rna.obs[["cell_type", "donor"]].loc[mdata.obs_names]
    del rna.obs["donor"]
    return mdata


def twin_of(mdata: MuData) -> AnnData:
    twin, prot = mdata["rna"].copy(), mdata["prot"]
    for name in twin.obs_names:
        twin.obs.loc[name, "prot:leiden"] = prot.obs.loc[name, "leiden"]
        twin.obs.loc[name, "donor"] = mdata.obs.loc[name, "donor"]
    for key in ("prot:leiden", "donor"):
        twin.obs[key] = twin.obs[key].astype("category")
    rows = [list(prot.obs_names).index(name) for name in twin.obs_names]
    twin.obsm["prot"] = prot.X.toarray()[rows].astype(np.float32)
    return twin


def trained(
    data: MuData | AnnData,
    said: dict[str, Any],
    max_epochs: int = 1,
    *,
    model_class: type[GenerativeModel] = NBVAE,
    seed: int = 0,
) -> Any:
    setup = model_class.setup_mudata if isinstance(data, MuData) else model_class.setup_anndata
    setup(data, **{**said, "layer": layer_of(model_class)})
    in_two_stages = model_class in PATHS
    model = model_class(data, seed=seed, **(TINY_PATH if in_two_stages else TINY))
    second = {"density_kwargs": {"max_epochs": max_epochs}} if in_two_stages else {}
    model.train(max_epochs, progress_bar=False, **second)
    return model


def fit(mdata: MuData, *, max_epochs: int = 1, seed: int = 0, **said: Any) -> NBVAE:
    return trained(mdata, said, max_epochs, seed=seed)


@cache
def models(model_class: type[GenerativeModel] = NBVAE) -> tuple[Any, Any]:
    """A model of a MuData, and one of its twin."""
    mdata = make_mdata()
    twin = twin_of(mdata)
    return (
        trained(mdata, SAID, 3, model_class=model_class),
        trained(twin, TWIN, 3, model_class=model_class),
    )


@pytest.fixture(params=MODELS, ids=lambda model_class: model_class.__name__)
def model_class(request: pytest.FixtureRequest) -> type[GenerativeModel]:
    return request.param


@pytest.fixture
def mdata() -> MuData:
    return make_mdata()


def parts(mdata: MuData) -> tuple[Any, ...]:
    """All of a MuData, to tell whether it was changed."""
    own = mdata.obs, mdata.var, dict(mdata.obsm), dict(mdata.uns), mdata.obs_names.to_numpy()
    return *mdata.mod.values(), *own


def setup_is_refused(
    mdata: MuData, error: type[Exception], *names: Any, of: Any = MODELS, **said: Any
) -> None:
    for model_class in of:
        with refused(error, *names, of=parts(mdata)):
            model_class.setup_mudata(mdata, **{**SAID, "layer": layer_of(model_class), **said})


# ---------------------------------------------------------------------- the catalogue's rows


def test_M01_unknown_modality(model_class, mdata):
    setup_is_refused(mdata, KeyError, "'rna', 'prot'", "Did you mean 'rna'", modality="rnaa")
    setup_is_refused(mdata, TypeError, "modality", "'rna', 'prot'", modality=None)
    model, _ = models(model_class)
    other = several(gex=mdata["rna"], prot=mdata["prot"])
    for verb in VERBS.values():
        with refused(KeyError, "modality='rna'", "'gex', 'prot'", of=parts(other)):
            verb(model, other)
    with pytest.raises(TypeError, match="'modality'"):
        model_class.setup_mudata(mdata)


@parametrize(("short", "counted"), [("prot", "5 of the modelled"), ("rna", "5 are only there")])
def test_M02_unpaired_cells(model_class, mdata, short, counted):
    rest = {name: mod.copy() for name, mod in mdata.mod.items()}
    rest[short] = rest[short][5:].copy()
    unpaired = several(**rest)
    unpaired.obs = mdata.obs.loc[unpaired.obs_names]
    names = "5 cells are unpaired", counted, "muon.pp.intersect_obs"
    setup_is_refused(unpaired, SetupError, *names)
    model, _ = models(model_class)
    for verb in VERBS.values():
        with refused(SetupError, *names, of=parts(unpaired)):
            verb(model, unpaired)


def test_M02_a_modality_that_does_not_condition_need_not_be_paired(mdata):
    three = several(rna=mdata["rna"], atac=mdata["prot"][:7].copy())
    NBVAE.setup_mudata(three, modality="rna", categorical_condition_keys=["cell_type"])
    assert NBVAE(three, **TINY).conditions["n_train"].sum() == N_OBS


@parametrize("verb", VERBS)
def test_M03_cells_are_matched_by_name(model_class, mdata, verb):
    assert list(mdata["rna"].obs_names) != list(mdata["prot"].obs_names)
    model, by_hand = models(model_class)
    twin = twin_of(mdata)
    ours, theirs = VERBS[verb](model, mdata), VERBS[verb](by_hand, twin)
    if verb in WRITING:
        assert ours is mdata
        assert set(theirs.layers) == set(ours["rna"].layers)
        assert_same(theirs.layers, ours["rna"].layers)
        assert_same(theirs.uns["exprgen"][verb], ours["rna"].uns["exprgen"][verb])
        assert "exprgen" not in mdata.uns
        assert "exprgen" not in mdata["prot"].uns
    elif verb == "posterior_predictive_sample":
        assert_same(*(np.asarray(x.todense()) for x in (ours, theirs)))
    else:
        assert_same(ours, theirs)


def test_M04_same_names_of_genes_in_two_modalities(model_class, mdata):
    prot = mdata["prot"].copy()
    prot.var_names = mdata["rna"].var_names[:4]
    twice = several(rna=mdata["rna"], prot=prot)
    twice.obs = mdata.obs
    model, _ = models(model_class)
    same = trained(twice, SAID, 3, model_class=model_class)
    assert list(same.var_names) == list(mdata["rna"].var_names)
    np.testing.assert_array_equal(
        same.log_likelihood(n_samples=2, seed=0), model.log_likelihood(n_samples=2, seed=0)
    )
    assert same.predict(n_samples=20)["prot"].shape == (N_OBS, 4)


def test_M05_the_method_for_the_other_object(model_class, mdata):
    with refused(TypeError, "AnnData", "MuData", "setup_mudata", of=parts(mdata)):
        model_class.setup_anndata(mdata)
    with refused(TypeError, "MuData", "AnnData", "setup_anndata", of=mdata["rna"]):
        model_class.setup_mudata(mdata["rna"], modality="rna")
    with refused(TypeError, "MuData", "DataFrame", "mudata.MuData("):
        model_class.setup_mudata(mdata["rna"].to_df(), modality="rna")
    _, of_one = models(model_class)
    for verb in VERBS.values():
        with refused(TypeError, "AnnData", "MuData", "mdata['rna']", of=parts(mdata)):
            verb(of_one, mdata)


# ---------------------------------------------------------------------- which column is meant


def test_a_model_of_two_stages_is_that_of_its_twin(mdata):
    """So is one whose first stage was taken over."""
    twin, models = twin_of(mdata), []
    for data, setup, said in ((mdata, "setup_mudata", SAID), (twin, "setup_anndata", TWIN)):
        getattr(ExprFlow, setup)(data, **said)
        models.append(ExprFlow(data, seed=0, **TINY_PATH))
        models[-1].train(2, density_kwargs={"max_epochs": 2}, progress_bar=False)
    asked = {"n_steps": 2, "solver": "euler", "guidance": {"prot": 2.0, "cell_type": 0}, "seed": 0}
    ours, theirs = (m.sample(data, **asked) for m, data in zip(models, (mdata, twin), strict=True))
    assert_same(ours.X, theirs.X)
    assert_same(ours.obs, theirs.obs)
    results = [m.predict(n_samples=10, **asked) for m in models]
    assert_same(results[0]["rna"].layers["exprgen_mean"], results[1].layers["exprgen_mean"])
    autoencoder = fit(mdata, **SAID)
    taken = ExprFlow.from_autoencoder(autoencoder)
    taken.train(density_kwargs={"max_epochs": 2}, progress_bar=False)
    assert_same(latent_of(taken), latent_of(autoencoder))


def test_names_of_conditions_leave_out_the_modelled_modality():
    model, by_hand = models()
    assert model.schema == by_hand.schema
    pd.testing.assert_frame_equal(model.conditions, by_hand.conditions)
    vector = mdata_vector()
    given = {"cell_type": "type_0", "prot:leiden": "low", "dose": 1, "prot": vector}
    synthetic = model.sample(given, n_obs=3, seed=0)
    assert list(synthetic.obs["prot:leiden"]) == ["low"] * 3
    np.testing.assert_allclose(synthetic.obsm["prot"], np.tile(vector, (3, 1)))
    with pytest.raises(KeyError, match="rna:dose.*Did you mean 'dose'"):
        model.sample({"rna:dose": 1})


def mdata_vector() -> np.ndarray:
    return make_mdata()["prot"].X.toarray()[0]


def test_two_meanings_of_a_name_are_refused(mdata):
    mdata.obs["batch"] = "elsewhere"
    names = "'batch' has two meanings", "mdata.obs['batch']", "mdata['rna'].obs", "'rna:batch'"
    setup_is_refused(mdata, SetupError, *names, f"{N_OBS} cells", batch_key="batch")
    NBVAE.setup_mudata(mdata, **SAID)  # 'rna:batch' has one
    mdata.obs["batch"] = mdata["rna"].obs["batch"].loc[mdata.obs_names].astype(str)
    NBVAE.setup_mudata(mdata, **{**SAID, "batch_key": "batch"})  # equal: no doubt


def test_an_old_copy_of_a_column_is_named(mdata):
    mdata.obs["prot:leiden"] = "old"
    with warned(DataQualityWarning, "'prot:leiden'", "mdata['prot'].obs", "del mdata.obs"):
        NBVAE.setup_mudata(mdata, **SAID)
    assert set(NBVAE(mdata, **TINY).conditions["prot:leiden"]) == {"high", "low"}


def test_a_column_that_only_the_whole_has_may_be_left_over(mdata):
    mdata.obs["prot:leiden"] = mdata["prot"].obs["leiden"].loc[mdata.obs_names]
    del mdata["prot"].obs["leiden"]
    names = "'prot:leiden'", "mdata['prot'].obs has no 'leiden'", "del mdata.obs['prot:leiden']"
    with warned(DataQualityWarning, *names):
        NBVAE.setup_mudata(mdata, **SAID)


def test_errors_name_the_modality(mdata):
    setup_is_refused(mdata, KeyError, "In modality 'rna'", "'nope'", "'counts'", layer="nope")
    mdata["prot"].X[3, 1] = np.nan
    cell = mdata["prot"].obs_names[3]
    names = "mdata['prot'].X", "condition_embedding_key='prot'", "1 cells", repr(cell)
    setup_is_refused(mdata, CovariateError, *names)
    model, _ = models()
    with refused(CovariateError, *names, of=parts(mdata)):
        model.log_likelihood(mdata, n_samples=2)
    other = make_mdata()
    other["rna"].layers["counts"] = -other["rna"].layers["counts"]
    with refused(SetupError, "In modality 'rna'", "negative", of=parts(other)):
        model.log_likelihood(other, n_samples=2)


def test_a_model_of_what_is_not_set_up(mdata):
    with refused(ValueError, "NBVAE.setup_mudata(mdata, modality=...)", of=parts(mdata)):
        NBVAE(mdata)


def test_embedding_in_obsm(mdata):
    pca = pd.DataFrame(mdata["prot"].obsm["X_pca"], mdata["prot"].obs_names)
    mdata.obsm["X_all"] = pca.loc[mdata.obs_names].to_numpy()
    said = {"modality": "rna", "layer": "counts"}
    models_ = []
    for key in ("prot:X_pca", "X_all"):
        models_.append(fit(mdata, **said, condition_embedding_key=key))
        assert models_[-1].schema.embedding_key == key
    a, b = (model.log_likelihood(n_samples=2, seed=0) for model in models_)
    np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------- setup, as for an AnnData


def test_setup_leaves_nothing_but_the_identifiers(mdata):
    with untouched(*parts(mdata)[:2]):
        before = digest(dict(mdata.uns)), [digest(part) for part in (mdata.obs, dict(mdata.obsm))]
        NBVAE.setup_mudata(mdata, **SAID)
        assert {key for key in mdata.uns if not key.startswith("_scvi_")} == set()
        mine = {key: mdata.uns[key] for key in mdata.uns if not key.startswith("_scvi_")}
        assert before == (digest(mine), [digest(part) for part in (mdata.obs, dict(mdata.obsm))])


@parametrize(
    ("said", "error", "names"),
    [
        ({"layer": "count"}, KeyError, ["'count'", "'counts'"]),
        ({"batch_key": "rna:bach"}, KeyError, ["batch_key", "'rna:bach'", "'rna:batch'"]),
        ({"donor_key": "leiden"}, KeyError, ["donor_key", "Did you mean 'prot:leiden'"]),
        ({"categorical_condition_keys": "cell_type"}, TypeError, ["did you mean ['cell_type']"]),
        ({"continuous_condition_keys": ["cell_type"]}, SetupError, ["given twice"]),
        ({"continuous_condition_keys": ["rna:cell_type"]}, SetupError, ["given twice"]),
        ({"condition_embedding_key": "X_pca"}, KeyError, ["Did you mean 'prot:X_pca'"]),
        ({"condition_embedding_key": "rna"}, SetupError, ["'rna'", "on themselves"]),
        ({"size_factor_key": "dept"}, KeyError, ["size_factor_key", "'dept'"]),
        ({"labels_key": "cell_type"}, TypeError, ["categorical_condition_keys"]),
        ({"modalities": {}}, TypeError, ["setup_mudata()", "'modality:key'"]),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used(mdata, said, error, names):
    with untouched(*parts(mdata)), pytest.raises(error) as caught:
        NBVAE.setup_mudata(mdata, **{**SAID, **said})
    message = str(caught.value).lower()
    assert [name for name in names if name.lower() not in message] == [], message


def break_counts(mdata: MuData) -> None:
    mdata["rna"].layers["counts"].data[:] *= -1


def break_leiden(mdata: MuData) -> None:
    mdata["prot"].obs.iloc[0, 0] = None
    mdata.obs = mdata.obs.drop(columns="prot:leiden", errors="ignore")


def break_global(mdata: MuData) -> None:
    mdata.obs.loc[mdata.obs_names[0], "donor"] = None


def break_protein(mdata: MuData) -> None:
    mdata["prot"].X[0, 0] = np.nan


def no_protein(mdata: MuData) -> None:
    mdata["prot"].X = None


def repeat_names(mdata: MuData) -> None:
    names = mdata["prot"].obs_names.to_list()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata["prot"].obs_names = [names[1], *names[1:]]


@parametrize(
    ("fault", "error", "names"),
    [
        (break_counts, SetupError, ["'rna'", "negative", "layers['counts']"]),
        (break_leiden, CovariateError, ["prot:leiden", "1 missing"]),
        (break_global, CovariateError, ["donor", "1 missing"]),
        (break_protein, CovariateError, ["'prot'", "finite"]),
        (no_protein, SetupError, ["mdata['prot'].X is None"]),
        (repeat_names, SetupError, ["1 names of cells are repeated in mdata['prot']"]),
    ],
)
def test_data_that_cannot_be_used(mdata, fault, error, names):
    fault(mdata)
    setup_is_refused(mdata, error, *names, of=OF_COUNTS)


def test_size_factors_are_read_by_name(mdata):
    mdata["prot"].obs["depth"] = 1.0
    cell = mdata["prot"].obs_names[0]
    mdata["prot"].obs.loc[cell, "depth"] = 0.0
    names, key = (cell, "positive"), {"size_factor_key": "prot:depth"}
    setup_is_refused(mdata, CovariateError, *names, of=OF_COUNTS, **key)
    mdata["prot"].obs.loc[cell, "depth"] = 2.0
    model = fit(mdata, **{**SAID, **key})
    library = model._cells(None).library
    assert library[mdata["rna"].obs_names.get_loc(cell)] == 2
    assert library.sum() == N_OBS + 1


def test_what_is_made_dense_is_limited(mdata):
    wide = AnnData(sparse.random(N_OBS, 2001, 0.01, "csr"), mdata["rna"].obs[[]].copy())
    wide.obsm["X_lsi"] = np.zeros((N_OBS, 2)) + np.arange(N_OBS)[:, None]
    both = several(rna=mdata["rna"], atac=wide)
    said = {"modality": "rna", "layer": "counts"}
    with refused(SetupError, "mdata['atac']", "2001 columns", "at most 2000", of=parts(both)):
        NBVAE.setup_mudata(both, **said, condition_embedding_key="atac")
    NBVAE.setup_mudata(both, **said, condition_embedding_key="atac:X_lsi")


def test_a_view_is_no_place_to_set_up(mdata):
    with refused(SetupError, "view", "mdata.copy()"):
        NBVAE.setup_mudata(mdata[:50], **SAID)


def test_too_few_cells():
    mdata = make_mdata()
    few = several(rna=mdata["rna"][:5].copy(), prot=mdata["prot"][:3].copy())
    with refused(SetupError, "In modality 'rna'", "5 cells", "minimum is 10"):
        NBVAE.setup_mudata(few, modality="rna", layer="counts")


@parametrize("edit", [break_leiden, break_global])
def test_conditions_edited_after_setup(mdata, edit):
    NBVAE.setup_mudata(mdata, **SAID)
    model = NBVAE(mdata, seed=0, **TINY)
    edit(mdata)
    with refused(CovariateError, "changed since setup_mudata", of=parts(mdata)):
        model.train(1, progress_bar=False)


def test_protein_edited_after_setup(mdata):
    NBVAE.setup_mudata(mdata, **SAID)
    model = NBVAE(mdata, seed=0, **TINY)
    mdata["prot"].X.data[0] += 1
    with refused(CovariateError, "'prot' changed since setup_mudata", of=parts(mdata)):
        model.train(1, progress_bar=False)


@parametrize("key", ["fold", "rna:fold", "prot:fold"])
def test_split_by_a_column(mdata, key):
    owner = {"fold": mdata, "rna:fold": mdata["rna"], "prot:fold": mdata["prot"]}[key]
    owner.obs["fold"] = "train"
    chosen = mdata["prot"].obs_names[:20]
    owner.obs.loc[chosen, "fold"] = "validation"
    NBVAE.setup_mudata(mdata, **SAID)
    model = NBVAE(mdata, seed=0, **TINY)
    model.train(1, split_key=key, progress_bar=False)
    assert set(mdata["rna"].obs_names[model.validation_indices_]) == set(chosen)


# ---------------------------------------------------------------------- verbs


@parametrize("verb", [name for name in VERBS if name not in WRITING])
def test_verbs_that_do_not_write_leave_it_as_it_was(mdata, verb):
    model, _ = models()
    with untouched(*parts(mdata)):
        VERBS[verb](model, mdata)


@parametrize("verb", WRITING)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # mudata's, of its own next version
def test_results_about_a_view_come_in_a_copy(mdata, verb):
    model, _ = models()
    view = mdata[mdata.obs_names[::-1][:20]]
    with untouched(*parts(mdata)):
        written = VERBS[verb](model, view)
    assert view.is_view
    assert not written.is_view
    whole = getattr(model, verb)(mdata, n_samples=20 if verb == "predict" else 2, seed=0)
    name = "exprgen_mean" if verb == "predict" else "exprgen_denoised"
    assert written["rna"].layers[name].shape == (20, 12)
    if verb == "predict":
        # Conditions decide the numbers, not the place of the cell, up to draws.
        rows = whole["rna"].obs_names.get_indexer(written["rna"].obs_names)
        ratio = written["rna"].layers[name] / whole["rna"].layers[name][rows]
        assert np.median(np.abs(np.log(ratio))) < np.log(2)
    copied = getattr(model, verb)(mdata, copy=True, n_samples=2, seed=0, overwrite=True)
    assert copied is not mdata


def test_results_go_to_the_modality(mdata):
    model, by_hand = models()
    twin = twin_of(mdata)
    for a_model, cells in ((model, mdata), (by_hand, twin)):
        a_model.log_likelihood(cells, n_samples=2, key_added="exprgen", seed=0)
        latent_of(a_model, cells, key_added="exprgen")
    rna = mdata["rna"]
    assert_same(rna.obsm["X_exprgen"], twin.obsm["X_exprgen"])
    assert_same(rna.obs["exprgen_log_likelihood"], twin.obs["exprgen_log_likelihood"])
    assert set(rna.obs["exprgen_split"]) == {"train", "validation"}
    with refused(ValueError, "is a view", of=parts(mdata)):
        model.log_likelihood(mdata[:9], key_added="exprgen")


def test_a_modality_that_is_a_view_is_written_to_in_the_mdata_only(mdata):
    rna = mdata["rna"].copy()
    of_view = several(rna=rna[:, ::-1], prot=mdata["prot"])
    of_view.obs = mdata.obs
    model, _ = models()
    with untouched(rna):
        model.denoise(of_view, n_samples=2, seed=0)
    model.denoise(mdata, n_samples=2, seed=0)
    np.testing.assert_allclose(
        of_view["rna"][:, mdata["rna"].var_names].layers["exprgen_denoised"],
        mdata["rna"].layers["exprgen_denoised"],
        rtol=1e-5,
    )


def test_batch_and_donor_may_be_left_out_of_a_query(mdata):
    model, _ = models()
    for key in ("donor",):
        del mdata.obs[key]
    del mdata["rna"].obs["batch"]
    mdata.obs = mdata.obs.drop(columns="rna:batch", errors="ignore")
    synthetic = model.sample(mdata, seed=0)
    assert set(synthetic.obs["batch"]) == {"batch_0", "batch_1"}
    del mdata["prot"].obs["leiden"]
    mdata.obs = mdata.obs.drop(columns="prot:leiden", errors="ignore")
    with refused(CovariateError, "lack 'prot:leiden'", of=parts(mdata)):
        model.sample(mdata, seed=0)


def test_the_modality_alone_where_it_has_all_conditions(mdata):
    model, by_hand = models()
    twin = twin_of(mdata)
    np.testing.assert_array_equal(
        model.log_likelihood(twin, n_samples=2, seed=0),
        by_hand.log_likelihood(twin, n_samples=2, seed=0),
    )
    with refused(CovariateError, "The cells lack", "'prot:leiden'", "in obsm: 'prot'"):
        model.log_likelihood(mdata["rna"], n_samples=2)


# ---------------------------------------------------------------------- files


def answers(model: NBVAE, cells: Any) -> list[np.ndarray]:
    return [
        model.sample(cells, seed=1).X.toarray(),
        model.log_likelihood(cells, n_samples=2, seed=1),
        latent_of(model, cells),
    ]


def test_round_trip(mdata, tmp_path):
    model = fit(mdata, max_epochs=2, **SAID)
    model.save(tmp_path / "model", donor_labels=True)
    said = NBVAE.load_registry(tmp_path / "model")
    assert said["setup_method_name"] == "setup_mudata"
    assert said["setup_args"]["batch_key"] == "rna:batch"
    expected = answers(model, mdata)

    fresh = make_mdata()
    with untouched(*parts(fresh)[:2]):
        loaded = NBVAE.load(tmp_path / "model", fresh)
    assert loaded.adata is fresh
    for a, b, c in zip(expected, answers(loaded, fresh), answers(loaded, None or mdata),
                       strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    loaded.train(1, progress_bar=False)

    alone = NBVAE.load(tmp_path / "model")
    for a, b in zip(expected, answers(alone, mdata), strict=True):
        np.testing.assert_array_equal(a, b)
    with refused(ValueError, "loaded without data"):
        alone.log_likelihood()

    twin = twin_of(mdata)
    of_twin = NBVAE.load(tmp_path / "model", twin)
    for a, b in zip(expected, answers(of_twin, twin), strict=True):
        np.testing.assert_array_equal(a, b)
    of_twin.train(1, progress_bar=False)


def test_load_finds_genes_by_name(mdata, tmp_path):
    model = fit(mdata, max_epochs=2, **SAID)
    model.save(tmp_path / "model", donor_labels=True)
    rna = mdata["rna"]
    turned = several(rna=rna[:, ::-1].copy(), prot=mdata["prot"])
    turned.obs = mdata.obs
    loaded = NBVAE.load(tmp_path / "model", turned)
    assert list(loaded.var_names) == list(rna.var_names)
    np.testing.assert_allclose(
        loaded.log_likelihood(n_samples=2, seed=0),
        model.log_likelihood(n_samples=2, seed=0),
        rtol=1e-5,
    )
    loaded.train(1, progress_bar=False)
    fewer = several(rna=rna[:, 1:].copy(), prot=mdata["prot"])
    fewer.obs = mdata.obs
    with refused(GeneMismatchError, "gene_0", of=parts(fewer)):
        NBVAE.load(tmp_path / "model", fewer)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # mudata's, of its own next version
def test_cells_in_a_file(mdata, tmp_path):
    model, _ = models()
    mdata.write(tmp_path / "cells.h5mu")
    backed = mudata.read_h5mu(tmp_path / "cells.h5mu", backed="r")
    for a, b in zip(answers(model, mdata), answers(model, backed), strict=True):
        np.testing.assert_array_equal(a, b)
    again = fit(backed, max_epochs=3, **SAID)
    np.testing.assert_array_equal(*(answers(a_model, mdata)[1] for a_model in (model, again)))
    assert model.denoise(backed, n_samples=2) is backed
    for given, names in ((backed[:9], "a view"), (backed, "copy=True")):
        with refused(ValueError, names, "mudata.read_h5mu(path)"):
            model.denoise(given, n_samples=2, copy=given is backed)


def test_data_are_saved_beside_the_model(mdata, tmp_path):
    mdata.obs["prot:dose"] = 9.0  # of no modality, or of another value there
    mdata.obs["rna:dose"] = "mine"
    mdata["rna"].obs["text"] = mdata["rna"].obs_names.to_numpy() + "!"
    with warned(DataQualityWarning, "'rna:dose'"):
        model = fit(mdata, **SAID)
    with untouched(*parts(mdata)):
        model.save(tmp_path / "model", save_anndata=True, donor_labels=True)
    with warned(DataQualityWarning, "'rna:dose'"):
        loaded = NBVAE.load(tmp_path / "model")
    assert isinstance(loaded.adata, MuData)
    for a, b in zip(answers(model, mdata), answers(loaded, loaded.adata), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_of_one_modality_takes_no_mudata(mdata, tmp_path):
    _, of_one = models()
    of_one.save(tmp_path / "model")
    with refused(TypeError, "load", "AnnData", "MuData", "mdata['rna']", of=parts(mdata)):
        NBVAE.load(tmp_path / "model", mdata)


def test_the_setup_is_printed_by_its_name(mdata, tmp_path, capsys):
    fit(mdata, **SAID).save(tmp_path / "model")
    NBVAE.view_setup_args(tmp_path / "model")
    said = capsys.readouterr().out
    assert said.startswith("NBVAE.setup_mudata was called with")
    assert "'modality': 'rna'" in said


# ---------------------------------------------------------------------- is it of use


def held_out(train: MuData, test: MuData, key: str | None) -> float:
    """Mean log-likelihood of cells that training has not seen, nats per cell."""
    NBVAE.setup_mudata(train, modality="rna", condition_embedding_key=key)
    model = NBVAE(train, seed=0, n_hidden=32, n_latent=4, n_components=4)
    model.train(25, progress_bar=False)
    return model.log_likelihood(test, n_samples=20, seed=0).mean()


def test_protein_improves_held_out_likelihood_and_noise_does_not():
    rna = simulate_nb(1000, n_vars=30, n_types=4, seed=0)
    types = rna.obs["cell_type"].cat.codes.to_numpy()
    rng = np.random.default_rng(0)
    levels = rng.normal(np.eye(4)[types], 0.2)

    def split(values: np.ndarray) -> tuple[MuData, MuData]:
        prot = AnnData(values, rna.obs[[]].copy())
        shuffled = prot[rng.permutation(700)].copy()
        return (
            several(rna=rna[:700].copy(), prot=shuffled),
            several(rna=rna[700:].copy(), prot=prot[700:].copy()),
        )

    without = held_out(*split(levels), None)
    # Telling four types apart is worth up to log(4) = 1.4 nats to a perfect model of all cells.
    assert held_out(*split(levels), "prot") > without + 1
    assert held_out(*split(rng.permutation(levels)), "prot") < without + 0.3


# ---------------------------------------------------------------------- real cells


def test_rna_given_surface_proteins(shared_data):
    cells = ad.read_h5ad(shared_data("cite_pbmc_400_scvi.h5ad"))
    totals = pd.Series(np.asarray(cells.X.sum(0)).ravel(), cells.var_names)
    genes = totals.nlargest(60).index.union(["CD3D", "CD3E", "IL7R", "LYZ", "S100A8"])
    counts = cells.obsm["protein_counts"]
    prot = AnnData(np.log1p(counts.to_numpy(np.float64)), cells.obs[[]].copy())
    prot.var_names = counts.columns
    mdata = several(rna=cells[:, genes].copy(), prot=prot[::-1].copy())
    NBVAE.setup_mudata(
        mdata, modality="rna", batch_key="rna:batch", condition_embedding_key="prot"
    )
    # Without outliers: their size is shared by genes, and one of LYZ's size moves a mean of CD3D.
    model = NBVAE(mdata, seed=0, n_hidden=32, n_latent=4, likelihood="nb")
    model.train(30, progress_bar=False)
    order = np.argsort(mdata["prot"][:, "CD3_TotalSeqB"].X.ravel())
    names = mdata["prot"].obs_names
    few, many = (
        model.sample(mdata[names[chosen]], n_obs=5, seed=0).to_df().mean()
        for chosen in (order[:100], order[-100:])
    )
    # T cells carry the protein, monocytes do not.
    assert (many[["CD3D", "CD3E", "IL7R"]] > 3 * few[["CD3D", "CD3E", "IL7R"]]).all()
    assert (many[["LYZ", "S100A8"]] < few[["LYZ", "S100A8"]] / 2).all()


def test_rna_given_chromatin(shared_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata = mudata.read_h5mu(shared_data("scicar_kidney.h5mu"))
    mdata = several(rna=mdata["rna"][:, :60].copy(), atac=mdata["atac"])
    said = {"modality": "rna", "categorical_condition_keys": ["rna:cell_type"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataQualityWarning)
        NBVAE.setup_mudata(mdata, **said, condition_embedding_key="atac")
    model = NBVAE(mdata, seed=0, **TINY)
    model.train(2, progress_bar=False)
    assert model.schema.layout.n_embedding == 1499
    synthetic = model.sample(mdata[mdata.obs_names[:20]], seed=0)
    assert synthetic.obsm["atac"].shape == (20, 1499)
    assert list(synthetic.obs["cell_type"]) == list(mdata["rna"].obs["cell_type"][:20])


@pytest.mark.filterwarnings("ignore:1 cells of adata lie far outside")
def test_outliers_and_tails_are_those_of_the_twin():
    model, by_hand = models()
    mdata = make_mdata(250)
    names = list(mdata["rna"].obs_names[N_OBS:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibration, query = mdata[names[:60]].copy(), mdata[names[60:]].copy()
    twin = twin_of(query)
    options = {"progress_bar": False, "seed": 0, "n_samples": 2}
    for cells, given, judge in (
        (query, calibration, model),
        (twin, twin_of(calibration), by_hand),
    ):
        with pytest.warns(DataQualityWarning, match="calibration cells of group"):
            found = tl.outliers(cells, judge, given, groupby="cell_type", **options)
        assert found is cells
        assert tl.tail_pvalues(cells, judge, **options) is cells
    rna = query["rna"]
    columns = [name for name in rna.obs if name.startswith("exprgen")]
    assert_same(twin.obs[columns], rna.obs[columns])
    assert_same(twin.layers["exprgen_tail_pvalue"], rna.layers["exprgen_tail_pvalue"])
    assert_same(twin.uns["exprgen"]["outliers"], rna.uns["exprgen"]["outliers"])
    assert "exprgen" not in query.uns
