"""The loop of docs/hosts.md with accelerate, in two processes."""

import pytest
from helpers import snippet


@pytest.mark.hosts
def test_the_loop_of_the_readme(start_processes, tmp_path):
    (tmp_path / "loop.py").write_text(snippet("Accelerator()"))
    assert "the step of one big batch in 2 processes" in start_processes(2, "plain_loop.py", tmp_path / "loop.py")
