"""A run or a model as a Hugging Face directory that stands alone: weights, config, tokenizer, generation, card."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earthshine.checkpoint import run_store
from earthshine.checkpoint.accounting import check_tied_copies, log_unused, match_tensors
from earthshine.checkpoint.hf import read_blocks, read_config, require_space_for, tensors_of_state, write_model
from earthshine.checkpoint.name_tables import Entry, entries
from earthshine.checkpoint.run_rule import RunRule, run_rule
from earthshine.checkpoint.safetensors_store import Store, check_finite, check_fits
from earthshine.checkpoint.safetensors_writer import OutputTensor
from earthshine.checkpoint.tokenizer_class import keep_class, warn_of_ids_beyond
from earthshine.checkpoint.tokenizer_files import (
    GENERATION,
    TOKENIZER,
    check_token_ids,
    has_tokenizer,
    is_tokenizer_file,
    tokenizer_and_license_files,
)
from earthshine.config import encode, parse_object
from earthshine.console import log
from earthshine.errors import CheckpointError, ConfigError, nearest
from earthshine.model.config import ModelConfig
from earthshine.model.counts import count_parameters
from earthshine.model.hf_config import to_hf
from earthshine.model.hf_families import HF_CLASSES
from earthshine.model.serving import lacks_bias, serving_notes
from earthshine.run_folder import (
    CONFIG,
    EVAL,
    HELDOUT_AFTER,
    HELDOUT_BEFORE,
    METRICS,
    ORIGIN,
    STARTS,
    UPCYCLING,
    VERIFICATIONS,
    is_run,
    read_steps,
    run_of,
    start_lines,
)
from earthshine.staging import require_absent, staged_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CARD = "README.md"


def export(
    source: str | Path,
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: str = "float32",
    trust: bool = False,
) -> None:
    """Write a run's latest checkpoint, or a Hugging Face directory, as a Hugging Face directory.

    Args:
        tokenizer_dir: folder with the tokenizer, and the generation config if it has one; else those of `source`, or
            of the model that the run started from, from which licenses come in any case.
        dtype: of the stored weights, "float32" or "bfloat16"; a router's bias stays float32.
        trust: read a checkpoint that was not made on this machine.
    Raises ConfigError, OutputExistsError, WeightsError, CheckpointError, DiskFullError.
    """
    source, out_dir = Path(source), Path(out_dir)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} cannot be exported.{nearest(dtype, DTYPES)}")
    require_absent(out_dir)
    named = None if tokenizer_dir is None else tokenizer_and_license_files(tokenizer_dir)
    if named is not None and not has_tokenizer(named):
        raise ConfigError(
            f"{tokenizer_dir} holds no tokenizer file to copy; name the folder that its tokenizer.json is in."
        )
    read = _from_run if is_run(source) else _from_directory
    config, tensors, origin, facts = read(source, DTYPES[dtype], trust)
    config, tensors = _as_served(config, tensors, DTYPES[dtype])
    files = _files(origin, named)
    check_token_ids(files, config, (GENERATION in (named or {}) and tokenizer_dir) or origin or source)
    rule = run_rule(source) if is_run(source) else None
    if rule is not None:
        _check_tokenizer(rule, files, tokenizer_dir or origin or source)
        files = _ending_as_trained(rule, files)
    if not has_tokenizer(files):
        model_dir = origin or source
        reason = f"there is none beside {model_dir}" if model_dir.exists() else f"{model_dir} does not exist (any more)"
        log(f"{out_dir} gets no tokenizer: {reason}; name a folder that holds one (--tokenizer).")
    files = _keep_class(files, config, Path(tokenizer_dir) if tokenizer_dir is not None else origin)
    texts = _texts(config, files, _common_facts(config, out_dir, dtype) | facts)
    beside: dict[str, str | bytes] = {**files, **texts}
    if parse_object(beside[GENERATION], GENERATION).get("eos_token_id") in (None, []):
        log(
            f"warning: {out_dir} names no end token, so that generation ends only at its limit: write an eos_token_id "
            f"into its {GENERATION} and config.json."
        )
    require_space_for(out_dir, tensors)
    with staged_directory(out_dir) as staging:
        write_model(staging, config, tensors, beside)


def _check_tokenizer(rule: RunRule, files: Mapping[str, bytes], where: str | Path) -> None:
    """Raise ConfigError when a run would be exported with another tokenizer than its data was made with."""
    if TOKENIZER in files:
        fix = "Name the folder of the tokenizer that its data was prepared with (--tokenizer)."
        rule.require_tokenizer(hashlib.sha256(files[TOKENIZER]).hexdigest(), f"{Path(where) / TOKENIZER}", fix)
    elif has_tokenizer(files) and rule.tokenization is not None:
        log(
            f"{where} holds no {TOKENIZER}, which the data of {rule.path} was made with (sha256 "
            f"{rule.tokenization.tokenizer_sha256}): whether its tokenizer is the same cannot be compared."
        )


def _ending_as_trained(rule: RunRule, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, with the data's end-of-document token among the end tokens of their generation config."""
    if GENERATION not in files or rule.tokenization is None:
        return files
    generation = parse_object(files[GENERATION], GENERATION)
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if rule.tokenization.eod in ends:
        return files
    ends = [*ends, rule.tokenization.eod]
    generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return files | {GENERATION: (json.dumps(generation, indent=2) + "\n").encode()}


def _as_served(
    config: ModelConfig, tensors: list[OutputTensor], dtype: torch.dtype
) -> tuple[ModelConfig, list[OutputTensor]]:
    """The same function in the form that most serving programs read; what they do not read is logged.

    vLLM's Qwen2-MoE always has a bias on queries, keys and values: where there is none, zeros are written.
    """
    if lacks_bias(config):
        config, by_name = replace(config, qkv_bias=True), {t.name: t for t in tensors}
        log("q, k and v get a bias of zeros, which changes nothing: vLLM's Qwen2-MoE always has one.")
        tensors = [by_name.get(e.hf) or _zeros(e, dtype) for e in entries(config)]
    for note in serving_notes(config):
        log(f"serving: {note} (docs/serving.md).")
    return config, tensors


def _zeros(entry: Entry, dtype: torch.dtype) -> OutputTensor:
    return OutputTensor(entry.hf, dtype, entry.shape, lambda: [torch.zeros(entry.shape, dtype=dtype)])


def _files(origin: Path | None, named: dict[str, bytes] | None) -> dict[str, bytes]:
    """The files beside the model at `origin`; its tokenizer is replaced, whole, by that of a folder that was named.

    The generation config and the licenses stay where that folder has none.
    """
    files = tokenizer_and_license_files(origin)
    if named is None:
        return files
    return {name: text for name, text in files.items() if not is_tokenizer_file(name)} | named


def _keep_class(files: dict[str, bytes], config: ModelConfig, folder: Path | None) -> dict[str, bytes]:
    """The files, with the tokenizer class that reads them as in `folder`, where they come from; it is logged."""
    hf = _json(folder / "config.json") if folder is not None else {}
    named = hf.get("tokenizer_class")
    files, reading = keep_class(files, hf.get("model_type"), config.family, named if isinstance(named, str) else "")
    if reading is not None:
        log(reading.sentence + ".")
        warn_of_ids_beyond(files, config.vocab_size, folder)
    return files


Source = tuple[ModelConfig, list[OutputTensor], Path | None, dict[str, Any]]


def _from_directory(source: Path, dtype: torch.dtype, trust: bool) -> Source:
    """Config, weights, where the tokenizer is, and facts for the card. A directory's safetensors need no trust."""
    config, store = read_config(source), Store(source)
    match = match_tensors(store, config)
    check_tied_copies(store, match.unused)
    log_unused(source, match.unused)

    def rows_of(entry: Entry) -> Iterator[Tensor]:
        for _, part in read_blocks(store, entry, match.locations[entry.hf]):
            check_fits(entry.hf, part, entry.dtype(dtype))
            yield part.to(entry.dtype(dtype))

    tensors = [OutputTensor(e.hf, e.dtype(dtype), e.shape, partial(rows_of, e)) for e in match.entries]
    upcycling = _json(source / UPCYCLING)
    facts = {"upcycling": upcycling} if upcycling else {}
    return config, tensors, source, {"base_model": source.name, "lineage": [str(source.name)], **facts}


def _from_run(source: Path, dtype: torch.dtype, trust: bool) -> Source:
    """The same for a run's folder, or for one of its checkpoints."""
    checkpoint = run_store.latest(source, trust=trust)
    if checkpoint is None:
        raise CheckpointError(f"{source} holds no checkpoint to export.")
    config, state = run_store.load_model_state(checkpoint.folder, trust=trust)
    for name, tensor in state.items():
        check_finite(name, tensor)
    job, run_dir = checkpoint.job, checkpoint.folder.parent.parent
    origin = _origin(run_dir, job)
    lineage = [f"{origin.name}" if origin else "random initialization", f"trained for {checkpoint.step:,} steps"]
    facts: dict[str, Any] = {
        "training": {
            "job": job,
            "steps": checkpoint.step,
            "tokens": read_steps(run_dir / METRICS).get(checkpoint.step, {}).get("total_tokens"),
            "starts": [line.record for line in start_lines(run_dir / STARTS) if line.record],
        },
        "data": [dict(s) for s in job.get("data", {}).get("sources", [])],
        "lineage": lineage,
        "evaluation": [
            {"name": name.removesuffix(".json"), **result}
            for name in (HELDOUT_BEFORE, HELDOUT_AFTER)
            if (result := _json(run_dir / EVAL / name))
        ],
        "verification": [_json(p) for p in sorted((run_dir / EVAL).glob(VERIFICATIONS))],
    }
    if origin:
        upcycling = _json(origin / UPCYCLING)
        facts |= {"base_model": origin.name} | ({"upcycling": upcycling} if upcycling else {})
    return config, tensors_of_state(state, config, dtype), origin, facts


def _origin(run_dir: Path, job: dict[str, Any]) -> Path | None:
    """The Hugging Face directory that a run's weights began in, through the runs between; None for random ones.

    A relative path begins in the folder in which the run was started; the run's origin.json has the absolute one.
    """
    seen: set[Path] = set()
    while True:
        path = job.get("init", {}).get("path")
        if not path or run_dir in seen:
            return None
        seen.add(run_dir)
        folder = Path(_json(run_dir / ORIGIN).get("path", path))
        if not is_run(folder):
            return folder
        run_dir = run_of(folder)
        job = _json(run_dir / CONFIG)


def _common_facts(config: ModelConfig, out_dir: Path, dtype: str) -> dict[str, Any]:
    return {
        "name": out_dir.name,
        "architecture": HF_CLASSES[config.family],
        "model": encode(config),
        "parameters": asdict(count_parameters(config)),
        "dtype": dtype,
    }


def _texts(config: ModelConfig, files: Mapping[str, bytes], facts: dict[str, Any]) -> dict[str, str]:
    """The card, and a generation config where the files have none."""
    from earthshine.report.model_card import model_card

    texts = {CARD: model_card(facts)}
    if GENERATION not in files:
        hf = to_hf(config)
        tokens = {k: hf[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[k] is not None}
        texts[GENERATION] = json.dumps(tokens, indent=2) + "\n"
    return texts


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is none."""
    return parse_object(path.read_bytes(), path, "Restore it.") if path.is_file() else {}
