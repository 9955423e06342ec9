"""Transposed convolutions by phases: the results of the operator, for every stride and border."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from minicompiler.ir.expr import Const, Dim
from minicompiler.ir.graph import Constant, Function, Input, applies, apply
from minicompiler.ir.types import TensorType, dtype_of, float32
from minicompiler.ops import conv
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.phases import convolve_phases


def transposed(
    sizes: tuple[object, ...],
    kernel: tuple[int, ...],
    groups: int = 1,
    outputs: int = 3,
    **attrs: tuple[int, ...],
) -> Function:
    rng = np.random.default_rng(0)
    shape = tuple(Const(n) if isinstance(n, int) else n for n in (2, 4, *sizes))
    x = Input("x", TensorType(shape, float32))  # type: ignore[arg-type]
    weight = Constant(rng.standard_normal((4, outputs, *kernel), np.float32))
    bias = Constant(rng.standard_normal(outputs * groups, np.float32))
    a = conv.ConvTransposeAttrs(groups=groups, **attrs)
    return Function("f", (x,), (apply(conv.conv_transpose, x, weight, bias, attrs=a),))


CASES = {
    "halves": transposed((5, 6), (4, 4), strides=(2, 2), pads_begin=(1, 1), pads_end=(1, 1)),
    "odd": transposed(
        (5, 4), (3, 3), strides=(2, 2), pads_begin=(1, 1), pads_end=(1, 1), output_padding=(1, 1)
    ),
    "no overlap": transposed((3, 3), (2, 2), strides=(2, 2)),
    "gaps": transposed((3, 4), (2, 3), strides=(3, 4), output_padding=(1, 0)),
    "uneven": transposed((4, 5), (5, 3), strides=(2, 3), pads_begin=(2, 0), pads_end=(1, 1)),
    "line": transposed((7,), (16,), strides=(8,), pads_begin=(4,), pads_end=(4,)),
    "volume": transposed((2, 3, 2), (2, 3, 2), strides=(2, 2, 1), pads_begin=(0, 1, 0)),
    "own taps": transposed((5, 4), (3, 5), outputs=16, strides=(2, 2), pads_begin=(1, 0)),
    "own pixels": transposed(
        (3, 4), (4, 4), outputs=16, strides=(2, 2), pads_begin=(1, 1), pads_end=(1, 1)
    ),
    "every pixel": transposed((5, 5), (3, 3), pads_begin=(1, 2), pads_end=(0, 1)),
    "one pixel": transposed((1, 1), (4, 4)),
    "one line": transposed((1, 5), (4, 4), strides=(1, 2), pads_begin=(1, 1), pads_end=(0, 1)),
    "cut within the first taps": transposed((5, 5), (4, 4), strides=(2, 2), pads_begin=(4, 0)),
    "any size": transposed((Dim("h", 2, 9), 4), (4, 4), strides=(2, 2), pads_begin=(1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_by_phases(name: str) -> None:
    fn = CASES[name]
    made = convolve_phases(fn, None)
    assert conv.conv_transpose not in {v.op for v in applies(made)}
    shape = [n.value if isinstance(n, Const) else 5 for n in fn.params[0].type.shape]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    assert_close(run_reference(made, [x])[0], run_reference(fn, [x])[0], 100)


KEPT = {
    "groups": transposed((5, 5), (4, 4), groups=2, strides=(2, 2)),
    "dilated": transposed((5, 5), (3, 3), strides=(2, 2), dilations=(2, 2)),
    "cut before the last pixel": transposed((5, 5), (4, 4), strides=(2, 2), pads_end=(5, 0)),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    fn = KEPT[name]
    assert convolve_phases(fn, None) is fn


def test_each_phase_has_its_own_taps() -> None:
    """Of 3 taps at every second pixel one phase needs 2, the other 1."""
    made = convolve_phases(transposed((5, 4), (3, 3), outputs=16, strides=(2, 2)), None)
    kernels = [v.args[1].data.shape[2:] for v in applies(made) if v.op is conv.conv]
    assert sorted(kernels) == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_few_channels_stay_together() -> None:
    """Four phases of three channels fit one block, which four convolutions would fill in part."""
    made = convolve_phases(CASES["halves"], None)
    assert len([v for v in applies(made) if v.op is conv.conv]) == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_transposed_convolution(data: st.DataObject) -> None:
    """The pass keeps the numbers, whatever it makes of the operator."""
    (x, w, bias), attrs = conv.conv_transpose.samples(data.draw)
    fn_input = Input("x", TensorType(tuple(map(Const, x.shape)), dtype_of(x.dtype)))
    args = [fn_input, Constant(w), *([] if bias is None else [Constant(bias)])]
    fn = Function("f", (fn_input,), (apply(conv.conv_transpose, *args, attrs=attrs),))
    got, want = (run_reference(f, [x])[0] for f in (convolve_phases(fn, None), fn))
    assert_close(got, want, 100)
