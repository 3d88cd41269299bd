"""Training: the plans (what a step does), the data, the best weights, the checkpoints."""

from exprgen.train._blocks import WINDOW, BlockLoader, Shuffle
from exprgen.train._callbacks import KeepBestWeights
from exprgen.train._checkpoint import FINISHED, KeepState, TrainingCheckpoint, digest_rows
from exprgen.train._data import (
    CellDataModule,
    CellDataset,
    EncodedDataset,
    default_batch_size,
    default_density_epochs,
    default_max_epochs,
)
from exprgen.train._moments import data_moments
from exprgen.train._plans import (
    DensityTrainingPlan,
    GenerativeTrainingPlan,
    StagePlan,
    check_plan,
)
from exprgen.train._processes import SameRun, SharedBatches

__all__ = [
    "FINISHED",
    "WINDOW",
    "BlockLoader",
    "CellDataModule",
    "CellDataset",
    "DensityTrainingPlan",
    "EncodedDataset",
    "GenerativeTrainingPlan",
    "KeepBestWeights",
    "KeepState",
    "SameRun",
    "SharedBatches",
    "Shuffle",
    "StagePlan",
    "TrainingCheckpoint",
    "check_plan",
    "data_moments",
    "default_batch_size",
    "default_density_epochs",
    "default_max_epochs",
    "digest_rows",
]
