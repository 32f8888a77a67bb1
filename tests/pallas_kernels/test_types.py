"""The two values that carry masking and selection."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import KeyRange, Selection


def test_causal():
    ranges = KeyRange.causal(2, 3, offset=jnp.array([0, 2]))
    np.testing.assert_array_equal(ranges.start, np.zeros((2, 3)))
    np.testing.assert_array_equal(ranges.end, [[1, 2, 3], [3, 4, 5]])
    assert ranges.start.dtype == ranges.end.dtype == jnp.int32
    np.testing.assert_array_equal(KeyRange.causal(1, 2, offset=4).end, [[5, 6]])


def test_packed():
    """Equal ids count as one document only side by side; padding sees nothing."""
    ids = jnp.array([[3, 3, 1, 1, 1, 0, 3, 3], [0, 0, 5, 6, 6, 0, 0, 0]])
    found = np.asarray(KeyRange.packed(ids).mask(8))
    expected = np.zeros((2, 8, 8), bool)
    for b, documents in enumerate([[(0, 2), (2, 5), (6, 8)], [(2, 3), (3, 5)]]):
        for first, end in documents:
            for t in range(first, end):
                expected[b, t, first : t + 1] = True
    np.testing.assert_array_equal(found, expected)


def test_mask_of_odd_ranges():
    ranges = KeyRange(jnp.array([[-2, 1, 3, 2]]), jnp.array([[2, 9, 3, 0]]))
    expected = [[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(ranges.mask(3)[0], np.array(expected, bool))


def test_selection():
    selection = Selection(jnp.array([[[0, 2, -1], [-1, -1, -1], [1, 2, 3]]], jnp.int32))
    np.testing.assert_array_equal(selection.valid.sum(-1), [[2, 0, 3]])
    expected = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]
    np.testing.assert_array_equal(selection.mask(4)[0], np.array(expected, bool))
