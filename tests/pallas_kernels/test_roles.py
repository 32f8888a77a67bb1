"""How kernels with roles are launched."""

import pytest

from pallas_kernels.hopper import roles


def launch(registers):
    return roles.kernel(
        "test", lambda **_: (), registers, scratch_types={}, landing_slots=1, grid={"cta": 1},
        interpret=None,
    )  # fmt: skip


@pytest.mark.parametrize("registers", [(208, 240, 56), (208, 192, 24, 88)])
def test_registers_that_there_are(registers):
    launch(registers)


@pytest.mark.parametrize("registers", [(216, 240, 56), (208, 192, 32, 88)])
def test_registers_that_no_launch_deals_out(registers):
    """A warpgroup would wait for them forever, on a GPU only."""
    with pytest.raises(ValueError, match="one would wait forever"):
        launch(registers)
