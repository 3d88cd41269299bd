"""What goes into a model file comes out the same: type, dtype, order, values."""

from __future__ import annotations

import io
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from exprgen._plain import KIND, from_plain, to_plain

FRAME = pd.DataFrame(
    {
        "loss": np.array([1.5, np.nan], dtype=np.float32),
        "step": [1, 2],
        "label": ["a", None],
        "type": pd.Categorical(["b", None], categories=["c", "b"], ordered=True),
        "flag": pd.array([True, None], dtype="boolean"),
        "count": pd.array([2**60 + 1, None], dtype="Int64"),
        "text": pd.array(["x", None], dtype="string"),
        "day": pd.to_datetime(["2020-01-01", "2021-01-01"]),
        3: [(1, 2), "mixed"],
    },
    index=pd.Index([5, 3], name="epoch"),
)

VALUES = [
    1, 1.5, True, None, "text", 2**80, float("inf"), -0.0,
    [1, (2, "x"), []], (), torch.Size([2, 3]),
    {"a": 1, 2: "b", None: 3, True: 4}, {(1, "a"): 2}, {np.int64(3): 1}, {KIND: "array", "x": 1},
    OrderedDict(b=1, a=2), defaultdict(list, {"a": [1]}),
    np.float32(1.5), np.int64(3), np.bool_(True), np.str_("x"), np.datetime64("2020-01-01"),
    np.arange(6, dtype=np.uint16).reshape(2, 3), np.array(3.0), np.zeros((0, 4)),
    np.array([1, 2], dtype=">i4"), np.array([True]), np.array([1j]), np.array(["ab", "c"]),
    np.array([b"ab"]), np.array(["a", 1, None, 2.5, (1, 2)], dtype=object),
    np.array([[None, "a"]], dtype=object), np.float16([1, 2]), np.asfortranarray(np.eye(3)),
    Path("a") / "ü b", pd.RangeIndex(1, 7, 2, name="i"), pd.Index(["a", "b"], name="gene"),
    pd.Index([1, 2], dtype=object), pd.CategoricalIndex(["x", "y"]), pd.Series([1, 2], name="s"),
    pd.Categorical([1, 2, 1]), FRAME, FRAME.iloc[:0], FRAME[[]], FRAME.iloc[:, [0, 0]],
]  # fmt: skip


def same(a, b) -> bool:
    """Equality in type, dtype, order and value."""
    if type(a) is not type(b):
        return isinstance(a, tuple) and isinstance(b, tuple) and tuple(a) == tuple(b)
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and same(a.tolist(), b.tolist())
    if isinstance(a, (pd.DataFrame, pd.Series, pd.Index)):
        assertion = {pd.DataFrame: "frame", pd.Series: "series"}.get(type(a), "index")
        getattr(pd.testing, f"assert_{assertion}_equal")(a, b)
        return True
    if isinstance(a, pd.Categorical):
        return a.equals(b) and a.dtype == b.dtype
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b and repr(a) == repr(b)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}")
def test_round_trip_through_a_file_that_runs_no_code(value):
    file = io.BytesIO()
    torch.save(to_plain({"nested": [value]}), file)
    file.seek(0)
    assert same(from_plain(torch.load(file, weights_only=True))["nested"][0], value)


def test_arrays_come_back_writable():
    back = from_plain(to_plain(np.arange(3)))
    back[0] = 7
    assert back.tolist() == [7, 1, 2]


def test_a_slice_of_a_tensor_does_not_take_along_the_rest():
    cells = torch.arange(1000.0, requires_grad=True)
    plain = to_plain({"a": cells[3:5], "b": torch.nn.Parameter(torch.ones(2))})
    assert plain["a"].untyped_storage().nbytes() == 8
    assert not plain["a"].requires_grad
    assert type(plain["b"]) is torch.Tensor


@pytest.mark.parametrize(
    "value", [object(), lambda: 0, {1, 2}, pd.MultiIndex.from_tuples([(1, 2)]),
              np.array([object()]), np.zeros(2, dtype=[("a", int)])]
)  # fmt: skip
def test_what_is_not_plain_is_named(value):
    with pytest.raises(TypeError, match=r"state\['history'\]\[1\].* cannot hold"):
        to_plain({"history": [1, value]}, where="state")


def test_a_function_is_not_kept_but_what_it_filled_is():
    assert to_plain(defaultdict(lambda: 0, a=1)) == {"a": 1}


@pytest.mark.parametrize(
    "value",
    [
        {KIND: "call", "function": "os.system"},
        {KIND: "array", "dtype": "O", "shape": (1,), "bytes": torch.zeros(8, dtype=torch.uint8)},
        {KIND: "nullable", "dtype": "category", "values": []},
    ],
)
def test_made_up_kinds_are_refused(value):
    with pytest.raises(ValueError, match="Unknown|OBJECT"):
        from_plain(value)
