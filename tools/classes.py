"""Every class of transformers that is a language model, in tiny form: is it trained as its own loss would train it?

    python tools/classes.py [CLASS ...]

Builds each class of three mappings (causal language models, image and text to text, other multimodal language models)
with small sizes, random weights, and scales and caps away from their defaults. The objective `cross_entropy` is
compared with the loss of the class, values and gradients, in float64 on padded text without images or sound: on the
first batch, and on another one after the head has grown a hundredfold. Each class has a process and a time limit.
Writes docs/compatibility/classes.json and classes.md and a sentence of docs/compatibility.md; of CLASS, or of all.
"""

import json
import math
import os
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 120
ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "compatibility" / "classes.json"
PAGE = ROOT / "docs" / "compatibility.md"
START, END = "<!-- classes: written by tools/classes.py -->", "<!-- end of classes -->"

SIZES = {
    64: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size embedding_dim hidden_dim word_embed_proj_dim"
    " decoder_hidden_size mamba_d_ssm lru_width",
    96: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim d_inner moe_intermediate_size"
    " shared_expert_intermediate_size ffn_hidden_size dim_feedforward shared_intermediate_size mlp_hidden_size"
    " moe_shared_expert_intermediate_size",
    128: "max_position_embeddings n_positions max_seq_len max_seq_length",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers depth top_k"
    " num_decoder_layers num_experts_per_tok moe_topk moe_k num_blocks num_experts_per_token",
    4: "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads num_local_experts"
    " num_key_value_heads n_kv_heads num_kv_heads num_experts n_routed_experts moe_num_experts heads mamba_n_heads"
    " linear_num_key_heads linear_num_value_heads",
    1: "n_group topk_group",
    8: "mamba_d_state linear_key_head_dim linear_value_head_dim mamba_chunk_size q_lora_rank kv_lora_rank",
    16: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels attention_head_dim d_kv rotary_dim d_head",
    32: "mamba_d_head",
    97: "vocab_size decoder_vocab_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
EVEN_IF_NONE = (
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
)  # what the class cannot do without
# What a class does to logits, or adds to its loss, so strong that it cannot be overlooked.
STRONG = {
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 1.5),
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"), 0.3),
    **dict.fromkeys(("router_aux_loss_coef", "aux_loss_coef", "z_loss_coefficient"), 0.1),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PLANES = {**ROPE, "mrope_section": [2, 3, 3]}
WHOLE = {**PLANES, "partial_rotary_factor": 1.0}
# By the type of a config: what its class wants beside or instead of the above.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [96, 96]},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_hidden_layers": 4,
        "intermediate_size": [96] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "glm4v_moe_text": {"rope_parameters": WHOLE},
    "glm4v_text": {"rope_parameters": WHOLE},
    "glm_ocr_text": {"rope_parameters": WHOLE},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "mistral4": {"rope_parameters": ROPE},
    "modernbert-decoder": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "paddleocr_vl_text": {"rope_parameters": PLANES},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 91},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 91},
    "qwen2_5_omni_text": {"rope_parameters": PLANES},
    "qwen2_5_vl_text": {"rope_parameters": PLANES},
    "qwen2_vl_text": {"rope_parameters": PLANES},
    "qwen4_exp_text": {"layer_types": ["linear_attention"] * 2, "ngram_vocab_size_base": 97, "split_ngram_parts": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hash_seed": 0},
    "step3p5": {"sliding_window": 8, "num_sliding_attention_heads": 4, "share_expert_dim": 96},
    "xglm": {"scale_embedding": False},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 32, "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
PRIVATE = ("_name_or_path", "output_attentions", "per_layer_config", "transformers_version", "id2label", "label2id")


def small(config: dict[str, Any]) -> dict[str, Any]:
    """A config as a dictionary, and all that it holds, with small sizes."""
    layers = {config.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers", "depth")} - {None}
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if name in PRIVATE:
            continue
        if isinstance(value, dict):
            value = small(value)
        elif name in SMALL and (isinstance(value, int) or name in EVEN_IF_NONE):
            value = SMALL[name]
        elif name in STRONG:
            value = STRONG[name]
        elif name == "use_cache":  # as trainers have it
            value = False
        elif name == "mrope_section":
            value = PLANES[name]
        elif isinstance(value, list) and len(value) in layers:  # something for each layer
            value = [value[0], value[-1]]
        elif isinstance(value, float) and any(part in name for part in ("dropout", "pdrop", "layerdrop", "drop_path")):
            value = 0.0
        elif str(name).endswith(("token_id", "token_index")) and isinstance(value, int) and value > 90:
            value = 90 + sum(map(ord, name)) % 7
        changed[name] = value
    return changed | MORE.get(config.get("model_type", ""), {})


def mappings() -> dict[str, str]:
    """The type of a config for every class."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        for config, classes in mapping.items():
            for name in classes if isinstance(classes, (tuple, list)) else [classes]:
                found.setdefault(name, config)
    return found


def tiny(name: str, config_type: str) -> Any:
    """A model of a class with random weights, in float64."""
    import torch
    import transformers

    cls = getattr(transformers, name)
    config_class = cls.config_class or transformers.CONFIG_MAPPING[config_type]
    config = config_class.from_dict(small(config_class().to_dict()))
    torch.manual_seed(0)
    model = cls(config).double().train()
    if hasattr(model, "set_experts_implementation"):  # the fast one has no float64
        model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def batch(seed: int) -> dict[str, Any]:
    """Two rows with a prompt, the second one padded on the right."""
    import torch

    ids = torch.randint(8, 80, (2, 16), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, seed: int) -> tuple[float, dict[str, Any], Any]:
    import torch

    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(**batch(seed))
    outputs.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(outputs.loss), grads, outputs


def grow(model: Any) -> None:
    """Make the logits large, so that caps cut."""
    import torch

    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in head.parameters() if head is not None else ():
            parameter *= 100


def off(ours: tuple[float, dict[str, Any], Any], own: tuple[float, dict[str, Any], Any]) -> float:
    """The greatest relative difference of two steps; most classes compute their loss in float32."""
    value = abs(ours[0] - own[0]) / max(abs(own[0]), 1e-6)
    size = sum(float(grad.norm()) ** 2 for grad in own[1].values()) ** 0.5
    zero = {name: grad.new_zeros(()) for name, grad in {**own[1], **ours[1]}.items()}
    differences = [float((ours[1].get(n, z) - own[1].get(n, z)).norm()) for n, z in zero.items()]
    return max(value, sum(d**2 for d in differences) ** 0.5 / max(size, 1e-30))


def examined(name: str, config_type: str) -> tuple[str, str]:
    """What becomes of a class, and why."""
    import copy

    import torch

    from axolotl_cvloss import Objective, install

    try:
        model = tiny(name, config_type)
    except Exception as error:
        return "not built", first_line(error)
    ours = copy.deepcopy(model)
    try:
        try:
            own = step(model, 1)
            overflows = math.isnan(own[0])
        except RuntimeError as error:
            overflows = "overflow" in str(error)
            if not overflows:
                raise
        if overflows:  # the mask of the class, in float64
            own = step(model.float(), 1)
            ours.float()
    except Exception as error:
        if getattr(model.config, "is_encoder_decoder", False):
            own = None
        else:
            return "fails by itself", first_line(error)
    try:
        install(ours, Objective.from_config({"cross_entropy": 1.0}))
        first = step(ours, 1)
        result = "fused" if first[2].logits is None else "full logits"
        assert own is not None
        differences = [off(first, own)]
        for one in (model, ours):
            grow(one)
        differences.append(off(step(ours, 2), step(model, 2)))
    except Exception as error:
        return ("refused" if "cv_loss" in str(error) else "error"), first_line(error)
    largest = max(differences)
    # 2,048 roundings in float32; another loss is off by a thousand times that.
    return ("another loss" if not largest <= 2048 * torch.finfo(torch.float32).eps else result), f"{largest:.0e}"


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    _, refused, why = str(error).partition("cannot be trained: ")
    text = why.split(". An objective")[0] if refused else f"{type(error).__name__}: {error}"
    return text.replace("\n", " ")[:200]


def in_a_process(name: str, config_type: str) -> dict[str, str]:
    """What becomes of a class, in a copy of this process."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        signal.alarm(SECONDS)
        try:
            result, why = examined(name, config_type)
        except Exception as error:
            result, why = "error", first_line(error)
        os.write(write, json.dumps({"result": result, "why": why}).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(process, 0)
    return json.loads(said) if said else {"result": "not built", "why": f"not done in {SECONDS} seconds"}


MEANINGS = {
    "fused": "exact, and logits never exist in full",
    "full logits": "exact; the logits are kept, with a warning that says why",
    "refused": "an error that names the class: its own loss is not the cross-entropy of each next token",
    "another loss": "trained with another loss than its own, without a word",
    "error": "an error of another kind",
    "fails by itself": "its own loss fails on text alone (images are demanded), or at these sizes",
    "not built": "no model of these sizes",
}

SAID = {
    "full logits": "exact with full logits",
    "refused": "refused, as their own loss is another one",
    "another loss": "trained with another loss",
    "error": "end in an error",
    "fails by itself": "fail by themselves without images or at these sizes",
    "not built": "were not built",
}


def page(record: dict[str, Any]) -> str:
    found: dict[str, list[str]] = {result: [] for result in MEANINGS}
    for name, entry in record["classes"].items():
        found[entry["result"]].append(name)
    rows = [f"| {result} | {len(names)} | {MEANINGS[result]} |" for result, names in found.items()]
    lines = [
        "# Classes of models",
        "",
        "Written by `make test-classes`. Every class of transformers' mappings of causal language models,",
        "image-text-to-text models and other multimodal language models, as a tiny random model in float64, on padded",
        "text: is the objective `cross_entropy` the loss of the class, in value and gradient, on the first batch and",
        "after the head has grown?",
        "",
        f"transformers {record['versions']['transformers']}, torch {record['versions']['torch']}: "
        f"{len(record['classes'])} classes.",
        "",
        "| result | classes | |",
        "|---|---|---|",
        *rows,
        "",
    ]
    for result, names in found.items():
        if not names:
            continue
        lines += [f"## {result}", ""]
        if result == "fused":
            lines += [", ".join(sorted(names)), ""]
            continue
        reasons = [record["classes"][name]["why"].replace("|", "\\|") for name in sorted(names)]
        lines += ["| class | why |", "|---|---|"]
        lines += [f"| {name} | {why} |" for name, why in zip(sorted(names), reasons, strict=True)] + [""]
    return "\n".join(lines)


def sentence(record: dict[str, Any]) -> str:
    """What docs/compatibility.md says of all this."""
    counts = Counter(entry["result"] for entry in record["classes"].values())
    others = [f"{counts[result]} {what}" for result, what in SAID.items() if counts[result]]
    return (
        f"Of the {len(record['classes'])} classes of language models in transformers "
        f"{record['versions']['transformers']}, in tiny form and on text, {counts['fused']} are fused and exact, "
        f"{', '.join(others)} ([which, and why](compatibility/classes.md))."
    )


def with_sentence(text: str, record: dict[str, Any]) -> str:
    """The page with the sentence in its place."""
    before, rest = text.split(START)
    return f"{before}{START}\n{sentence(record)}\n{END}{rest.split(END)[1]}"


def main(chosen: list[str]) -> int:
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    examined("LlamaForCausalLM", "llama")  # all that is imported late is then there for every process
    transformers.logging.set_verbosity_error()
    classes = {}
    for name, config_type in mappings().items():
        if not chosen or name in chosen:
            classes[name] = in_a_process(name, config_type)
            print(f"{classes[name]['result']:16} {name}  {classes[name]['why']}", flush=True)
    print(dict(Counter(entry["result"] for entry in classes.values())))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    known = json.loads(RECORD.read_text())["classes"] if chosen else {}
    record = {"versions": versions, "classes": dict(sorted({**known, **classes}.items()))}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    RECORD.with_suffix(".md").write_text(page(record))
    PAGE.write_text(with_sentence(PAGE.read_text(), record))
    return int(any(entry["result"] in ("another loss", "error") for entry in classes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
