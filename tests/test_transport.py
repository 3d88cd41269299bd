"""Counterfactuals of combinations never seen: whose response is borrowed, and that it is."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from exprgen import NBVAE, CondVAE
from exprgen._conditions import ConditionLayout
from exprgen._errors import ExtrapolationWarning
from exprgen.likelihoods import Gaussian, NegativeBinomial
from exprgen.models._transport import _weights, decoder_under, stand_ins
from exprgen.spaces import ContinuousLatentSpace, Decoded, LatentSpace

KEYS = {"categorical_condition_keys": ["cell_type", "condition"]}
QUIET = {"progress_bar": False}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([0, 0], [0, 1], []),  # was seen
        ([2, 0], [2, 1], [[0, 0], [1, 0]]),  # type 3 is not seen treated either
        ([2, 0], [0, 1], []),  # nothing is left that could be shared
        ([4, 0], [4, 1], [[0, 0], [1, 0]]),  # the cell's own combination need not be seen
        ([2, 2], [2, 1], []),  # nobody was seen in condition 2
    ],
)
def test_stand_ins_were_seen_before_and_after_the_change(old, new, expected):
    seen = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [3, 0]])
    found = stand_ins(seen, np.array(old), np.array(new))
    assert [row.tolist() for row in found] == expected


def test_stand_ins_share_only_the_labels_that_change():
    seen = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1], [2, 0, 0], [2, 1, 1]])
    found = stand_ins(seen, np.array([0, 1, 0]), np.array([0, 1, 1]))
    assert [row.tolist() for row in found] == [[0, 0, 0], [1, 1, 0]]
    # Two labels change at once.
    found = stand_ins(seen, np.array([3, 0, 0]), np.array([3, 1, 1]))
    assert [row.tolist() for row in found] == [[2, 0, 0]]


def test_without_labels_there_are_no_stand_ins():
    assert stand_ins(np.zeros((1, 0), int), np.zeros(0, int), np.zeros(0, int)) == []


def test_weights_interpolate():
    exact = _weights(torch.tensor([[0.0], [0.3], [2.0]]))
    torch.testing.assert_close(exact[:, 0], torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    alike = _weights(torch.tensor([[0.7], [0.7], [0.7]]))
    torch.testing.assert_close(alike[:, 0], torch.full((3,), 1 / 3))
    twins = _weights(torch.zeros(2, 4))
    torch.testing.assert_close(twins, torch.full((2, 4), 0.5))
    squared = _weights(torch.tensor([[1.0], [2.0]]))[:, 0]
    torch.testing.assert_close(squared, torch.tensor([0.8, 0.2]))


# An analytic model: types × conditions on a table, everything additive -----------------------

MAIN, INTERACTION = 1.0, 2.0
# Gene 0 tells types apart, gene 1 responds in all of them, gene 2 in type 0; of type 1, which is
# like it, the decoder was not taught whether.
TYPE_LEVEL = torch.tensor([0.0, 0.1, 5.0])
RESPONDS = torch.tensor([1.0, 0.0, 0.0])


def _table_model():
    """Types 0 and 1 are close, 2 is far; z moves gene 0, and its mean is the treatment."""

    def decode_at(z, log_depth, c, effect=None):
        kind, treated = c[:, 0].long(), c[:, 1]
        columns = [
            TYPE_LEVEL[kind] + z[:, 0],
            MAIN * treated,
            INTERACTION * treated * RESPONDS[kind],
        ]
        location = torch.stack(columns, 1)
        if effect is not None:
            location = location + effect
        return Decoded(location, location[:, None] / 2)

    space = SimpleNamespace(
        density_features=lambda c: c,
        mean=None,
        n_latent=1,
        decode_at=decode_at,
        to_effects=lambda location: location,
        from_effects=lambda values: values,
        moved=lambda decoded, log_depth, effect: decoded,
        known_effect=lambda c: None,
    )
    prior = SimpleNamespace(mean=lambda c: c[:, 1:2])
    return SimpleNamespace(space=space, density=None, autoencoder_prior=prior)


def test_a_planted_interaction_is_borrowed_from_the_like_and_the_main_effect_from_all():
    seen = np.array([[0, 0], [0, 1], [1, 0], [2, 0], [2, 1]])
    c = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    new_c = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    y = torch.tensor([[0.3], [-0.2], [0.9]])
    location, extra = decoder_under(_table_model(), c, c, new_c, seen)(y, None)
    # Of squared distance (.1² / 3) and (4.9² / 3): all but 2e-7 is type 0's.
    borrowed = INTERACTION * (1 - 1 / (1 + 49.0**4))
    expected = torch.tensor(
        [
            [0.1 + 0.3 + 1, MAIN, borrowed],  # place kept, the mean state moved by 1
            [5.0 - 0.2 + 1, MAIN, 0.0],  # was seen: its own
            [0.1 + 0.9 + 1, MAIN, borrowed],
        ]
    )
    torch.testing.assert_close(location, expected)
    torch.testing.assert_close(extra[:, 0], expected / 2)


def test_a_combination_far_from_all_gets_their_average_response(monkeypatch):
    monkeypatch.setitem(globals(), "TYPE_LEVEL", torch.tensor([0.0, 10.0, 5.0]))
    seen = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
    c, new_c = torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    monkeypatch.setitem(globals(), "RESPONDS", torch.tensor([1.0, 0.0, 5.0]))
    location, _ = decoder_under(_table_model(), c, c, new_c, seen)(torch.zeros(1, 1), None)
    torch.testing.assert_close(location, torch.tensor([[6.0, MAIN, INTERACTION / 2]]))


# Spaces --------------------------------------------------------------------------------------

LAYOUT = ConditionLayout(n_categories=(3,), n_continuous=0, n_embedding=0, n_batch=0, n_donor=2)
SHAPE = {"n_latent": 2, "n_hidden": 8, "n_layers": 1, "dropout": 0.0}


@pytest.fixture(params=["composition", "size factor", "continuous"])
def space(request):
    torch.manual_seed(0)
    if request.param == "continuous":
        made = ContinuousLatentSpace(5, LAYOUT, Gaussian(5), **SHAPE)
        made.scale.copy_(torch.arange(1.0, 6.0))
    else:
        observed = request.param == "size factor"
        made = LatentSpace(5, LAYOUT, NegativeBinomial(5), depth_is_observed=observed, **SHAPE)
    return made.eval()


@torch.no_grad()
def test_effects_and_depth_can_be_taken_apart(space):
    z, c = torch.randn(7, 2), torch.tensor([[0.0, 1.0]]).expand(7, -1)
    effect, depth = torch.randn(7, 5), torch.randn(7)
    together = space.decode_at(z, depth, c, effect)
    alone = space.decode_at(z, None, c)
    moved = space.moved(alone, depth, effect)
    torch.testing.assert_close(moved.location, together.location)
    back = space.from_effects(space.to_effects(alone.location))
    torch.testing.assert_close(back, alone.location, atol=1e-4, rtol=0)


def test_effects_multiply_what_is_expressed_and_add_to_what_is_not():
    space = LatentSpace(3, LAYOUT, NegativeBinomial(3), depth_is_observed=False, **SHAPE)
    before, after = (torch.tensor([[0.5, 1e-9, 0.0]]), torch.tensor([[0.25, 1e-3, 0.0]]))
    before[0, 2], after[0, 2] = 1 - before.sum(), 1 - after.sum()
    own = torch.tensor([[0.02, 1e-5, 0.97999]])
    values = space.to_effects(own.log())
    values = values + space.to_effects(after.log()) - space.to_effects(before.log())
    moved = space.from_effects(values).exp()[0]
    assert moved.sum() == pytest.approx(1)
    ratio = (
        moved / moved[2] * own[0, 2] * after[0, 2] / before[0, 2]
    )  # before they add up to 1 again
    assert ratio[0] == pytest.approx(0.01, rel=0.02)
    # A millionfold: the law of one count per ten thousand says from what.
    assert ratio[1] == pytest.approx((1e-5 + 1e-4) * 11 - 1e-4, rel=0.01)


# A trained model -----------------------------------------------------------------------------


def _cells(with_interaction, n=120, n_genes=60):
    """Four types in two pairs of kin; some genes respond in all, some in the first pair only."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, n_genes)
    pair = rng.normal(0, 0.7, (2, n_genes))
    own = rng.normal(0, 0.2, (4, n_genes))
    main, special = np.zeros(n_genes), np.zeros(n_genes)
    main[:6], special[6:12] = 1.2, 1.5 * with_interaction
    counts, labels = [], []
    for kind in range(4):
        for treated in range(2):
            log_mean = base + pair[kind // 2] + own[kind] + treated * main
            log_mean = log_mean + treated * special * (kind < 2)
            rho = np.exp(log_mean) / np.exp(log_mean).sum()
            depth = np.exp(rng.normal(7.5, 0.3, (n, 1)))
            counts.append(rng.poisson(depth * rho * rng.gamma(5, 0.2, (n, n_genes))))
            labels += [(f"type_{kind}", ("control", "treated")[treated])] * n
    obs = pd.DataFrame(labels, columns=["cell_type", "condition"], dtype=str)
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(sparse.csr_matrix(np.concatenate(counts).astype(np.float32)), obs=obs)
    adata.layers["counts"] = adata.X.copy()
    return adata


def _fold_changes(after, before):
    """Natural logs of ratios of compositions."""
    sums = [np.asarray(part.layers["counts"].sum(0)).ravel() + 0.5 for part in (after, before)]
    return np.log(sums[0] / sums[0].sum()) - np.log(sums[1] / sums[1].sum())


@pytest.mark.parametrize("with_interaction", [True, False])
def test_held_out_responses_are_those_of_the_kin(with_interaction):
    adata = _cells(with_interaction)
    treated = adata.obs["condition"] == "treated"
    held = ((adata.obs["cell_type"] == "type_1") & treated).to_numpy()
    train = adata[~held].copy()
    NBVAE.setup_anndata(train, layer="counts", **KEYS)
    model = NBVAE(train, seed=0, n_latent=3, n_hidden=32)
    model.train(accelerator="cpu", **QUIET)
    before = train[(train.obs["cell_type"] == "type_1")].copy()
    with pytest.warns(ExtrapolationWarning, match="cell_type=type_1, condition=treated"):
        cells = model.counterfactual(before, to={"condition": "treated"}, seed=0, **QUIET)
    assert (cells.obs["support"] == "unseen combination").all()
    assert cells.obs["extrapolated"].all()
    found, true = _fold_changes(cells, before), _fold_changes(adata[held], before)
    assert np.abs(found[:6] - true[:6]).mean() < 0.2
    if with_interaction:
        # The average of all types is a third of it.
        assert found[6:12].mean() > 0.8 * true[6:12].mean()
    else:
        assert np.abs(found[6:12] - true[6:12]).mean() < 0.2


@pytest.mark.filterwarnings("ignore:.*least value in training")
def test_responses_of_continuous_values_keep_their_size():
    adata = _cells(with_interaction=True)
    counts = adata.X.toarray()
    adata.layers["values"] = np.log1p(1e3 * counts / counts.sum(1, keepdims=True))
    treated = adata.obs["condition"] == "treated"
    held = ((adata.obs["cell_type"] == "type_1") & treated).to_numpy()
    train = adata[~held].copy()
    CondVAE.setup_anndata(train, layer="values", **KEYS)
    model = CondVAE(train, seed=0, n_latent=3, n_hidden=32)
    model.train(accelerator="cpu", **QUIET)
    before = train[train.obs["cell_type"] == "type_1"].copy()
    cells = model.counterfactual(
        before, to={"condition": "treated"}, seed=0, on_extrapolation="ignore", **QUIET
    )
    centre = before.layers["values"].mean(0)
    found = np.asarray(cells.X).mean(0) - centre
    true = adata[held].layers["values"].mean(0) - centre
    assert found[6:12].mean() > 0.8 * true[6:12].mean()
