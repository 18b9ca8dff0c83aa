"""A model's head: run something of ours in its place, so that the logits of a batch never exist."""

import copy
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .engine.sources import Head

PROBED_ROWS = 4


Take = Callable[[Tensor, Head, Tensor | None], None]  # hidden states, the head, and the logits of the rows to be probed


class HeadTap:
    """Hands the input of a model's head to a function, during one forward of the model.

    The function runs inside the forward of the head: there its weights are whole, however they are sharded. The
    model goes on with a stand-in of the logits; where ``probe`` is asked for, with the true logits of a few rows,
    which show what the model does to them afterwards. Threads do not disturb each other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._head: Head | None = None
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

    def run(self, forward: Callable[[], Any], take: Take, probe: bool) -> Any:
        """Call ``forward`` with ``take`` in the place of the head. Afterwards the head is as it was before."""
        before = vars(self._thread).copy()
        self._enter()
        self._thread.take, self._thread.probe = take, probe
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
        some = None
        if self._thread.probe:
            with torch.no_grad():  # once, as a head with dropout draws anew at every call
                some = self._head.forward(probed(hidden_states))
        take(hidden_states, self._head, None if some is None else some.clone())
        logits = torch.zeros_like(hidden_states[..., :1]) if some is None else some
        return logits.requires_grad_() if partitioned(self._head.module) else logits


def partitioned(head: nn.Module) -> bool:
    """DeepSpeed's ZeRO-3 has the weights. It makes them whole for the backward pass of a module where the gradient of
    what the module has returned comes in, so the loss must depend on that."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def probed(hidden_states: Tensor) -> Tensor:
    """A few rows, (1, n, H)."""
    return hidden_states.detach()[:1, :PROBED_ROWS]


def postprocessing(config: Any) -> dict[str, float | None]:
    """What a model's config says it does to its logits: ``scale`` and ``softcap``, as ``from_hidden`` takes them."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= getattr(text, name, None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
    return {"scale": scale, "softcap": getattr(text, "final_logit_softcapping", None)}  # Gemma 2 and later


def processed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits.float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
