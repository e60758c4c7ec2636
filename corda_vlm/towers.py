"""Where the parts of a model live, as transformers says and where it does not, and which of their layers are adapted."""

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from corda_core import select_linears
from corda_core.layers import gathered
from corda_core.linears import LINEAR_TYPES, Patterns
from corda_core.lora import is_taken, saved_names
from corda_vlm.probe import Reach, probe

KINDS = {
    "attention": r".*\.(self_attn|attn|attention|self_attention|cross_attn|attn_pool)\..+",
    "mlp": r".*\.(mlp|feed_forward|ffn)\..+|.*\.fc\d",
    "experts": r"(.*\.)?experts\..+",
}
"""What the words "attention", "mlp" and "experts" stand for in ``targets`` and ``exclude``, alone or in a list."""


EMBEDDINGS = r"(^|\.)(embeddings|patch_embed)\."
"""Linear layers that embed patches: left out unless ``targets`` names them."""


@dataclass(frozen=True)
class Family:
    """Prefixes of the modules of each part; where they overlap, the longest counts."""

    vision: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    default: tuple[str, ...] = field(default=("language",), kw_only=True)
    """The parts that get adapters unless the user names some."""

    def prefixes(self, part: str) -> tuple[str, ...]:
        """Return where a part's modules live."""
        prefixes: tuple[str, ...] = getattr(self, part)
        return prefixes

    def part_of(self, name: str) -> str | None:
        """Return which part a layer belongs to."""
        hits = [
            (len(prefix), part) for part in PARTS for prefix in self.prefixes(part) if f"{name}.".startswith(f"{prefix}." if prefix else "")
        ]
        return max(hits)[1] if hits else None


BOTH = ("vision", "language")
TWO_TOWERS = Family(
    vision=("vision_model", "visual_projection", "vision_projection", "video_model"),
    language=("text_model", "text_projection", "qformer"),  # BLIP-2 reads text with the Q-former that it reads images with
    default=BOTH,
)
OPEN_CLIP = Family(vision=("visual",), language=("transformer", "text", "text_decoder", "token_embedding", "text_projection"), default=BOTH)
WHOLE_LANGUAGE = Family(language=("",))
WHOLE_VISION = Family(vision=("",), default=("vision",))

EXCEPTIONS: dict[str, Family] = {
    # Two vision towers, of two resolutions; transformers names the lower.
    "deepseek_vl_hybrid": Family(
        ("model.vision_model", "model.high_res_vision_model"),
        ("model.aligner", "model.high_res_vision_neck", "model.high_res_vision_proj"),
        ("model.language_model",),
    ),
    # The tower stands in what reads; what writes has the same language model again.
    "diffusion_gemma": Family(
        ("model.encoder.vision_tower",), ("model.encoder.embed_vision",), ("model.encoder.language_model", "model.decoder")
    ),
    # No vision tower: patches are embedded by one layer.
    "fuyu": Family((), ("model.vision_embed_tokens",), ("model.language_model",)),
    # The tower is called an image encoder, and the language model is what holds it.
    "git": Family(("git.image_encoder",), ("git.visual_projection",), ("git",)),
    "idefics": Family(("model.vision_model",), ("model.perceiver_resampler",), ("model",)),
    # It draws too, with parts that no image passes which is read.
    "janus": Family(("model.vision_model",), ("model.aligner",), ("model.language_model",)),
    # A vision-language model within one that acts.
    "pi0": Family(("model.vlm.vision_tower",), ("model.vlm.multi_modal_projector",), ("model.vlm.language_model", "model.dit")),
    # The tower stands in the text's encoder.
    "t5gemma2": Family(
        ("model.encoder.vision_tower",), ("model.encoder.multi_modal_projector",), ("model.encoder.text_model", "model.decoder")
    ),
    # Text and patches share one encoder.
    "udop": Family(language=("encoder", "decoder")),
}
"""``config.model_type`` -> where its parts live, if it is not where ``get_encoder`` and ``get_decoder`` of transformers say."""

PARTS = ("vision", "projector", "language")

MEDIA = ("image", "video", "audio")
"""What tokens of the text may stand for."""
SEES = re.compile(r"pixel_values|flattened_patches")
"""Arguments of a model's forward that are images."""
TOWERS = re.compile(r"(image|vision|video)_(tower|model|encoder)")
"""Names of vision towers beside that which transformers names."""
EARS = re.compile(r".*(audio|speech|sound).*")
"""Names of what hears: of no part."""
BRIDGES = re.compile(r"(deepstack_)?merger(_list)?|connector|vision_adapter|.*projector")
"""Names of projectors that stand within a vision tower."""


def family_of(model: nn.Module) -> Family:
    """Return where the model's parts live, as it has them; of a model that is not known all is language."""
    return known_family(model) or WHOLE_LANGUAGE


def known_family(model: nn.Module) -> Family | None:
    """Return the parts of a model of transformers or of open_clip; None for others."""
    if is_open_clip(model):
        return _present(model, OPEN_CLIP)
    if not hasattr(model, "config"):
        return None
    if has_two_towers(model):
        return _present(model, TWO_TOWERS)
    if is_text_only(model) or is_vision_only(model):
        return WHOLE_LANGUAGE if is_text_only(model) else WHOLE_VISION
    listed = _listed(model)
    return _borrowed(model) if listed is None else _present(model, listed)


def has_two_towers(model: nn.Module) -> bool:
    """Return whether the model compares an image tower with a text tower, as CLIP does."""
    kinds = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return is_open_clip(model) or any(kind.__name__ in kinds for kind in type(model).__mro__)


def is_open_clip(model: nn.Module) -> bool:
    """Return whether the model is one of open_clip's."""
    return isinstance(getattr(model, "visual", None), nn.Module) and hasattr(model, "encode_image") and hasattr(model, "encode_text")


def is_text_only(model: nn.Module) -> bool:
    """Return whether the model reads text and no images."""
    return not _sees(model) and _reads(model)


def is_vision_only(model: nn.Module) -> bool:
    """Return whether the model is a vision tower by itself."""
    return _sees(model) and not _reads(model)


def image_tokens(model: nn.Module) -> list[int]:
    """Return the ids of the tokens that stand for pieces of images, videos and sound."""
    config: Any = getattr(model, "config", None)
    configs = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))]
    tokens = [getattr(each, f"{kind}_{end}", None) for each in configs for kind in MEDIA for end in ("token_id", "token_index", "patch_id")]
    return sorted({token for token in tokens if isinstance(token, int) and token >= 0})


def image_dtype(model: Any) -> torch.dtype:
    """Return the precision that an open_clip model's image tower wants its images in."""
    weights = (module.weight.dtype for module in model.visual.modules() if isinstance(module, nn.Conv2d))
    return next(weights, torch.float32)


def modules_of(model: nn.Module, parts: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the modules that make up these parts.

    Raises:
        ValueError: If the model has no such part.
    """
    family, modules = family_of(model), dict(model.named_modules())
    present: list[str] = []
    for part in parts:
        names = [name for name in (family.prefixes(part) if part in PARTS else ()) if name in modules and name]
        if not names:
            known = [part for part in PARTS if any(name in modules and name for name in family.prefixes(part))]
            raise ValueError(f"train_fully names {part!r}, which {type(model).__name__} does not have; expected some of {known}.")
        present += names
    return tuple(present)


def select_layers(
    model: nn.Module,
    *,
    parts: Sequence[str] | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Return the linear layers of the named parts that match.

    Args:
        model: A vision-language model, a CLIP-type model, a vision tower or a causal language model.
        parts: Any of "language", "vision", "projector"; None takes the family's default: the language model of those that have one, both
            towers of CLIP.
        targets: As in ``corda_core.select_linears``; or "attention", "mlp" or "experts", which may stand in a list too. Fused experts are
            taken only where ``targets`` speaks of them.
        exclude: As ``targets``.

    Raises:
        ValueError: If a part is unknown for this model, or nothing matches.
    """
    family = family_of(model)
    chosen = family.default if parts is None else tuple(parts)
    known = [part for part in PARTS if family.prefixes(part)]
    unknown = [part for part in chosen if part not in known]
    if unknown or not chosen:
        raise ValueError(f"parts: {unknown or chosen!r} is not what {type(model).__name__} has; expected some of {sorted(known)}.")
    names = select_linears(model, _pattern(targets), _pattern(exclude))
    inside = tuple(name for name in names if family.part_of(name) in chosen and (targets or not re.search(EMBEDDINGS, name)))
    readable = saved_names(model, inside)
    if mistaken := [name for name in inside if name not in readable or not is_taken(model, name)]:
        warnings.warn(
            f"PEFT puts no adapters on {len(mistaken)} layer(s), such as {mistaken[0]} ({type(model).__name__}), or does not find them "
            "again in a file: left out.",
            stacklevel=2,
        )
        inside = tuple(name for name in inside if name not in set(mistaken))
    if not inside:
        what = "There are linear layers" if targets is None else f"targets={targets!r} matches layers"
        raise ValueError(f"{what}, but none of them in parts={chosen!r}; the first is {names[0]}.")
    return inside


def reach_of(model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> Reach:
    """Return what became of each layer in these batches, where it got furthest; under ``torch.distributed`` in any process's."""
    reaches = [reach for process in gathered([probe(model, batch, names) for batch in batches]) for reach in process]
    cut_off = _cut_off(model)
    learnable = {name for reach in reaches for name in reach.learnable if not cut_off.fullmatch(name)}
    ran = {name for reach in reaches for name in (*reach.learnable, *reach.unused)}
    return Reach(
        learnable=tuple(name for name in names if name in learnable),
        unused=tuple(name for name in names if name in ran - learnable),
        not_run=tuple(name for name in names if name not in ran),
    )


def learnable_layers(model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the layers that can learn from one of these batches (``corda_vlm.probe.probe``), and warn of those left out.

    Under ``torch.distributed`` from one of any process's.

    Raises:
        ValueError: If none can.
    """
    reach = reach_of(model, names, batches)
    if not reach.learnable:
        raise ValueError(
            f"None of the {len(names)} layers can learn from the first samples: {len(reach.not_run)} never ran (such as "
            f"{(reach.not_run or reach.unused)[0]}), {len(reach.unused)} ran without reaching the output; "
            "give samples that reach them (images for a vision tower), or other parts or targets."
        )
    for left_out, reason in ((reach.unused, "ran, but what they compute does not reach the output"), (reach.not_run, "never ran")):
        if left_out:
            warnings.warn(f"{len(left_out)} layer(s) {reason}, such as {left_out[0]}: left out.", stacklevel=3)
    if known_family(model) is None:
        kinds = sorted({name.rpartition(".")[2] for name in reach.learnable})
        warnings.warn(
            f"{type(model).__name__} is of no family that corda_vlm knows: took all {len(reach.learnable)} linear layers that can learn "
            f"({', '.join(kinds)}); name others with `targets`.",
            stacklevel=3,
        )
    return reach.learnable


def _cut_off(model: Any) -> re.Pattern[str]:
    """Return the names of layers whose outputs are thrown away in a way that autograd's graph does not show.

    A Q-former that reads a question beside its queries (InstructBLIP) gives on what became of the queries only.
    """
    config = getattr(getattr(model, "config", None), "qformer_config", None)
    if config is None or "qformer_input_ids" not in inspect.signature(type(model).forward).parameters:
        return re.compile("(?!)")
    return re.compile(rf".*qformer\.encoder\.layer\.{config.num_hidden_layers - 1}\.(intermediate|output)\.dense")


def _listed(model: nn.Module) -> Family | None:
    return EXCEPTIONS.get(getattr(getattr(model, "config", None), "model_type", ""))


def _sees(model: nn.Module) -> bool:
    names = inspect.signature(type(model).forward).parameters if hasattr(model, "config") else ()
    return any(SEES.match(name) for name in names) or _listed(model) is not None


def _reads(model: nn.Module) -> bool:
    return hasattr(model, "config") and bool({"input_ids", "decoder_input_ids"} & inspect.signature(type(model).forward).parameters.keys())


def _present(model: nn.Module, family: Family) -> Family:
    """Return the prefixes that this model has; models without an output layer lack the leading "model."."""
    names = {name for name, _ in model.named_modules()}

    def own(part: str) -> tuple[str, ...]:
        prefixes = (prefix if hasattr(model, "model") else prefix.removeprefix("model.") for prefix in family.prefixes(part))
        return tuple(prefix for prefix in prefixes if prefix in names)

    return Family(own("vision"), own("projector"), own("language"), default=family.default)


def _borrowed(model: Any) -> Family | None:
    """Return the parts of a vision-language model as transformers finds them; None if it finds no language model.

    Vision tower and language model are the largest modules that hold the one and not the other. What stands beside them is a projector,
    unless its name says that it is a further tower, or hears; what merges patches within a tower too.
    """
    if not hasattr(model, "get_decoder"):
        return None
    names = {module: name for name, module in model.named_modules()}
    decoder, tower = names.get(model.get_decoder(), ""), names.get(model.get_encoder(modality="image"), "")
    if not tower or f"{decoder}.".startswith(f"{tower}."):  # an encoder of images, such as Pix2Struct's
        tower = names.get(model.get_encoder(), "")
    if not decoder or not tower or f"{decoder}.".startswith(f"{tower}."):
        return Family(language=(decoder,)) if decoder else None
    decoder, tower = _widest(decoder, tower), _widest(tower, decoder)
    beside = [name for child, name in names.items() if _is_beside(name, decoder) and name != tower and _is_adaptable(model, child)]
    towers = [name for name in beside if TOWERS.fullmatch(name.rpartition(".")[2])]
    bridges = [name for name in names.values() if name.rpartition(".")[0] == tower and BRIDGES.fullmatch(name.rpartition(".")[2])]
    return Family((tower, *towers), (*bridges, *(name for name in beside if name not in towers)), (decoder,))


def _is_beside(name: str, other: str) -> bool:
    """Return whether two modules are different children of one."""
    return name not in ("", other) and name.rpartition(".")[0] == other.rpartition(".")[0] and not EARS.fullmatch(name.rpartition(".")[2])


def _is_adaptable(model: Any, module: nn.Module) -> bool:
    """Return whether a module has linear layers and is neither the output layer nor what holds all else."""
    inside = any(isinstance(part, LINEAR_TYPES) for part in module.modules())
    return inside and module is not model.get_output_embeddings() and module is not model.base_model


def _widest(name: str, other: str) -> str:
    """Return the outermost module around ``name`` that does not hold ``other``."""
    steps = name.split(".")
    around = (".".join(steps[:count]) for count in range(1, len(steps) + 1))
    return next(prefix for prefix in around if not f"{other}.".startswith(f"{prefix}."))


def _pattern(patterns: str | Sequence[str] | None) -> Patterns | None:
    if patterns is None or isinstance(patterns, str):
        return None if patterns is None else KINDS.get(patterns, patterns)
    return [re.compile(KINDS[pattern]) if pattern in KINDS else pattern for pattern in patterns]
