"""Parallel forms that split what the loss of a row needs are refused before training, in real processes."""

import pytest


@pytest.mark.hosts
@pytest.mark.matrix
@pytest.mark.parametrize(("size", "kind"), [("cp_size", "context"), ("tp_size", "tensor")])
def test_refused(size, kind, start_processes, tmp_path):
    printed = start_processes(2, "refused.py", size, tmp_path)
    assert printed.count(f"refused: cv_loss cannot be used with {size} above 1 ({kind} parallelism)") == 2
    assert "use FSDP or DeepSpeed ZeRO instead" in printed
