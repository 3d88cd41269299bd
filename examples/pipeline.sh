#!/usr/bin/env bash
# From real cells to synthetic cells and a report, by the command line alone.
#
#   bash examples/pipeline.sh                                    700 blood cells that scanpy ships
#   bash examples/pipeline.sh train.h5ad test.h5ad KEY [FOLDER]  yours: raw counts in X, and KEY a
#                                                                column of labels in obs
#
# Results lie in FOLDER (pipeline/).
set -euo pipefail

out=${4:-pipeline}
mkdir -p "$out"
if [ $# -eq 0 ]; then
    train=$out/train.h5ad test=$out/test.h5ad key=cell_type
    python - "$train" "$test" <<'PYTHON'
import sys

import exprgen

adata = exprgen.datasets.pbmc68k_reduced()
for path, rows in zip(sys.argv[1:], (slice(0, None, 2), slice(1, None, 2)), strict=True):
    adata[rows].write_h5ad(path)
PYTHON
else
    train=$1 test=$2 key=$3
fi

run() {
    echo "+ exprgen $*" >&2
    python -m exprgen "$@" --seed 0 --overwrite
}

# 1. The model. Killed? The same line goes on from its checkpoint.
run train "$train" --condition "$key" --out "$out/model" --history "$out/history.csv" \
    --checkpoint-dir "$out/checkpoint" --resume

# 2. Two new cells for the conditions of each held-out cell, as counts.
run sample "$out/model" --conditions "$test" --n-obs 2 --out "$out/synthetic.h5ad"

# 3. What each held-out cell's genes may be: mean, standard deviation, 90 % interval.
run predict "$out/model" "$test" --out "$out/annotated.h5ad"

# 4. Are they any good? Every measure beside the same measure between real cells.
run evaluate "$train" "$test" "$out/synthetic.h5ad" --groupby "$key" --out "$out/report.csv"
