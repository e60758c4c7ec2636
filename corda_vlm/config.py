"""How an adapter is prepared, as a value: each option is declared and documented here, once."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from corda_core import Mode, Split
from corda_core.allocate import budget_of_rank, check_budget
from corda_core.attach import Residual, check_experts, check_options
from corda_core.linears import FourBit, check_pattern, expert_of
from corda_core.lora import Protect
from corda_vlm.options import Count, Options, Seed, one_of


class Variant(StrEnum):
    """Which paper's recipe fills options that are None."""

    CORDA = "corda"
    CORDA_PLUS_PLUS = "corda++"


@dataclass(frozen=True)
class CordaConfig(Options):
    """How an adapter is prepared: the keywords of ``corda_vlm.prepare``, and ``corda`` in a recipe."""

    mode: Mode = Mode.KPM
    """"kpm": keep what the context shows; "ipm": learn faster what the context shows; "lora": start at random, as plain LoRA does, to
    train beside ``keep`` or to compare with."""

    rank: Count = 128
    """r of every layer, clipped where a layer is smaller; 128 is the papers', we measured 16 to 64."""

    alpha: float | None = None
    """LoRA's alpha; None takes the rank (scaling 1)."""

    targets: str | Sequence[str] | None = None
    """Layers to adapt, as PEFT's ``target_modules``, or "attention", "mlp" or "experts", also in a list; None takes every linear layer of
    the parts that can learn. Fused experts (Mixtral, Qwen3-MoE, gpt-oss) are taken only where "experts" is named: each has a covariance."""

    exclude: str | Sequence[str] | None = None
    """Layers to leave out, named as in ``targets``."""

    parts: Sequence[str] | None = None
    """Of "language", "vision", "projector"; None takes the language model, or both towers of CLIP, or the whole of a lone tower."""

    split: Split = Split.BALANCED
    """"balanced" or "paper": how the scale of B A is shared between the factors."""

    damping: float = 0.01
    """λ of C + λ · mean(diag C) · I: tells directions apart that no sample reached."""

    residual: Residual = Residual.OFFSET
    """"offset" leaves the base weights alone; "subtract" is the papers' form, (W − B0 A0) x + B A x."""

    quantize: FourBit | None = None
    """"nf4" or "fp4": hold the adapted layers' base weights in 4 bits after the decomposition; the residual with ``residual: subtract``."""

    train_fully: Sequence[str] = ()
    """Parts that train whole and get no adapters, such as "projector"."""

    protect: Protect | None = None
    """"strict": A stays frozen at the directions that the context uses least, B trains from 0 (half the parameters); "start": A and B
    train, as published; "whitened": both train from where strict starts, A in coordinates in which the context's directions are short.
    The first and the last are for KPM in offset form; "none": A trains too, B from 0, an ordinary LoRA. None is "strict" for KPM in
    offset form, "start" elsewhere, and "none" for ``mode: lora``."""

    variant: Variant = Variant.CORDA
    """"corda"; or "corda++": five candidates and a budget of what ``rank`` costs everywhere, where those options are None."""

    candidates: Count | None = None
    """From how many disjoint draws of samples each layer takes the covariance that suits it best; None is one, or CorDA++'s five."""

    budget: Annotated[int, Field(ge=1, lt=2**63)] | Annotated[str, one_of("rank")] | None = None
    """Parameters of A and B to spread over the layers by their spectra; "rank" for what ``rank`` everywhere takes; None gives each layer
    ``rank``."""

    min_rank: Count = 1
    """What each layer gets at least where a budget is spread."""

    max_rank: Count | None = None
    """What each layer gets at most where a budget is spread."""

    tokens: str | Mapping[str, float] = "all"
    """Which tokens the language model's covariances count: "all", "image", "text", or weights such as {"image": 0.2, "text": 1}, as
    hundreds of image tokens drown a question."""

    max_memory: str | float | None = None
    """What the covariances may take at once, in bytes or as "8GB"; the samples are run as often as that needs, with the same result. None
    takes half of what is free on a GPU, and sets no limit on CPUs."""

    num_samples: Count = 256
    """How many samples of context are drawn at most. Ready batches are all used, or this many of them for each of several candidates."""

    batch_size: Count = 8
    """Samples in one forward pass; does not change the result."""

    seed: Seed = 0
    """Seed of the draw of samples, where there are more than ``num_samples``, and of a random start."""

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
        check_options(self.mode, self.protection, self.residual)
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"min_rank is {self.min_rank} and max_rank {self.max_rank}; expected min_rank <= max_rank.")
        if self.damping == 0 and (self.assesses or self.protect is Protect.WHITENED):
            raise ValueError('damping is 0; candidates, budget and protect="whitened" need it positive: a covariance may be singular.')
        if self.mode is Mode.LORA and (self.assesses or self.tokens != "all"):
            raise ValueError("mode is lora, which starts at random and reads no context; leave out candidates, variant, budget and tokens.")
        if not self.spreads and (self.min_rank, self.max_rank) != (1, None):
            raise ValueError(
                f'min_rank is {self.min_rank} and max_rank {self.max_rank}, but there is no budget to spread; set budget="rank".'
            )

    @property
    def protection(self) -> Protect:
        """``protect``, or what stands for None: "strict" where it can be, as it forgets least and does no harm at LoRA's rates."""
        if self.mode is Mode.LORA:
            return self.protect or Protect.NONE
        can_be_strict = self.mode is Mode.KPM and self.residual is Residual.OFFSET
        return self.protect or (Protect.STRICT if can_be_strict else Protect.START)

    @property
    def spreads(self) -> bool:
        """Whether a budget is spread over the layers."""
        return self.budget is not None or self.variant is Variant.CORDA_PLUS_PLUS

    @property
    def assesses(self) -> bool:
        """Whether covariances are assessed: to choose among them, or to spread a budget."""
        return self.spreads or self.num_candidates > 1

    @property
    def num_candidates(self) -> int:
        """From how many sets of samples each layer's covariance is chosen."""
        return self.candidates if self.candidates is not None else 5 if self.variant is Variant.CORDA_PLUS_PLUS else 1

    def total_budget(self, shapes: Iterable[tuple[int, int]]) -> int | None:
        """Return the parameters to spread over layers of these shapes (m, n); None if each layer gets ``rank``.

        Raises:
            ValueError: If the budget is below ``min_rank`` in every layer.
        """
        if not self.spreads:
            return None
        shapes = list(shapes)
        budget = self.budget if isinstance(self.budget, int) else budget_of_rank(shapes, self.rank)
        check_budget(budget, [(m + n, min(m, n)) for m, n in shapes], self.min_rank)
        return budget

    def check_layers(self, names: Iterable[str]) -> None:
        """Refuse what does not go with these layers.

        Raises:
            ValueError: If fused experts are among them, and options are such as they cannot have.
        """
        experts = [name for name in names if expert_of(name)]
        check_experts(experts, self.protection, self.residual, self.quantize)
        if experts and self.assesses:
            raise ValueError(
                f"{experts[0]} is a fused expert, of which PEFT gives all in a parameter one rank and samples reach some: no budget can be "
                "spread and no candidate chosen; leave candidates, variant and budget, or the experts, out."
            )

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
