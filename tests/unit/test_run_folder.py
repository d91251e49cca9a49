"""run_folder.py: names of checkpoints, and lines that outlive what befalls one of them."""

from pathlib import Path

from earthshine.run_folder import (
    checkpoint_folders,
    is_run,
    json_lines,
    read_steps,
    records,
    run_of,
    start_lines,
    step_folder,
    step_folders,
)


def test_checkpoints_are_found_from_the_run_its_folder_of_them_and_themselves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (9, 10, 1_000_000):
        step_folder(run, step).mkdir(parents=True)
        (step_folder(run, step) / "manifest.json").write_text("{}")
    (run / "checkpoints" / ".step-000011.tmp").mkdir()
    (run / "checkpoints" / "step-last").mkdir()
    newest_first = [step_folder(run, step) for step in (1_000_000, 10, 9)]
    assert step_folders(run) == newest_first
    assert checkpoint_folders(run) == checkpoint_folders(run / "checkpoints") == newest_first
    assert checkpoint_folders(newest_first[1]) == [newest_first[1]]
    assert is_run(run) and is_run(newest_first[0]) and not is_run(tmp_path)
    assert run_of(run) == run_of(newest_first[0]) == run


def test_damaged_lines_are_told_apart_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\n[2]\n\xff\n{"kind": "heldout", "step": 2}\n{"kind": "step", "st')
    lines = list(json_lines(path))
    assert [line.number for line in lines if line.record is None] == [2, 3, 5]
    assert [line.cut_off for line in lines] == [False, False, False, False, True]
    assert [r["kind"] for r in records(path)] == ["step", "heldout"]
    assert read_steps(path) == {1: {"kind": "step", "step": 1}}
    assert list(json_lines(tmp_path / "none")) == []


def test_a_start_is_completed_from_the_line_before_unless_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "starts.jsonl"
    path.write_text('{"config": 1, "plan": 2, "changes": 3}\n{"plan": 4}\n{"config": \n{"plan": 5}\n')
    whole = [{"config": 1, "plan": 2, "changes": 3}, {"config": 1, "plan": 4}, None, {"plan": 5}]
    assert [line.record for line in start_lines(path)] == whole
