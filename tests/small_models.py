"""Small compiled models for tests of the runtime: kernels straight from tensor expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicompiler import te
from minicompiler.codegen.launch import emit_main
from minicompiler.codegen.llvm import emit
from minicompiler.codegen.native import compile_object
from minicompiler.ir.expr import ZERO, Const, Dim, Expr, wrap
from minicompiler.ir.graph import Apply, Function, Input, Item, Value, layout_of, type_of
from minicompiler.ir.op import Op
from minicompiler.ir.tir import PARALLEL, For, PrimFunc
from minicompiler.ir.types import DType, TensorType
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.memory import Alias, KernelCall, plan_memory
from minicompiler.lower.to_tir import from_tensors
from minicompiler.runtime.module import Module
from minicompiler.target import Target
