"""A run that is killed at any moment goes on as if it had not been."""

from killing import Study


def test_runs_killed_at_random_moments_come_out_as_one_that_was_not(tmp_path):
    kills, _ = Study(tmp_path)(10)
    assert any(kill.saving for kill in kills)
    assert any(kill.kept for kill in kills)
