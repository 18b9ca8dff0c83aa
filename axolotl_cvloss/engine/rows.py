"""Which rows count: the causal shift, scopes, documents and masks. Nothing else in the package masks or shifts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORE_INDEX = -100
REFERENCE = "reference_logp"  # a statistic that comes with a batch


class Filter(Protocol):
    """Which rows of a scope a term looks at. Hashable."""

    def __call__(self, targets: Tensor, input_ids: Tensor | None, documents: Tensor) -> Tensor:
        """(B, T) bool, from the token that each row predicts, the tokens of the input, and their documents."""


@dataclass(frozen=True)
class Selector:
    """Which rows a term looks at: those of a scope that all filters keep, and a column of 0 and 1 where one is named.

    The scope ``completion`` has the rows whose label is not -100; ``sequence`` has in addition every row whose next
    token is not padding, with that token of ``input_ids`` as its label. A row never predicts the first token of another
    document.
    """

    scope: str = "completion"
    filters: tuple[Filter, ...] = ()
    where: str | None = None

    def only(self, kept: Filter) -> "Selector":
        """With one more filter."""
        return replace(self, filters=(*self.filters, kept))


COMPLETION, SEQUENCE = Selector("completion"), Selector("sequence")


@dataclass
class Rows:
    """The rows that some term of an objective looks at, in the order of the batch.

    index: (N,) position of each row among the B * T rows of logits.
    labels: (N,) its target.
    documents: (N,) number of its document; not decreasing.
    scopes: for each selector, (N,) bool, whether the row belongs to it.
    weights: for each selector, (N,) what the values of a row are multiplied by; empty: all alike.
    masses: for each selector, what the sum over its rows is divided by: n^(1 - power) of each document with n of them,
        summed. That is the number of rows where the power is 0.
    given: by the name of a statistic, (N,) numbers of each row's target that came with the batch.
    aligned: (B, T) all labels, in line with the rows of logits, as the paper's code has them.
    shifted: whether that took a shift.
    """

    index: Tensor
    labels: Tensor
    documents: Tensor
    scopes: dict[Selector, Tensor]
    weights: dict[Selector, Tensor]
    masses: dict[Selector, float]
    given: dict[str, Tensor]
    aligned: Tensor
    shifted: bool

    def first(self, count: int) -> "Rows":
        """At most so many rows: the first documents, or the beginning of a longer one."""
        if count < len(self.labels):
            whole = int((self.documents < self.documents[count]).sum())
            count = whole or count
        return replace(
            self,
            index=self.index[:count],
            labels=self.labels[:count],
            documents=self.documents[:count],
            scopes={selector: mask[:count] for selector, mask in self.scopes.items()},
            weights={selector: weights[:count] for selector, weights in self.weights.items()},
            given={name: values[:count] for name, values in self.given.items()},
        )

    @property
    def tokens(self) -> Tensor:
        """(N,) position of the token that each row predicts among the B * T tokens."""
        return self.index + 1 if self.shifted else self.index

    def of_documents(self, selector: Selector = COMPLETION) -> tuple[Tensor, Tensor, Tensor]:
        """The places (M,) of a selector's rows, the number 0 to D - 1 of the document of each, and its rows, (D,)."""
        members = self.scopes[selector].nonzero().squeeze(1)
        found = torch.unique_consecutive(self.documents[members], return_inverse=True, return_counts=True)
        return members, *found[1:]

    def weighed(self, weights: Tensor) -> "Rows":
        """With the values of each document's rows multiplied; (D,), one a document with trained rows."""
        members, number, sizes = self.of_documents()
        if weights.shape != sizes.shape:
            raise ValueError(
                f"document_weights: of shape {tuple(weights.shape)}; expected {tuple(sizes.shape)}, one a document "
                "with trained rows"
            )
        by_document = torch.ones(int(self.documents[-1]) + 1 if len(self.documents) else 0, dtype=weights.dtype)
        by_document[self.documents[members]] = weights[number]
        each = by_document[self.documents]
        found = {selector: each * self.weights.get(selector, 1.0) for selector in self.scopes}
        return replace(self, weights=found)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Rows":
        """On a device, with weights of that dtype."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(each) for name, each in value.items()}
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

        return Rows(**{each.name: moved(getattr(self, each.name)) for each in fields(self)})


def in_main_memory(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    """The tensors of a batch (whole numbers, or weights) in main memory, fetched from a device all at once."""
    away = {name: x for name, x in tensors.items() if x is not None and x.device.type != "cpu"}
    if away:
        # Whole numbers below 2^53 are the same in float64, but not every device has it: weights travel as their bits.
        words = [x.float().view(torch.int32).long() if x.is_floating_point() else x.long() for x in away.values()]
        fetched = torch.cat([x.flatten() for x in words]).cpu().split([x.numel() for x in words])
        for (name, x), part in zip(away.items(), fetched, strict=True):
            part = part.int().view(torch.float32) if x.is_floating_point() else part
            tensors[name] = part.view(x.shape)
    return tensors


def select_rows(
    labels: Tensor,
    *,
    shift: bool = True,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    selectors: Sequence[Selector] = (COMPLETION,),
    example_weights: Tensor | None = None,
    reference_logps: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    power: float = 0.0,
) -> Rows:
    """The rows of a batch that some selectors name, in main memory.

    Args:
        labels: (B, T) or (N,), int64; -100 is ignored.
        shift: Row t predicts label t + 1; otherwise labels are aligned with the rows already.
        position_ids: (B, T), or (P, B, T); a document begins where they do not increase in any of the P planes.
        attention_mask: (B, T); 0 is padding, and at its edges labels alone decide. With position_ids so is a last
            document without labels that repeats one token. Where documents are numbered 1, 2, ... in it, these are
            used too.
        input_ids: (B, T), what the model was given (never shifted), for the scope ``sequence`` and for filters.
        example_weights: (B,), one an example, or one a token in the shape of the labels.
        reference_logps: In the shape of the labels, log p of each of these tokens under a reference model.
        columns: Those that selectors name, by name; (B,), one an example, or one a token in the shape of the labels.
        power: Each row weighs n^-power, where its document has n rows of the selector.
    """
    acting = dict.fromkeys(s.where for s in selectors if s.where is not None)
    if missing := [name for name in acting if name not in (columns or {})]:
        raise ValueError(
            f"cv_loss.where: the batch has no column {missing[0]}; give it in columns beside the labels: one number an "
            "example, or one a token, 0 or 1"
        )
    given = in_main_memory(
        labels=labels,
        position_ids=position_ids,
        attention_mask=attention_mask,
        input_ids=input_ids if any(s.scope == "sequence" or s.filters for s in selectors) else None,
        example_weights=example_weights,
        reference_logps=reference_logps,
        **{f"where: {name}": columns[name] for name in acting if columns},
    )
    labels = torch.atleast_2d(given.pop("labels")).long()
    position_ids, attention_mask, input_ids = (given.pop(n) for n in ("position_ids", "attention_mask", "input_ids"))
    numbers = {name: _of_rows(name, values, labels, shift) for name, values in given.items() if values is not None}
    weights, logps = numbers.get("example_weights"), numbers.get("reference_logps")
    if attention_mask is not None:
        attention_mask = torch.atleast_2d(attention_mask)
    documents = _documents(labels, position_ids, attention_mask)
    within = torch.zeros_like(labels, dtype=torch.bool)  # the next token is of the same document
    within[:, :-1] = documents[:, 1:] == documents[:, :-1]
    targets = labels.roll(-1, dims=1) if shift else labels
    completion, of_rows = targets != IGNORE_INDEX, documents
    if shift:
        # At an edge of padding labels alone decide, as they do in models' own losses; such a row is of the document of
        # the one of its two tokens that is not padding.
        padding = _padding(labels, attention_mask)
        edge = padding != padding.roll(-1, dims=1)
        edge[:, -1:] = False
        completion &= within | edge
        of_rows = torch.where(edge & padding, documents.roll(-1, dims=1), documents)
    sequence = completion
    if any(selector.scope == "sequence" for selector in selectors):
        if input_ids is None:
            raise ValueError("cv_loss: scope: sequence needs input_ids beside the labels")
        tokens = _not_padding(labels, input_ids.view_as(labels), documents, position_ids, attention_mask)
        sequence = completion | (tokens.roll(-1, dims=1) & within)
        targets = torch.where(completion, targets, input_ids.view_as(labels).roll(-1, dims=1))
    index = sequence.flatten().nonzero().squeeze(1)
    masks = {COMPLETION: completion, SEQUENCE: sequence}
    for selector in selectors:
        mask = masks[Selector(selector.scope)]
        if selector.where is not None:
            mask = mask & _acts(selector.where, numbers[f"where: {selector.where}"])
        for kept in selector.filters:
            mask = mask & kept(targets, input_ids, documents)
        masks[selector] = mask
    rows = Rows(
        index=index,
        labels=targets.flatten()[index],
        documents=of_rows.flatten()[index],
        scopes={selector: masks[selector].flatten()[index] for selector in selectors},
        weights={},
        masses={},
        given={} if logps is None else {REFERENCE: logps.flatten()[index]},
        aligned=aligned_labels(labels, shift),
        shifted=shift,
    )
    _weigh(rows, None if weights is None else weights.flatten()[index], power)
    return rows


def _weigh(rows: Rows, column: Tensor | None, power: float) -> None:
    """Put down weights and masses; ``column`` (N,) has the weights that were given."""
    for selector, scope in rows.scopes.items():
        if column is not None:
            rows.weights[selector] = column
        rows.masses[selector] = float(scope.sum())
        if power:
            members, number, sizes = rows.of_documents(selector)
            each = sizes.double() ** -power
            own = torch.ones(len(scope), dtype=torch.float64).index_copy_(0, members, each[number])
            rows.weights[selector] = own if column is None else own * column
            rows.masses[selector] = float((sizes * each).sum())


def _of_rows(name: str, numbers: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """(B, T), for each row the number of the token that it predicts, or of its example."""
    if numbers.dim() == 1 and labels.shape == (1, len(numbers)):
        numbers = numbers[None]  # one a token, of labels that are (T,) as well
    if numbers.shape == labels.shape:
        return numbers.roll(-1, dims=1) if shift else numbers
    of_examples = numbers.numel() == labels.shape[0] or numbers.numel() == labels.shape[1] == labels.numel()
    if name != "reference_logps" and of_examples:
        return numbers.reshape(labels.shape[0], -1).expand_as(labels)
    example = "" if name == "reference_logps" else f"({labels.shape[0]},), one an example, or "
    raise ValueError(
        f"cv_loss.{name}: of shape {tuple(numbers.shape)}; expected {example}{tuple(labels.shape)}, one a token, as "
        "packed examples need"
    )


def _acts(name: str, numbers: Tensor) -> Tensor:
    """Where a column of 0 and 1 says that a term acts."""
    if (wrong := numbers[(numbers != 0) & (numbers != 1)]).numel():
        raise ValueError(
            f"cv_loss.where: {name} has {float(wrong[0]):g}; it says on which rows a term acts, so allowed are 0 and 1"
        )
    return numbers == 1


@dataclass(frozen=True)
class Goldfish:
    """Leaves one token in ``k`` out, so that a text is not learnt by heart: always the same ones after the same text.

    A token is left out where a hash of the ``h`` tokens before it is below 1 / k. The first ``h`` tokens of a document
    stay. The hash is ours; it is the same on every machine and in every run.

    Source: Hans et al. 2024, Be like a Goldfish, Don't Memorize!, arXiv:2406.10209
    """

    k: int
    h: int

    def __call__(self, targets: Tensor, input_ids: Tensor | None, documents: Tensor) -> Tensor:
        if input_ids is None:
            raise ValueError("cv_loss: goldfish needs input_ids beside the labels")
        keep = torch.ones_like(targets, dtype=torch.bool)
        if targets.shape[1] < self.h:
            return keep
        # A row t that has the tokens t - h + 1 to t in its own document; the token it predicts is t + 1.
        context = input_ids.view_as(targets).long().unfold(1, self.h, 1)
        whole = documents.unfold(1, self.h, 1)
        whole = whole[..., 0] == whole[..., -1]
        value = torch.zeros_like(context[..., 0])
        for token in context.unbind(-1):
            value = (value * 31 + token + 1) % MODULUS
        for factor in (48271, 69621, 16807):  # spread what is near; each product stays within int64
            value = (value * factor + 11) % MODULUS
        keep[:, self.h - 1 :] = ~(whole & (value < MODULUS // self.k))
        return keep


MODULUS = 2**31 - 1  # a prime


def aligned_labels(labels: Tensor, shift: bool) -> Tensor:
    """Labels (B, T) in line with the rows of logits, as the paper's code has them."""
    labels = torch.atleast_2d(labels).long()
    if not shift:
        return labels
    aligned = labels.roll(-1, dims=1)
    aligned[:, -1:] = IGNORE_INDEX
    return aligned


def _documents(labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """The number of each token's document, (B, T), rising through the batch."""
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, :1] = True
    if position_ids is not None:
        # Multimodal models have planes for time, height and width; within an image only some of them increase.
        planes = position_ids if position_ids.dim() == 3 else torch.atleast_2d(position_ids)[None]
        planes = planes.expand(-1, *labels.shape)
        starts[:, 1:] |= (planes[:, :, 1:] <= planes[:, :, :-1]).all(0)
    if attention_mask is not None and attention_mask.shape == labels.shape:
        starts[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    return starts.flatten().cumsum(0).view_as(labels) - 1


def _padding(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T) bool, what a mask calls padding."""
    if attention_mask is None or attention_mask.shape != labels.shape:
        return torch.zeros_like(labels, dtype=torch.bool)
    return attention_mask == 0


def _not_padding(
    labels: Tensor,
    input_ids: Tensor,
    documents: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> Tensor:
    if attention_mask is not None:
        if attention_mask.shape != labels.shape:
            raise ValueError(
                f"cv_loss: scope: sequence needs an attention_mask of shape {tuple(labels.shape)}, "
                f"not {tuple(attention_mask.shape)}"
            )
        real = attention_mask > 0
        if position_ids is None:
            return real
        # Axolotl packs streamed texts without a mask, and what collates the filled lines gives them one of ones alone.
        # There the padding is a last document without labels that repeats one token.
        last = documents == documents[:, -1:]
        repeats = ((input_ids == input_ids[:, -1:]) & (labels == IGNORE_INDEX)) | ~last
        return real & ~(last & repeats.all(1, keepdim=True))
    if position_ids is None:
        return torch.ones_like(labels, dtype=torch.bool)
    # Packed without a mask: the padding is a document of its own, and nothing in it is labelled. Nothing else tells it
    # from a document without labels, and where that stands in a row must not matter.
    labelled = torch.zeros(documents.numel(), dtype=torch.bool, device=labels.device)
    labelled[documents[labels != IGNORE_INDEX]] = True
    return labelled[documents]
