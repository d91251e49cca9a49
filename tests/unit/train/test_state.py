"""train/state.py: what a checkpoint of one kind of device is on another."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from earthshine.checkpoint import run_store
from earthshine.checkpoint.hf import save_model
from earthshine.config import encode
from earthshine.data.tokenization import Tokenization
from earthshine.train.job import FromCheckpoint, FromHuggingFace, Scratch, TrainJob
from earthshine.train.loop import fit
from earthshine.train.state import TrainState, build_state

JobMaker = Callable[..., TrainJob]
CPU, ACCELERATOR = torch.device("cpu"), torch.device("cuda:0")


class Generator:
    """An accelerator's random state, where there is no accelerator."""

    def __init__(self, state: list[int]) -> None:
        self.state = torch.tensor(state, dtype=torch.uint8)
        self.restored: list[int] | None = None

    def get_rng_state(self, device: torch.device) -> Tensor:
        return self.state.clone()

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        self.restored = state.tolist()


def started(job: TrainJob, device: torch.device) -> TrainState:
    state = build_state(job, CPU, torch.float32, None, trust=False, allow_config_change=False)
    state.device = device
    return state


def pretend(patch: pytest.MonkeyPatch, state: list[int]) -> Generator:
    generator = Generator(state)
    patch.setattr(torch, "get_device_module", lambda device=None: generator)
    return generator


def save(job: TrainJob, state: TrainState, run: Path) -> None:
    run_store.save(
        run,
        step=state.step,
        tensors=state.tensors(),
        state=state.metadata(),
        model=state.model.config,
        job=encode(job),
        keep=0,
    )


def restored(job: TrainJob, run: Path, device: torch.device) -> TrainState:
    checkpoint = run_store.latest(run)
    assert checkpoint is not None
    state = started(job, device)
    state.restore(checkpoint, allow_config_change=False)
    return state


def test_a_run_begun_on_a_cpu_resumes_on_an_accelerator(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job()
    fit(job, tmp_path, stop_after=2, device="cpu")
    generator = pretend(monkeypatch, [1, 2, 3])
    assert restored(job, tmp_path, ACCELERATOR).step == 2
    assert generator.restored is None
    line = (
        "step-000002 was saved on another kind of device than cuda:0: of the random states only the CPU's is restored"
    )
    assert line in capsys.readouterr().err


def test_a_run_begun_on_an_accelerator_resumes_on_a_cpu_bit_for_bit(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job()
    fit(job, tmp_path / "cpu", device="cpu")
    fit(job, tmp_path / "run", stop_after=3, device="cpu")
    with monkeypatch.context() as patch:
        pretend(patch, [1, 2, 3])
        save(job, restored(job, tmp_path / "run", ACCELERATOR), tmp_path / "run")
    capsys.readouterr()
    fit(job, tmp_path / "run", device="cpu")
    assert "another kind of device than cpu" in capsys.readouterr().err
    whole, cut = (run_store.load_model_state(tmp_path / name)[1] for name in ("cpu", "run"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("then", "now", "expected"), [([1, 2], [3, 4], [1, 2]), ([1, 2], [3, 4, 5], None)])
def test_an_accelerator_takes_the_random_state_of_its_own_kind(
    then: list[int],
    now: list[int],
    expected: list[int] | None,
    make_job: JobMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = make_job()
    pretend(monkeypatch, then)
    save(job, started(job, ACCELERATOR), tmp_path)
    generator = pretend(monkeypatch, now)
    restored(job, tmp_path, ACCELERATOR)
    assert generator.restored == expected
    assert ("another kind of device" in capsys.readouterr().err) == (expected is None)


@pytest.mark.parametrize(("ends", "after"), [((), (0,)), ((2, 3), (0,)), ((3, 0), (3, 0))])
def test_the_end_token_of_the_data_is_the_models(
    make_job: JobMaker, tmp_path: Path, ends: tuple[int, ...], after: tuple[int, ...]
) -> None:
    """Drawn weights learn to end documents with it; ids that a preset brought along belong to another tokenizer."""
    job = make_job()
    assert isinstance(job.init, Scratch)
    job = make_job(init=Scratch(model=replace(job.init.model, eos_token_ids=ends)))
    fit(job, tmp_path, stop_after=2, device="cpu")
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint and checkpoint.model.eos_token_ids == after
    assert checkpoint.tokenization and (checkpoint.tokenization.eod, checkpoint.tokenization.recorded) == (0, False)
    assert fit(job, tmp_path, device="cpu").finished  # the same job resumes, although its model says otherwise


def test_a_warm_start_keeps_its_end_tokens_beside_the_datas(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job()
    assert isinstance(job.init, Scratch)
    model = replace(job.init.model, eos_token_ids=(5,))
    save_model(started(job, CPU).model, model, tmp_path / "hf")
    state = started(make_job(init=FromHuggingFace(path=str(tmp_path / "hf"))), CPU)
    assert state.model.config.eos_token_ids == (5, 0)
    assert "documents end with id 0" in capsys.readouterr().err


def test_a_run_from_before_checkpoints_named_the_end_token_resumes(make_job: JobMaker, tmp_path: Path) -> None:
    job = make_job()
    assert isinstance(job.init, Scratch)
    state = started(job, CPU)
    state.model.config = job.init.model
    save(job, state, tmp_path)
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint and checkpoint.tokenization is None and checkpoint.model.eos_token_ids == ()
    assert restored(job, tmp_path, CPU).model.config.eos_token_ids == (0,)


def test_a_warm_start_from_a_run_of_another_tokenizer_is_reported(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job()
    state = started(job, CPU)
    for sha256, said in (("0" * 64, False), ("1" * 64, True)):
        rule = Tokenization(tokenizer_sha256=sha256, eod=0)
        run_store.save(
            tmp_path, step=1, tensors=state.tensors(), state=state.metadata(), model=state.model.config,
            job=encode(job), keep=0, tokenization=rule,
        )  # fmt: skip
        started(make_job(init=FromCheckpoint(path=str(tmp_path))), CPU)
        assert ("was made with another tokenizer than the data of" in capsys.readouterr().err) == said
