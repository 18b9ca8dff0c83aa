"""A loop with accelerate in several processes: its one step against that of one big batch.

torchrun --nproc-per-node 2 plain_loop.py LOOP.py
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from one_step import make_model, make_rows, padded

from axolotl_cvloss import Objective

rows, model, alone = make_rows(), make_model(), make_model()
loop = {
    "model": model,
    "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    "loader": torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=padded),
}
exec(Path(sys.argv[1]).read_text(), loop)

batch = padded(rows)
labels = batch.pop("labels")
objective = Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4})
result = objective.from_logits(alone(**batch).logits, labels, **batch)
result.loss.backward()
before = alone.lm_head.weight.detach().clone()
torch.optim.SGD(alone.parameters(), lr=0.1).step()
assert (alone.lm_head.weight - before).norm() > 1e-2
for ours, expected in zip(model.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
if PartialState().is_main_process:
    print(f"the step of one big batch in {PartialState().num_processes} processes")
PartialState().destroy_process_group()
