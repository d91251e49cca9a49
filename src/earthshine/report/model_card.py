"""A Hugging Face model card (README.md) from what is known about a model; unknown facts are left out."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from earthshine.report.content import Table, clean, fence, inline_markdown, markdown_element
from earthshine.report.scales import fixed, optimizer_name, short, whole
from earthshine.report.starts import effective, mid_run_changes, start_of

# An id of the Hub, "owner/name". A local folder appears in the text only.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

KEYS = (
    "name", "license", "base_model", "tags", "language", "architecture", "model", "parameters", "dtype", "lineage",
    "upcycling", "training", "data", "evaluation", "verification", "limitations",
)  # fmt: skip


def model_card(info: Mapping[str, Any]) -> str:
    """The text of README.md: YAML front matter, then what the model is and where it comes from.

    Every key of `info` is optional; a section without facts does not appear, and nothing is guessed.

    Args:
        info: any of
            name, license, language, dtype, architecture (the transformers class): texts;
            base_model: a Hub id, or the folder the weights came from;
            tags, limitations, lineage: lists of texts (lineage: from the origin to this model);
            model: an encoded ModelConfig; parameters: {"total", "active"};
            upcycling: the content of an upcycled folder's earthshine.json, or {"options": {...}};
            training: {"job": an encoded TrainJob, "steps", "tokens", "starts": the records of starts.jsonl};
            data: [{"path", "weight", "tokens", "license"}];
            evaluation: [{"name", "loss", "stderr", "bits_per_byte", "tokens"}];
            verification: results of `earthshine verify`.
            Other keys are shown as they are under "Further facts".
    """
    parts = [_front_matter(info), f"# {inline_markdown(str(info.get('name') or 'Model'))}", _introduction(info)]
    sections = (
        ("Model", _model(info)),
        ("Lineage", "\n".join(f"{i}. {inline_markdown(str(s))}" for i, s in enumerate(info.get("lineage") or (), 1))),
        ("Upcycling recipe", _upcycling(info.get("upcycling") or {})),
        ("Training", _training(info.get("training") or {})),
        ("Data", _data(info.get("data") or ())),
        ("Evaluation", _evaluation(info.get("evaluation") or ())),
        ("Verification", _verification(info.get("verification") or ())),
        ("Use", _use(info)),
        ("Limitations", _limitations(info)),
        ("Further facts", _further(info)),
    )
    parts += [f"## {title}\n\n{text}" for title, text in sections if text]
    return clean("\n\n".join(p for p in parts if p)) + "\n"


def _front_matter(info: Mapping[str, Any]) -> str:
    """YAML whose texts are JSON strings, which YAML reads as they are."""
    lines = []
    if info.get("license"):
        lines.append(f"license: {_yaml(info['license'])}")
    base = info.get("base_model")
    if base and _HUB_ID.fullmatch(str(base)):
        lines.append(f"base_model: {_yaml(base)}")
    if info.get("language"):
        lines.append(f"language: {_yaml(info['language'])}")
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    tags = ["earthshine"]
    if _get(info, "model", "moe", "num_experts"):
        tags.append("mixture-of-experts")
    if info.get("upcycling"):
        tags.append("upcycled")
    if _get(info, "training", "job", "optimizer", "algorithm") == "muon":
        tags.append("muon")
    lines += [f"- {_yaml(tag)}" for tag in dict.fromkeys([*tags, *(info.get("tags") or ())])]
    return "\n".join(["---", *lines, "---"])


def _yaml(value: Any) -> str:
    return json.dumps(clean(str(value)), ensure_ascii=False)


def _get(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _introduction(info: Mapping[str, Any]) -> str:
    moe = _get(info, "model", "moe") or {}
    kind = "A mixture-of-experts language model" if moe.get("num_experts") else "A language model"
    total, active = _get(info, "parameters", "total"), _get(info, "parameters", "active")
    if total:
        kind += f" of {whole(total)} parameters"
        if active and active != total:
            kind += f", {whole(active)} of them active per token"
    if info.get("upcycling"):
        kind += ", upcycled from a dense model"
    if info.get("base_model"):
        kind += f"; {'continued from' if info.get('training') else 'its weights come from'} `{info['base_model']}`"
    return inline_markdown(f"{kind}. Made with Earthshine.")


def _facts(rows: Sequence[tuple[str, Any]]) -> str:
    """A table of the facts that are known."""
    facts = tuple((name, str(value)) for name, value in rows if value not in (None, "", []))
    return markdown_element(Table("", ("Fact", "Value"), facts)) if facts else ""


def _model(info: Mapping[str, Any]) -> str:
    model, moe = info.get("model") or {}, _get(info, "model", "moe") or {}
    experts = None
    if moe.get("num_experts"):
        layers = len(moe.get("layers") or ())
        experts = (
            f"{moe['num_experts']}, top-{moe.get('top_k')}, in {layers} of {model.get('num_hidden_layers')} layers"
        )
    return _facts(
        (
            ("Architecture", info.get("architecture")),
            ("Parameters", _whole(_get(info, "parameters", "total"))),
            ("Active per token", _whole(_get(info, "parameters", "active"))),
            ("Layers", model.get("num_hidden_layers")),
            ("Hidden size", model.get("hidden_size")),
            ("Experts", experts),
            ("Vocabulary", _whole(model.get("vocab_size"))),
            ("Context length", _whole(model.get("max_position_embeddings"))),
            ("Weights dtype", info.get("dtype")),
        )
    )


def _whole(value: Any) -> str | None:
    return None if value is None else whole(value)


def _upcycling(recipe: Mapping[str, Any]) -> str:
    options = recipe.get("options") or {}
    if not options:
        return ""
    text = (
        "Every expert starts as a copy of its layer's dense feed-forward network; attention, norms and embeddings are "
        "copied; the router is initialized at random. The gate takes a softmax over the chosen experts' logits, so the "
        "weights sum to one, and the MoE computes the dense model's function until training makes the experts differ "
        "(sparse upcycling: arXiv:2212.05055, arXiv:2412.09952)."
    )
    layers = options.get("layers")
    rows = (
        ("Experts", options.get("experts")),
        ("Experts per token", options.get("top_k")),
        ("Layers converted", "all" if layers in ([], ()) else layers and ", ".join(map(str, layers))),
        ("Router standard deviation", options.get("router_std")),
        ("Seed", options.get("seed")),
        ("Parameters before", _whole(_get(recipe, "source", "parameters", "total"))),
    )
    return f"{text}\n\n{_facts(rows)}"


def _training(training: Mapping[str, Any]) -> str:
    job = training.get("job") or {}
    optimizer, schedule = job.get("optimizer") or {}, job.get("schedule") or {}
    batch = None
    if "sequences_per_step" in job and "seq_len" in job:
        batch = f"{whole(job['sequences_per_step'])} sequences of {whole(job['seq_len'])} tokens"
    return _facts(
        (
            ("Steps", _whole(training.get("steps"))),
            ("Tokens", _whole(training.get("tokens"))),
            ("Batch", batch),
            ("Optimizer", optimizer_name(optimizer) if optimizer else None),
            ("Peak learning rate", short(optimizer["lr"]) if "lr" in optimizer else None),
            ("Weight decay", optimizer.get("weight_decay")),
            ("QK-Clip threshold", optimizer.get("qk_clip_threshold") or None),
            ("Schedule", schedule.get("kind")),
            ("Seed", job.get("seed")),
            ("Changed mid-run", _changed(training)),
        )
    )


def _changed(training: Mapping[str, Any]) -> str:
    """What changed when the run resumed: the rows above are those of its last steps."""
    done = training.get("steps")
    starts = effective(start_of(record) for record in training.get("starts") or ())
    return mid_run_changes([s for s in starts if done is None or s.first_step <= done])


def _data(sources: Sequence[Mapping[str, Any]]) -> str:
    columns = (("Source", "path"), ("Weight", "weight"), ("Tokens", "tokens"), ("License", "license"))
    return _table(columns, sources)


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the columns for which any row has a value."""
    used = [(title, key) for title, key in columns if any(row.get(key) not in (None, "") for row in rows)]
    if not used:
        return ""
    cells = tuple(tuple(_cell(row.get(key)) for _, key in used) for row in rows)
    return markdown_element(Table("", tuple(title for title, _ in used), cells))


def _cell(value: Any) -> str:
    match value:
        case None:
            return "\u2014"
        case bool() | str():
            return str(value)
        case int():
            return whole(value)
        case float():
            return short(value)
    return json.dumps(value, ensure_ascii=False)


def _evaluation(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        {
            "name": r.get("name", "held-out text"),
            "loss": fixed(r["loss"]) + (f" \u00b1 {fixed(r['stderr'])}" if r.get("stderr") is not None else ""),
            "bits_per_byte": fixed(r["bits_per_byte"]) + (" (lossy: unknown tokens)" if r.get("lost") else "")
            if r.get("bits_per_byte") is not None
            else None,
            "tokens": r.get("tokens"),
        }
        for r in results
        if isinstance(r.get("loss"), int | float)
    ]
    columns = (
        ("Evaluation", "name"),
        ("Loss, nats per token", "loss"),
        ("Bits per byte", "bits_per_byte"),
        ("Tokens", "tokens"),
    )
    table = _table(columns, rows)
    return f"{table}\n\n\u00b1 is one standard error over the sequences." if "\u00b1" in table else table


def _verification(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        {"check": f"{result.get('check')}: {row.get('name')}", "measured": row.get("measured"),
         "tolerance": row.get("tolerance"), "result": "pass" if row.get("ok") else "FAIL"}
        for result in results
        for row in result.get("rows") or ()
    ]  # fmt: skip
    columns = (("Check", "check"), ("Measured", "measured"), ("Tolerance", "tolerance"), ("Result", "result"))
    return _table(columns, rows)


def _use(info: Mapping[str, Any]) -> str:
    if not info.get("architecture"):
        return ""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        'inputs = tokenizer("The Moon", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"
    )
    return "From this directory:\n\n" + fence(code, "python")


def _limitations(info: Mapping[str, Any]) -> str:
    """The limitations given, and those that follow from the facts."""
    items = [str(item) for item in info.get("limitations") or ()]
    if info.get("base_model"):
        items.append(f"It inherits what `{info['base_model']}` has learned, including its errors and biases.")
    if info.get("evaluation"):
        items.append("Only the evaluations above were run; other abilities, and safety, were not evaluated.")
    if info.get("upcycling") and not info.get("training"):
        items.append("It has not been trained since upcycling: it still computes the dense model's function.")
    return "\n".join(f"- {inline_markdown(item)}" for item in items)


def _further(info: Mapping[str, Any]) -> str:
    lines = []
    for key, value in info.items():
        if key not in KEYS and value not in (None, "", [], {}):
            lines.append((key, _cell(value)))
    return _facts(lines)
