"""ExprFlow and ExprDiffusion: two stages of training, what is kept of them, how cells are drawn.

What all models promise is in test_contract.py, the density itself in test_path.py.
"""

from __future__ import annotations

import random
import warnings

import anndata as ad
import numpy as np
import pytest
import torch
from faults import N_OBS, ROLES, make_cells, refused, untouched
from lightning.pytorch import Callback

from exprgen import NBVAE, ZINBVAE, ExprDiffusion, ExprFlow, datasets
from exprgen._errors import TrainingDivergedError
from exprgen.densities import _path
from exprgen.train import DensityTrainingPlan, GenerativeTrainingPlan, KeepBestWeights

parametrize = pytest.mark.parametrize
both = parametrize("model_class", [ExprFlow, ExprDiffusion])

AUTOENCODER = {"n_latent": 2, "n_hidden": 8, "n_components": 2}
TINY = {**AUTOENCODER, "density_hidden": 8, "density_layers": 1}
QUIET = {"progress_bar": False, "accelerator": "cpu"}
SHORT = {**QUIET, "density_kwargs": {"max_epochs": 2}}
T0 = {"cell_type": "type_0", "dose": 1.0}
LABEL = {"layer": "counts", "categorical_condition_keys": ["cell_type"]}


def _untrained(model_class=ExprFlow, seed=0, roles=LABEL, **options):
    adata = make_cells()
    model_class.setup_anndata(adata, **roles)
    sizes = AUTOENCODER if model_class in (NBVAE, ZINBVAE) else TINY
    return model_class(adata, seed=seed, **sizes, **options)


def _trained(*args, epochs=2, callbacks=(), **kwargs):
    model = _untrained(*args, **kwargs)
    model.train(epochs, **SHORT, trainer_kwargs={"callbacks": list(callbacks)})
    return model


def _autoencoder(**kwargs):
    model = _untrained(NBVAE, **kwargs)
    model.train(2, **QUIET)
    return model


@pytest.fixture(scope="module")
def flow():
    """Of all roles; not to be changed."""
    return _trained(roles=ROLES)


@pytest.fixture(scope="module")
def autoencoder():
    return _autoencoder()


def _weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _same_cells(a, b):
    return (a.X != b.X).nnz == 0 and np.array_equal(a.obs["library"], b.obs["library"])


def _in_density(plan):
    return isinstance(plan, DensityTrainingPlan)


# What is kept ----------------------------------------------------------------------------


class Recorder(Callback):
    """Writes down the density's averaged weights after each epoch of the second stage."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, plan):
        if _in_density(plan):
            with plan.averaged():
                self.epochs.append(_weights(plan.density))


class Spoil(Callback):
    """Sets the output's biases at the start of an epoch of the second stage."""

    def __init__(self, epoch, value):
        self.epoch, self.value = epoch, value

    def on_train_epoch_start(self, trainer, plan):
        if _in_density(plan) and trainer.current_epoch == self.epoch:
            plan.density.network.output.bias.data.fill_(self.value)


def test_the_best_validated_weights_are_kept_where_some_epochs_are_validated(monkeypatch):
    monkeypatch.setattr("exprgen.models._stages._N_VALIDATIONS", 4)
    model, recorder = _untrained(), Recorder()
    model.train(
        1,
        train_size=0.7,
        early_stopping=False,
        density_kwargs={"max_epochs": 12, "lr": 0.02, "batch_size": 16},
        trainer_kwargs={"callbacks": [Spoil(9, 20.0), recorder]},
        **QUIET,
    )
    history = model.history["density_loss_validation"].to_numpy(float).ravel()
    validated = [2, 5, 8, 11]
    values = history[np.isfinite(history)]
    assert len(recorder.epochs) == 12
    assert len(values) == 4
    best = validated[int(values.argmin())]
    assert 2 < best < 11, "a run whose first and last validations are not its best"
    kept = _weights(model.module.density)
    assert [_equal(kept, epoch) for epoch in recorder.epochs].index(True) == best


def test_an_epoch_without_validation_is_never_the_best():
    class Plan:
        module = torch.nn.Linear(1, 1)
        warms_up = False

        @staticmethod
        def averaged():
            return warnings.catch_warnings()  # any context without effect

    class Trainer:
        def __init__(self, epoch, **metrics):
            self.current_epoch = epoch
            self.callback_metrics = {k: torch.tensor(v) for k, v in metrics.items()}

    keep, unvalidated = KeepBestWeights("loss"), Trainer(0)
    keep.on_train_epoch_end(unvalidated, Plan)
    assert not keep.restore(Plan.module)
    for epoch, value in [(1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0)]:
        Plan.module.weight.data.fill_(epoch)
        keep.on_train_epoch_end(Trainer(epoch, loss=value), Plan)
    assert keep.restore(Plan.module)
    # Epoch 4 has the number of epoch 3, as Lightning leaves it where nothing is validated.
    assert (keep.best_epoch, Plan.module.weight.item()) == (3, 3.0)


class Steps(Callback):
    """Writes down the density's weights before and after each step of the second stage."""

    def __init__(self):
        self.weights = []

    def _add(self, plan):
        if _in_density(plan):
            self.weights.append([p.detach().clone() for p in plan.density.parameters()])

    def on_train_start(self, trainer, plan):
        self._add(plan)

    def on_train_batch_end(self, trainer, plan, *args):
        self._add(plan)


@parametrize("decay", [0.0, 0.5, 0.995])
def test_weights_kept_are_averages_over_steps(decay):
    model, steps = _untrained(), Steps()
    model.train(
        1,
        train_size=1.0,
        early_stopping=False,
        density_kwargs={"max_epochs": 5, "batch_size": 30, "ema_decay": decay, "lr": 0.02},
        trainer_kwargs={"callbacks": [steps]},
        **QUIET,
    )
    assert len(steps.weights) == 1 + 15
    average, *later = steps.weights
    for n, weights in enumerate(later, start=1):
        share = min(decay, n / (n + 10))
        average = [share * a + (1 - share) * w for a, w in zip(average, weights, strict=True)]
    kept = list(model.module.density.parameters())
    for ours, expected, last in zip(kept, average, later[-1], strict=True):
        torch.testing.assert_close(ours.detach(), expected)
        assert decay == 0 or not torch.equal(ours, last) or ours.numel() == 0


def test_averaged_swaps_and_restores():
    plan = DensityTrainingPlan(_untrained().module)
    parameters = list(plan.density.parameters())
    own = [p.detach().clone() for p in parameters]
    for average in plan._average:
        average.add_(1.0)

    def holds(shift):
        return all(torch.equal(p, o + shift) for p, o in zip(parameters, own, strict=True))

    with plan.averaged():
        assert holds(1.0)
    assert holds(0.0)
    with pytest.raises(KeyError), plan.averaged():
        raise KeyError
    assert holds(0.0)
    with plan.averaged():
        assert holds(1.0)


def test_the_second_stage_leaves_the_first_alone_and_the_other_way_round():
    class Stages(Callback):
        def __init__(self):
            self.seen = []

        def on_train_start(self, trainer, plan):
            self.seen.append(_weights(plan.module))

        def on_train_end(self, trainer, plan):
            self.seen.append(_weights(plan.module))

    stages = Stages()
    _trained(ExprDiffusion, callbacks=[stages])
    changed = [
        {name for name in start if not torch.equal(start[name], end[name])}
        for start, end in (stages.seen[:2], stages.seen[2:])
    ]
    assert {name.split(".")[0] for name in changed[0]} == {"space", "prior"}
    assert {name.split(".")[0] for name in changed[1]} == {"density"}
    assert any(name.startswith("density.depth") for name in changed[1])


# Stages that stop ------------------------------------------------------------------------


class Stopped(Exception):
    pass


class Stop(Callback):
    """Raises at the start of an epoch of a stage."""

    def __init__(self, stage, epoch, error=Stopped):
        self.stage, self.epoch, self.error = stage, epoch, error

    def on_train_epoch_start(self, trainer, plan):
        if isinstance(plan, self.stage) and trainer.current_epoch == self.epoch:
            raise self.error


def _stopped(model, *where, epochs=3, **kwargs):
    with pytest.raises(Stopped):
        model.train(
            epochs,
            **QUIET,
            density_kwargs={"max_epochs": 4},
            trainer_kwargs={"callbacks": [Stop(*where)]},
            **kwargs,
        )


def _answers(model):
    return np.isfinite(model.sample({"cell_type": "type_0"}, 5, seed=0).X.sum())


def test_stopped_in_the_first_stage_a_model_is_untrained():
    model = _untrained()
    _stopped(model, GenerativeTrainingPlan, 2)
    assert not model.is_trained_
    assert not model.module.training
    with pytest.raises(RuntimeError, match="not trained"):
        _answers(model)
    model.train(1, **SHORT)
    assert _answers(model)


def test_stopped_in_the_second_stage_a_model_can_be_used_once_validated(monkeypatch):
    model = _untrained()
    _stopped(model, DensityTrainingPlan, 2)
    assert model.is_trained_
    assert not model.module.training
    assert _answers(model)
    assert len(model.train_indices) == model.conditions["n_train"].sum() == N_OBS * 0.9
    monkeypatch.setattr("exprgen.models._stages._N_VALIDATIONS", 1)
    for epoch in (0, 2):
        model = _untrained()
        _stopped(model, DensityTrainingPlan, epoch)
        assert not model.is_trained_


def test_a_trained_model_is_as_before_if_training_on_stops_before_there_is_another():
    model = _trained()
    before, history = _weights(model.module), model.history
    for plan, epoch in (
        (GenerativeTrainingPlan, 0),
        (GenerativeTrainingPlan, 1),  # the density is of another space then
        (DensityTrainingPlan, 0),
    ):
        _stopped(model, plan, epoch)
        assert model.is_trained_
        assert not model.module.training
        assert _equal(before, _weights(model.module))
        assert model.history is history


def test_a_density_that_diverges_is_told_and_can_be_tried_again():
    model, nan = _untrained(), float("nan")
    with pytest.raises(TrainingDivergedError, match=r"epoch 2, step .*density_kwargs=\{\"lr\": 0"):
        model.train(
            1,
            density_kwargs={"max_epochs": 4, "lr": 1e-3},
            trainer_kwargs={"callbacks": [Spoil(2, nan)]},
            **QUIET,
        )
    assert model.is_trained_
    assert _answers(model)
    assert all(torch.isfinite(value).all() for value in _weights(model.module).values())


def test_training_goes_on_where_it_ended():
    model = _trained()
    before, split = _weights(model.module), model.train_indices
    starts = []

    class Start(Callback):
        def on_train_start(self, trainer, plan):
            starts.append(_weights(plan.module))

    model.train(1, **SHORT, trainer_kwargs={"callbacks": [Start()]})
    np.testing.assert_array_equal(model.train_indices, split)
    assert _equal(starts[0], before)
    network = {k for k in before if k.startswith("density.network")}
    assert all(torch.equal(starts[1][k], before[k]) for k in network)
    assert not _equal(_weights(model.module.density), _weights(_trained().module.density))
    assert model.is_trained_
    assert {"elbo_validation", "density_loss_validation"} <= model.history.keys()


@both
def test_a_seed_fixes_both_stages_and_touches_nothing(model_class):
    torch.manual_seed(11)
    first = _weights(_trained(model_class).module)
    torch.manual_seed(12)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    again = _trained(model_class)
    after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert _equal(first, _weights(again.module))
    other = _weights(_trained(model_class, 1).module)
    assert not torch.equal(first["density.network.output.weight"],
                           other["density.network.output.weight"])  # fmt: skip


# density_kwargs --------------------------------------------------------------------------


@parametrize(
    ("wrong", "error", "names"),
    [
        ({"lrate": 1e-3}, TypeError, ["density_kwargs has no 'lrate'", "max_epochs"]),
        ({"max_epoch": 2}, TypeError, ["Did you mean 'max_epochs'"]),
        ({"kl_warmup": 0.1}, TypeError, ["density_kwargs has no 'kl_warmup'"]),
        ({"seed": 1}, TypeError, ["density_kwargs has no 'seed'"]),
        ([("lr", 1)], TypeError, ["density_kwargs must be a dict or None"]),
        ({"lr": "1"}, TypeError, ["density_kwargs['lr'] must be a number", "(0, inf)"]),
        ({"lr": float("nan")}, ValueError, ["density_kwargs['lr']", "(0, inf)", "nan"]),
        ({"lr": 0}, ValueError, ["density_kwargs['lr']"]),
        ({"lr_warmup": 1.1}, ValueError, ["density_kwargs['lr_warmup']", "[0, 1]"]),
        ({"weight_decay": -1}, ValueError, ["density_kwargs['weight_decay']"]),
        ({"ema_decay": 1}, ValueError, ["density_kwargs['ema_decay']", "[0, 1)"]),
        ({"ema_decay": True}, TypeError, ["density_kwargs['ema_decay']"]),
        ({"max_epochs": 0}, ValueError, ["density_kwargs['max_epochs'] must be at least 1"]),
        ({"max_epochs": 2.0}, TypeError, ["density_kwargs['max_epochs']", "integer"]),
        ({"batch_size": -5}, ValueError, ["density_kwargs['batch_size']", "-5"]),
    ],
)
def test_density_kwargs_are_checked_before_anything_runs(untrained, wrong, error, names):
    with refused(error, *names):
        untrained.train(1, density_kwargs=wrong, **QUIET)
    assert not untrained.module.initialized


@pytest.fixture(scope="module")
def untrained():
    return _untrained()


def test_models_of_one_stage_take_no_density_kwargs():
    model = _untrained(NBVAE)
    with refused(TypeError, "density_kwargs", "NBVAE", "plan_kwargs"):
        model.train(1, density_kwargs={"lr": 1e-3}, **QUIET)
    assert not model.module.initialized
    model.train(1, density_kwargs={}, **QUIET)


# from_autoencoder ------------------------------------------------------------------------


@both
def test_an_autoencoder_is_taken_over_and_only_the_density_trained(autoencoder, model_class):
    before = _weights(autoencoder.module)
    model = model_class.from_autoencoder(autoencoder, density_hidden=8, density_layers=1)
    assert model.seed_ == autoencoder.seed_
    assert not model.is_trained_
    stages = []

    class Stage(Callback):
        def on_train_start(self, trainer, plan):
            stages.append(type(plan))

    for word, value in (("max_epochs", 2), ("batch_size", 8), ("plan_kwargs", {"lr": 0.1})):
        with refused(ValueError, word, "taken over trained", "density_kwargs"):
            model.train(**{word: value}, **SHORT)
    model.train(**SHORT, trainer_kwargs={"callbacks": [Stage()]})
    assert stages == [DensityTrainingPlan]
    assert set(model.history) == {"density_loss_train", "density_loss_validation"}
    module = model.module
    assert _equal(_weights(module.space), _weights(autoencoder.module.space))
    assert _equal(_weights(module.prior), _weights(autoencoder.module.density))
    assert _equal(_weights(autoencoder.module), before)
    for name in ("train_indices", "validation_indices"):
        np.testing.assert_array_equal(getattr(model, name), getattr(autoencoder, name))
    assert model.registry_["setup_args"] == autoencoder.registry_["setup_args"]
    # What the encoder answers is the same, bit by bit.
    for verb in ("denoise", "counterfactual"):
        extra = {"to": {"cell_type": "type_1"}} if verb == "counterfactual" else {"copy": True}
        ours, theirs = (
            getattr(m, verb)(make_cells(), n_samples=2, seed=0, progress_bar=False, **extra)
            for m in (model, autoencoder)
        )
        layer = "exprgen_mean" if verb == "counterfactual" else "exprgen_denoised"
        np.testing.assert_array_equal(ours.layers[layer], theirs.layers[layer])


def test_an_autoencoder_that_was_saved_will_do(autoencoder, tmp_path):
    autoencoder.save(tmp_path / "model")
    loaded = NBVAE.load(tmp_path / "model", make_cells(), accelerator="cpu")
    ours, theirs = (
        ExprFlow.from_autoencoder(model, density_hidden=8) for model in (loaded, autoencoder)
    )
    for model in (ours, theirs):
        model.train(**SHORT)
    assert _same_cells(ours.sample(n_obs=20, seed=0), theirs.sample(n_obs=20, seed=0))
    # Rows of other data are not the cells of the split.
    for cells in (make_cells(60), make_cells()[::-1].copy()):
        loaded = NBVAE.load(tmp_path / "model", cells, accelerator="cpu")
        with refused(ValueError, "the data that it was trained on"):
            ExprFlow.from_autoencoder(loaded)
    alone = NBVAE.load(tmp_path / "model", False, accelerator="cpu")
    with refused(ValueError, "loaded without data"):
        ExprFlow.from_autoencoder(alone)


def test_what_is_no_such_autoencoder_is_refused(autoencoder):
    with refused(TypeError, "exprgen.NBVAE", "ZINBVAE"):
        ExprFlow.from_autoencoder(_untrained(ZINBVAE))
    with refused(TypeError, "exprgen.NBVAE", "NoneType"):
        ExprFlow.from_autoencoder(None)
    with refused(RuntimeError, "not trained"):
        ExprFlow.from_autoencoder(_untrained(NBVAE))
    with refused(ValueError, "density='mixture'", "'gaussian'"):
        ExprDiffusion.from_autoencoder(_autoencoder(density="gaussian"))
    for word, value in [("n_latent", 2), ("likelihood", "nb"), ("adata", autoencoder.adata)]:
        with refused(TypeError, "from_autoencoder() takes", word, of=autoencoder.adata):
            ExprFlow.from_autoencoder(autoencoder, **{word: value})
    with pytest.raises(TypeError, match="schedule"):
        ExprFlow.from_autoencoder(autoencoder, schedule="vp")


# Guidance --------------------------------------------------------------------------------


@parametrize(
    ("guidance", "error", "names"),
    [
        ({"cell_typ": 1.0}, KeyError, ["'cell_typ'", "cell_type", "Did you mean 'cell_type'"]),
        ({"batch": 2.0}, KeyError, ["'batch'", "no condition"]),
        (-0.5, ValueError, ["guidance must lie in [0, inf)", "-0.5"]),
        ({"dose": -1}, ValueError, ["guidance['dose']", "-1"]),
        (float("nan"), ValueError, ["guidance", "nan"]),
        ({"dose": float("nan")}, ValueError, ["guidance['dose']", "nan"]),
        (float("inf"), ValueError, ["guidance"]),
        ("2", TypeError, ["guidance must be a number"]),
        (None, TypeError, ["guidance must be a number"]),
        ({"dose": None}, TypeError, ["guidance['dose']"]),
        ([2.0, 1.0], TypeError, ["guidance must be a number"]),
    ],
)
@parametrize("verb", ["sample", "predict"])
def test_guidance_is_checked(flow, verb, guidance, error, names):
    with refused(error, *names):
        getattr(flow, verb)(T0, guidance=guidance, seed=0)
    assert "_density_options" not in vars(flow)


def _options_seen(monkeypatch, model, verb="sample", **options):
    """What the density was told, by the way it asks the solver."""
    seen = {}
    solve, sample = _path.solve, model.module.density.sample

    def spy_solve(solver, field, y, n_steps, generator):
        seen.update(solver=solver, n_steps=n_steps)
        return solve(solver, field, y, n_steps, generator)

    def spy_sample(*args, **kwargs):
        seen.update(guidance=kwargs.get("guidance"))
        return sample(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_path, "solve", spy_solve)
        patch.setattr(model.module.density, "sample", spy_sample)
        answer = getattr(model, verb)(T0, seed=0, progress_bar=False, **options)
    assert "_density_options" not in vars(model)
    return seen, answer


def test_a_number_weighs_all_conditions_and_a_mapping_those_it_names(flow, monkeypatch):
    assert flow.schema.condition_keys == ["cell_type", "dose"]
    for given, expected in [
        (2.0, [2.0, 2.0]),
        (0, [0.0, 0.0]),
        ({"dose": 3}, [1.0, 3.0]),
        ({"cell_type": 0.5}, [0.5, 1.0]),
        ({}, None),
        ({"dose": 1.0}, None),
    ]:
        seen, _ = _options_seen(monkeypatch, flow, guidance=given)
        assert seen["guidance"] == expected, given


@both
def test_a_weight_of_one_is_none_bit_by_bit(model_class):
    model = _untrained(model_class, roles=ROLES)
    model.train(2, density_kwargs={"max_epochs": 10, "batch_size": 16, "lr": 0.02}, **QUIET)
    plain, *others = (
        model.sample(T0, 200, seed=0, **options)
        for options in ({}, {"guidance": 1}, {"guidance": {"dose": 1.0}}, {"guidance": 2.0})
    )
    assert [_same_cells(plain, other) for other in others] == [True, True, False]


@pytest.fixture(scope="module")
def simulated():
    """Cells of three types under two treatments that are planted in their latent states."""
    adata = datasets.simulate_latent(
        450, n_vars=25, n_types=3, n_latent=2, doses=(0.0, 3.0), log_depth=(6.0, 0.3), seed=2
    )
    adata.obs["treated"] = np.where(adata.obs["dose"] > 0, "yes", "no")
    return adata[:, adata.X.sum(0).A1 > 5].copy()


@pytest.fixture(scope="module")
def family(simulated):
    """An NBVAE, and a flow and a diffusion in its space."""
    roles = {**LABEL, "categorical_condition_keys": ["cell_type", "treated"]}
    NBVAE.setup_anndata(simulated, **roles)
    first = NBVAE(simulated, seed=0, n_latent=3, n_hidden=32, n_components=4)
    first.train(25, batch_size=64, **QUIET)
    models = [first]
    for model_class in (ExprFlow, ExprDiffusion):
        model = model_class.from_autoencoder(first, density_hidden=64, condition_dropout=0.2)
        model.train(density_kwargs={"max_epochs": 100, "batch_size": 128}, **QUIET)
        models.append(model)
    return models


def _draw(model, n, guidance, cell_type=0, treated=0):
    """Latent states and depth of one combination, and of what the decoder makes of them."""
    c = torch.tensor([[float(cell_type), float(treated)]]).expand(n, -1)
    generator = torch.Generator().manual_seed(0)
    features = model.module.space.features.conditions(c)
    return model.module.density.sample(features, generator, guidance=guidance)


@parametrize("index", [1, 2], ids=["flow", "diffusion"])
def test_a_weight_of_zero_makes_draws_independent_of_a_condition(family, index):
    model = family[index]
    for which, name in enumerate(["cell_type", "treated"]):
        weights = model._guidance({name: 0})
        own, other = (_draw(model, 200, weights, **{name: label}) for label in (0, 1))
        assert torch.equal(own, other)
        # The other condition still counts, and so does this one at any other weight.
        third = "treated" if which == 0 else "cell_type"
        assert not torch.equal(own, _draw(model, 200, weights, **{third: 1}))
        assert not torch.equal(
            _draw(model, 200, [0.1, 0.1]), _draw(model, 200, [0.1, 0.1], **{name: 1})
        )


@parametrize("index", [1, 2], ids=["flow", "diffusion"])
def test_weights_above_one_drive_conditions_apart_and_narrow_the_narrow_one(family, index):
    """What varies less within a condition than among all cells then varies still less."""

    def law(weight):
        draws = [
            _draw(family[index], 1000, [weight] * 2, label, treated)[:, :-1]
            for label in range(3)
            for treated in range(2)
        ]
        means = torch.stack([d.mean(0) for d in draws])
        return means.var(0).sum(), torch.stack([d.var(0).sum() for d in draws])

    weights = (0.0, 0.5, 1.0, 2.0, 4.0)
    apart, within = map(torch.stack, zip(*map(law, weights), strict=True))
    assert (apart.diff() > 0.05).all()
    narrow = int(within[2].argmin())
    assert within[2, narrow] < 0.95 * within[0, narrow]
    assert (within[:, narrow].diff() < 0).all()
    assert within[3, narrow] < 0.97 * within[2, narrow]


def test_conditions_are_weighed_by_name_in_whole_samples(family):
    """Where a type is hidden, the depth and state drawn are those of all types."""
    model = family[1]
    args = {"n_obs": 300, "seed": 0, "progress_bar": False}
    hidden = [
        model.sample(
            {"cell_type": f"type_{k}", "treated": "no"}, guidance={"cell_type": 0}, **args
        )
        for k in range(2)
    ]
    labels = [cells.obs["cell_type"].iloc[0] for cells in hidden]
    assert labels == ["type_0", "type_1"]
    assert list(hidden[0].uns["exprgen"]["guidance"]) == [0.0, 1.0]


# Solvers ---------------------------------------------------------------------------------


@parametrize(
    ("options", "error", "names"),
    [
        ({"n_steps": -1}, ValueError, ["n_steps must be at least 1", "-1"]),
        ({"n_steps": 2.0}, TypeError, ["n_steps must be an integer"]),
        ({"n_steps": True}, TypeError, ["n_steps must be an integer"]),
        ({"solver": "rk45"}, ValueError, ["solver", "'rk45'", "heun"]),
        ({"solver": 3}, (TypeError, ValueError), ["solver"]),
    ],
)
@parametrize("verb", ["sample", "predict"])
def test_solvers_are_checked(flow, verb, options, error, names):
    with untouched(), pytest.raises(error) as caught:
        getattr(flow, verb)(T0, seed=0, **options)
    assert all(name in str(caught.value) for name in names)
    assert "_density_options" not in vars(flow)


@parametrize("verb", ["sample", "predict"])
def test_solvers_are_passed_on(flow, monkeypatch, verb):
    few = {} if verb == "sample" else {"n_samples": 10}
    for options, expected in [
        ({}, {"solver": "heun", "n_steps": 5}),
        ({"n_steps": 2}, {"solver": "heun", "n_steps": 2}),
        ({"solver": "ddpm", "n_steps": 3}, {"solver": "ddpm", "n_steps": 3}),
        ({"solver": "euler"}, {"solver": "euler", "n_steps": 25}),
        ({"solver": "heun"}, {"solver": "heun", "n_steps": 5}),
    ]:
        seen, _ = _options_seen(monkeypatch, flow, verb, **few, **options)
        assert seen == {**expected, "guidance": None}


def test_a_models_own_solver_is_its_default(monkeypatch):
    model = _trained(ExprDiffusion, roles=ROLES, solver="ddim", n_steps=3)
    seen, _ = _options_seen(monkeypatch, model)
    assert seen == {"solver": "ddim", "n_steps": 3, "guidance": None}


def test_coupled_noise_has_no_stochastic_solver():
    model = _trained(coupling="optimal_transport")
    with refused(ValueError, "solver", "'ddpm'", "coupling='optimal_transport'"):
        model.sample({"cell_type": "type_0"}, solver="ddpm", seed=0)


def test_what_is_drawn_depends_on_the_steps_less_and_less(family):
    c = torch.tensor([[0.0, 0.0]]).expand(500, -1)
    density = family[1].module.density
    features = family[1].module.space.features.conditions(c)
    exact, *few = (
        density.sample(features, torch.Generator().manual_seed(0), n_steps=n)
        for n in (60, 1, 3, 9)
    )
    errors = [float((draws - exact).square().mean().sqrt()) for draws in few]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


# Where cells come from is kept ------------------------------------------------------------


def _written(adata, path):
    adata.write_h5ad(path)
    return ad.read_h5ad(path).uns["exprgen"]


def test_provenance_survives_a_file(flow, tmp_path):
    options = {"guidance": {"dose": 2.0}, "n_steps": 2, "solver": "euler"}
    cells = flow.sample(T0, 5, seed=0, **options)
    read = _written(cells, tmp_path / "cells.h5ad")
    assert (read["model"], read["solver"], int(read["n_steps"])) == ("ExprFlow", "euler", 2)
    assert list(read["guidance"]) == [1.0, 2.0]
    again = flow.sample(
        T0, 5, seed=int(read["seed"]), n_steps=int(read["n_steps"]), solver=read["solver"],
        guidance=dict(zip(flow.schema.condition_keys, map(float, read["guidance"]), strict=True)),
    )  # fmt: skip
    assert _same_cells(cells, again)
    plain = _written(flow.sample(T0, 5, seed=0), tmp_path / "plain.h5ad")
    assert not {"guidance", "n_steps", "solver"} & plain.keys()
    predicted = flow.predict(make_cells(), n_samples=10, seed=0, **options)
    assert "predict" in _written(predicted, tmp_path / "predicted.h5ad")


def test_without_conditions_there_is_nothing_to_weigh(tmp_path):
    model = _trained(ExprDiffusion, roles={"layer": "counts"})
    cells = model.sample(n_obs=20, guidance=1.0, seed=0)
    assert "guidance" not in _written(cells, tmp_path / "cells.h5ad")
    with refused(ValueError, "guidance=3.0", "none"):
        model.sample(n_obs=20, guidance=3.0)
    with refused(KeyError, "'cell_type'", "no condition"):
        model.sample(guidance={"cell_type": 2.0})


def test_tokens_that_were_never_trained_are_not_used():
    model = _trained(condition_dropout=0.0)
    assert model.sample({"cell_type": "type_0"}, 3, seed=0).n_obs == 3
    with refused(ValueError, "guidance=2.0", "condition_dropout=0"):
        model.sample({"cell_type": "type_0"}, 3, guidance=2.0)


@parametrize("target", ["noise", "data", "score"])
def test_a_target_with_a_pole_has_draws_and_no_likelihood(target):
    model = _trained(ExprDiffusion, target=target)
    assert np.isfinite(model.sample({"cell_type": "type_0"}, 3, seed=0).X.sum())
    with refused(ValueError, f"target='{target}'", "velocity"):
        model.log_likelihood(n_samples=1, progress_bar=False)


def test_a_run_that_breaks_before_its_validation_has_diverged():
    model = _untrained()
    plan = {"max_epochs": 3, "lr": 1e30, "batch_size": 512}
    with pytest.raises(TrainingDivergedError, match="density_kwargs"):
        model.train(1, density_kwargs=plan, **QUIET)
    assert not model.is_trained_


@parametrize("word", ["limit_val_batches", "limit_train_batches", "max_steps", "max_time"])
def test_epochs_are_whole(word):
    with refused(TypeError, f"trainer_kwargs['{word}']", "max_epochs"):
        _untrained().train(1, trainer_kwargs={word: 1}, **QUIET)


def test_an_autoencoder_taken_over_stays_what_it_is_through_a_file(tmp_path):
    source = _autoencoder()
    model = ExprFlow.from_autoencoder(source, density_hidden=8, density_layers=1)
    model.train(density_kwargs={"max_epochs": 1}, **QUIET)
    model.save(tmp_path / "model")
    again = ExprFlow.load(tmp_path / "model", source.adata.copy(), accelerator="cpu")
    before = _weights(again.module.space)
    with refused(ValueError, "max_epochs", "taken over"):
        again.train(1, **QUIET)
    again.train(density_kwargs={"max_epochs": 1}, **QUIET)
    assert _equal(before, _weights(again.module.space))
    np.testing.assert_array_equal(again.train_indices_, model.train_indices_)
    others = ExprFlow.load(tmp_path / "model", source.adata[:60].copy(), accelerator="cpu")
    with refused(ValueError, "taken over", "from_autoencoder"):
        others.train(**QUIET)


@parametrize("size", ["density_hidden", "density_layers"])
def test_sizes_of_the_network_are_positive(size):
    adata = make_cells()
    ExprFlow.setup_anndata(adata, **LABEL)
    with refused(ValueError, size, "got 0"):
        ExprFlow(adata, **{size: 0})


def test_a_file_holds_both_stages(tmp_path):
    model = _trained(ExprDiffusion, schedule="vp", target="noise", solver="ddim", n_steps=4)
    model.save(tmp_path / "model")
    alone = ExprDiffusion.load(tmp_path / "model", False, accelerator="cpu")
    density = alone.module.density
    assert (density.target, density.solver, density.n_steps) == ("noise", "ddim", 4)
    assert _equal(_weights(alone.module), _weights(model.module))
    asked = {"cell_type": "type_1"}
    options = {"seed": 0, "guidance": 2.0, "n_steps": 2}
    assert _same_cells(alone.sample(asked, 30, **options), model.sample(asked, 30, **options))


# Beside the autoencoder -------------------------------------------------------------------


@parametrize("given", ["conditions", "depth"])
def test_likelihoods_agree_with_those_of_the_autoencoders_own_mixture(family, given):
    rows = np.arange(0, 450, 6)
    args = {"indices": rows, "n_samples": 10, "seed": 0, "progress_bar": False}
    mixture, *paths = (model.log_likelihood(given=given, **args) for model in family)
    for values in paths:
        assert np.isfinite(values).all()
        assert abs(values.mean() - mixture.mean()) < 2
        assert np.corrcoef(values, mixture)[0, 1] > 0.98


@parametrize("index", [1, 2], ids=["flow", "diffusion"])
def test_predictions_of_few_steps_are_those_of_the_autoencoder(family, index):
    args = {"n_samples": 1500, "seed": 0, "progress_bar": False}
    asked = {"cell_type": "type_1", "treated": "yes"}
    mixture = family[0].predict(asked, **args)
    path = family[index].predict(asked, solver="heun", n_steps=4, **args)
    mean, std = (mixture.layers[f"exprgen_{name}"][0] for name in ("mean", "std"))
    for name in ("mean", "std"):
        ratio = path.layers[f"exprgen_{name}"][0] / mixture.layers[f"exprgen_{name}"][0]
        assert np.median(ratio) == pytest.approx(1, abs=0.08), name
    assert (np.abs(path.layers["exprgen_mean"][0] - mean) < 0.35 * std).all()


@parametrize("index", [1, 2], ids=["flow", "diffusion"])
def test_a_fixed_library_is_what_cells_have(family, index):
    asked = {"cell_type": "type_0", "treated": "no"}
    for library in (200.0, 900.0):
        cells = family[index].sample(asked, 800, library=library, seed=0, progress_bar=False)
        total = cells.obs["library"]
        assert total.mean() == pytest.approx(library, rel=0.05)


# Roles of the columns of obs --------------------------------------------------------------


@parametrize(
    "roles",
    [
        {},
        {"continuous_condition_keys": ["dose"], "size_factor_key": "depth"},
        {"categorical_condition_keys": ["cell_type"], "condition_embedding_key": "drug"},
        {"batch_key": "batch", "donor_key": "donor"},
    ],
    ids=["none", "number, size factor", "label, embedding", "batch, donor"],
)
@both
def test_every_role_works(model_class, roles):
    """And every condition has a weight of its own, which changes what is drawn."""
    adata = make_cells()
    adata.obs["depth"] = adata.layers["counts"].sum(1).A1 + 1
    adata.obsm["drug"] = np.random.default_rng(0).normal(size=(N_OBS, 3))
    model_class.setup_anndata(adata, layer="counts", **roles)
    model = model_class(adata, seed=0, **TINY)
    model.train(2, density_kwargs={"max_epochs": 3, "batch_size": 16, "lr": 0.02}, **QUIET)
    plain = model.sample(adata, seed=0)
    assert (plain.obs["support"] == "seen").all()
    assert np.isfinite(model.log_likelihood(n_samples=1, seed=0)).all()
    assert np.isfinite(model.log_likelihood(n_samples=1, given="depth", seed=0)).all()
    predicted = model.predict(adata[:20].copy(), n_samples=5, n_steps=1, seed=0)
    assert np.isfinite(predicted.layers["exprgen_std"]).all()
    assert np.isfinite(model.sample(adata, library=300.0, seed=0).X.sum())
    for key in model.schema.condition_keys:
        assert not _same_cells(plain, model.sample(adata, seed=0, guidance={key: 0}))
        assert not _same_cells(plain, model.sample(adata, seed=0, guidance={key: 2.0}))
