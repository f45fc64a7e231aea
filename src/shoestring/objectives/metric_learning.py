r"""Metric learning: a classifier on features of length 1, spread over the sphere and drawn together by class.

Source   "Unlocking the Hidden Potential of CLIP in Generalizable Deepfake Detection", arXiv:2503.19683; weights of its
         successor GenD, arXiv:2508.06248; alignment and uniformity: Wang, Isola 2020, arXiv:2005.10242
Update   f = v / |v|, logits = scale * W f + b;  loss + alignment * L_A + uniformity * L_U
         L_A = mean over pairs i < j of one class of |f_i - f_j|^alpha
         L_U = log of the mean over pairs i < j of exp(-t |f_i - f_j|^2)
         slerp, in training: f'_i = (sin((1 - l) w) f_i + sin(l w) f_j) / sin w, w the angle between f_i and f_j of a
         random j of the same class, l ~ U(0, 1); f' takes the place of f
Shapes   v, f [batch, features]: what enters the last linear layer of the classifier
Trains   with learn_scale one number; for the rest what the recipe trains, such as norms or adapters, and the head
Costs    the squared distances of the pairs of a batch
Differs  slerp makes new tensors; between near features it goes along the straight line, scaled to length 1. Losses are
         of one micro-batch on one device. Frames of a video are not averaged. scale is ours: logits of features of
         length 1 are at most |W|
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RunFailed, SettingError
from ..fakes import has_values
from ..forwards import forward_replaced
from ..modes import in_training
from ..precision import at_least_float32
from ..technique import Phase, Technique, register_technique

SMALLEST = 1e-6
"""Of distances; and what the cosine of two features is below 1 where slerp goes along the straight line."""
SCALE = "feature_scale"


@register_technique
@dataclass
class MetricLearning(Technique):
    """Features of length 1 before the classifier of images or texts, with losses over the pairs of a batch.

    alignment, uniformity: weights of L_A and L_U, at least 0. GenD's are 0.1 and 0.5.
    alpha, temperature: the power of distances in L_A, and t of L_U; above 0.
    slerp: move features towards others of their class in training.
    scale: of the logits, above 0; learn_scale: it trains, from that value.

    Evaluation uses the same head, so the trained model needs the recipe (`shoestring.recipe.load`).

    Raises SettingError for values out of range, for models without a linear classifier of one vector a sample, for
    labels that are not one class a sample, and for a first batch of one sample with uniformity.
    """

    name: ClassVar[str] = "metric_learning"
    phase: ClassVar[Phase] = Phase.OBJECTIVE
    claims: ClassVar[frozenset[str]] = frozenset({"the output head"})
    loss_over_batch: ClassVar[bool] = True

    alignment: float = 0.1
    uniformity: float = 0.5
    alpha: float = 2.0
    temperature: float = 2.0
    slerp: bool = False
    scale: float = 1.0
    learn_scale: bool = False

    def __post_init__(self) -> None:
        for name in ("alignment", "uniformity"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} of metric_learning must be at least 0, got {getattr(self, name)}.")
        for name in ("alpha", "temperature", "scale"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} of metric_learning must be above 0, got {getattr(self, name)}.")
        self._labels: Tensor | None = None  # of the forward in training that runs now
        self._features: Tensor | None = None
        self._learned: nn.Parameter | None = None
        self._had_pairs = {"alignment": False, "uniformity": False}

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put features of length 1 before the classifier."""
        owner, head = find_classifier(model)

        def forward(plain: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._features = None
            self._labels = None
            if in_training(module) and (self.slerp or self.alignment or self.uniformity):
                labels = self._checked(kwargs.get("labels"))
                self._labels = labels if self.slerp else None
            try:
                return plain(*args, **kwargs)
            finally:
                self._labels = None

        def head_forward(plain: Callable[..., Any], module: nn.Module, v: Tensor) -> Tensor:
            if v.dim() != 2:
                raise SettingError(
                    "metric_learning needs one vector a sample before the classifier, [batch, features], got "
                    f"{list(v.shape)}: this model classifies every token and then picks one. Leave it out."
                )
            f = F.normalize(at_least_float32(v), dim=1)
            if self._labels is not None:
                f = slerp_in_classes(f, self._labels)
            if in_training(module):
                self._features = f
            scale = self.scale if self._learned is None else self._learned
            logits: Tensor = plain((f * scale).to(v.dtype))
            return logits

        with forward_replaced(owner, forward), forward_replaced(head, head_forward):
            if self.learn_scale:
                self._learned = nn.Parameter(torch.tensor(self.scale, device=head.weight.device))
                owner.register_parameter(SCALE, self._learned)
            try:
                yield model
            finally:
                owner._parameters.pop(SCALE, None)
                self._learned = self._features = None

    def _checked(self, labels: Any) -> Tensor:
        """The class of each sample."""
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            got = f"{list(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else repr(labels)
            raise SettingError(
                f"metric_learning needs labels of shape [batch], one class of each sample as a whole number, got {got}."
            )
        return labels

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """alignment * L_A + uniformity * L_U of the features of this forward.

        Raises RunFailed if they hold NaN or Inf.
        """
        f, self._features = self._features, None
        if f is None or not (self.alignment or self.uniformity):
            return None
        labels = self._checked(batch.get("labels"))
        if has_values(f) and not torch.isfinite(f).all():
            raise RunFailed(
                "The features before the classifier hold NaN or Inf, so that metric_learning has no value: lower "
                "train.learning_rate, or train in bf16 in place of fp16."
            )
        with torch.autocast(f.device.type, enabled=False):
            total = f.new_zeros(())
            if self.alignment:
                total = total + self.alignment * alignment_loss(f, labels, self.alpha)
                self._note_pairs(labels)
            if self.uniformity and len(f) > 1:
                total = total + self.uniformity * uniformity_loss(f, self.temperature)
            elif self.uniformity and not self._had_pairs["uniformity"]:
                raise SettingError(
                    "uniformity of metric_learning needs pairs, but there is 1 sample in the batch: set "
                    "per_device_train_batch_size to 2 or more, or uniformity to 0."
                )
            self._had_pairs["uniformity"] = True  # the last batch of an epoch may be of one
            return total

    def _note_pairs(self, labels: Tensor) -> None:
        """Warn, once, if the first batch has no two samples of one class."""
        if self._had_pairs["alignment"] or not has_values(labels):
            return
        self._had_pairs["alignment"] = True
        if len(labels.unique()) == len(labels):
            warnings.warn(
                "No two samples of the batch are of one class, so alignment of metric_learning is 0 there: larger "
                "batches hold more pairs.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The learned scale."""
        return {} if self._learned is None else {"scale": self._learned.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the learned scale."""
        if self._learned is not None:
            with torch.no_grad():
                self._learned.copy_(state["scale"])


def find_classifier(model: nn.Module) -> tuple[PreTrainedModel, nn.Linear]:
    """The model that classifies, and the last linear layer of its head, in the copy that trains if there is one.

    Raises SettingError if there is none, or one that is adapted itself.
    """
    owner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    num_labels = getattr(getattr(owner, "config", None), "num_labels", None)
    heads = () if owner is None else [child for child in owner.children() if child is not owner.base_model]
    inside = [module for child in heads for module in _in_use(child)]
    found = [module for module in inside if getattr(module, "out_features", None) == num_labels]
    if owner is None or not found or owner.get_output_embeddings() is not None:
        raise SettingError(
            f"metric_learning needs a classifier of images or texts, with a linear layer of as many outputs as labels; "
            f"{type(owner or model).__name__} has none. Load the model for classification, or leave it out."
        )
    if not isinstance(head := found[-1], nn.Linear) or isinstance(head, BaseTunerLayer):
        raise SettingError(
            f"metric_learning needs a plain nn.Linear as last layer of the classifier, but it is of type "
            f"{type(head).__name__}: list it in modules_to_save in place of target_modules."
        )
    return owner, head


def _in_use(head: nn.Module) -> list[nn.Module]:
    """The modules of a head, of copies that peft trains the one in use."""
    if isinstance(head, ModulesToSaveWrapper):
        return _in_use(head.modules_to_save[head.active_adapters[0]])
    if isinstance(head, BaseTunerLayer):
        return [head]
    return [head, *(module for child in head.children() for module in _in_use(child))]


def alignment_loss(
    f: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"], alpha: float = 2.0
) -> Float[Tensor, ""]:
    """The mean over pairs of one class of their distance to the power alpha; 0, with a graph, without such pairs."""
    same = (labels[:, None] == labels)[_pairs(len(f), f.device)]
    return (distances(f).pow(alpha) * same).sum() / same.sum().clamp(min=1)


def uniformity_loss(f: Float[Tensor, "batch features"], temperature: float = 2.0) -> Float[Tensor, ""]:
    """The log of the mean over pairs of exp(-temperature times their squared distance); lower is more uniform."""
    squares = distances(f).square()
    return (-temperature * squares).logsumexp(0) - math.log(len(squares))


def distances(f: Float[Tensor, "batch features"]) -> Float[Tensor, " pairs"]:
    """|f_i - f_j| for i < j, at least 1e-6."""
    return F.pdist(f).clamp(min=SMALLEST)


def _pairs(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(count, count, 1, device=device)
    return first, second


def slerp_in_classes(
    f: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, "batch features"]:
    """Each row somewhere on the arc to a random other one of its class; itself, if there is no other."""
    other = (labels[:, None] == labels) & ~torch.eye(len(f), dtype=torch.bool, device=f.device)
    drawn = torch.rand(len(f), len(f), device=f.device)
    alone = torch.arange(len(f), device=f.device)
    partner = torch.where(other.any(1), drawn.masked_fill(~other, -1).argmax(1), alone)
    return slerp(f, f[partner], torch.rand(len(f), device=f.device).to(f.dtype))


def slerp(
    a: Float[Tensor, "batch features"], b: Float[Tensor, "batch features"], share: Float[Tensor, " batch"]
) -> Float[Tensor, "batch features"]:
    """The points at `share` of the arcs from a to b, all of length 1; of near ones on the straight line."""
    least = 1e-7 if a.dtype == torch.float32 else 1e-12
    cosine = (a * b).sum(1, keepdim=True)
    omega = cosine.clamp(-1 + least, 1 - least).arccos()
    share = share[:, None]
    parallel = cosine > 1 - SMALLEST
    sine = torch.where(parallel, 1, omega.sin())
    along = torch.where(parallel, 1 - share, ((1 - share) * omega).sin() / sine)
    across = torch.where(parallel, share, (share * omega).sin() / sine)
    return F.normalize(along * a + across * b, dim=1)
