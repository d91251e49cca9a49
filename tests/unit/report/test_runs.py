"""Reading run folders: what is absent is None, what is damaged is an error that names the file."""

import json
import math

import pytest

from earthshine.errors import ConfigError, DataError
from earthshine.report.curves import marks, stretches
from earthshine.report.facts import compute_done, settings, what_was_run
from earthshine.report.runs import MEDIAN_LOAD, WORST_LOAD, read_run, read_runs


def test_a_whole_run_is_read(pair):
    run = read_run(pair[1].path)
    assert run.name == "smollm2-e8t2"
    assert list(run.steps.step) == [1, 2, 3, 4]
    assert len(run.steps.finite("loss")) == 4
    assert [h.step for h in run.heldout_during] == [0, 2, 4]
    assert len(run.before.sequences) == 48
    assert run.verifications[0].ok and len(run.verifications[0].rows) == 3
    assert run.model["moe"]["num_experts"] == 8
    assert run.notes == []


def test_loads_are_multiples_of_the_fair_share(folder):
    run = folder("r", num_steps=1)
    load = {"3": [0.5, 0.25, 0.25, 0.0], "0": [0.25, 0.25, 0.25, 0.25]}
    run.write("metrics.jsonl", json.dumps({"kind": "step", "step": 1, "loss": 1.0, "expert_load": load}) + "\n")
    steps = read_run(run.path).steps
    assert steps.first_load == (1, {0: [1.0, 1.0, 1.0, 1.0], 3: [2.0, 1.0, 1.0, 0.0]})
    assert steps.finite(WORST_LOAD) == [2.0]
    assert steps.finite(MEDIAN_LOAD) == [2.0]


def test_columns_have_a_value_a_step(folder):
    run = folder("r", num_steps=1)
    lines = [
        {"kind": "step", "step": 1, "loss": 3.0},
        {"kind": "step", "step": 2, "loss": None, "lr": 0.1},
        {"kind": "step", "step": 5, "loss": math.nan},
    ]
    run.write("metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    steps = read_run(run.path).steps
    assert list(steps.step) == [1, 2, 5]
    assert steps.finite("loss") == [3.0]
    assert [math.isnan(v) for v in steps.column("loss")] == [False, True, True]
    assert [math.isnan(v) for v in steps.column("lr")] == [True, False, True]
    assert len(steps.column("never written")) == 0


def test_a_line_that_is_being_written_is_left_out_and_reported(pair):
    path = pair[0].path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "step", "st')
    run = read_run(path.parent)
    assert len(run.steps) == 4
    assert "cut off" in run.notes[0]


@pytest.mark.parametrize("line", ["nonsense", "\0" * 40, "3", '{"kind": "step", "st', "[" * 100_000])
def test_a_damaged_line_is_left_out_and_reported(pair, line, capsys):
    """As training leaves it out, and sets it aside, when the run resumes."""
    path = pair[0].path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    run = read_run(path.parent)
    assert len(run.steps) == 3
    assert "metrics.jsonl is damaged in line 3 (not a JSON object); left out." in run.notes
    assert f"warning: {path} is damaged in line 3" in capsys.readouterr().err


def test_starts_are_those_that_steps_are_kept_of(pair):
    """A damaged line is noted; another host alone is no change of a run."""
    start = {"first_step": 1, "changes": {}}
    tried = {"first_step": 3, "changes": {"config": [{"field": "seed", "from": 0, "to": 1}]}, "another_run": ["seed"]}
    host = {"first_step": 3, "changes": {"environment": [{"field": "host", "from": "a", "to": "b"}]}}
    lines = [json.dumps(start), json.dumps(tried), "nonsense", json.dumps(host)]
    pair[0].write("starts.jsonl", "\n".join(lines) + "\n")
    run = read_run(pair[0].path)
    assert [s.first_step for s in run.starts] == [1, 3]
    last = run.starts[1]
    assert not last.config and not last.another_run and not last.changed and not last.moved
    assert [str(c) for c in last.environment] == ['`host` "a" \u2192 "b"']
    assert "starts.jsonl is damaged in line 3 (not a JSON object); left out." in run.notes


def test_compute_is_the_sum_over_the_starts(pair):
    """Two steps by another plan, then two by the present one; before the first recorded start by what it changed."""
    key = "forward_backward_flops_per_step"
    now = read_run(pair[0].path).plan[key]
    changed = {"first_step": 3, "changes": {"plan": [{"field": key, "from": 10.0, "to": now}]}}
    for lines in ([changed], [{"first_step": 1, "changes": {}}, changed]):
        pair[0].write("starts.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
        assert compute_done(read_run(pair[0].path), "forward_backward") == pytest.approx(2 * 10.0 + 2 * now)


def test_only_what_makes_other_steps_is_marked(pair):
    def start(another_run=(), **parts):
        changes = {part: [{"field": field, "from": 1, "to": 2}] for part, field in parts.items()}
        return {"first_step": 3, "changes": changes, "another_run": list(another_run)}

    for record, marked in (
        (start(), False),
        (start(config="checkpoint.keep"), False),
        (start(config="num_steps", plan="total_flops"), False),
        (start(config="optimizer.lr", another_run=["optimizer.lr"]), True),
        (start(plan="parameters"), True),
        (start(environment="threads"), True),
        (start(environment="host"), False),
    ):
        pair[0].write("starts.jsonl", json.dumps(record) + "\n")
        assert bool(marks([read_run(pair[0].path)])) == marked, record


def test_the_rate_of_steps_that_are_not_done_yet_is_not_the_run_s(pair):
    changes = {"config": [{"field": "optimizer.lr", "from": 0.007, "to": 0.0003}]}
    pair[0].write("starts.jsonl", json.dumps({"first_step": 5, "changes": changes}) + "\n")
    table = what_was_run([read_run(pair[0].path)])
    assert dict(row[:1] + (row[1].text,) for row in table.rows)["Peak learning rate"] == "0.007"


def test_a_line_of_a_setting_ends_where_it_changed(pair):
    """The norm that gradients were clipped to, as the learning rate's and Muon's nominal size."""
    changes = {"config": [{"field": "clip_grad_norm", "from": 0.5, "to": 1.0}]}
    pair[0].write("starts.jsonl", json.dumps({"first_step": 3, "changes": changes}) + "\n")
    runs = [read_run(p.path) for p in pair]
    assert settings(runs[0], "clip_grad_norm") == [(1, 2, 0.5), (3, 4, 1.0)]
    assert stretches(runs[:1], "clip_grad_norm") == [((1, 2), 0.5), ((3, 4), 1.0)]
    assert stretches(runs, "clip_grad_norm") == [((1, 2), 0.5), ((1, 4), 1.0)]
    assert stretches(runs, "optimizer", "update_rms") == [((1, 4), 0.2)]


def test_absent_files_are_noted(pair):
    pair[0].remove("plan.json", "env.json", "metrics.jsonl", "eval/heldout-before.json")
    run = read_run(pair[0].path)
    assert run.plan is None and run.env is None and run.before is None and run.model is None
    assert any("metrics.jsonl is absent" in note for note in run.notes)


def test_files_of_another_kind_are_reported(pair):
    pair[0].write("eval/accuracy.json", {"kind": "harness"})
    path = pair[0].path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "alien"}\n')
    notes = " ".join(read_run(pair[0].path).notes)
    assert "eval/accuracy.json is not shown: it is none of heldout-before.json," in notes and "'alien'" in notes


STEP = {"kind": "step", "step": 1, "loss": 1.0}
DAMAGED = {
    "truncated json": ("config.json", '{"name": "x"', "config.json is not readable JSON"),
    "not an object": ("plan.json", [1], "plan.json holds a list"),
    "not utf-8": ("env.json", b"\xff\xfe{}", "env.json is not readable JSON"),
    "deeply nested": ("env.json", "[" * 100_000, "env.json is not readable JSON"),
    "step not an integer": ("metrics.jsonl", {**STEP, "step": 1.5}, "step=1.5 must be an integer"),
    "step goes back": ("metrics.jsonl", [STEP, STEP], "step 1 comes after step 1"),
    "loss a text": ("metrics.jsonl", {**STEP, "loss": "low"}, "loss='low' must be a number"),
    "load not fractions": ("metrics.jsonl", {**STEP, "expert_load": {"0": [0.5, -0.5]}}, "must be fractions"),
    "load of a text": ("metrics.jsonl", {**STEP, "expert_load": {"0": "aa"}}, "must be fractions"),
    "load not an object": ("metrics.jsonl", {**STEP, "expert_load": [1]}, "must be an object"),
    "rms not an object": ("metrics.jsonl", {**STEP, "update_rms": 0.2}, "update_rms=0.2 must be an object"),
    "samples not a hash": ("metrics.jsonl", {**STEP, "samples": "xyz"}, "must be a hash in hex"),
    "heldout no loss": ("eval/heldout-after.json", {"stderr": 0.1}, "loss=None must be a finite number"),
    "heldout nan": ("eval/heldout-after.json", {"loss": math.nan}, "must be a finite number"),
    "lists differ": (
        "eval/heldout-before.json",
        {"loss": 1.0, "sequence_losses": [1.0], "sequence_tokens": []},
        "lists of the same length",
    ),
    "loss is another": (
        "eval/heldout-before.json",
        {"loss": 2.0, "stderr": 0, "bits_per_byte": 1, "sequence_losses": [1.0, 1.0], "sequence_tokens": [5, 5]},
        "not the token mean of sequence_losses",
    ),
    "no tokens": (
        "eval/heldout-before.json",
        {"loss": 1.0, "sequence_losses": [1.0], "sequence_tokens": [0]},
        "must be a positive integer",
    ),
    "samples not texts": ("eval/samples-after.json", {"samples": [{"prompt": 1}]}, "samples[0]"),
    "samples no list": ("eval/samples-after.json", {"samples": "x"}, "must be a list"),
    "check without ok": ("eval/verify-x.json", {"rows": []}, "needs 'ok'"),
    "row without ok": ("eval/verify-x.json", {"ok": True, "rows": [{"name": "a"}]}, "rows[0] needs"),
    "ok by nothing": (
        "eval/verify-x.json",
        '{"ok": true, "rows": [{"name": "a", "measured": Infinity, "tolerance": Infinity, "ok": true}]}',
        "rows[0] says ok=true of numbers that are not finite",
    ),
    "start without a step": ("starts.jsonl", {"changes": {}}, "line 1: a start needs 'first_step'"),
    "start of other changes": ("starts.jsonl", {"first_step": 2, "changes": {"config": [1]}}, "must be lists of"),
    "ok in spite of a row": ("eval/verify-x.json", {"ok": True, "rows": [{"name": "a", "ok": False}]}, "does not hold"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_names_the_file(folder, case):
    name, content, message = DAMAGED[case]
    run = folder("r")
    if isinstance(content, bytes):
        (run.path / name).write_bytes(content)
    elif name.endswith(".jsonl") and not isinstance(content, str):
        lines = content if isinstance(content, list) else [content]
        run.write(name, "".join(json.dumps(x) + "\n" for x in lines))
    else:
        run.write(name, content)
    with pytest.raises(DataError) as error:
        read_run(run.path)
    assert str(run.path / name) in str(error.value)
    assert message in str(error.value)


def test_what_is_not_a_run_folder_is_refused(tmp_path, pair):
    with pytest.raises(ConfigError, match="at least one run folder"):
        read_runs([])
    with pytest.raises(ConfigError, match="does not exist"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="is a file"):
        read_runs([pair[0].path / "config.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither config.json nor metrics.jsonl"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([pair[0].path, pair[0].path / "../smollm2-dense"])


def test_runs_of_one_name_are_told_apart(folder):
    a, b = folder("first"), folder("second")
    for run in (a, b):
        config = json.loads((run.path / "config.json").read_text())
        run.write("config.json", {**config, "name": "tour"})
    assert [r.name for r in read_runs([a.path, b.path])] == ["tour (first)", "tour (second)"]
