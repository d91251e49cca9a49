"""Read a run folder with nothing but the standard library: python examples/read_run_folder.py RUN

A run folder is complete without the program: JSON for programs, HTML for readers. Without RUN,
examples/train_tiny_moe.py makes one first.
"""

import json
import sys
from pathlib import Path


def main(run: Path) -> list[dict]:
    job = json.loads((run / "config.json").read_text())  # every field of the job, defaults included
    plan = json.loads((run / "plan.json").read_text())  # the numbers that followed from it before step 0
    print(f"job {job['name']}: {job['num_steps']} steps of {job['sequences_per_step']} x {job['seq_len']} tokens")
    print(f"plan: {plan['parameters']:,} parameters, {plan['total_tokens']:,} tokens, {plan['total_flops']:.3g} FLOPs")

    # One JSON object per line: kind "step" for a training step, "heldout" for an evaluation.
    with (run / "metrics.jsonl").open() as lines:
        records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["kind"] == "step"]
    print("a step has:", ", ".join(steps[-1]))
    losses = [step["loss"] for step in steps]
    low, high = min(losses), max(losses)
    for step in steps[:: max(1, len(steps) // 15)]:
        bar = "#" * round(40 * (step["loss"] - low) / (high - low))
        print(f"step {step['step']:4}  loss {step['loss']:6.3f}  {bar}")

    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        manifest = json.loads((checkpoint / "manifest.json").read_text())  # with the sha256 of every file
        print(f"{checkpoint.name}: {', '.join(sorted(manifest))}")
    return steps


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        import train_tiny_moe

        main(train_tiny_moe.main())
