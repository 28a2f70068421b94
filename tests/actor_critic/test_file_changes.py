"""A batch of A2C is followed from the rewards to the loss without losing it among the files."""

import pytest
from benchmarks.file_changes import read


# Ten lead to the critic's units and the divisor of the loss. The baseline takes 24 more: sums over all processes lie
# between its pure functions, which know of no processes
@pytest.mark.parametrize("most, overrides", [(76, {}), (48, {"gate_critic": False, "scale_advantages": False})])
def test_a_reader_changes_file_no_more_than_so_often(most, overrides):
    files = read(**overrides)
    assert "actor_critic/trainer.py" in files and "token_mdp/returns.py" in files  # the way leads through these
    assert len(files) - 1 <= most, " > ".join(files)
