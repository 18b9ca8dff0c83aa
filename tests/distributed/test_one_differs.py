"""Decisions that come before a collective are the same in all processes, also where one of them sees something else."""

import pytest


@pytest.mark.hosts
def test_both_go_the_same_way(start_processes, tmp_path):
    assert "both went the same way" in start_processes(2, "one_differs.py", tmp_path)
