"""What an update does to arrays: NumPy's way against Numba's, to the bit, and both against exact sums."""

import math
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from streaming_polyak import LINEAR, MEAN, Exponential
from streaming_polyak.training import kernels

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def by_numba(sizes, dtypes, threads=1):
    """A kernel whose loops are there when they are asked for a second time."""
    kernel = kernels.Kernel(sizes, dtypes, 10**9)
    kernel._threads = list(kernels.shares(sizes, dtypes, threads))
    return kernel


def check_by_numba(w, limit):
    kernel = by_numba([w.size], [w.dtype])
    kernel.check(kernels.Weights([w]), lambda dtype: limit)
    kernels.finish_compiling()
    return kernel.check(kernels.Weights([w]), lambda dtype: limit) is None


def move_by_numba(w, m, e, first, rows, c):
    kernel = by_numba([w.size], [w.dtype])
    if w.dtype in kernels._KNOWN:
        kernels.compiled_loop("plain" if e is None else "compensated", w.dtype, m.dtype)
        kernels.finish_compiling()
        assert kernels.compiled_loop("plain" if e is None else "compensated", w.dtype, m.dtype)  # Numba is there
    kernel.move(kernels.Weights([w]), m, e, np.array([first]), rows, c)


@pytest.mark.parametrize("compensated", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("rows", [[0, 1, 2], [1], [0, 2]], ids=str)
@pytest.mark.parametrize(
    ("weights", "averages"),
    [
        ("float32", "float32"),
        ("float32", "float64"),
        ("float64", "float64"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
    ],
)
def test_both_ways_give_the_same_bits_as_the_formula(weights, averages, rows, compensated):
    rng = np.random.default_rng(0)
    n = 2 * kernels._BLOCK + 77
    start = rng.normal(size=(3, n)).astype(averages)
    ways = [(start.copy(), np.zeros_like(start) if compensated else None) for _ in range(3)]
    c = np.array([0.3, 0.01, 1.0])[: len(rows)].astype(averages)
    for _ in range(3):
        w = (rng.normal(size=n) * 10.0 ** rng.integers(-3, 4, n)).astype(DTYPES[weights])
        w.setflags(write=False)
        kernels.move_blocks(w[:50], *ways[0], 0, np.array(rows), c)
        kernels.move_blocks(w[50:], *ways[0], 50, np.array(rows), c)
        move_by_numba(w[:7], *ways[1], 0, np.array(rows), c)
        move_by_numba(w[7:], *ways[1], 7, np.array(rows), c)
        m, e = ways[2]
        for j, factor in zip(rows, c, strict=True):
            wide, before = w.astype(averages), m[j].copy()
            if not compensated:
                m[j] = before + factor * (wide - before)
                continue
            y = factor * ((wide - before) - e[j]) + e[j]
            m[j] = before + y
            added = m[j] - before
            e[j] = (before - (m[j] - added)) + (y - added)
    for m, e in ways[:2]:
        assert m.tobytes() == ways[2][0].tobytes()
        assert not compensated or e.tobytes() == ways[2][1].tobytes()


@pytest.mark.parametrize("sizes", [[10, 0, 5], [1], [100, 1, 1, 1, 1000], [7] * 50, [10**6]])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_are_all_numbers_once_and_about_as_many_each(sizes, count):
    dtypes = [np.dtype(("f4", "f8")[k % 2]) for k in range(len(sizes))]
    threads = list(kernels.shares(sizes, dtypes, count))
    parts = [[(share.dtype, *part) for share in thread for part in share.parts()] for thread in threads]
    numbers = [(k, i) for thread in parts for _, k, numbers in thread for i in range(numbers.start, numbers.stop)]
    assert sorted(numbers) == [(k, i) for k, size in enumerate(sizes) for i in range(size)]
    assert all(dtype == dtypes[k] for thread in parts for dtype, k, _ in thread)
    each = [sum(numbers.stop - numbers.start for _, _, numbers in thread) for thread in parts]
    assert max(each) - min(each) <= 32 or count > len(threads) or sum(sizes) < 16 * count


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_many_tensors_of_several_dtypes_are_checked_and_moved_as_one_by_one(numba, threads, monkeypatch):
    rng = np.random.default_rng(3)
    shapes = [(3, 5), (0,), (40_000,), (7,), (200, 100), (1,), (33, 2)] * 4
    kinds = [("float32", "float64", "bfloat16")[k % 3] for k in range(len(shapes))]
    tensors = [rng.normal(size=shape).astype(DTYPES[kind]) for shape, kind in zip(shapes, kinds, strict=True)]
    sizes, dtypes = [w.size for w in tensors], [w.dtype for w in tensors]
    kernel = by_numba(sizes, dtypes, threads)
    kernel._worth_compiling = numba
    kernel._threads_of_numpy = kernel._threads
    here = np.array([dtype != np.float64 for dtype in dtypes])
    columns = np.where(here, np.cumsum([0, *np.where(here, sizes, 0)])[:-1], -1)
    start = rng.normal(size=(2, int(np.where(here, sizes, 0).sum()))).astype(np.float32)
    ways, rows, c = [(start.copy(), np.zeros_like(start)) for _ in range(2)], np.array([0, 1]), np.float32([0.1, 0.7])
    if numba:
        for dtype in kernels._KNOWN:
            kernels.compiled_loop("check", dtype)
            kernels.compiled_loop("compensated", dtype, np.dtype(np.float32))
        kernels.finish_compiling()
    kernel.move(kernels.Weights(tensors), *ways[0], columns, rows, c)
    for w, column in zip(tensors, columns, strict=True):
        if column >= 0:
            kernels.move_blocks(w.ravel(), *ways[1], int(column), rows, c)
    for a, b in zip(*ways, strict=True):
        assert a.tobytes() == b.tobytes()
    assert start.tobytes() != ways[0][0].tobytes()
    assert kernel.check(kernels.Weights(tensors), lambda dtype: 1e30) is None
    for k in (26, 18, 4):  # the first of those that are bad is named
        tensors[k].reshape(-1)[-1] = np.nan
        assert kernel.check(kernels.Weights(tensors), lambda dtype: 1e30) == k


@pytest.mark.parametrize("way", ["NumPy", "Numba"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_bad_number_is_seen_anywhere_and_large_ones_are_not_bad(dtype, bad, way):
    check = kernels.check_blocks if way == "NumPy" else check_by_numba
    limit = float(ml_dtypes.finfo(DTYPES[dtype]).max) / 2
    w = np.full(2 * kernels._BLOCK + 3, -0.9 * limit).astype(DTYPES[dtype])
    with np.errstate(all="ignore"):
        assert check(w, limit)
        assert not check(w, 0.8 * limit)
        assert check(w[:0], limit)
        for k in (0, 5, w.size - 1):
            w[k] = bad
            assert not check(w, limit)
            w[k] = 1


def test_updates_while_the_loops_are_compiled_have_the_bits_of_those_after_it(monkeypatch):
    monkeypatch.setattr(kernels, "_jobs", {})
    release = threading.Event()
    real = kernels._loops

    def slow():
        release.wait(60)
        return real()

    monkeypatch.setattr(kernels, "_loops", slow)
    rng = np.random.default_rng(5)
    tensors = [rng.normal(size=n).astype(np.float32) for n in (2**19, 3, 2**18)]
    sizes, columns, rows = [w.size for w in tensors], np.array([0, 2**19, 2**19 + 3]), np.array([0, 1])
    ways = [np.zeros((2, sum(sizes)), np.float32) for _ in range(2)]
    kernel = kernels.Kernel(sizes, [w.dtype for w in tensors], 2)
    for k in range(1, 5):
        c = np.float32([1 / k, 2 / (k + 1)])
        for w in tensors:
            w += rng.normal(size=w.size).astype(np.float32)
        assert kernel.check(kernels.Weights(tensors), lambda dtype: 1e30) is None
        kernel.move(kernels.Weights(tensors), ways[0], None, columns, rows, c)
        kernels.move_blocks(np.concatenate(tensors), ways[1], None, 0, rows, c)
        assert ways[0].tobytes() == ways[1].tobytes()
        if k == 2:
            single = np.dtype(np.float32)
            assert kernels.compiled_loop("plain", single, single) is None  # not yet
            release.set()
            kernels.finish_compiling()
            assert kernels.compiled_loop("plain", single, single) is not None


@pytest.mark.parametrize("name", ["numba", "numba.core.cgutils"])
def test_without_numba_or_with_a_part_of_it_numpy_does_it_all(name, monkeypatch):
    monkeypatch.setattr(kernels, "_jobs", {})
    monkeypatch.setattr(kernels, "_loops", kernels._loops.__wrapped__)
    monkeypatch.setitem(sys.modules, name, None)
    kernel, single = kernels.Kernel([2**20], [np.dtype(np.float32)], 1), np.dtype(np.float32)
    w, m = np.ones(2**20, np.float32), np.zeros((1, 2**20), np.float32)
    for _ in range(2):
        kernel.move(kernels.Weights([w]), m, None, np.array([0]), np.array([0]), np.float32([1]))
        kernels.finish_compiling()
    assert kernels.compiled_loop("plain", single, single) is None
    assert (m == 1).all()


def test_a_numba_that_fails_is_told_once_and_numpy_goes_on(monkeypatch, caplog):
    def fail():
        raise OSError("libLLVM cannot be loaded")

    monkeypatch.setattr(kernels, "_jobs", {})
    monkeypatch.setattr(kernels, "_loops", fail)
    kernel, w, m = kernels.Kernel([2**20], [np.dtype(np.float32)], 1), np.ones(2**20, np.float32), np.zeros((1, 2**20))
    for _ in range(3):
        kernel.move(kernels.Weights([w]), m, None, np.array([0]), np.array([0]), np.ones(1))
        kernels.finish_compiling()
    assert (m == 1).all()
    assert [record.message for record in caplog.records] == [
        "Numba cannot compile updates of averages here; NumPy makes them, slower."
    ]


def test_a_process_without_another_thread_does_all_in_its_own(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(kernels, "_jobs", {})
    monkeypatch.setattr(kernels.ThreadPoolExecutor, "submit", refuse)
    single = np.dtype(np.float32)
    kernel, w, m = by_numba([2**20], [single], 3), np.ones(2**20, np.float32), np.zeros((1, 2**20), np.float32)
    for _ in range(2):
        assert kernel.check(kernels.Weights([w]), lambda dtype: 1e30) is None
        kernel.move(kernels.Weights([w]), m, None, np.array([0]), np.array([0]), np.float32([0.5]))
    assert (m == 0.75).all()  # each number moved twice, none of them more often
    w[-1] = np.nan
    assert kernel.check(kernels.Weights([w]), lambda dtype: 1e30) == 0
    assert kernels.compiled_loop("plain", single, single) is None


def test_an_error_is_told_when_no_thread_writes_any_more():
    ended = []

    def work(share, loop):
        time.sleep(0.2 * share.firsts[0] / 2**18)
        ended.append(int(share.firsts[0]))
        if not share.firsts[0]:
            raise KeyboardInterrupt

    kernel = by_numba([2**20], [np.dtype(np.float32)], 4)
    kernel._threads_of_numpy = kernel._threads
    with pytest.raises(KeyboardInterrupt):
        kernel._each(work, kernels.Weights((np.ones(2**20, np.float32),)), "check")
    assert sorted(ended) == [0, 2**18, 2**19, 3 * 2**18]


def test_no_loop_is_compiled_for_weights_that_an_array_of_averages_has_none_of(monkeypatch):
    monkeypatch.setattr(kernels, "_jobs", {})
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    kernel, tensors = by_numba([8, 8], [single, double]), [np.ones(8, single), np.ones(8, double)]
    m = np.zeros((1, 8), np.float32)
    kernel.move(kernels.Weights(tensors), m, None, np.array([0, -1]), np.array([0]), np.float32([1]))
    kernels.finish_compiling()
    assert list(kernels._jobs) == [("plain", single, single)]


@pytest.mark.slow
def test_after_a_million_updates_the_compensated_averages_are_exact_and_plain_ones_within_their_bound():
    updates, decay = 1_000_000, 0.999
    weightings = [MEAN, LINEAR, Exponential(decay=decay)]
    rng = np.random.default_rng(1)
    members = np.empty((updates, 6), np.float32)
    members[:, 0] = 1 + rng.normal(size=updates) / 100
    members[:, 1] = rng.normal(size=updates) + 3
    members[:, 2] = np.linspace(-1, 2, updates)  # goes on in one direction
    members[:, 3] = 0.1  # never moves
    members[:, 4] = rng.normal(size=updates).cumsum() / 1000  # walks
    members[:, 5] = np.where(np.arange(updates) % 2, 1e4, -1e-4) + rng.normal(size=updates)
    n = np.arange(1, updates + 1)
    c = np.stack([weighting(n) for weighting in weightings]).T
    rows = np.arange(3)
    plain, wide, m = (np.zeros((3, 6), dtype) for dtype in (np.float32, np.float64, np.float32))
    e, c32 = np.zeros_like(m), c.astype(np.float32)
    move = kernels._loops()["plain"]  # and the compensated one
    ((share,),) = kernels.shares([6], [members.dtype], 1)
    addresses, first = members.ctypes.data + members.strides[0] * np.arange(updates), np.array([0])
    for k in range(updates):
        move(addresses[k : k + 1], share, plain, None, first, rows, c32[k])
        move(addresses[k : k + 1], share, m, e, first, rows, c32[k])
        move(addresses[k : k + 1], share, wide, None, first, rows, c[k])
    raw = [np.ones(updates), n.astype(np.float64), decay ** (updates - n.astype(np.float64))]
    for j, weights in enumerate(raw):
        for i, column in enumerate(members.T.astype(np.float64)):
            exact = math.fsum(weights * column) / math.fsum(weights)
            ulp = float(np.spacing(np.float32(abs(exact))))
            assert abs(float(m[j, i]) - exact) <= ulp, (j, i)
            assert abs(float(wide[j, i]) - exact) <= 1e-5 * ulp, (j, i)
            largest = float(np.spacing(np.abs(members[:, i]).max()))
            bound = (updates / 4, updates / 6, 1 / (2 * (1 - decay)))[j] + 3  # see Average
            assert abs(float(plain[j, i]) - exact) <= bound * largest, (j, i)
    worst = max(
        abs(float(plain[0, i]) - math.fsum(column) / updates)
        / float(np.spacing(np.float32(abs(math.fsum(column) / updates))))
        for i, column in enumerate(members.T.astype(np.float64))
    )
    assert worst > 10  # what compensation is for
