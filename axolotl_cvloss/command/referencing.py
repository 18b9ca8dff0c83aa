"""The log-probabilities of a reference model as a column of the dataset: those of the model before it trains.

    python -m axolotl_cvloss.command.referencing axolotl|trl CONFIG.yaml OUT

The host makes model and data of the config, as for a training without packing; nothing is trained. OUT gets the
examples as tokens with the column, and the config that trains on them. It runs in a process of its own, as a host
changes much of the process that it is loaded into.
"""

import argparse
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..engine.rows import IGNORE_INDEX
from ..hosts.transformers import ObjectiveTrainer
from ..model.adapters import adapters_off, begins_elsewhere
from ..objective.config import KEY, CVLossConfig
from ..objective.objective import Objective
from .checking import REFERENCES, with_references
from .probing import of_axolotl, of_trl

CONFIG = "config.yaml"
SHARD = 512  # examples between two files that a killed run goes on from
# What a host has tokenized, beside columns that the key names.
TOKENIZED = ("input_ids", "attention_mask", "labels", "completion_mask", "assistant_masks")


# The config to prepare data with, and the one to train with


def preparing(data: Mapping[str, Any], host: str) -> dict[str, Any]:
    """The config with all that its data need, unpacked and in one process, and an objective that needs no reference."""
    named = CVLossConfig.parse(data[KEY])
    acting = [{"loss": "cross_entropy", "where": term.where} for term in named.terms if term.where]
    weights = {} if named.example_weights is None else {"example_weights": named.example_weights}
    key = {"terms": [{"loss": "cross_entropy"}, *acting], **weights}
    if host == "axolotl":
        without = {"fsdp", "fsdp_config", "fsdp_version", "deepspeed", "eval_sample_packing"}
        changes: dict[str, Any] = {"sample_packing": False, "pad_to_sequence_len": False, "torch_compile": False}
    else:
        without = {"fsdp", "fsdp_config", "deepspeed", "eval_packing"}
        changes = {"packing": False, "padding_free": False, "torch_compile": False}
        # Packing that splits long texts needs them whole.
        if data.get("packing") and data.get("packing_strategy", "bfd") in ("wrapped", "bfd_split"):
            changes["max_length"] = None
    return {**{name: value for name, value in data.items() if name not in without}, **changes, KEY: key}


def training(data: Mapping[str, Any], host: str, files: Mapping[str, Path], columns: Sequence[str]) -> dict[str, Any]:
    """The config that trains on the files, by split, which have these columns."""
    changes: dict[str, Any] = {KEY: with_references(data[KEY])}
    if host == "axolotl":
        without = {"val_set_size", "test_datasets"}
        names = {"train": "datasets", "test": "test_datasets"}
        for split, path in files.items():
            changes[names[split]] = [{"path": str(path), "ds_type": "parquet", "split": "train", "type": None}]
    else:
        without = {"datasets", "dataset_config", "dataset_streaming", "assistant_only_loss", "completion_only_loss"}
        changes["dataset_name"] = str(files["train"].parent)
        changes |= {f"dataset_{split}_split": split for split in files}
        if "completion_mask" in columns:
            changes["completion_only_loss"] = True
    return {**{name: value for name, value in data.items() if name not in without}, **changes}


# The forward passes


def add_references(trainer: ObjectiveTrainer, out: Path, columns: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """Write the datasets of a trainer with the column; the file of each split, and the columns in them."""
    sets = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
    sets = {split: data for split, data in sets.items() if data is not None}
    for split, data in sets.items():
        if not hasattr(data, "__len__") or "input_ids" not in getattr(data, "column_names", ()):
            raise SystemExit(
                f"{KEY}: the {split} set is streamed, is several sets, or gets its tokens in the collator, as images "
                "do; a reference can be made for one tokenized dataset of known length"
            )
    installed = trainer.cv_loss
    if why := begins_elsewhere(installed.model):
        raise SystemExit(f"{KEY}: the base model is not at hand: {why}")
    kept = out / ".unfinished"
    files, found = {}, []
    with torch.no_grad(), trainer.compute_loss_context_manager():
        of_batch = partial(_logps, trainer, Objective.from_config("cross_entropy"))
        for split, data in sets.items():
            wanted = [name for name in (*TOKENIZED, *columns) if name in data.column_names]
            tokens = data.with_format("torch", columns=["input_ids"])["input_ids"]
            logps = _of_all(of_batch, tokens, trainer.args.per_device_eval_batch_size, kept / split, split)
            files[split], found = out / f"{split}.parquet", wanted
            data.with_format(None).select_columns(wanted).add_column(REFERENCES, logps).to_parquet(str(files[split]))
    shutil.rmtree(kept)
    return files, found


def _logps(trainer: ObjectiveTrainer, objective: Objective, tokens: Sequence[Tensor]) -> list[list[float]]:
    """For each example log p of each token given those before it, 0 for the first."""
    padding = getattr(trainer.processing_class, "pad_token_id", None) or 0
    mask = pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True)
    ids = pad_sequence(list(tokens), batch_first=True, padding_value=padding)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, IGNORE_INDEX)}
    rows = {name: x.to(trainer.args.device) for name, x in rows.items()}
    installed = trainer.cv_loss
    run = partial(
        installed.original, input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], return_dict=True
    )
    if installed._verdict is None:
        installed._judge(run, rows["labels"], rows["attention_mask"])
    with adapters_off(installed.model):
        found = installed.token_logps(run, objective, rows).float().cpu()
    return [line[: len(own)].tolist() for line, own in zip(found, tokens, strict=True)]


def _of_all(
    of_batch: Callable[[Sequence[Tensor]], list[list[float]]], tokens: Any, batch: int, folder: Path, split: str
) -> list[list[float]]:
    """Of all examples, in their order. What is done is kept in a folder, and not done again."""
    found = []
    with tqdm(total=len(tokens), desc=f"cv_loss: reference, {split}") as bar:
        for first in range(0, len(tokens), SHARD):
            own = [torch.as_tensor(ids) for ids in tokens[first : first + SHARD]]
            path = folder / f"{first}.pt"
            if not path.exists():
                # The longest first: where memory ends, it ends at once. Examples of like length share a batch.
                order = sorted(range(len(own)), key=lambda number: -len(own[number]))
                shard: list[Any] = [None] * len(own)
                for some in (order[at : at + batch] for at in range(0, len(order), batch)):
                    for number, values in zip(some, of_batch([own[number] for number in some]), strict=True):
                        shard[number] = values
                    bar.update(len(some))
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(shard, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            else:
                bar.update(len(own))
            found += torch.load(path)
    return found


def begin(out: Path, config: Path) -> None:
    """Make the folder, or go on in one that an earlier call with the same config has not finished.

    Raises:
        SystemExit: Something else is in it.
    """
    mark, same = out / ".unfinished" / "config", hashlib.sha256(config.read_bytes()).hexdigest()
    if mark.is_file() and mark.read_text() == same:
        return
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out}: is not empty, and not an unfinished reference of {config}; give another folder")
    mark.parent.mkdir(parents=True)
    mark.write_text(same)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("host", "config", "out"):
        parser.add_argument(name)
    args = parser.parse_args()
    config, out = Path(args.config), Path(args.out)
    begin(out, config)
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepare.yaml"
        prepared.write_text(yaml.safe_dump(preparing(data, args.host)))
        trainer = {"axolotl": of_axolotl, "trl": of_trl}[args.host](prepared, folder)
        files, columns = add_references(trainer, out, [*CVLossConfig.parse(data[KEY]).columns])
    changed = training(data, args.host, files, columns)
    (out / CONFIG).write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
