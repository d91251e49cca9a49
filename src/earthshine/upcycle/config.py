"""`UpcycleConfig`: how a dense model becomes an MoE. No torch import."""

from dataclasses import dataclass

from earthshine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Options of the conversion.

    experts, top_k: experts per converted layer, and how many of them each token passes through (at least 2).
    layers: which feed-forward networks become MoE layers; empty means all.
    router_std: standard deviation of the router's initial weights. Not zero: equal logits would send every token
        to the first top_k experts.
    seed: seed for the router's initial weights.
    shared_intermediate_size: width of the shared expert, where the output class demands one: Qwen2-MoE, of a Qwen2, or
        of some layers of a Llama or Mistral. It is written as zeros: it adds nothing, and its gradient is zero.
    max_shard_gib: size of the output's files, in GiB; also the unit in which a killed conversion resumes.
    """

    experts: int = 8
    top_k: int = 2
    layers: tuple[int, ...] = ()
    router_std: float = 0.02
    seed: int = 0
    shared_intermediate_size: int = 128
    max_shard_gib: float = 2.0

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ConfigError(f"upcycle.experts={self.experts} must be at least 2.")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"upcycle.top_k={self.top_k} must be between 1 and upcycle.experts={self.experts}: "
                f"a token cannot choose more experts than there are."
            )
        if self.top_k == 1:
            raise ConfigError(
                "upcycle.top_k=1 would leave the router without a gradient forever: the gate is a softmax over the "
                "chosen experts, and over a single one it is 1 whatever the router says. Take at least 2."
            )
        if len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"upcycle.layers={list(self.layers)} names a layer twice.")
        if not 0 < self.router_std < float("inf"):
            raise ConfigError(
                f"upcycle.router_std={self.router_std} must be positive: "
                f"a zero router sends every token to the same experts."
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"upcycle.seed={self.seed} must be between 0 and 2**63 - 1.")
        if self.shared_intermediate_size < 1:
            raise ConfigError(f"upcycle.shared_intermediate_size={self.shared_intermediate_size} must be at least 1.")
        if not 0 < self.max_shard_gib < float("inf"):
            raise ConfigError(f"upcycle.max_shard_gib={self.max_shard_gib} must be positive.")
