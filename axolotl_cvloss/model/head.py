"""A model's head: run something of ours in its place, so that the logits of a batch never exist."""

import copy
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.sources import Head

Take = Callable[[Tensor, Head], Tensor]  # hidden states and the head, and what the model goes on with


class HeadTap:
    """Hands the input of a model's head to a function, during one forward of the model.

    The function runs inside the forward of the head: there its weights are whole, however they are sharded. The model
    goes on with what it returns, a stand-in of the logits. Threads do not disturb each other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._head: Head | None = None
        self.alone = threading.Lock()  # for one who changes the model for a while
        self._lock, self._runs = threading.Lock(), 0
        self._thread = threading.local()  # what the run of this thread wants
        # Made once: with another function at every step, torch.compile would compile at every step.
        self._uncompiled = torch.compiler.disable(HeadTap._forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadTap":
        return type(self)(copy.deepcopy(self.model, memo))

    def find(self) -> nn.Module | None:
        """The head, or None where the model has none that transformers can name."""
        get = getattr(self.model, "get_output_embeddings", None)
        return get() if get is not None else None

    def run(self, forward: Callable[[], Any], take: Take) -> Any:
        """Call ``forward`` with ``take`` in the place of the head. Afterwards the head is as it was before."""
        before = vars(self._thread).copy()
        self._enter()
        self._thread.take = take
        try:
            return forward()
        finally:
            vars(self._thread).clear()
            vars(self._thread).update(before)
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if not self._runs:
                module = self.find()
                assert module is not None
                self._saved = module.__dict__.get("forward")
                self._head = Head(module, module.forward)
                module.__dict__["forward"] = MethodType(self._uncompiled, self)
            self._runs += 1

    def _leave(self) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                assert self._head is not None
                own = self._head.module.__dict__
                del own["forward"]
                if self._saved is not None:
                    own["forward"] = self._saved

    def _forward(self, hidden_states: Tensor) -> Tensor:
        assert self._head is not None
        take = getattr(self._thread, "take", None)
        if take is None:  # of a thread that wants the logits
            return self._head.forward(hidden_states)
        logits = take(hidden_states, self._head)
        return logits.requires_grad_() if partitioned(self._head.module) else logits


def partitioned(head: nn.Module) -> bool:
    """DeepSpeed's ZeRO-3 has the weights. It makes them whole for the backward pass of a module where the gradient of
    what the module has returned comes in, so the loss must depend on that."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())
