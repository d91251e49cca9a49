"""The first sentence of the report, over the situations that run folders come in."""

import json

import pytest

from earthshine.report.results import comparisons
from earthshine.report.runs import read_runs
from earthshine.report.verdict import verdict


def sentence(*folders):
    runs = read_runs([folder.path for folder in folders])
    return verdict(runs, comparisons(runs))


def failing(folder, row=0):
    """One row of the run's upcycling check does not hold."""
    check = json.loads((folder.path / "eval/verify-upcycle.json").read_text())
    check["ok"] = check["rows"][row]["ok"] = False
    check["rows"][row]["measured"] = 3e-5
    folder.write("eval/verify-upcycle.json", check)


def lines(folder, change):
    """Rewrite the step lines: `change` of each record, None to leave one out."""
    records = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    folder.write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in map(change, records) if r is not None))


def without_heldout(folder):
    folder.remove("eval/heldout-before.json", "eval/heldout-after.json")
    lines(folder, lambda r: None if r["kind"] == "heldout" else r)


def diverge(folder):
    lines(folder, lambda r: r | {"loss": float("nan")} if r["kind"] == "step" and r["step"] > 2 else r)
    folder.remove("eval/heldout-after.json")


FUNCTION = "The upcycled MoE computes the dense model's function to 2\u00d710\u207b\u2076"
END = "its held-out loss fell from 2.43 to 2.38"


def test_a_dense_model_and_the_moe_made_from_it(pair):
    expected = f"{FUNCTION}; after 4 steps on 32.8k tokens {END}, as the dense model's did; every check holds."
    assert sentence(*pair) == sentence(*reversed(pair)) == expected


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (2.2, "fell from 2.43 to 2.32, 0.061 below the dense model's (significant at 2 standard errors)"),
        (2.309, "did not change significantly (2.432 to 2.427), 0.048 above the dense model's"),
        (2.5, "rose from 2.43 to 2.62, 0.24 above the dense model's (significant at 2 standard errors)"),
    ],
)
def test_the_difference_from_the_dense_model_is_judged(pair, heldout_json, loss, words):
    pair[1].write("eval/heldout-after.json", heldout_json(loss, 3, 0.02))
    for order in (pair, pair[::-1]):
        assert words in sentence(*order)


def test_a_check_that_does_not_hold_is_reported_first_and_last(pair):
    failing(pair[1])
    text = sentence(*pair)
    assert text.startswith(
        "The upcycled MoE does **not** compute the dense model's function (logits, relative 3\u00d710\u207b\u2075, "
        "tolerance 10\u207b\u2075); after 4 steps"
    )
    assert text.endswith("; **1 of 3 checks does not hold**.")
    for row in (1, 2):
        failing(pair[1], row)
    assert sentence(*pair).endswith("; **3 of 3 checks do not hold**.")


def test_a_check_that_failed_without_a_row_is_counted(pair):
    pair[0].write("eval/verify-x.json", {"check": "x", "ok": False, "rows": []})
    pair[1].write("eval/verify-y.json", {"check": "y", "ok": False, "rows": [{"name": "a", "ok": True}]})
    assert sentence(*pair).endswith("; **2 of 6 checks do not hold**.")


def test_one_run(folder):
    assert sentence(folder("a")) == (
        f"a, a dense model of 135M parameters, was trained for 4 steps on 32.8k tokens: {END}; no check is recorded."
    )
    assert sentence(folder("b", sparse=True)) == f"{FUNCTION}; after 4 steps on 32.8k tokens {END}; every check holds."
    scratch = folder("c", sparse=True)
    config = json.loads((scratch.path / "config.json").read_text())
    scratch.write("config.json", config | {"init": {"kind": "scratch"}}).remove("eval/verify-upcycle.json")
    words = "c, an MoE of 8 experts (283M parameters, 156M active), was trained from scratch for 4 steps"
    assert sentence(scratch).startswith(words)


def test_nothing_held_out(folder):
    run = folder("a")
    without_heldout(run)
    text = sentence(run)
    assert "its training loss went from " in text and text.endswith(" (no held-out loss); no check is recorded.")
    run.remove("metrics.jsonl")
    assert sentence(run) == "no training step of a is recorded; no check is recorded.".replace("no", "No", 1)


def test_held_out_only_at_the_start_as_of_a_run_that_was_stopped(folder):
    run = folder("a")
    run.remove("eval/heldout-after.json")
    lines(run, lambda r: None if r["kind"] == "heldout" and r["step"] else r)
    assert "(the held-out loss was 2.43 before); no check" in sentence(run)


def test_held_out_only_at_the_end(folder):
    run = folder("a")
    lines(run, lambda r: None if r["kind"] == "heldout" else r)
    run.remove("eval/heldout-before.json")
    assert "its held-out loss is 2.38;" in sentence(run)


def test_a_change_that_cannot_be_judged(folder, heldout_json):
    run = folder("a")
    run.remove("eval/heldout-before.json", "eval/heldout-after.json")
    assert "went from 2.31 to 2.26 (the error of that change is not recorded)" in sentence(run)
    run.write("eval/heldout-before.json", heldout_json(2.0, 1, 0.01, 1))
    run.write("eval/heldout-after.json", heldout_json(1.5, 2, 0.01, 1))
    assert "(on a single sequence)" in sentence(run)
    run.write("eval/heldout-after.json", heldout_json(1.5, 2, 0.01, 4))
    assert "before, on different sequences)" in sentence(run)
    for name in ("before", "after"):
        run.write(f"eval/heldout-{name}.json", heldout_json(2.0, 1))
    assert "its held-out loss stayed at 2.12" in sentence(run)


def test_a_run_that_diverged(pair):
    diverge(pair[0])
    assert "its loss is **not finite** from step 3 on" in sentence(pair[0])
    text = sentence(*pair)
    assert "the upcycled MoE's" not in text
    assert f"after 4 steps on 32.8k tokens {END}, the dense model's loss is **not finite** from step 3 on" in text


def test_a_run_that_is_not_finished_or_changed_on_the_way(folder):
    run = folder("a")
    config = json.loads((run.path / "config.json").read_text())
    run.write("config.json", config | {"num_steps": 24})
    assert "was trained for 4 of 24 planned steps on 32.8k tokens:" in sentence(run)
    change = {"config": [{"field": "optimizer.lr", "from": 0.1, "to": 0.2}]}
    resumed = {"first_step": 3, "changes": change, "another_run": ["optimizer.lr"]}
    run.write("starts.jsonl", json.dumps({"first_step": 1, "changes": {}}) + "\n" + json.dumps(resumed) + "\n")
    assert "on 32.8k tokens, its config changed at step 3: its held-out loss" in sentence(run)


def test_an_old_folder_with_metrics_only(folder):
    run = folder("old")
    run.remove("config.json", "plan.json", "env.json", "eval/heldout-before.json", "eval/heldout-after.json")
    assert sentence(run) == (
        "old was trained for 4 steps on 32.8k tokens: its held-out loss went from 2.31 to 2.26 "
        "(the error of that change is not recorded); no check is recorded."
    )


def test_two_runs_of_one_kind_go_by_their_names(folder, heldout_json):
    a, b = folder("a"), folder("b", num_steps=6)
    assert sentence(a, b) == (
        "After 6 steps on 49.1k tokens, b's held-out loss fell from 2.43 to 2.38, as a's did after 4 steps on 32.8k "
        "tokens; no check is recorded."
    )
    lines(b, lambda r: r if r.get("step", 0) <= 4 else None)
    config = json.loads((b.path / "config.json").read_text())
    b.write("config.json", config | {"num_steps": 4})
    assert sentence(a, b).startswith("After 4 steps on 32.8k tokens, b's held-out loss fell")
    without_heldout(b)
    assert ", a's held-out loss fell from 2.43 to 2.38; no check" in sentence(a, b)


def test_many_runs(folder, heldout_json):
    runs = [folder(name) for name in "abc"]
    for run, loss in zip(runs, (2.2, 2.1, 2.3), strict=True):
        run.write("eval/heldout-after.json", heldout_json(loss, 3, 0.02))
    ends = "lowest for b, 2.22 nats per token, and highest for c, 2.42 (significant at 2 standard errors)"
    assert sentence(*runs) == f"Of 3 runs, the held-out loss is {ends}; no check is recorded."
    runs[1].write("eval/heldout-after.json", heldout_json(2.2, 3, 0.02, 40))
    assert "(not compared: they were measured on different held-out sequences)" in sentence(*runs)
    diverge(runs[2])
    assert "; 1 of 3 runs **diverged** (c); no check" in sentence(*runs)


def test_any_name_is_safe(folder):
    text = sentence(folder("<img src=x onerror=alert(1)>".replace("/", "")))
    assert text.startswith("<img src=x onerror=alert(1)>, a dense model")
