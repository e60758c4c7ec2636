"""Options as values: frozen dataclasses that refuse contradictions, and their YAML form."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from corda_core import Mode, Split
from corda_core.allocate import check_budget
from corda_core.decompose import Solver
from corda_core.linears import check_pattern
from corda_core.quantize import KINDS as QUANTIZED
from corda_vlm.options import Count, Options, Seed, one_of


@dataclass(frozen=True)
class CordaConfig(Options):
    """How an adapter is prepared. The same names as the arguments of ``prepare``."""

    mode: Annotated[str, one_of(*Mode)] = "kpm"
    """"kpm": keep what the context shows; "ipm": learn faster what the context shows."""

    rank: Count = 128
    """r of every layer; clipped where a layer is smaller."""

    alpha: float | None = None
    """LoRA's alpha; None takes the rank (scaling 1)."""

    targets: str | Sequence[str] | None = None
    """Layers to adapt, as PEFT's ``target_modules``, or "attention" or "mlp"; None takes every linear layer of the parts that can learn."""

    exclude: str | Sequence[str] | None = None
    """Layers to leave out."""

    parts: Sequence[str] | None = None
    """Of "language", "vision", "projector"; None takes the language model, or both towers of CLIP, or the whole of a lone tower."""

    split: Annotated[str, one_of(*Split)] = "balanced"
    """"balanced" or "paper": how the scale of B A is shared between the factors."""

    damping: float = 0.01
    """λ: C + λ · mean(diag C) · I."""

    residual: Annotated[str, one_of("offset", "subtract")] = "offset"
    """"offset" leaves the base weights alone; "subtract" is the papers' form."""

    quantize: Annotated[str, one_of(*QUANTIZED)] | None = None
    """"nf4" or "fp4": hold the adapted layers' base weights in 4 bits after the decomposition; the residual with ``residual: subtract``."""

    train_fully: Sequence[str] = ()
    """Parts that train whole beside the adapters, such as "projector"."""

    protect: Annotated[str, one_of("strict", "start", "whitened")] | None = None
    """"strict": A is frozen; "start": A and B train (as published); "whitened": A trains where the context is short. The first and the last
    are for KPM in offset form; None is "strict" there and "start" elsewhere."""

    variant: Annotated[str, one_of("corda", "corda++")] = "corda"
    """"corda"; or "corda++": five candidates and a budget of what ``rank`` costs everywhere, where those options are None."""

    candidates: Count | None = None
    """From how many disjoint draws of samples each layer takes the covariance that suits it best; None is one, or CorDA++'s five."""

    budget: Annotated[int, Field(ge=1, lt=2**63)] | Annotated[str, one_of("rank")] | None = None
    """Parameters of A and B to spread over the layers; "rank" for what ``rank`` everywhere takes; None gives each layer ``rank``."""

    min_rank: Count = 1
    """What each layer gets at least where a budget is spread."""

    max_rank: Count | None = None
    """What each layer gets at most where a budget is spread."""

    solver: Annotated[str, one_of(*Solver)] = "auto"
    """"exact", "partial" or "auto": see ``corda_core.decompose``."""

    tokens: str | Mapping[str, float] = "all"
    """Which tokens the language model's covariances count: "all", "image", "text", or weights {"image": w, "text": v}."""

    normalize: Annotated[str, one_of("sample-max")] | None = None
    """None: mean over tokens; "sample-max": each sample scaled to maximum 1, as in the papers."""

    max_memory: str | float | None = None
    """What the covariances may take at once, in bytes or as "8GB": the samples are gone over as often as that needs."""

    num_samples: Count = 256
    """How many samples of context are used at most."""

    batch_size: Count = 8
    """Samples in one forward pass; does not change the result."""

    seed: Seed = 0
    """Seed of the draw of samples, where there are more than ``num_samples``."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be right.

        Raises:
            ValueError: If an option has an impossible value; the text names it.
        """
        super().__post_init__()
        for option, pattern in (("targets", self.targets), ("exclude", self.exclude)):
            if isinstance(pattern, str):
                check_pattern(pattern, option)
        if self.damping < 0 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError(f"damping is {self.damping} and alpha {self.alpha}; expected damping >= 0 and alpha > 0.")
        if set(self.token_weights) != {"image", "text"} or min(self.token_weights.values()) < 0 or max(self.token_weights.values()) <= 0:
            raise ValueError(f'tokens is {self.tokens!r}; expected "all", "image", "text", or weights >= 0 of both, not all zero.')
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f'max_memory is {self.max_memory!r}; expected a positive size such as "8GB".')
        if self.protection != "start" and (self.mode != "kpm" or self.residual != "offset"):
            raise ValueError(
                f'protect="{self.protect}" goes with mode="kpm" and residual="offset", not with {self.mode!r} and {self.residual!r}.'
            )
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"min_rank is {self.min_rank} and max_rank {self.max_rank}; expected min_rank <= max_rank.")
        if self.damping == 0 and (self.assesses or self.protect == "whitened"):
            raise ValueError('damping is 0; candidates, budget and protect="whitened" need it positive: a covariance may be singular.')
        if not self.spreads and (self.min_rank, self.max_rank) != (1, None):
            raise ValueError(
                f'min_rank is {self.min_rank} and max_rank {self.max_rank}, but there is no budget to spread; set budget="rank".'
            )

    @property
    def protection(self) -> str:
        """``protect``, or what stands for None: "strict" where it can be, as it forgets least and does no harm at LoRA's rates."""
        return self.protect or ("strict" if self.mode == "kpm" and self.residual == "offset" else "start")

    @property
    def spreads(self) -> bool:
        """Whether a budget is spread over the layers."""
        return self.budget is not None or self.variant == "corda++"

    @property
    def assesses(self) -> bool:
        """Whether covariances are assessed: to choose among them, or to spread a budget."""
        return self.spreads or self.num_candidates > 1

    @property
    def num_candidates(self) -> int:
        """From how many sets of samples each layer's covariance is chosen."""
        return self.candidates if self.candidates is not None else 5 if self.variant == "corda++" else 1

    def total_budget(self, sizes: Iterable[tuple[int, int]]) -> int | None:
        """Return the parameters to spread over layers of these sizes (m, n); None if each layer gets ``rank``.

        Raises:
            ValueError: If the budget is below ``min_rank`` in every layer.
        """
        if not self.spreads:
            return None
        sizes = list(sizes)
        budget = self.budget if isinstance(self.budget, int) else sum((m + n) * min(self.rank, m, n) for m, n in sizes)
        check_budget(budget, [(m + n, min(m, n)) for m, n in sizes], self.min_rank)
        return budget

    @property
    def token_weights(self) -> Mapping[str, float]:
        """How much a token of each modality counts."""
        if not isinstance(self.tokens, str):
            return self.tokens
        return {"image": float(self.tokens in ("all", "image")), "text": float(self.tokens in ("all", "text"))}

    @property
    def max_bytes(self) -> int | None:
        """``max_memory`` in bytes.

        Raises:
            ValueError: If it cannot be read as a size.
        """
        if self.max_memory is None:
            return None
        if not isinstance(self.max_memory, str):
            return int(self.max_memory)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", self.max_memory.strip(), flags=re.IGNORECASE)
        if match is None:
            raise ValueError(f'max_memory is {self.max_memory!r}; expected bytes or a size such as "8GB" or "500MB".')
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
