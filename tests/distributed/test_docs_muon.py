"""docs/muon.md stays true: its Python blocks run, and print what the page says they print.

What a block needs stands in a comment above it: "N processes[, needs PACKAGES][, gradients given]". It finds the names
that the page promises: `model`, `batches`, `device_type`, and what `_names` says besides. What a block defines is then
put to use: one step of its `optimizer`, and more for the trainers and the checkpoints.
"""

import re
import warnings
from ast import literal_eval
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Worlds
from layouts import spread_like
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from earthshine.optim.logical_matrices import logical_matrices

PAGE = Path(__file__).resolve().parents[2] / "docs" / "muon.md"
_BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
_SPECIFICATION = re.compile(r"^\| `(\([\d, ]+\))` \| `(\(.*?\))` \| ([\dx +of]+) \|", re.MULTILINE)
V, D, HEADS, WIDTH = 24, 32, (4, 2), 8


class Experts(nn.Module):
    """Expert stacks that say what they hold; two experts, both take every token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2, 32, D) / 8)
        self.down = nn.Parameter(torch.randn(2, D, 16) / 8)

    def logical_matrices(self) -> dict[str, Any]:
        return {"gate_up": ("rows", (16, 16)), "down": ("batch",)}

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bsd,efd->bsef", x, self.gate_up).chunk(2, -1)
        return torch.einsum("bsef,edf->bsd", F.silu(gate) * up, self.down)


class Attention(nn.Module):
    """Causal, grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (
            nn.Linear(D, HEADS[0] * WIDTH, bias=False),
            nn.Linear(HEADS[0] * WIDTH, D, bias=False),
        )
        self.k_proj, self.v_proj = (nn.Linear(D, HEADS[1] * WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.experts = nn.RMSNorm(D), Attention(), Experts()
        self.up_proj, self.down_proj = nn.Linear(D, 48, bias=False), nn.Linear(48, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down_proj(F.silu(self.up_proj(x))) + self.experts(x)


class Net(nn.Module):
    """The page's `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def _names() -> dict[str, Any]:
    """What blocks may use: the same on every process. queries, keys: of a forward, with logits above 100."""
    torch.manual_seed(0)
    tokens = torch.randint(V, (2, 4, 9))
    return {
        "model": Net(),
        "batches": [(t[:, :-1], t[:, 1:]) for t in tokens],
        "device_type": "cpu",
        "queries": 30 * torch.randn(2, HEADS[0], 5, WIDTH),
        "keys": torch.randn(2, HEADS[1], 5, WIDTH),
    }


def blocks() -> list[tuple[str, str, str]]:
    """(mark, code, printed text) of each Python block, in the page's order."""
    return [(mark, code, text) for mark, code, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def block_with(phrase: str) -> str:
    """The code of the one block that holds the phrase."""
    (code,) = (code for _, code, _ in blocks() if phrase in code)
    return code


def execute(code: str, **given: Any) -> dict[str, Any]:
    names = _names() | given
    exec(compile(code, "<block of docs/muon.md>", "exec"), names)
    return names


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def train(names: dict[str, Any], by_hand: bool = False, steps: int = 1) -> dict[str, Tensor]:
    """Steps of what a block has made, by backward or with random gradients; the whole parameters after them."""
    model, optimizer = names["model"], names["optimizer"]
    bare = getattr(model, "module", model)
    before = {name: whole(p) for name, p in bare.named_parameters()}
    for _ in range(steps):
        if by_hand:
            for p in bare.parameters():
                p.grad = spread_like(torch.randn(p.shape), p)
        else:
            tokens, targets = names["batches"][0]
            F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name: whole(p) for name, p in bare.named_parameters()}
    for name, p in after.items():
        assert bool(p.isfinite().all()) and not torch.equal(p, before[name]), name
    assert optimizer.predicted_bytes() == optimizer.last_stats["bytes_sent"]
    return after


def test_every_block_is_marked() -> None:
    marks = [mark for mark, _, _ in blocks()]
    assert len(marks) == PAGE.read_text(encoding="utf-8").count("```python") > 8
    assert all(marks), "a block that does not say what it needs"


@pytest.mark.parametrize(
    "code, text",
    [pytest.param(code, text, id=f"{n}") for n, (mark, code, text) in enumerate(blocks()) if mark == "1 process"],
)
def test_blocks_of_one_process(code: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    execute(code)
    if text:
        printed, promised = (out.splitlines() for out in (capsys.readouterr().out, text))
        assert len(printed) == len(promised)
        for line, wanted in zip(printed, promised, strict=True):
            # Two decimals may be rounded either way: the last bits of a product differ between processors.
            assert [_number(word) for word in line.split()] == [
                pytest.approx(_number(word), abs=0.011) if isinstance(_number(word), float) else word
                for word in wanted.split()
            ]


def _number(word: str) -> float | str:
    return float(word) if re.fullmatch(r"\d+\.\d+", word) else word


def test_table_of_specifications() -> None:
    """What each row says a parameter of that shape holds is what it is divided into."""
    rows = _SPECIFICATION.findall(PAGE.read_text(encoding="utf-8"))
    assert len(rows) == PAGE.read_text(encoding="utf-8").count("\n| `(") >= 10
    for shape, specification, holds in rows:
        sizes = Counter((m.M, m.N) for m in logical_matrices(literal_eval(shape), literal_eval(specification)))
        found = " + ".join(f"{count} of {rows} x {columns}" for (rows, columns), count in sizes.items())
        assert holds == found, f"{shape} {specification}"


# ---------------------------------------------------------------------------------------------------------- processes


def run_block(code: str, by_hand: bool) -> dict[str, Tensor]:
    """In fp32, also where this CPU multiplies faster in bf16: its roundings would hide a wrong element."""
    return train(execute(code.replace("lr=4.2e-4", 'lr=4.2e-4, ns_dtype="float32"')), by_hand)


@pytest.mark.parametrize(
    "mark, code",
    [
        pytest.param(mark, code, id=f"{n}, {mark}")
        for n, (mark, code, _) in enumerate(blocks())
        if re.fullmatch("[24] processes(, gradients given)?", mark)
    ],
)
def test_blocks_of_processes(worlds: Worlds, mark: str, code: str) -> None:
    """The ranks agree, and where gradients are of a backward pass, with a plain optimizer of one process."""
    by_hand = "given" in mark
    ranks = worlds.run(int(mark[0]), run_block, code, by_hand)
    plain = "from earthshine import Muon, param_groups\noptimizer = Muon(param_groups(model), lr=4.2e-4)"
    (alone,) = worlds.run(1, run_block, plain, by_hand)
    for rank in ranks:
        for name, p in rank.items():
            assert torch.equal(p, ranks[0][name]), name
            if not by_hand:
                # Gradients differ in last bits, which Newton-Schulz enlarges: 1e-4 of a step, and a weight's last bit.
                torch.testing.assert_close(p, alone[name], rtol=2e-7, atol=1e-4 * 4.2e-4, msg=name)


def save_or_load(layout: str, code: str, folder: str, which: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and momentum, whole, after three steps that are saved, or after loading into a fresh model."""
    names = execute(layout) | {k: v for k, v in execute(code).items() if k in ("save", "load")}
    if which == "save":
        train(names, steps=3)
    with warnings.catch_warnings():
        # torch asks back where there is no process group.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        names[which](names["model"], names["optimizer"], folder)
    params = dict(names["model"].named_parameters())
    state = {
        name: whole(names["optimizer"].state[p]["momentum_sum"])
        for name, p in params.items()
        if "blocks" in name and p.ndim > 1
    }
    return {name: whole(p) for name, p in params.items()}, state


def test_checkpoint_block(worlds: Worlds, tmp_path: Path) -> None:
    code, plain = block_with("def save"), block_with("describe(groups)").partition("schedule =")[0]
    saved, state = worlds.run(
        2, save_or_load, block_with("for block in model.blocks:\n    fully_shard"), code, str(tmp_path), "save"
    )[0]
    ((loaded, loaded_state),) = worlds.run(1, save_or_load, plain, code, str(tmp_path), "load")
    assert state.keys() == loaded_state.keys()
    for one, other in ((saved, loaded), (state, loaded_state)):
        for name, t in one.items():
            assert torch.equal(t, other[name]), name


# ------------------------------------------------------------------------------------------------------------ trainers


def test_hugging_face_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes at step 2 ends where the uninterrupted one does, to the bit."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=V, num_hidden_layers=1, **sizes, bos_token_id=0, eos_token_id=0)
    rows = [{"input_ids": t, "labels": t} for t in torch.randint(V, (8, 9), generator=torch.Generator().manual_seed(0))]
    more = {"save_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}
    ended = []
    for resume in (None, "out/checkpoint-2"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        code = block_with("class MuonTrainer").replace("max_steps=4", "max_steps=4, **more")
        if resume:
            code = code.replace(".train()", f".train(resume_from_checkpoint={resume!r})")
        names = execute(code, model=model, dataset=rows, more=more)
        ended.append(dict(model.named_parameters()))
        assert names["arguments"].max_steps == 4
    for name, p in ended[0].items():
        assert torch.equal(p, ended[1][name]), name


def _lightning_module(lightning: Any, names: dict[str, Any]) -> Any:
    class Module(lightning.LightningModule):
        configure_optimizers = names["configure_optimizers"]

        def __init__(self) -> None:
            super().__init__()
            self.net = names["model"]

        def training_step(self, batch: Any) -> Tensor:
            tokens, targets = batch
            return F.cross_entropy(self.net(tokens).flatten(0, 1), targets.flatten())

    return Module()


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of torch's deprecations and of data loaders
def test_lightning_block(tmp_path: Path) -> None:
    """A run that resumes at step 2 ends where the uninterrupted one does, to the bit."""
    lightning = pytest.importorskip("lightning", reason="no dependency of ours")
    ended = []
    for stops in ((4,), (2, 4)):
        for last in stops:
            names = execute(block_with("def configure_optimizers"))
            module = _lightning_module(lightning, names)
            trainer = lightning.Trainer(
                max_steps=last,
                accelerator="cpu",
                gradient_clip_val=1.0,
                default_root_dir=tmp_path,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            batches = torch.utils.data.DataLoader(names["batches"][:1] * 4, batch_size=None)  # it starts an epoch over
            trainer.fit(module, batches, ckpt_path=None if last == stops[0] else tmp_path / "two.ckpt")
            if last == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")
        ended.append(dict(names["model"].named_parameters()))
    for name, p in ended[0].items():
        assert torch.equal(p, ended[1][name]), name
