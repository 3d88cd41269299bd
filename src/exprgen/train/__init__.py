"""Training: the plans (what a step does), the data (which cells it sees), the best weights."""

from exprgen.train._blocks import WINDOW, BlockLoader, Shuffle
from exprgen.train._callbacks import KeepBestWeights
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

__all__ = [
    "WINDOW",
    "BlockLoader",
    "CellDataModule",
    "CellDataset",
    "DensityTrainingPlan",
    "EncodedDataset",
    "GenerativeTrainingPlan",
    "KeepBestWeights",
    "Shuffle",
    "StagePlan",
    "check_plan",
    "data_moments",
    "default_batch_size",
    "default_density_epochs",
    "default_max_epochs",
]
