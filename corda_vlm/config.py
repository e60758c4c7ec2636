"""Options as values: frozen dataclasses that refuse contradictions, and their YAML form."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field

from corda_core import Mode, Solver, Split
from corda_core.allocate import check_budget
from corda_core.files import read_yaml
from corda_core.modules import check_pattern
from corda_core.quantize import KINDS as QUANTIZED
from corda_vlm.options import Count, Options, Seed, as_declared, members_of, one_of

T = TypeVar("T")


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


def read_config(path: Path, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Return the dataclass ``schema`` filled from a YAML file, and from ``key.key=value`` overrides.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no mapping, has a key that the dataclass does not have, or lacks one that it needs.
    """
    if not path.exists():
        raise FileNotFoundError(f"The config {path} does not exist; the shipped ones are in configs/.")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected option: value lines.")
    return from_mapping(overridden(values, overrides, str(path)), schema, str(path))


def from_mapping(values: Mapping[str, Any], schema: type[T], source: str) -> T:
    """Return the dataclass ``schema`` filled from a mapping, nested dataclasses included.

    Raises:
        ValueError: If a key is unknown, a value is not what its field declares or one is missing; the text names ``source`` and option.
    """
    return _filled(values, schema, source, ())


def _filled(values: Mapping[str, Any], schema: type[T], source: str, inside: tuple[str, ...]) -> T:
    """``from_mapping`` of the options under some names."""
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    where = ", ".join([source, *inside])
    unknown = next((key for key in values if key not in fields), None)
    if unknown is not None:
        near = get_close_matches(str(unknown), fields, n=1)
        raise ValueError(
            f"{where}: unknown option {unknown!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(fields)}.")
        )
    filled = {key: _inner(value, fields[key].type, source, (*inside, key)) for key, value in values.items()}
    missing = [name for name, field in fields.items() if name not in filled and _is_required(field)]
    if missing:
        raise ValueError(f"{where}: the option {missing[0]!r} is missing and has no default; add it.")
    try:
        return schema(**as_declared(schema, filled, written=True))
    except ValueError as error:
        raise ValueError(f"{source}: {'.'.join([*inside, str(error)])}") from error


def _inner(value: Any, declared: Any, source: str, inside: tuple[str, ...]) -> Any:
    """Return an option's value, which is a dataclass of its own if its field declares one."""
    members = members_of(declared)
    nested = next((one for one in members if dataclasses.is_dataclass(one)), None)
    if nested is None or (value is None and NoneType in members) or isinstance(value, nested):  # type: ignore[arg-type]
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{source}: {'.'.join(inside)} is {value!r}; expected option: value lines.")
    return _filled(value, nested, source, inside)  # type: ignore[arg-type]


def overridden(values: Mapping[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    """Return the mapping with ``key.key=value`` overrides put in; values are read as YAML.

    Raises:
        ValueError: If an override has another form, or goes into what is no mapping.
    """
    result = copy.deepcopy(dict(values))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ValueError(f"The override {override!r} is not of the form option=value, such as training.steps=100.")
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"The override {override!r} goes into {parent!r}, which holds no options in {source}.")
        place[last] = _yaml_value(text, override)
    return result


def _yaml_value(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # numbers of more digits than Python reads, and dates that there are not
        reason = " ".join(str(error).split())
        raise ValueError(f"The override {override!r} has a value that is no YAML ({reason}); put quotes around a text.") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
