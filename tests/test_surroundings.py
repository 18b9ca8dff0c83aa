"""What an objective meets around it: other processes, counts, strides, hooks, autocast, random states, devices."""

import copy
import pickle

import pytest
import torch
from helpers import KNOWN

from axolotl_cvloss import Objective

V, H, B, T = 37, 8, 2, 19


def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[:, :5] = -100
    return {"labels": labels, "input_ids": labels.clamp_min(3), "position_ids": torch.arange(T).expand(B, T)}


def tensors(dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((B, T, H), (V, H))]


def test_an_objective_goes_to_other_processes():
    """With a schedule, and with what it has learnt of a tokenizer and a training set."""
    terms = [
        {"loss": "focal", "gamma": {"from": 1.0, "to": 3.0}, "goldfish": {"k": 3, "h": 3}},
        {"loss": "ldam"},
        {"loss": "number_token_mse"},
        {"loss": "lovasz", "scope": "sequence"},
    ]
    objective = Objective.from_config({"terms": terms}, **KNOWN)
    objective.advance(0.5)
    logits = tensors()[0] @ tensors()[1].T
    for other in pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective):
        assert torch.equal(other.from_logits(logits, **batch()).loss, objective.from_logits(logits, **batch()).loss)
        assert str(other) == str(objective)


def test_a_count_is_one_number_in_any_shape():
    """Trainer's is (1,) in some releases."""
    objective, (hidden, weight) = Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4}), tensors()
    expected = objective.from_hidden(hidden, weight, **batch(), num_items_in_batch=50).loss
    for count in torch.tensor([50]), torch.tensor([[50.0]]), {"completion": torch.tensor([50])}:
        found = objective.from_hidden(hidden, weight, **batch(), num_items_in_batch=count).loss
        assert found.shape == ()
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"num_items_in_batch: one number is expected, not a tensor of shape \(2,\)"):
        objective.from_hidden(hidden, weight, **batch(), num_items_in_batch=torch.tensor([5, 6]))
