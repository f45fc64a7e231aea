r"""SPT: a budget of trained parameters goes where the loss is sensitive, as low-rank modules or as single numbers.

Source   He, Cai, Zhang, Tao, Zhuang 2023, arXiv:2303.08566 (ICCV 2023)
Code     github.com/ziplab/SPT, of which nothing is copied
Update   s = sum over rows of g^2 for each number of the pretrained weights; m = how many of a tensor's are among the
         tau largest of all. With P the parameters of a module for that matrix, a tensor of D numbers trains as
         matrix  m >= structured_fraction P: y = x W^T + x A^T B^T (lora), or o + A(o) with o = x W^T (bottleneck);
                 otherwise its m numbers: y = x (W + S)^T, S sparse with m numbers
         vector  m >= vector_fraction D: whole; otherwise not at all
         tau is the largest with which what trains stays within the budget
Shapes   W [out, in], A [r, in], B [out, r], vectors [D]
Start    A Kaiming, B = 0, S = 0: step 0 is the pretrained model
Trains   at most `budget` numbers, beside a new head
Costs    before training a step of full training without its optimizer a row, one dense gradient at a time, and 4
         bytes a number to choose from on the host. Then as LoRA; a matrix whose numbers train keeps its input for
         backward and makes one dense gradient, one matrix at a time. 16 bytes a trained number with AdamW
Differs  rows are scored one by one, in eval mode; in the paper batches are, with dropout
         tau is found among all there are, not on a grid; numbers with equal scores count together
         the numbers of W train, not a difference to them, so that weight decay acts on them
         the structured branch has no DropPath; dropout is 0 unless asked for
         a matrix that computes queries, keys and values together counts as one
         vectors are those in blocks; a final norm outside of them stays frozen
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from ..adapters.as_technique import PeftTechnique
from ..adapters.base import has_linear_weight, linear_sizes
from ..adapters.bottleneck import BottleneckConfig
from ..errors import SettingError
from ..fakes import has_values
from ..quantisation.calibration import Calibrated
from ..technique import register_technique
from ..whole_files import write_text
from .base import check_trainable, named_parameters, settings_error
from .scores import gradient_scores
from .sparse import SparseSelection

logger = logging.getLogger(__name__)

ROUTING_FILE, MODULES_FOLDER = "routing.json", "structured"
CLASS_TOKENS = frozenset({"cls_token", "class_token", "class_embedding"})
NONE_CHOSEN = 0x7F800000  # the bits of infinity in float32; lower bits are lower thresholds, 0 chooses all

Kind = Literal["structured", "sparse", "vector", "frozen"]


@dataclass(frozen=True)
class Route:
    """How a tensor trains. members: of its numbers, those among the most sensitive. trained: how many train for it."""

    kind: Kind
    members: int
    trained: int


@dataclass(frozen=True)
class Candidate:
    """A tensor to choose from. size: its numbers. module_size: parameters of a module for it, None for a vector."""

    size: int
    module_size: int | None


@register_technique
@dataclass(kw_only=True)
class SPT(Calibrated, SparseSelection):
    """Trains what the data says is sensitive: modules where much of a matrix is, single numbers elsewhere.

    The data is what the recipe is attached with, `recipe.apply(model, data={"train": rows})`; `shoestring train` gives
    its own.

    budget: the most numbers that train beside a new head, as a count, or as a share of all there are to choose from.
    structured: the module for a matrix: "lora", or "bottleneck", a small network after the layer.
    r: rank of LoRA, or inner size of the bottleneck. dropout: of that module.
    structured_fraction: a matrix gets a module if it has this share of the module's parameters among the most
        sensitive numbers; 0.1 in the paper.
    vector_fraction: a vector trains if this share of it is among them; 0.2 in the paper.
    train_class_token: also train the token that a vision transformer classifies by; it counts.
    target_modules, exclude_modules: whose weights and vectors may be chosen; None: linear layers and all vectors in the
        model's blocks.
    calibration_rows, calibration_max_tokens, calibration_seed: how many rows, cut to how many tokens, which ones.
    train_head: also train what stands outside of the pretrained model, such as a new classifier.

    Raises SettingError for settings out of range; on attaching, if the budget is too small or there is no data.
    """

    name: ClassVar[str] = "spt"

    budget: int | float = 0.005
    structured: Literal["lora", "bottleneck"] = "lora"
    r: int = 8
    dropout: float = 0.0
    structured_fraction: float = 0.1
    vector_fraction: float = 0.2
    train_class_token: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        count = isinstance(self.budget, int) and self.budget >= 1
        if not count and not (isinstance(self.budget, float) and 0 < self.budget <= 1):
            raise settings_error(
                "spt", "budget", "a count of at least 1 or a share above 0 and at most 1.0", self.budget
            )
        if self.structured not in ("lora", "bottleneck"):
            raise settings_error("spt", "structured", "lora or bottleneck", self.structured)
        if self.r < 1:
            raise settings_error("spt", "r", "at least 1", self.r)
        if not 0 <= self.dropout < 1:
            raise settings_error("spt", "dropout", "at least 0 and below 1", self.dropout)
        for setting in ("structured_fraction", "vector_fraction"):
            if not 0 < getattr(self, setting) <= 1:
                raise settings_error("spt", setting, "above 0 and at most 1", getattr(self, setting))
        self.routes: dict[str, Route] = {}
        self._saved: dict[str, Route] = {}
        self._chosen: dict[str, Tensor] = {}
        self._modules: PeftTechnique | None = None
        self._whole: list[tuple[nn.Parameter, Tensor]] = []  # what trains whole, with what it was before

    def see_saved(self, folder: Path) -> None:
        """Take the routing from the files, whatever data there is."""
        super().see_saved(folder)
        self._saved = read_routing(folder)

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Choose, and put modules on the matrices that get one.

        Raises SettingError, naming it, for what cannot be chosen from, and for a budget that nothing fits into.
        """
        try:
            with super().attach(model), self._with_modules(model) as wrapped:
                yield wrapped
        finally:
            self.routes, self._saved, self._whole = {}, {}, []

    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Find the routes; returns the class token and the vectors that train."""
        found = {name: parameter for name, (_, parameter) in super().candidates(model).items()}
        check_trainable(self.name, found)
        tokens = {name: p for name, _, key, p in named_parameters(model) if key in CLASS_TOKENS}
        tokens = tokens if self.train_class_token else {}
        if not self.values_follow:
            self.routes = self._routed(model, found, sum(p.numel() for p in tokens.values()))
            logger.info("%s", self.routing_table())
        elif self._saved.keys() - found.keys():
            odd = sorted(self._saved.keys() - found.keys())[0]
            raise SettingError(f"What spt has saved was made of another model or other targets: {odd} is not here.")
        else:
            self.routes = self._saved
        chosen = tokens | {name: found[name] for name, route in self.routes.items() if route.kind == "vector"}
        self._whole = [(parameter, parameter.detach().clone()) for parameter in chosen.values()]
        return chosen

    def candidates(self, model: nn.Module) -> dict[str, tuple[list[tuple[nn.Module, str]], nn.Parameter]]:
        """The matrices of which single numbers train."""
        sparse = {name for name, route in self.routes.items() if route.kind == "sparse"}
        return {name: found for name, found in super().candidates(model).items() if name in sparse} if sparse else {}

    def may_choose(self, module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
        """Weights of linear layers, and vectors.

        Raises SettingError for other weights of modules that are named in target_modules.
        """
        if parameter.dim() == 1 or (key == "weight" and parameter.dim() == 2 and has_linear_weight(module)):
            return True
        if self.target_modules is not None:
            raise SettingError(
                f"spt chooses from linear layers and vectors, but target_modules names a {type(module).__name__}, "
                f"whose {key} is of shape {tuple(parameter.shape)}: leave it out, or list it in exclude_modules."
            )
        return False

    def places(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Int[Tensor, " n"]]:
        """The numbers of these matrices that are among the most sensitive."""
        places, self._chosen = {name: self._chosen[name] for name in weights}, {}
        return places

    def _routed(self, model: nn.Module, found: Mapping[str, nn.Parameter], tokens: int) -> dict[str, Route]:
        """The routes of all tensors within the budget, of which class tokens take so many numbers."""
        candidates = {name: self._candidate(model, name, parameter) for name, parameter in found.items()}
        total = sum(candidate.size for candidate in candidates.values())
        budget = self.budget if isinstance(self.budget, int) else int(self.budget * total)
        if budget < tokens:
            raise SettingError(
                f"budget of spt is {budget}, less than the {tokens} numbers of the class token: raise it, or set "
                "train_class_token: false."
            )
        if all(has_values(parameter) for parameter in found.values()):
            rows, number, most = self.rows_drawn(), self.calibration_rows, self.calibration_max_tokens
            scores = gradient_scores(model, found, rows, number, max_tokens=most, squared=True)
            level, routes = self.within(budget - tokens, candidates, lambda level: _members(scores, level))
            self._chosen = {
                name: (scores[name].flatten() >= _threshold(level)).nonzero()[:, 0]
                for name, route in routes.items()
                if route.kind == "sparse"
            }
        else:  # all tensors as sensitive as each other
            _, routes = self.within(budget - tokens, candidates, lambda level: _evenly(candidates, level))
            self._chosen = {n: torch.arange(route.members) for n, route in routes.items() if route.kind == "sparse"}
        if not tokens and not any(route.trained for route in routes.values()):
            raise SettingError(f"budget of spt is {budget}, into which nothing fits: raise it.")
        return routes

    def _candidate(self, model: nn.Module, name: str, parameter: nn.Parameter) -> Candidate:
        if parameter.dim() == 1:
            return Candidate(parameter.numel(), None)
        out_features, in_features = linear_sizes(model.get_submodule(name.rpartition(".")[0]))
        if self.structured == "lora":
            return Candidate(parameter.numel(), self.r * (in_features + out_features))
        return Candidate(parameter.numel(), 2 * self.r * out_features + self.r + out_features)

    def within(
        self, budget: int, candidates: Mapping[str, Candidate], members_at: Callable[[int], Mapping[str, int]]
    ) -> tuple[int, dict[str, Route]]:
        """The lowest threshold with which what trains stays within the budget, and the routes it gives.

        members_at: of each tensor, the numbers that a threshold chooses; what trains never gets less with more of them.
        """
        low, high = -1, NONE_CHOSEN  # low is over the budget, high is not
        routes = {name: self.route(each, 0) for name, each in candidates.items()}
        while high - low > 1:
            level = (low + high) // 2
            members = members_at(level)
            tried = {name: self.route(candidate, members[name]) for name, candidate in candidates.items()}
            if sum(route.trained for route in tried.values()) <= budget:
                high, routes = level, tried
            else:
                low = level
        return high, routes

    def route(self, candidate: Candidate, members: int) -> Route:
        """How a tensor trains that has so many of the most sensitive numbers."""
        if members and candidate.module_size is None and members >= self.vector_fraction * candidate.size:
            return Route("vector", members, candidate.size)
        if not members or candidate.module_size is None:
            return Route("frozen", members, 0)
        if members >= self.structured_fraction * candidate.module_size:
            return Route("structured", members, candidate.module_size)
        return Route("sparse", members, members)

    def routing_table(self) -> str:
        """How each tensor trains, one a line, and how many of each sort there are."""
        kinds = [route.kind for route in self.routes.values()]
        sums = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("structured", "sparse", "vector", "frozen"))
        lines = [f"spt trains {sum(r.trained for r in self.routes.values())} numbers of {len(kinds)} tensors: {sums}"]
        return "\n".join(
            [*lines, *(f"{name}: {r.kind}, m = {r.members}, {r.trained} train" for name, r in self.routes.items())]
        )

    @contextmanager
    def _with_modules(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put LoRA or bottlenecks on the matrices that get one; what trained before goes on to."""
        names = [name.rpartition(".")[0] for name, route in self.routes.items() if route.kind == "structured"]
        if not names:
            yield model
            return
        attributes = [(module, set(vars(module))) for module in model.modules()]
        trained = [p for p in model.parameters() if p.requires_grad]
        self._modules = PeftTechnique(self._config(names))
        try:
            with self._modules.attach(model) as wrapped:
                for parameter in trained:
                    parameter.requires_grad_(True)
                yield wrapped
        finally:
            self._modules = None
            for module, before in attributes:
                for attribute in set(vars(module)) - before:  # peft leaves its config on the model
                    delattr(module, attribute)

    def _config(self, names: list[str]) -> PeftConfig:
        """Of the modules on the layers of these names, which may be wrapped by adapters already."""
        layers = "|".join(re.escape(name.removesuffix(".base_layer")) for name in names)
        if self.structured == "lora":
            return LoraConfig(r=self.r, lora_alpha=self.r, lora_dropout=self.dropout, target_modules=layers)
        return BottleneckConfig(
            form="houlsby", r=self.r, init="lora", activation="gelu", dropout=self.dropout, target_modules=layers
        )

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """As for single numbers, with vectors and the class token as they were, and without the modules."""
        learned = [parameter.detach().clone() for parameter, _ in self._whole]
        with super().switched_off(), nullcontext() if self._modules is None else self._modules.switched_off():
            try:
                for parameter, before in self._whole:
                    parameter.data.copy_(before)
                yield
            finally:
                for (parameter, _), now in zip(self._whole, learned, strict=True):
                    parameter.data.copy_(now)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the routes, places and values, and the modules as peft does."""
        super().save(model, folder)
        table = {name: asdict(route) for name, route in self.routes.items()}
        write_text(folder / ROUTING_FILE, json.dumps(table, indent=1))
        if self._modules is not None:
            self._modules.save(model, folder / MODULES_FOLDER)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Take over values.

        Raises SettingError if they were routed otherwise.
        """
        saved = read_routing(folder)
        if saved != self.routes:
            odd = sorted(name for name in saved.keys() | self.routes.keys() if saved.get(name) != self.routes.get(name))
            raise SettingError(
                f"{folder / ROUTING_FILE} has other routes than the model here, {odd[0]} first ({len(odd)} in all): it "
                "was made of other data, or another model. shoestring.load takes the routes from the folder."
            )
        super().restore(model, folder)
        if self._modules is not None:
            self._modules.restore(model, folder / MODULES_FOLDER)


def read_routing(folder: Path) -> dict[str, Route]:
    """The routes that `save` wrote.

    Raises SettingError if there are none.
    """
    try:
        return {name: Route(**route) for name, route in json.loads((folder / ROUTING_FILE).read_text()).items()}
    except (OSError, ValueError, TypeError) as error:
        raise SettingError(f"{folder / ROUTING_FILE}, which spt has saved, cannot be read: {error}") from error


def _threshold(level: int) -> float:
    """The float32 of these bits; thresholds rise with them."""
    return float(torch.tensor(level, dtype=torch.int32).view(torch.float32))


def _members(scores: Mapping[str, Tensor], level: int) -> dict[str, int]:
    """How many scores of each tensor reach the threshold."""
    return {name: int((score >= _threshold(level)).sum()) for name, score in scores.items()}


def _evenly(candidates: Mapping[str, Candidate], level: int) -> dict[str, int]:
    """The same share of each tensor, from all at level 0 to none."""
    return {name: candidate.size * (NONE_CHOSEN - level) // NONE_CHOSEN for name, candidate in candidates.items()}
