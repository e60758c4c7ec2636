"""What a study's methods are given, and what they return: a base with something to learn and to keep, and how both are measured."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from torch import Tensor, nn

from corda_core import Covariance, collect, data_digest, load_covariances, save_covariances
from corda_core.bases import base_digest
from corda_core.covariance import together
from corda_core.linears import LINEAR_TYPES

Batch = Mapping[str, Any]
TARGET = "target"
"""The name of what is learned among the contexts and the scores; all other scores are of what is to be kept."""
WARMUP = 0.03
"""Part of the steps after which the peak learning rate is reached."""
WRITTEN = "self"
"""The name of the context that the base wrote itself, without old data."""
FILES = "files"
"""The name of the context of which covariances alone are left: that of the base, and of past tasks."""


@dataclass(frozen=True)
class Score:
    """How well a model does one thing."""

    loss: float | None
    """Mean negative log-likelihood of the right answer, or of the text, in nats; None where it is not measured."""

    accuracy: float | None = None
    """In percent, where there are answers."""

    losses: Sequence[float] | None = None
    """Of each item (a picture, an answer, a window), in nats, always in one order; ``loss`` is their mean."""

    right: Sequence[bool] | None = None
    """Whether each item's answer is right; ``accuracy`` is the percentage."""

    @staticmethod
    def of(losses: Sequence[float] | None, right: Sequence[bool] | None = None) -> "Score":
        """Return the score of items that all count alike."""
        return Score(None if losses is None else fmean(losses), None if right is None else 100 * fmean(right), losses, right)


def plain_scores(scores: Mapping[str, Score], *, items: bool = True) -> dict[str, Any]:
    """Return scores for JSON: ``losses`` in thousandths of a nat and ``right`` as 0 or 1, where there are such and they are asked for."""
    plain: dict[str, dict[str, Any]] = {name: {"loss": score.loss, "accuracy": score.accuracy} for name, score in scores.items()}
    for name, score in scores.items() if items else ():
        if score.losses is not None and all(map(math.isfinite, score.losses)):
            plain[name]["losses"] = [round(1000 * loss) for loss in score.losses]
        if score.right is not None:
            plain[name]["right"] = [int(right) for right in score.right]
    return plain


@dataclass(frozen=True)
class Task:
    """One setting with its data drawn, for one run."""

    model: nn.Module
    """The untouched base in float32 and evaluation mode, all parameters frozen. A method may change it in place."""

    layers: tuple[str, ...]
    """The linear layers that may change."""

    loss: Callable[[nn.Module, Batch], Tensor]
    """The mean loss of a training batch, of the base or of what PEFT made of it."""

    batches: Sequence[Batch]
    """What is trained on, one batch a step, in order."""

    contexts: Mapping[str, Sequence[Batch]]
    """Inputs of the model by domain, for covariances: those to be kept, and what is learned, ``TARGET`` and
    perhaps its parts. All tokens count: none is padding.
    One domain alone need not reach every layer; all that are to be kept together do, and so does ``TARGET``."""

    validate: Callable[[nn.Module], float]
    """The loss of what is learned, in nats, on samples that neither training nor ``measure`` has."""

    measure: Callable[[nn.Module], dict[str, Score]]
    """What was learned (``TARGET``) and each thing that is to be kept, on samples that no training and no context has."""

    cache: Path
    """Where covariances are kept for the next run."""

    seed: int
    """Of what the method draws."""

    learned: tuple[str, ...] = ()
    """Where several tasks are learned at once: their names among the contexts and the scores; ``TARGET`` is then their mixture. They are
    not to be kept."""

    guessing: float = math.inf
    """The loss of what is learned, in nats, of a guesser who knows the form of an answer: gains count from there where the
    base is worse, or a method that taught the form alone would look as good as one that taught the thing."""

    kept_guessing: Mapping[str, float] = field(default_factory=dict)
    """The loss, in nats, of a guesser of each thing that is to be kept and has one: classes, choices; texts have none."""

    pairs: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    """Of a model with two towers the pictures of ``contexts`` that are to be kept with their captions, by domain."""

    written: Callable[[nn.Module], Sequence[Batch]] | None = None
    """Returns the context ``WRITTEN``, as those of ``contexts``: what the base itself writes; None where the setting has no such thing."""

    held_out: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    """Some inputs of what is measured of the things that are to be kept, by name: the KL of the base to what it became is taken there."""

    casting: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The precision that the setting's losses are taken in."""

    kept_kl: Callable[[nn.Module], dict[str, float]] | None = None
    """The mean KL of the base's predictions to a model's, nats, on what is measured of the things that are to be kept, by name, where that
    is no language model's on ``held_out``."""

    kept_loss: Callable[[nn.Module, Batch], Tensor] | None = None
    """The mean loss over the samples of a batch from ``contexts``, for methods that ask what bends it: of a text its next tokens, of a
    classifier its own predictions; None where the setting has no such loss."""

    remembered: tuple[Mapping[str, Covariance], ...] = ()
    """Covariances of what is to be kept and can be run through no model again (``FILES``)."""

    def default_context(self, mode: str) -> tuple[str, ...]:
        """Return the domains that covariances are usually taken from: what is learned for IPM, all that is kept for KPM."""
        return (TARGET,) if mode == "ipm" else tuple(domain for domain in self.contexts if domain not in (TARGET, *self.learned))

    def context(self, domain: str) -> Sequence[Batch]:
        """Return the batches of one domain, or those that the base wrote (``WRITTEN``).

        Raises:
            ValueError: If the setting has no such domain.
        """
        if domain == WRITTEN and self.written is not None:
            return self.written(self.model)
        if domain not in self.contexts:
            raise ValueError(f"The context {domain} is not one of this setting's: {', '.join(self.contexts)}.")
        return self.contexts[domain]

    def samples(self, domain: str) -> Sequence[Batch]:
        """Return the batches of one domain, with captions where the model has two towers.

        Raises:
            ValueError: If the setting has no such domain.
        """
        return self.pairs[domain] if domain in self.pairs else self.context(domain)

    def covariances(self, *domains: str, first: int | None = None, draw: int = 0) -> dict[str, Covariance]:
        """Return the covariances of one or several domains' samples taken together, from the cache where they are there.

        Args:
            domains: Names of contexts.
            first: Take only so many batches of each domain, at least 1; None takes all.
            draw: Leave out so many times as many batches before these.

        Raises:
            ValueError: If a domain is unknown or too short, the domains do not reach all layers, ``first`` is below 1, or the model carries
                adapters already.
        """
        if domains == (FILES,) and self.remembered:
            total = together(self.remembered)
            return {name: total[name] for name in self.layers}
        if not domains:
            raise ValueError(f"A method names no context; expected some of this setting's: {', '.join(self.contexts)}.")
        if first is not None and first < 1:
            raise ValueError(f"A context of {first} batches of each domain is empty; expected at least 1, or None for all.")
        start = draw * (first or 0)
        batches = [batch for domain in domains for batch in self.context(domain)[start : None if first is None else start + first]]
        if draw and len(batches) < len(domains) * (first or math.inf):
            raise ValueError(
                f"The context {', '.join(domains)} is too short for {draw + 1} draws of {first} batches; take fewer or shorter."
            )
        digest = data_digest(batches)
        key = hashlib.sha256("\n".join((digest, base_digest(self.model, self.layers), *self.layers)).encode()).hexdigest()[:12]
        path = self.cache / f"{'-'.join(domains)}-{key}.safetensors"
        if not path.exists():
            collected = self._collected(domains, batches)
            self.cache.mkdir(parents=True, exist_ok=True)
            save_covariances(collected, path, model=self.model, data=digest, options={})
        return load_covariances(path, model=self.model, data=digest, options={})

    def _collected(self, domains: Sequence[str], batches: Sequence[Batch]) -> dict[str, Covariance]:
        adapted = [name for name in self.layers if not isinstance(self.model.get_submodule(name), LINEAR_TYPES)]
        if adapted:
            raise ValueError(f"{adapted[0]} carries an adapter, but covariances are those of the base; ask for them before it is adapted.")
        try:
            return collect(self.model, batches, self.layers)
        except ValueError as error:
            raise ValueError(
                f"The context {', '.join(domains)} does not do for all {len(self.layers)} layers: {error} This setting's contexts are "
                f"{', '.join(self.contexts)}; several may be taken together."
            ) from error


@dataclass(frozen=True)
class Adapted:
    """A model made ready for training by a method."""

    model: nn.Module
    """What is trained and called: all its parameters that take gradients. The layers of the task are in ``base_of(model)`` under their
    names, and each is still linear in its input, apart from its bias."""

    penalty: Callable[[], Tensor | None] | None = None
    """Called once a step, in order: what is added to the loss; None adds nothing to this step's."""

    after_step: Callable[[], object] | None = None
    """Called after each step of the optimiser."""

    finish: Callable[[], Mapping[str, float]] | None = None
    """Called once after the last step, before anything is measured; what it returns is recorded."""

    weight_decay: float = 0.0
    """AdamW's."""

    warmup: float = WARMUP
    """Part of the steps after which the peak rate is reached."""


class Method(Protocol):
    """A way to fine-tune: a frozen dataclass of its options, in a file of ``corda_eval.study.methods`` of its own."""

    def adapt(self, task: Task) -> Adapted:
        """Return the task's model made ready; the layers must be those of ``task.layers``.

        Raises:
            ValueError: If an option is not right, or the method cannot adapt such layers.
        """
        ...
