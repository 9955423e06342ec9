"""Parallel loops: every iteration is done once, whoever is late."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import llvmlite.binding as llvm
import pytest

from minicompiler.runtime.pool import Pool, kernel_symbols

# Word 1: the extent of a loop that all threads share, run twice with a barrier between. Every
# iteration adds 1 to its word (64 + i); thread `word 2` first waits until word 3 is done by others.
KERNEL = """
define void @share(i32 %tid, i32 %n, ptr %arg, ptr %barrier) {
  %own = alloca i64, align 8
  %p_extent = getelementptr i32, ptr %arg, i32 1
  %extent32 = load i32, ptr %p_extent
  %extent = sext i32 %extent32 to i64
  %p_late = getelementptr i32, ptr %arg, i32 2
  %late = load i32, ptr %p_late
  %p_done = getelementptr i32, ptr %arg, i32 3
  %p_wanted = getelementptr i32, ptr %arg, i32 4
  %wanted = load i32, ptr %p_wanted
  br label %round
round:
  %r = phi i32 [ 0, %0 ], [ %r1, %met ]
  store i64 0, ptr %own, align 8
  %am = icmp eq i32 %tid, %late
  %once = icmp eq i32 %r, 0
  %waits = and i1 %am, %once
  br i1 %waits, label %wait, label %claim
wait:
  %d = load atomic i32, ptr %p_done acquire, align 4
  %enough = icmp sge i32 %d, %wanted
  br i1 %enough, label %claim, label %wait
claim:
  %c = call { i64, i64 } inttoptr (i64 CLAIM to ptr)(
    ptr %barrier, i32 %tid, i32 %n, i64 %extent, ptr %own)
  %a = extractvalue { i64, i64 } %c, 0
  %b = extractvalue { i64, i64 } %c, 1
  %some = icmp slt i64 %a, %b
  br i1 %some, label %work, label %meet
work:
  %i = phi i64 [ %a, %claim ], [ %i1, %work ]
  %j = add i64 %i, 64
  %p = getelementptr i32, ptr %arg, i64 %j
  %x = atomicrmw add ptr %p, i32 1 monotonic
  %y = atomicrmw add ptr %p_done, i32 1 release
  %i1 = add i64 %i, 1
  %more = icmp slt i64 %i1, %b
  br i1 %more, label %work, label %claim
meet:
  call void inttoptr (i64 BARRIER to ptr)(ptr %barrier, i32 %n)
  br label %met
met:
  %r1 = add i32 %r, 1
  %again = icmp slt i32 %r1, 2
  br i1 %again, label %round, label %out
out:
  ret void
}
"""


@pytest.fixture(scope="module")
def share() -> Iterator[int]:
    symbols = kernel_symbols()
    text = KERNEL.replace("CLAIM", str(symbols["mc_claim"]))
    text = text.replace("BARRIER", str(symbols["mc_barrier"]))
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
    engine.finalize_object()
    yield engine.get_function_address("share")


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("extent", [0, 1, 2, 7, 40, 1000, 4099])
def test_every_iteration_is_done_once(
    share: int, make_pool: Callable[[int], Pool], threads: int, extent: int
) -> None:
    pool = make_pool(threads)
    words = (ctypes.c_int32 * (64 + extent))()
    words[1], words[2] = extent, -1
    for call in range(1, 4):  # counts of one region mean nothing in the next
        pool.run(share, ctypes.addressof(words))
        assert set(words[64:]) <= {2 * call}


def test_others_do_the_share_of_a_thread_that_is_late(
    share: int, make_pool: Callable[[int], Pool]
) -> None:
    extent = 1000
    words = (ctypes.c_int32 * (64 + extent))()
    words[1], words[2], words[4] = extent, 1, extent  # thread 1 waits until all is done
    make_pool(2).run(share, ctypes.addressof(words))
    assert set(words[64:]) == {2}
