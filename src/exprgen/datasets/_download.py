"""Public data sets, downloaded once, checked against a SHA-256 and kept in a local cache.

The cache is :func:`pooch.os_cache` ``("exprgen")``, or the folder named by the environment
variable ``EXPRGEN_DATA``. A file put there by hand, under the name in the table below, is used as
if it had been downloaded: that is the way on a machine without network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

__all__ = ["kang2018", "pbmc3k"]


class _Source(NamedTuple):
    """Where a file comes from and what it must be."""

    url: str
    sha256: str


_FILES = {
    "pbmc3k_raw.h5ad": _Source(
        "https://exampledata.scverse.org/scanpy/pbmc3k_raw.h5ad",
        "89a96f1beaa2dd83a687666d3f19a4513ac27a2a2d12581fcd77afed7ea653a1",
    ),
    "pbmc3k_labels.h5ad": _Source(
        "https://raw.githubusercontent.com/chanzuckerberg/cellxgene/"
        "68dfbcc2eb675e96c6a5e2a6b7a0d3465ccf46bc/example-dataset/pbmc3k.h5ad",
        "0db367b991dd95809732b218539ede489bea99113807f62ebd7ccc970025fe38",
    ),
    "kang_2018.h5ad": _Source(
        "https://exampledata.scverse.org/pertpy/kang_2018.h5ad",
        "e6a5adac64dcdeb36eaba27db49b63e0c64bb0ed4a64c6705971506b41c39830",
    ),
}


def pbmc3k() -> AnnData:
    """Return 2,638 labelled blood cells of one healthy donor (30 MB download, once).

    Returns
    -------
    AnnData
        ``.X`` and ``.layers["counts"]``: UMI counts, CSR float32, all 32,738 genes.
        ``.obs["cell_type"]``: the 8 types of scanpy's clustering tutorial; cells that the
        tutorial filtered out are left out.

    Raises
    ------
    ConnectionError
        No network and no cached file; the message says where to put it.
    ValueError
        A downloaded or cached file is not the one that was published.

    Notes
    -----
    Data: 10x Genomics, 3k PBMCs from a healthy donor, CC BY 4.0; labels from the processed
    object of scanpy's tutorial :cite:p:`Wolf2018` as distributed with cellxgene (MIT).
    """
    import pandas as pd

    adata = _read("pbmc3k_raw.h5ad")
    labels = _read("pbmc3k_labels.h5ad").obs["louvain"]
    adata.var_names_make_unique()
    adata = adata[labels.index].copy()
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(labels.astype(str).to_numpy())}, index=adata.obs_names
    )
    return _tidy(adata, obs, source="10x 3k PBMC, labels of scanpy's tutorial")


def kang2018() -> AnnData:
    """Return 24,673 blood cells of 8 lupus patients, with and without interferon-beta (38 MB).

    Returns
    -------
    AnnData
        ``.X`` and ``.layers["counts"]``: UMI counts, CSR float32, 15,706 genes. ``.obs``:
        ``cell_type`` (8), ``condition`` (``"ctrl"``, ``"stim"``), ``donor`` (8).

    Raises
    ------
    ConnectionError
        No network and no cached file; the message says where to put it.
    ValueError
        A downloaded or cached file is not the one that was published.

    Notes
    -----
    Data: Kang et al., Multiplexed droplet single-cell RNA-sequencing using natural genetic
    variation, Nature Biotechnology 2018 :cite:p:`Kang2018` (GEO GSE96583), as prepared for and
    hosted by pertpy; see there for terms of use.
    """
    import pandas as pd

    adata = _read("kang_2018.h5ad")
    columns = {"cell_type": "cell_type", "condition": "label", "donor": "replicate"}
    obs = pd.DataFrame(
        {new: pd.Categorical(adata.obs[old].astype(str)) for new, old in columns.items()},
        index=adata.obs_names,
    )
    return _tidy(adata, obs, source="Kang et al. 2018, GSE96583, via pertpy")


def _fetch(name: str) -> Path:
    """Path of the verified file, downloaded if it is not in the cache."""
    import os
    from pathlib import Path

    import pooch
    from requests.exceptions import RequestException

    source = _FILES[name]
    folder = Path(os.environ.get("EXPRGEN_DATA") or pooch.os_cache("exprgen")).expanduser()
    target = folder / name
    if target.exists():
        # Not left to pooch, which would replace a file that somebody put there by hand.
        if pooch.file_hash(str(target), alg="sha256") != source.sha256:
            raise ValueError(
                f"{target} is not the published file (its SHA-256 differs). Delete it, then call "
                f"again or download {source.url} to that path."
            )
        return target
    # The host refuses the agent names that Python sends by default.
    downloader = pooch.HTTPDownloader(
        progressbar=True, headers={"User-Agent": "Mozilla/5.0 (compatible; exprgen)"}, timeout=30
    )
    try:
        path = pooch.retrieve(
            source.url,
            known_hash=f"sha256:{source.sha256}",
            fname=name,
            path=folder,
            downloader=downloader,
        )
    except (RequestException, OSError) as error:
        raise ConnectionError(
            f"Could not download {source.url} ({type(error).__name__}). Without network, fetch it "
            f"on another machine and place it at {target} (or set EXPRGEN_DATA to the folder that "
            "holds it)."
        ) from error
    return Path(path)


def _read(name: str) -> AnnData:
    import warnings

    import anndata

    path = _fetch(name)
    with warnings.catch_warnings():
        # These files were written years ago: old format, names that are not unique.
        warnings.simplefilter("ignore")
        return anndata.read_h5ad(path)


def _tidy(adata: AnnData, obs: object, *, source: str) -> AnnData:
    """A new object with counts, our columns, and nothing else."""
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    counts = csr_matrix(adata.X, dtype=np.float32)
    return AnnData(
        X=counts,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(adata.var_names.astype(str))),
        layers={"counts": counts.copy()},
        uns={"source": source},
    )
