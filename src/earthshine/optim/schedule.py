"""The learning rate of a step, as a pure function; without torch."""

import math

from earthshine.optim.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak_lr: float, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `num_steps`.

    Warm-up is linear and reaches the peak on its last step: peak * (step + 1) / warmup_steps. After it:
    constant: the peak. cosine: f + (1 - f) * (1 + cos(pi * t)) / 2 of the peak, f = final_fraction, t from 0 on the
    first step after warm-up towards 1 at num_steps (SGDR, arXiv:1608.03983, one period). wsd: the peak until the last
    decay_steps (fewer where warm-up leaves less room), then linear towards f at num_steps (MiniCPM, arXiv:2404.06395,
    with the linear decay of Moonlight's last stage). The value f itself is that of any step from num_steps on.
    """
    if step < schedule.warmup_steps:
        return peak_lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak_lr
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, num_steps - schedule.decay_steps)
    t = min(max((step - start) / max(1, num_steps - start), 0.0), 1.0)
    left = (1 + math.cos(math.pi * t)) / 2 if schedule.kind == "cosine" else 1 - t
    return peak_lr * (schedule.final_fraction + (1 - schedule.final_fraction) * left)
