"""Training: who learns at which rate, what is kept, what a seed fixes, what stops it."""

from __future__ import annotations

import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from exprgen import NBVAE, datasets
from exprgen._errors import TrainingDivergedError
from exprgen._random import isolated
from exprgen.train import CellDataModule, CellDataset, GenerativeTrainingPlan, KeepBestWeights

SIZES = {"n_latent": 2, "n_hidden": 16, "n_components": 3}
QUIET = {"progress_bar": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def cells():
    adata = datasets.simulate_latent(
        201, n_vars=20, n_types=2, n_batches=2, n_donors=3, log_depth=(5.0, 0.4), seed=1
    )
    return adata[:, adata.X.sum(0).A1 > 0].copy()


def _model(cells, seed=0, **kwargs):
    adata = cells.copy()
    NBVAE.setup_anndata(
        adata, batch_key="batch", donor_key="donor", categorical_condition_keys=["cell_type"]
    )
    return NBVAE(adata, seed=seed, **SIZES, **kwargs)


def _weights(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def _equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class Recorder(Callback):
    """Writes down what the plan is doing, without taking part in it."""

    def __init__(self):
        self.kl_weights, self.rates, self.epochs = [], [], []

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.kl_weights.append(plan.kl_weight)
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_epoch_end(self, trainer, plan):
        state = plan.module.state_dict()
        value = float(trainer.callback_metrics["elbo_validation"])
        self.epochs.append((value, {name: tensor.clone() for name, tensor in state.items()}))


class Damage(Callback):
    """Sets the decoder's biases at the start of an epoch, as a diverging run would."""

    def __init__(self, epoch, value):
        self.epoch, self.value = epoch, value

    def on_train_epoch_start(self, trainer, plan):
        if trainer.current_epoch == self.epoch:
            plan.module.space.decoder.output.bias.data.fill_(self.value)


@pytest.fixture(scope="module")
def run(cells):
    """A run whose last epoch is not its best, and a record of it."""
    model, recorder = _model(cells), Recorder()
    model.train(
        20,
        batch_size=16,
        train_size=0.6,
        early_stopping=False,
        plan_kwargs={"lr": 0.02, "kl_warmup": 0.25, "lr_warmup": 0.4},
        trainer_kwargs={"callbacks": [recorder, Damage(19, 0.0)]},
        **QUIET,
    )
    return model, recorder


# The plan --------------------------------------------------------------------------------


def _peak_rates(plan, n_steps):
    """The optimizer, and the largest rate of each of its groups over a run."""
    plan._trainer = SimpleNamespace(estimated_stepping_batches=n_steps)
    configured = plan.configure_optimizers()
    optimizer, rates = configured["optimizer"], []
    for _ in range(n_steps):
        optimizer.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
        configured["lr_scheduler"]["scheduler"].step()
    return optimizer, np.max(rates, axis=0)


def test_every_parameter_learns_in_one_group_at_its_rate(cells):
    model = _model(cells)
    factors = {"density_lr_factor": 3, "dispersion_lr_factor": 7, "donor_lr_factor": 5}
    factors["offset_lr_factor"] = 2
    plan = GenerativeTrainingPlan(model.module, n_obs_training=10, lr=1e-3, **factors)
    optimizer, peaks = _peak_rates(plan, 100)
    groups = list(zip(optimizer.param_groups, peaks, strict=True))
    found = [(id(p), (group, peak)) for group, peak in groups for p in group["params"]]
    parameters = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    assert sorted(i for i, _ in found) == sorted(map(id, parameters.values()))
    group_of = dict(found)
    space, density = model.module.space, model.module.density
    factors = dict.fromkeys(map(id, density.parameters()), 3)
    factors |= dict.fromkeys(map(id, space.likelihood.parameters()), 7)
    factors |= dict.fromkeys(map(id, space.donors.parameters()), 5)
    factors |= dict.fromkeys(map(id, space.decoder.offset.parameters()), 2)
    matrices = {
        id(m.weight) for part in (space.encoder, space.decoder) for m in part.modules()
        if isinstance(m, nn.Linear) and m is not space.decoder.offset
    }  # fmt: skip
    for name, parameter in parameters.items():
        group, peak = group_of[id(parameter)]
        assert peak == pytest.approx(1e-3 * factors.get(id(parameter), 1), rel=1e-3), name
        assert group["eps"] == 1e-8
        # Decay is for weight matrices: not for biases, norms, random effects or dispersions.
        assert (group["weight_decay"] > 0) == (id(parameter) in matrices), name


@pytest.mark.parametrize("lr_warmup", [0.0, 0.2, 1.0])
def test_a_cycle_can_have_any_number_of_steps(cells, lr_warmup):
    plan = GenerativeTrainingPlan(
        _model(cells).module, n_obs_training=10, lr=1e-3, lr_warmup=lr_warmup
    )
    for n_steps in range(1, 12):
        _, peaks = _peak_rates(plan, n_steps)
        assert 0 < peaks[0] <= 1e-3 + 1e-12


def test_rates_follow_one_cycle_and_the_kl_weight_warms_up(run):
    _, recorder = run
    rates, n_steps = np.array(recorder.rates), len(recorder.rates)
    assert n_steps == 20 * 8
    np.testing.assert_allclose(rates.max(0), [0.02, 0.02, 0.1, 0.4, 0.2, 0.1], rtol=0.01)
    assert abs(rates[:, 0].argmax() - 0.4 * n_steps) <= 1
    assert (rates[-1] < 1e-3 * rates.max(0)).all()
    expected = np.minimum(1, np.arange(1, n_steps + 1) / (0.25 * n_steps))
    np.testing.assert_allclose(recorder.kl_weights, expected)


# What is kept ----------------------------------------------------------------------------


def _validation_elbo(model):
    """The plan's validation over the cells that it validated on, anew."""
    dataset, _ = model._training_cells()
    data = CellDataModule(dataset, model.train_indices, model.validation_indices, 16)
    plan = GenerativeTrainingPlan(model.module, n_obs_training=data.n_train, seed=model.seed_)
    with torch.no_grad():
        for i, batch in enumerate(data.val_dataloader()):
            plan.validation_step(batch, i)
    means = (plan._sums["validation"] / plan._n_obs["validation"]).tolist()
    terms = dict(zip(plan.terms, means, strict=True))
    return terms["reconstruction_loss_{}"] + terms["kl_local_{}"]


def test_the_weights_kept_are_those_of_the_best_epoch(run):
    model, recorder = run
    values = [value for value, _ in recorder.epochs]
    best = int(np.argmin(values))
    assert 0 < best < len(values) - 1
    assert values[-1] > values[best] + 0.01
    assert _equal(_weights(model), recorder.epochs[best][1])
    assert not _equal(_weights(model), recorder.epochs[-1][1])
    history = model.history["elbo_validation"].to_numpy(float).ravel()
    np.testing.assert_allclose(history, values, rtol=1e-6)


def test_validation_noise_is_fixed(run):
    """The same weights give the same number twice, and it is the one in the history."""
    model, _ = run
    first = _validation_elbo(model)
    torch.manual_seed(1)
    assert _validation_elbo(model) == first
    best = float(model.history["elbo_validation"].min().iloc[0])
    assert first == pytest.approx(best, rel=1e-5)


def test_training_learns(run):
    """The negative ELBO falls, and is the reconstruction's and the divergence's sum."""
    history = run[0].history
    loss, reconstruction, kl = (
        history[f"{name}_train"].to_numpy(float).ravel()
        for name in ("elbo", "reconstruction_loss", "kl_local")
    )
    assert loss[-2] < loss[0] - 1
    np.testing.assert_allclose(loss, reconstruction + kl, rtol=1e-5)


def test_without_validation_the_last_weights_are_kept(cells):
    model, seen = _model(cells), []

    class Last(Callback):
        def on_train_epoch_end(self, trainer, plan):
            seen.append({k: v.clone() for k, v in plan.module.state_dict().items()})

    model.train(
        3,
        train_size=1.0,
        early_stopping=False,
        trainer_kwargs={"callbacks": [Last()]},
        **QUIET,
    )
    assert len(seen) == 3
    assert _equal(_weights(model), seen[-1])
    assert model.is_trained_


def test_early_stopping_stops_and_keeps_the_best(cells):
    model = _model(cells)
    model.train(200, batch_size=16, early_stopping_patience=3, plan_kwargs={"lr": 0.05}, **QUIET)
    values = model.history["elbo_validation"].to_numpy(float).ravel()
    assert len(values) < 200
    assert values.argmin() == len(values) - 1 - 3
    assert _validation_elbo(model) == pytest.approx(values.min(), rel=0.01)


# Seeds -----------------------------------------------------------------------------------


def _trained(cells, seed, **kwargs):
    model = _model(cells, seed=seed)
    model.train(2, **QUIET, **kwargs)
    return model


def test_a_seed_fixes_everything_and_touches_nothing(cells):
    torch.manual_seed(11)
    first = _weights(_trained(cells, 3))
    torch.manual_seed(12)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    again = _trained(cells, 3)
    after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert _equal(first, _weights(again))
    other = _trained(cells, 4)
    assert not _equal(first, _weights(other))
    assert set(again.validation_indices) != set(other.validation_indices)


def test_the_split_is_disjoint_and_complete_or_as_asked(cells):
    model = _trained(cells, 0)
    train, validation = set(model.train_indices), set(model.validation_indices)
    assert not train & validation
    assert len(train) + len(validation) == cells.n_obs
    assert len(validation) == cells.n_obs // 10
    model = _trained(cells, 0, train_size=0.5, validation_size=0.2)
    assert (len(model.train_indices), len(model.validation_indices)) == (101, 40)
    adata = cells.copy()
    adata.obs["part"] = ["train", "validation", "test"] * 67
    model = _trained(adata, 0, split_key="part")
    np.testing.assert_array_equal(model.train_indices, np.arange(0, 201, 3))
    np.testing.assert_array_equal(model.validation_indices, np.arange(1, 201, 3))
    assert model.conditions["n_train"].sum() == 67


@pytest.mark.parametrize("batch_size", [1, 180, 60])
def test_a_last_batch_of_one_cell_trains(cells, batch_size):
    """181 of 201 cells train: batches of 180 and 60 leave one cell over."""
    model = _model(cells)
    model.train(1, batch_size=batch_size, train_size=181 / 201, **QUIET)
    assert len(model.train_indices) % batch_size in (0, 1)
    assert all(torch.isfinite(value).all() for value in _weights(model).values())


def test_training_goes_on_where_it_ended(cells):
    model = _trained(cells, 0)
    before, split = _weights(model), model.train_indices
    modes = []

    class Mode(Callback):
        def on_train_epoch_start(self, trainer, plan):
            modes.append(plan.module.training and plan.module.space.encoder.training)

    model.train(2, trainer_kwargs={"callbacks": [Mode()]}, **QUIET)
    np.testing.assert_array_equal(model.train_indices, split)
    assert not _equal(before, _weights(model))
    assert modes == [True, True]
    assert not model.module.training
    # Depth and mean expression are fitted once.
    for name, value in model.module.space.depth.state_dict().items():
        assert torch.equal(before[f"space.depth.{name}"], value)


# What stops it ---------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_the_best_weights_come_back(cells):
    model, recorder, damage = _model(cells), Recorder(), Damage(2, float("nan"))
    before = torch.get_rng_state()
    with pytest.raises(TrainingDivergedError, match=r"epoch 2, step .*lr"):
        model.train(5, trainer_kwargs={"callbacks": [recorder, damage]}, **QUIET)
    assert torch.equal(before, torch.get_rng_state())
    assert model.is_trained_
    assert not model.module.training
    assert all(torch.isfinite(value).all() for value in _weights(model).values())
    values = [value for value, _ in recorder.epochs]
    assert len(values) == 2
    assert _equal(_weights(model), recorder.epochs[int(np.argmin(values))][1])
    assert np.isfinite(model.sample({"cell_type": "type_0"}, 5, seed=0).X.sum())


def test_a_run_that_never_was_finite_can_be_tried_again(cells):
    model = _model(cells)
    with pytest.raises(TrainingDivergedError, match="epoch 0"):
        model.train(2, trainer_kwargs={"callbacks": [Damage(0, float("nan"))]}, **QUIET)
    assert not model.is_trained_
    with pytest.raises(RuntimeError, match="not trained"):
        model.sample({"cell_type": "type_0"})
    model.train(2, **QUIET)
    assert model.is_trained_
    trained = _weights(model)
    with pytest.raises(TrainingDivergedError):
        model.train(2, trainer_kwargs={"callbacks": [Damage(0, float("nan"))]}, **QUIET)
    assert model.is_trained_
    assert _equal(trained, _weights(model))


# Data ------------------------------------------------------------------------------------


def test_an_epoch_shows_every_training_cell_once():
    class Reader:
        shape = (50, 2)
        in_memory = True

        def rows(self, index):
            return np.repeat(index[:, None], 2, 1).astype(np.float32)

    numbers = np.arange(50)
    dataset = CellDataset(Reader(), numbers[:, None], numbers + 0.5)
    train, validation = np.arange(0, 50, 2), np.array([1, 7, 3])
    data = CellDataModule(dataset, train, validation, 8)
    with isolated(0):
        epochs = [[batch["x"][:, 0] for batch in data.train_dataloader()] for _ in range(2)]
    first, second = (torch.cat(epoch) for epoch in epochs)
    assert [len(batch) for batch in epochs[0]] == [8, 8, 8, 1]
    assert sorted(first.tolist()) == sorted(second.tolist()) == train.tolist()
    assert not torch.equal(first, second)
    [batch] = data.val_dataloader()
    assert batch["x"][:, 0].tolist() == validation.tolist()
    assert batch["c"][:, 0].tolist() == validation.tolist()
    assert batch["library"].tolist() == (validation + 0.5).tolist()
    assert len(data.test_idx) == 50 - 25 - 3


def test_the_best_weights_are_copies():
    layer, callback = nn.Linear(1, 1), KeepBestWeights("elbo_validation")
    assert not callback.restore(layer)
    plan = SimpleNamespace(module=layer, averaged=nullcontext, warms_up=True)
    for epoch, value in enumerate([3.0, 0.5, 2.0, 1.0, 1.5]):
        # The least of all is of the warm-up.
        plan.warms_up = epoch < 2
        metrics = {"elbo_validation": torch.tensor(value)}
        trainer = SimpleNamespace(callback_metrics=metrics, current_epoch=epoch)
        layer.weight.data.fill_(value)
        callback.on_train_epoch_end(trainer, plan)
    callback.on_train_end(trainer, plan)
    assert (callback.best, callback.best_epoch, layer.weight.item()) == ((False, 1.0), 3, 1.0)


# Arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"plan_kwargs": {name: wrong}}, error, rf"plan_kwargs\['{name}'\] must .*{allowed}.*got")
        for name, allowed, bad in (
            ("lr", r"\(0, inf\)", (0, -1, np.nan)),
            ("kl_warmup", r"\[0, 1\]", (-0.1, 1.1, np.nan)),
            ("lr_warmup", r"\[0, 1\]", (-1, 5)),
            ("weight_decay", r"\[0, inf\)", (-1, np.inf)),
            ("beta", r"\[0, inf\)", (-1, np.inf)),
            ("density_lr_factor", r"\[0, inf\)", (-1,)),
            ("dispersion_lr_factor", r"\[0, inf\)", (-1,)),
            ("donor_lr_factor", r"\[0, inf\)", (np.nan,)),
        )
        for wrong, error in (
            *((value, ValueError) for value in bad),
            *((value, TypeError) for value in ("1", None, True, [1])),
        )
    ]
    + [
        ({"plan_kwargs": 5}, TypeError, "plan_kwargs must be a dict or None, got 5"),
        ({"plan_kwargs": ["lr"]}, TypeError, r"plan_kwargs must be a dict or None, got \['lr'\]"),
        ({"trainer_kwargs": 5}, TypeError, "trainer_kwargs must be a dict or None, got 5"),
        (
            {"trainer_kwargs": {"limit_train_batch": 1}},
            TypeError,
            "trainer_kwargs has no 'limit_train_batch'.*Did you mean 'limit_train_batches'",
        ),
        ({"trainer_kwargs": {"callbacks": 5}}, TypeError, "'callbacks'.*list.*got 5"),
        ({"trainer_kwargs": {"callbacks": [Recorder]}}, TypeError, "'callbacks'.*list.*Recorder"),
        (
            {"trainer_kwargs": {"gradient_clip_val": -1}},
            ValueError,
            r"'gradient_clip_val'\] must lie in \[0, inf\), got -1",
        ),
        ({"early_stopping": "no"}, TypeError, "early_stopping must be True or False, got 'no'"),
        ({"train_size": "x"}, TypeError, "train_size must be a number"),
    ],
)
def test_arguments_are_checked_before_anything_runs(untrained, kwargs, error, message):
    with pytest.raises(error, match=message):
        untrained.train(1, **QUIET | kwargs)
    assert not untrained.module.initialized


@pytest.fixture(scope="module")
def untrained(cells):
    return _model(cells)
