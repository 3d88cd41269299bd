"""Data to learn on: real cells that need no network, public sets by download, simulators.

.. list-table::
   :header-rows: 1

   * - function
     - cells
     - needs
   * - :func:`pbmc68k_reduced`
     - 700 real blood cells with integer counts
     - nothing (shipped with scanpy)
   * - :func:`pbmc3k`, :func:`kang2018`
     - public sets with labels
     - network once, then a local cache
   * - :func:`simulate_nb`, :func:`simulate_latent`
     - counts whose p(x | c) is known
     - nothing

Every one of them returns a new AnnData with integer counts in ``.X`` and in ``.layers["counts"]``
(two equal CSR float32 matrices) and, where labels exist, ``.obs["cell_type"]``.
:func:`open_zarr` opens cells of your own that are too many for memory.
"""

from __future__ import annotations

from exprgen._stores import open_zarr
from exprgen.datasets._bundled import pbmc68k_reduced
from exprgen.datasets._download import kang2018, pbmc3k
from exprgen.datasets._simulate import nb_log_likelihood, simulate_latent, simulate_nb

__all__ = [
    "kang2018",
    "nb_log_likelihood",
    "open_zarr",
    "pbmc3k",
    "pbmc68k_reduced",
    "simulate_latent",
    "simulate_nb",
]
