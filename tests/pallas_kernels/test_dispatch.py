"""What None means: kernels where they serve, else the reference; and what was chosen."""

import threading

import pytest

from pallas_kernels import dispatch


def test_none_is_the_reference_without_a_gpu():
    assert dispatch.choose("op", None, None) == "xla"


def test_kernels_are_chosen_where_they_serve():
    with dispatch.kernels(True):
        assert dispatch.choose("op", None, None) == "mosaic"
        assert dispatch.choose("op", None, "too wide") == "xla"
        assert dispatch.choose("op", "xla", None) == "xla"
        with dispatch.kernels(False):
            assert dispatch.choose("op", None, None) == "xla"
            assert dispatch.choose("op", "mosaic", None) == "mosaic"
        assert dispatch.choose("op", None, None) == "mosaic"
    assert dispatch.choose("op", None, None) == "xla"


def test_other_threads_are_not_told():
    found = []
    with dispatch.kernels(True):
        thread = threading.Thread(target=lambda: found.append(dispatch.choose("op", None, None)))
        thread.start()
        thread.join()
    assert found == ["xla"]


def test_an_explicit_kernel_that_cannot_serve_is_an_error_inside_too():
    with dispatch.kernels(True), pytest.raises(dispatch.UnsupportedError, match="too wide"):
        dispatch.choose("op", "mosaic", "too wide")


def test_choices_are_recorded_and_the_reference_shows():
    with dispatch.kernels(True), dispatch.recorded() as found:
        dispatch.choose("a", None, None)
        dispatch.choose("b", None, None)
        dispatch.choose("b", None, "too wide")
        dispatch.choose("b", None, None)
    dispatch.choose("c", None, None)
    assert found == {"a": "mosaic", "b": "xla (too wide)"}
