"""Training throughput and memory of this package beside transformers' own classes: same weights, same objective.

    python benchmarks/train_step.py [--models mixtral deepseek llama h512] [--dtypes float32 bfloat16] [--threads 1 2]
                                    [--rounds 5] [--compile] [--json FILE]

A step is forward, backward and fused AdamW on 4,096 tokens (8 x 512). transformers initializes a model and saves it;
both sides load that. Before anything is timed, every side's loss and gradient norm are held to those of transformers'
eager float32 model. Each side first runs alone, in a process of its own: that gives its peak memory (VmHWM over the
steps, less what the imports took), and one that takes too long or too much memory is left out, with the reason. Then
the remaining sides step in turns in one process. Columns:

tok/s     of the whole step, AdamW included
MFU       (6 x active parameters, the head among them and the embedding not, + causal attention) x tokens, over the
          time of forward and backward, over the rate of a large matmul in the same dtype and the same rounds
Muon      this package's step in place of AdamW's; its fraction of a step of 4k, 16k and 64k tokens, where forward and
          backward grow in proportion to the tokens
DENSE     this package's dense model of equal active FLOPs: what the MoE costs

In bf16 transformers' parameters (and so its AdamW) are bf16; this package's are float32, cast as they are used, and so
are transformers' with --autocast. bf16 is measured only where its matmuls are faster than float32's. The bias of
DeepSeek's router does not move, on either side, and there is no balance loss. The loss after all steps, on the one
batch, shows whether both sides did the same: in float32 they agree.

With --json FILE, each configuration is appended as one line when it is done, and those that FILE already holds with
the same options are only shown: delete the file, or name another, to measure again.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from support.train_sides import MODELS, Case, Side, measure, peaks, prepare, probe

from earthshine.console import human_bytes, human_seconds, log, table
from earthshine.device import pick_device
from earthshine.files import append_line

# How many times the best of transformers this package should be, by dtype; and, in bf16, which MFU it should reach.
RATIO_TARGETS = {
    "float32": dict.fromkeys(MODELS, 1.2),
    "bfloat16": {"mixtral": 1.8, "deepseek": 3.0, "llama": 1.5},
}
MFU_TARGETS = {("h512", "bfloat16", 1): 0.6, ("h512", "bfloat16", 2): 0.5}
MOE_OVER_DENSE_TARGETS = {"mixtral": 0.75, "h512": 0.75}
MUON_TOKENS = (4096, 16384, 65536)
# A side of transformers that alone is this many times slower than their fastest cannot be their best: left out.
HOPELESS = 2.0


def sides_of(model: str, dtype: str, options: argparse.Namespace) -> list[Side]:
    is_moe = model != "llama"
    compiled = (False, True) if options.compile else (False,)
    backends = options.backends if is_moe else [""]
    own_sides = [Side(library="earthshine", experts=b, compiled=c) for c, b in itertools.product(compiled, backends)]
    if is_moe:
        own_sides += [Side(library="earthshine", experts="", dense=True, compiled=c) for c in compiled]
    autocast = (False, True) if options.autocast and dtype == "bfloat16" else (False,)
    peers = itertools.product(autocast, compiled, options.experts if is_moe else [""], options.attention)
    return own_sides + [
        Side(library="transformers", experts=e, attention=a, compiled=c, autocast=auto) for auto, c, e, a in peers
    ]


def run_child(task: str, case: Case, seconds: float | None = None, **more: Any) -> dict[str, Any]:
    """What a task returns, in a new process. `{"error": reason}` where it fails, dies or is not done in time."""
    request = json.dumps({"task": task, "case": asdict(case), **more})
    threads = {name: str(case.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--child"],
            input=request,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {seconds:.0f} s"}
    if done.returncode:
        return {"error": f"its process ended with code {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child() -> None:
    """Do the task on standard input; its result is the last line on standard output."""
    import torch

    request = json.load(sys.stdin)
    task, case = request.pop("task"), Case(**request.pop("case"))
    torch.set_num_threads(case.threads)
    torch.set_float32_matmul_precision(case.precision)
    try:
        if task == "probe":
            result = probe(case, Side(**request["side"]))
        elif task == "measure":
            result = measure(case, [Side(**s) for s in request["sides"]], request["rounds"], request["profile"])
        else:
            result = {"peaks": peaks, "prepare": prepare}[task](case)
    except Exception as e:  # the reason belongs in the table
        traceback.print_exc()
        result = {"error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}
    print(json.dumps(result))


def try_sides(case: Case, options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Write the weights and run each side alone: its probe, by name; and why sides are left out, by name."""
    sides = sides_of(case.model, case.dtype, options)
    written = run_child("prepare", case)
    if "error" in written:
        return {}, {s.name: f"no weights: {written['error']}" for s in sides}
    if options.skip_memory:
        return {}, {s.name: "not tried alone (--skip-memory)" for s in sides if s.experts == "batched_mm"}
    log(f"{case.model}, {case.dtype}: each side alone, threads {case.threads}")
    probes: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for side in sides:
        known = [s.name for s in sides if s != side and replace(s, attention=side.attention) == side]
        if other := next(
            (name for name in known if name in skipped), ""
        ):  # the experts are to blame, not the attention
            skipped[side.name] = f"as {other}"
            continue
        result = run_child("probe", case, options.budget, side=asdict(side))
        if "error" in result:
            skipped[side.name] = result["error"]
            log(f"  {side.name}: left out: {result['error']}")
            continue
        probes[side.name] = result
        memory, seconds = human_bytes(result["memory_bytes"]), human_seconds(result["step_seconds"])
        log(f"  {side.name}: {memory}, {seconds} per step alone")
    peers = {s.name: probes[s.name]["step_seconds"] for s in sides if not s.ours and s.name in probes}
    for name, seconds in peers.items():
        if seconds > HOPELESS * min(peers.values()):
            skipped[name] = f"{seconds:.1f} s per step alone, where their fastest takes {min(peers.values()):.1f} s"
            log(f"  {name}: left out: {skipped[name]}")
    return probes, skipped


def rows_of(case: Case, timed: list[Side], raw: dict[str, Any], probes: dict[str, dict[str, Any]]) -> list[dict]:
    """Medians and rates of each timed side."""
    peak = statistics.median(raw["gemm_flops_per_second"])
    rows = []
    for side, times in zip(timed, raw["sides"], strict=True):
        median = {name: statistics.median(times[name]) for name in ("forward", "backward", "adamw")}
        forward_backward = median["forward"] + median["backward"]
        step = statistics.median(map(sum, zip(*(times[name] for name in median), strict=True)))
        flops = case.tokens * raw["dense_flops_per_token" if side.dense else "flops_per_token"]
        rows.append(
            {
                "name": side.name,
                "side": asdict(side),
                "tokens_per_second": case.tokens / step,
                "mfu": flops / forward_backward / peak,
                **{f"{name}_seconds": seconds for name, seconds in median.items()},
                "memory_bytes": probes.get(side.name, {}).get("memory_bytes"),
                "samples": times,
            }
        )
    return rows


def summarize(case: Case, rows: list[dict], raw: dict[str, Any], probes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The best of either side, the ratios, Muon's fraction of a step, and the targets."""

    def best(library: str) -> dict[str, Any]:
        candidates = [r for r in rows if r["side"]["library"] == library and not r["side"]["dense"]]
        return max(candidates, key=lambda r: r["tokens_per_second"])

    ours, theirs = best("earthshine"), best("transformers")
    muon = statistics.median(raw["muon_seconds"])
    per_token = (ours["forward_seconds"] + ours["backward_seconds"]) / case.tokens
    dense = [r["tokens_per_second"] for r in rows if r["side"]["dense"]]
    memory = [p["memory_bytes"] for name, p in probes.items() if "transformers" in name and p.get("memory_bytes")]
    return {
        "ours": ours["name"],
        "theirs": theirs["name"],
        "ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "ratio_target": RATIO_TARGETS[case.dtype].get(case.model),
        "mfu": ours["mfu"],
        "their_mfu": theirs["mfu"],
        "mfu_target": MFU_TARGETS.get((case.model, case.dtype, case.threads)),
        "memory_ratio": ours["memory_bytes"] / min(memory) if ours["memory_bytes"] and memory else None,
        "moe_over_dense_target": MOE_OVER_DENSE_TARGETS.get(case.model),
        "moe_over_dense": ours["tokens_per_second"] / max(dense) if dense else None,
        "muon_seconds": muon,
        "muon_share": {str(n): muon / (muon + per_token * n) for n in MUON_TOKENS},
    }


def run_case(
    case: Case,
    options: argparse.Namespace,
    keys: dict[str, Any],
    probes: dict[str, dict[str, Any]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """One configuration's record, JSON-ready; `{"error": ...}` where it could not be measured."""
    sides = sides_of(case.model, case.dtype, options)
    timed = [s for s in sides if s.name not in skipped]
    for ours in (True, False):
        if not any(s.ours == ours and not s.dense for s in timed):
            reasons = "; ".join(f"{s.name}: {skipped[s.name]}" for s in sides if s.ours == ours and s.name in skipped)
            return {"error": f"no side of {'earthshine' if ours else 'transformers'} is left: {reasons}"}
    raw = run_child(
        "measure", case, None, sides=[asdict(s) for s in timed], rounds=options.rounds, profile=options.profile
    )
    if "error" in raw:
        return raw
    rows = rows_of(case, timed, raw, probes)
    summary = summarize(case, rows, raw, probes)
    keep = (
        "gemm_size",
        "gemm_flops_per_second",
        "flops_per_token",
        "active_parameters",
        "total_parameters",
        "environment",
    )
    record = {"benchmark": "train_step", "options": keys, **{k: raw[k] for k in keep}, "skipped": skipped}
    return record | {"sides": rows, "probes": probes, "muon_samples": raw["muon_seconds"], "summary": summary}


def show(record: dict[str, Any]) -> str:
    """One configuration's table, and what was left out."""
    keys, rates, summary = record["options"], record["gemm_flops_per_second"], record["summary"]
    plural = "" if keys["threads"] == 1 else "s"
    title = f"{keys['model']}, {keys['dtype']} (float32 matmuls: {keys['precision']}), {keys['threads']} thread{plural}"
    title += f" on {keys['device']}, {keys['tokens'] // keys['seq_len']} x {keys['seq_len']} tokens, medians of "
    title += f"{keys['rounds']}; {record['active_parameters'] / 1e6:.2f} M active parameters of "
    title += f"{record['total_parameters'] / 1e6:.2f} M\nGEMM of {record['gemm_size']} in the same rounds: "
    title += f"{statistics.median(rates) / 1e9:.3g} GFLOP/s ({min(rates) / 1e9:.3g} to {max(rates) / 1e9:.3g})"
    if keys["dtype"] == "bfloat16":
        title += "\ntransformers holds its parameters in bf16, this package in float32"
    headers = ["side", "tok/s", "forward ms", "backward ms", "AdamW ms", "MFU", "memory", "first pass", "loss"]
    headers += ["Muon ms", *(f"at {n >> 10}k" for n in MUON_TOKENS)]
    rows = []
    for r in record["sides"]:
        times = [f"{1e3 * r[k]:.0f}" for k in ("forward_seconds", "backward_seconds", "adamw_seconds")]
        memory = human_bytes(r["memory_bytes"]) if r["memory_bytes"] else "-"
        muon = ["", "", "", ""]
        if r["name"] == summary["ours"]:
            muon = [f"{1e3 * summary['muon_seconds']:.0f}", *(f"{s:.1%}" for s in summary["muon_share"].values())]
        first = human_seconds(r["samples"]["first_seconds"])
        rows.append([r["name"], f"{r['tokens_per_second']:.0f}", *times, f"{r['mfu']:.1%}", memory, first])
        rows[-1] += [f"{r['samples']['last_loss']:.4f}", *muon]
    left_out = [f"left out: {name}: {reason}" for name, reason in record["skipped"].items()]
    return "\n".join([title, table(headers, rows), *left_out])


def show_all(records: list[dict[str, Any]]) -> str:
    """A row per configuration: the ratios and their targets."""

    def against(value: float | None, target: float | None, form: str) -> str:
        if value is None:
            return "-"
        return f"{value:{form}}" if target is None else f"{value:{form}} (target {target:{form}})"

    headers = ["model", "dtype", "threads", "ours / their best", "their best", "MFU", "theirs", "memory / their least"]
    headers += ["MoE / dense", "Muon at 4k"]
    rows = []
    for record in records:
        keys, s = record["options"], record["summary"]
        rows.append(
            [keys["model"], keys["dtype"], keys["threads"], against(s["ratio"], s["ratio_target"], ".2f")]
            + [s["theirs"].removeprefix("transformers, "), against(s["mfu"], s["mfu_target"], ".1%")]
            + [f"{s['their_mfu']:.1%}", against(s["memory_ratio"], 1.0, ".2f")]
            + [against(s["moe_over_dense"], s["moe_over_dense_target"], ".2f"), f"{s['muon_share']['4096']:.1%}"]
        )
    return table(headers, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="per step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="auto", help="auto, cpu or an accelerator's name")
    parser.add_argument("--compile", action="store_true", help="torch.compile'd sides too")
    parser.add_argument("--autocast", action="store_true", help="transformers in bf16 with float32 parameters too")
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm", "batched_mm"], help="transformers'")
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"], help="transformers'")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="this package's: auto grouped padded loop")
    parser.add_argument("--matmul-precision", default="highest", choices=["highest", "high", "medium"])
    parser.add_argument("--budget", type=float, default=120, help="seconds for a side to load and step alone")
    parser.add_argument("--skip-memory", action="store_true", help="no side is run alone first; without batched_mm")
    parser.add_argument("--force", action="store_true", help="bf16 even where its matmuls are slower than float32's")
    parser.add_argument("--profile", action="store_true", help="print where each side's time goes, to stderr")
    parser.add_argument(
        "--json", type=Path, help="append a line of JSON per configuration here, instead of printing it"
    )
    options = parser.parse_args()
    if options.tokens % options.seq_len or min(options.tokens, options.seq_len, options.rounds, *options.threads) < 1:
        parser.error("--tokens must be a multiple of --seq-len, and all numbers at least 1")
    return options


def dtypes_worth_measuring(options: argparse.Namespace, case: Case) -> list[str]:
    peaks = run_child("peaks", case)
    if "error" in peaks:
        raise SystemExit(f"cannot measure the machine: {peaks['error']}")
    rates = {name: peaks[name] for name in ("float32", "bfloat16")}
    log(", ".join(f"{name} matmuls at {rate / 1e9:.3g} GFLOP/s" for name, rate in rates.items()))
    if "bfloat16" in options.dtypes and rates["bfloat16"] <= rates["float32"] and not options.force:
        print(
            f"bfloat16 is skipped: its matmuls run at {rates['bfloat16'] / 1e9:.3g} GFLOP/s here, float32's at "
            f"{rates['float32'] / 1e9:.3g} (--force runs it anyway)"
        )
        return [d for d in options.dtypes if d != "bfloat16"]
    return list(options.dtypes)


def read_records(path: Path | None, lines: list[str]) -> list[dict[str, Any]]:
    """What an earlier call wrote. Exits for any other kind of file, before anything is measured."""
    try:
        records = [json.loads(line) for line in lines]
        if all(record["benchmark"] == "train_step" for record in records):
            return records
    except (ValueError, KeyError, TypeError):
        pass
    raise SystemExit(f"--json {path}: not a file of this benchmark's lines; name another, or remove it")


def main() -> int:
    if sys.argv[1:] == ["--child"]:
        child()
        return 0
    options = parse()
    plan = Case(
        model="",
        dtype="float32",
        threads=options.threads[0],
        device=str(pick_device(options.device)),
        precision=options.matmul_precision,
        tokens=options.tokens,
        seq_len=options.seq_len,
    )
    keep = ("rounds", "compile", "autocast", "experts", "attention", "backends", "skip_memory")
    old = options.json.read_text().splitlines() if options.json and options.json.exists() else []
    earlier = read_records(options.json, old)
    records, failed = [], []
    for model, dtype in itertools.product(options.models, dtypes_worth_measuring(options, plan)):
        tried = None
        with tempfile.TemporaryDirectory(prefix="train-step-") as scratch:
            for threads in options.threads:
                case = replace(plan, model=model, dtype=dtype, threads=threads, directory=f"{scratch}/{model}")
                keys = {k: v for k, v in asdict(case).items() if k != "directory"}
                keys |= {k: getattr(options, k) for k in keep}
                record = next((r for r in earlier if r.get("options") == keys), None)
                if record is None:
                    tried = tried or try_sides(replace(case, threads=min(options.threads)), options)
                    log(f"{model}, {dtype}, threads {threads}")
                    record = run_case(case, options, keys, *tried)
                    if "error" in record:
                        failed.append(f"{model}, {dtype}, threads {threads}: {record['error']}")
                        log(failed[-1])
                        continue
                    if options.json:
                        append_line(options.json, json.dumps(record))
                print(show(record), end="\n\n", flush=True)
                records.append(record)
    print(show_all(records))
    print("\n".join(f"FAILED {reason}" for reason in failed))
    if not options.json:
        print(json.dumps(records))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
