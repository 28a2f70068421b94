"""A batch of A2C is followed from the rewards to the loss without losing it among the files."""

from benchmarks.file_changes import read


def test_a_reader_changes_file_at_most_40_times():
    files = read()
    assert "actor_critic/trainer.py" in files and "token_mdp/returns.py" in files  # the way leads through these
    assert len(files) - 1 <= 40, " > ".join(files)
