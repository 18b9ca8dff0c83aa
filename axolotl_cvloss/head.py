"""A model's head: run something of ours in its place, so that the logits of a batch never exist."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .engine.sources import Head

PROBED_ROWS = 4


class HeadTap:
    """Hands the input of a model's head to a function, during one forward of the model.

    The function runs inside the forward of the head: there its weights are whole, however they are sharded. The
    model goes on with a stand-in of the logits; where ``probe`` is asked for, with the true logits of a few rows,
    which show what the model does to them afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._head: Head | None = None
        self._take: Callable[[Tensor, Head], None] | None = None
        self._probe = False
        # Made once: with another function at every step, torch.compile would compile at every step.
        self._uncompiled = torch.compiler.disable(HeadTap._forward)

    def find(self) -> nn.Module | None:
        """The head, or None where the model has none that transformers can name."""
        get = getattr(self.model, "get_output_embeddings", None)
        return get() if get is not None else None

    def run(self, forward: Callable[[], Any], take: Callable[[Tensor, Head], None], probe: bool) -> Any:
        """Call ``forward`` with ``take`` in the place of the head. Afterwards the head is as it was before."""
        module = self.find()
        assert module is not None
        own = module.__dict__
        saved = own.get("forward")
        self._head, self._take, self._probe = Head(module, module.forward), take, probe
        own["forward"] = MethodType(self._uncompiled, self)
        try:
            return forward()
        finally:
            del own["forward"]
            if saved is not None:
                own["forward"] = saved
            self._head = self._take = None

    def _forward(self, hidden_states: Tensor) -> Tensor:
        assert self._head is not None
        assert self._take is not None
        self._take(hidden_states, self._head)
        if self._probe:
            with torch.no_grad():
                logits = self._head.forward(probed(hidden_states))
        else:
            logits = torch.zeros_like(hidden_states[..., :1])
        return logits.requires_grad_() if partitioned(self._head.module) else logits


def is_linear(head: nn.Module) -> bool:
    """It is a weight and perhaps a bias and nothing else: no adapter, not quantised."""
    return type(head).forward is nn.Linear.forward and type(head.weight) in (Tensor, nn.Parameter)


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
