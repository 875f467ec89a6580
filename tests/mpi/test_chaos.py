"""Two runs killed at random after their first checkpoint, once each; the whole story: chaos.py --runs 30."""

import pytest
from chaos import chaos


@pytest.mark.long
def test_runs_killed_at_random_end_with_the_bits_of_an_undisturbed_run(tmp_path):
    stories = chaos(runs=2, seed=20240501, place=tmp_path, after_first=True, most=1)
    assert len(stories) == 2
    assert sum(len(story.kills) for story in stories) >= 2
    assert sum(story.restarts for story in stories) >= 2
