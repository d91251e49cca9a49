"""PyTorch Lightning, in one process and by its own DDP."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import MUON, assert_close, assert_equal, batches, by_hand, tiny

from earthshine import Muon, param_groups

pytestmark = [
    pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning: pip install 'earthshine[trainers]'"),
    # Lightning's own: calls that torch has deprecated, and advice on data loaders.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*isinstance.treespec"),
]


def module(net: Any, **options: Any) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any) -> Any:
            return self.net(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = Muon(param_groups(self.net), **(MUON | options))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def fit(net: Any, folder: Path, **changed: Any) -> Any:
    import lightning

    fixed = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0, "logger": False} | {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    resume = changed.pop("resume", None)
    trainer = lightning.Trainer(**(fixed | changed))
    trainer.fit(module(net), torch.utils.data.DataLoader(batches(2), batch_size=None), ckpt_path=resume)
    return trainer


def test_the_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    net = tiny()
    fit(net, tmp_path)
    assert_equal(net, by_hand(tiny(), [[batch] for batch in batches(2)]))


def test_accumulation_and_bf16_autocast(tmp_path: Path) -> None:
    net, pairs = tiny(), batches(2)
    fit(net, tmp_path, accumulate_grad_batches=2)
    assert_close(net, by_hand(tiny(), [pairs[:2], pairs[2:]]), rtol=1e-5, atol=1e-7)
    net = tiny()
    fit(net, tmp_path, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in net.parameters())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, half, resumed = tiny("Qwen3Moe"), tiny("Qwen3Moe"), tiny("Qwen3Moe")
    fit(whole, tmp_path, max_epochs=2)
    fit(half, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, max_epochs=2, resume=tmp_path / "half.ckpt")
    assert_equal(whole, resumed)


@pytest.mark.slow
def test_lightning_s_ddp(tmp_path: Path) -> None:
    """Two processes that see the same data take one process's steps."""
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
from tiny_training import batches, by_hand, tiny, assert_close
from test_lightning import fit
net = tiny()
fit(net, Path({str(tmp_path)!r}), devices=2, strategy="ddp_fork", use_distributed_sampler=False)
assert_close(net, by_hand(tiny(), [[batch] for batch in batches(2)]), rtol=1e-5, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
