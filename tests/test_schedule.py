"""Which epochs or steps are averaged or kept."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import member_numbers

from streaming_polyak import LINEAR, MEAN, Average, Members
from streaming_polyak.schedule import check_averages


@given(st.integers(0, 30), st.integers(1, 9), st.sampled_from(["epoch", "step"]))
def test_due_are_start_and_every_so_many_after_it(start, every, unit):
    average = Average(LINEAR, start=start, every=every, unit=unit)
    due = [k for k in range(60) if average.due(k)]
    assert due == member_numbers(average, 60)
    assert np.flatnonzero(average.due(np.arange(60))).tolist() == due


def test_the_default_takes_every_epoch():
    assert Average(MEAN) == Average(MEAN, start=0, every=1, unit="epoch")
    assert all(Average(MEAN).due(k) for k in range(5))


@pytest.mark.parametrize("make", [lambda **said: Average(MEAN, **said), lambda **said: Members("folder", **said)])
def test_nonsense_in_start_and_every_is_refused(make):
    with pytest.raises(ValueError, match="start >= 0"):
        make(start=-1)
    with pytest.raises(ValueError, match="every >= 1"):
        make(every=0)
    with pytest.raises(TypeError, match="start as an int"):
        make(start=1.5)
    with pytest.raises(TypeError, match="every as an int"):
        make(every=True)


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="Expected dtype=None or dtype=\"float64\", got dtype='float16'"):
        Average(MEAN, dtype="float16")
    with pytest.raises(TypeError, match="Expected compensated=True or False, got compensated='yes'"):
        Average(MEAN, compensated="yes")
    with pytest.raises(ValueError, match='unit="epoch" or unit="step", got unit=\'batch\''):
        Average(MEAN, unit="batch")


def test_an_average_needs_a_weighting():
    with pytest.raises(TypeError, match=r"Expected a weighting such as MEAN.*parse_weighting"):
        Average("mean")


def test_members_sort_by_epoch_and_keep_their_suffix():
    members = Members("kept", start=3, every=2, suffix=".weights.h5")
    epochs = [epoch for epoch in range(12) if members.due(epoch)]
    assert epochs == [3, 5, 7, 9, 11]
    paths = [members.path(epoch) for epoch in (9, 99, 12345)]
    assert paths[0] == Path("kept/epoch-00009.weights.h5")
    assert paths == sorted(paths)


def test_nonsense_in_members_is_refused():
    with pytest.raises(ValueError, match="newest >= 1 or None"):
        Members("folder", newest=0)
    with pytest.raises(ValueError, match=r"a suffix of \.keras, \.weights\.h5, \.h5; got suffix='\.npz'"):
        Members("folder", suffix=".npz")


@pytest.mark.parametrize("name", ["", "a[b", "]", 3])
def test_names_of_averages_are_text_without_brackets(name):
    with pytest.raises(ValueError, match="non-empty names without brackets"):
        check_averages({name: Average(MEAN)})


def test_a_bare_weighting_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"Expected an Average under the name 'mean'.*Average\(MEAN\)"):
        check_averages({"mean": MEAN})
