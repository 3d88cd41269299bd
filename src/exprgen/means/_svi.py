r"""What genes share in the hierarchical mean, by stochastic variational inference in Pyro.

Coefficients, donors' effects and noise are integrated out in closed form
(:mod:`!exprgen.means._mixed`), and the ratio of variances of each gene is summed over by Pyro's
enumeration. What is left are a few numbers that all genes share; their guide is a point mass, so
that SVI :cite:p:`bingham2019` climbs to the mode of their posterior: empirical Bayes. scvi-tools'
plan for Pyro modules takes the steps. The priors are weak; expression is centred,
its median standard deviation over genes 1:

============================ ==========================================
v of a column's coefficients log-normal, median 1, sd of the log 3
:math:`d_0 - 1`              log-normal, median 8, sd of the log 1.5
:math:`s_0^2`                log-normal, median 0.5, sd of the log 2
median of λ over genes       log-normal, median 0.1, sd of the log 3
sd of log λ over genes       log-normal, median 1, sd of the log 0.5
============================ ==========================================
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exprgen._errors import TrainingDivergedError
from exprgen._quiet import quiet_lightning
from exprgen._random import isolated
from exprgen.means._mixed import Collapsed, Hyperparameters, evidence

if TYPE_CHECKING:
    from collections.abc import Callable

    from exprgen.means._mixed import Sums

__all__ = ["learn"]

logger = logging.getLogger("exprgen")

# Location and scale of the logarithms.
_PRIORS = {
    "prior_variance": (0.0, 3.0),
    "noise_dof": (math.log(8), 1.5),
    "noise_scale": (math.log(0.5), 2.0),
    "ratio_median": (math.log(0.1), 3.0),
    "ratio_sd": (0.0, 0.5),
}
# Adam's first rate and the share of it that the last step has.
_RATE, _LAST = 0.2, 0.02
# Nats that the last tenth of the steps may still gain, all genes together.
_SETTLED = 1.0


def learn(
    sums: Sums, ratios: Tensor, columns: Tensor, *, n_steps: int, progress_bar: bool
) -> Hyperparameters:
    """Learn what genes share.

    Parameters
    ----------
    sums
        Of the rows, for the genes to learn from.
    ratios
        Values that the ratio of variances may have, ``(K,)``.
    columns
        Number of the column that each input comes of, ``(n_inputs,)``: inputs of one share v.
    n_steps
        Steps of Adam, whose rate falls.
    progress_bar
        Whether to show one.

    Raises
    ------
    TrainingDivergedError
        If the loss is not finite.
    """
    import pyro

    # Nothing is left in Pyro's global store, nor lost from it; no draw matters.
    store = pyro.get_param_store()
    with isolated(0), quiet_lightning(), torch.enable_grad(), store.scope():
        pyro.clear_param_store()
        model = _model(Collapsed.of(sums, ratios), ratios, columns)
        guide = _train(model, n_steps, progress_bar)
        values = {name: value.detach() for name, value in guide().items()}
    return _hyperparameters(values, ratios, columns)


def _hyperparameters(logs: dict[str, Tensor], ratios: Tensor, columns: Tensor) -> Hyperparameters:
    log_weights = torch.zeros_like(ratios)
    if len(ratios) > 1:
        away = (ratios.log() - logs["ratio_median"]) / logs["ratio_sd"].exp()
        log_weights = torch.log_softmax(-away.square() / 2, 0)
    return Hyperparameters(
        prior_variance=logs["prior_variance"][columns].exp(),
        ratios=ratios,
        log_weights=log_weights,
        noise_dof=1 + logs["noise_dof"].exp(),
        noise_scale=logs["noise_scale"].exp(),
    )


def _model(collapsed: Collapsed, ratios: Tensor, columns: Tensor) -> Callable[[], None]:
    """The model as a Pyro program."""
    import pyro
    from pyro.distributions import Categorical, Normal

    shapes: dict[str, list[int]] = {name: [] for name in _PRIORS}
    shapes["prior_variance"] = [int(columns.max()) + 1 if len(columns) else 0]
    genes = torch.arange(collapsed.squares.shape[1])

    def model() -> None:
        logs = {}
        for name, shape in shapes.items():
            prior = Normal(*torch.tensor(_PRIORS[name], dtype=torch.float64))
            logs[name] = pyro.sample(name, prior.expand(shape).to_event(len(shape)))
        hyper = _hyperparameters(logs, ratios, columns)
        log_evidence = evidence(collapsed, hyper)[0]
        with pyro.plate("genes", len(genes)):
            prior = Categorical(logits=hyper.log_weights)
            ratio = pyro.sample("ratio", prior, infer={"enumerate": "parallel"})
            pyro.factor("expression", log_evidence[ratio, genes])

    return model


def _train(model: Callable[[], None], n_steps: int, progress_bar: bool) -> Any:
    """The guide, a point mass for each of the shared numbers, after ``n_steps`` of SVI."""
    from pyro import poutine
    from pyro.infer import TraceEnum_ELBO
    from pyro.infer.autoguide import AutoDelta
    from pyro.optim import ClippedAdam
    from scvi.module.base import PyroBaseModuleClass
    from scvi.train import PyroTrainingPlan, Trainer

    class HierarchicalModule(PyroBaseModuleClass):
        """The program and its guide, in the form of scvi-tools."""

        def __init__(self) -> None:
            super().__init__()
            start = {name: prior[0] for name, prior in _PRIORS.items()}
            self._guide = AutoDelta(
                poutine.block(model, hide=["ratio"]),
                init_loc_fn=lambda site: torch.full(
                    site["fn"].shape(), start[site["name"]], dtype=torch.float64
                ),
            )

        @staticmethod
        def _get_fn_args_from_batch(tensor_dict: Any) -> tuple[tuple[()], dict[str, Any]]:
            return (), {}

        @property
        def model(self) -> Callable[[], None]:
            return model

        @property
        def guide(self) -> Any:
            return self._guide

    losses: list[float] = []

    class HierarchicalPlan(PyroTrainingPlan):
        """scvi-tools' plan, which forgets the losses of an epoch when it ends."""

        def on_train_epoch_end(self) -> None:
            losses.extend(float(step["loss"]) for step in self.training_step_outputs)
            super().on_train_epoch_end()

    module = HierarchicalModule()
    plan = HierarchicalPlan(
        module,
        loss_fn=TraceEnum_ELBO(max_plate_nesting=1),
        optim=ClippedAdam({"lr": _RATE, "lrd": _LAST ** (1 / n_steps)}),
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=progress_bar,
        simple_progress_bar=False,
    )
    # The rows are summed up already: a step needs nothing but its number.
    trainer.fit(plan, train_dataloaders=range(n_steps))
    _check_settled(losses)
    return module.guide


def _check_settled(losses: list[float]) -> None:
    """Raise if the loss is not finite, and say so if it was still falling."""
    if not math.isfinite(losses[-1]):
        raise TrainingDivergedError(
            "The hierarchical mean's loss is not finite: weights, or numbers of the table, may be "
            "too extreme."
        )
    gained = losses[-1 - len(losses) // 10] - losses[-1]
    if gained > _SETTLED:
        logger.warning(
            "The hierarchical mean had not settled after n_steps=%d: the last tenth of the steps "
            "gained %.1f nats. Give more.",
            len(losses),
            gained,
        )
