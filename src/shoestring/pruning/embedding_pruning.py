r"""Dynamic embedding pruning: only the rows of the embedding that the data uses are loaded and trained.

Source   Williams and Aletras 2023, arXiv:2309.08708
Update   S = sorted ids of the data and of special tokens; E' = E[S]; embed(i) = E'[pi(i)] with pi(S_j) = j
Shapes   E [V, d], E' [m, d], m = |S|; pi [V] int32
Start    E' holds the rows of E; on save and on exit E holds the rows of E' again, and its other rows as they were
Trains   m d numbers in place of V d, or none where E is frozen
Costs    4 V bytes for pi, a look-up a batch, and on a GPU one wait for it, to name an id without a row. E stands once
         more in host memory, or in a file. A tied, frozen table saves nothing: m d numbers more for the input side
Differs  ids are mapped in front of the embedding, not in data sets or collators, so that data stays as it is and an id
         without a row is named; special tokens are kept always; ragged rows are counted; tables that share E (encoder,
         decoder) shrink together. With weight decay an unpruned run also shrinks the rows outside S, which here stay.
         A tied head is refused where it trains, or pruned too on request, with a softmax over S alone
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import SettingError
from ..fakes import has_values
from ..technique import Moment, Phase, Technique, register_technique
from .rows import ATTRIBUTE, KeptRows, kept_at_home
from .used_ids import is_stream, used_ids

NO_ROW = -1
NEED_EVERY_ROW = ("generate", "resize_token_embeddings")


@register_technique
@dataclass(kw_only=True)
class EmbeddingPruning(Technique):
    """Only the embedding rows that the data uses.

    The data is what the recipe is attached with, `recipe.apply(model, data={"train": ..., "validation": ...})`;
    `shoestring train` gives its own. A model loaded without data keeps all rows.

    keep_ids: ids kept beside those of the data; with them, data may be a stream or missing.
    columns: the columns that hold ids; None: the model's inputs, in encoder-decoders decoder_input_ids and labels too.
    restricted_softmax: prune a tied head too; the loss is then over the kept ids alone, not the model's own.
    offload_folder: keep the full matrix in a file here, gone when the process ends; None: in host memory.

    Raises SettingError for ids that are no ids and for an empty list of columns.
    """

    name: ClassVar[str] = "embedding_pruning"
    phase: ClassVar[Phase] = Phase.PRUNING
    exact: ClassVar[bool] = True

    keep_ids: list[int] = field(default_factory=list)
    columns: list[str] | None = None
    restricted_softmax: bool = False
    offload_folder: str | None = None

    def __post_init__(self) -> None:
        for index in self.keep_ids:
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise SettingError(f"keep_ids of embedding_pruning must be ids of 0 or more, got {index!r}.")
        if self.columns is not None and not self.columns:
            raise SettingError("columns of embedding_pruning must name a column, or be left out; got an empty list.")
        if self.restricted_softmax:
            self.exact = False  # type: ignore[misc]
            self.claims = frozenset({"the output head"})  # type: ignore[misc]
        self._data: Mapping[str, Any] | None = None
        self._processor: Any = None
        self._saved_ids: Tensor | None = None
        self._rows: list[KeptRows] = []
        self._others: tuple[Technique, ...] = ()

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Refuse what reads or trains the embedding by the ids of the full table."""
        self._others = tuple(others)
        for other in others:
            config = getattr(other, "config", None)
            if other.phase == Phase.PROMPT:
                raise SettingError(
                    f"embedding_pruning and {other.name} cannot be combined: learned prompts look the embedding up by "
                    "its full size."
                )
            if any(getattr(config, name, None) for name in ("trainable_token_indices", "token_indices")):
                raise SettingError(
                    f"embedding_pruning and {other.name} with trainable tokens cannot be combined: they count in the "
                    "rows of the full table. Take out one of the two."
                )

    def see_data(self, splits: Mapping[str, Any], processor: Any = None) -> None:
        """Remember the data until the model is known; the tokenizer says what an id without a row stands for."""
        self._data, self._processor = splits, processor

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Cut the embedding and all that shares its weight down to the rows of S.

        Raises SettingError if there is nothing to count, an id lies outside of the table, the embedding is no plain
        nn.Embedding, or it is pruned already.
        """
        embedding = _input_embedding(model)
        table: Any = embedding.weight
        self._table, self._kept, self._head = table, self._ids_to_keep(model, embedding), None
        if len(self._kept) == embedding.num_embeddings:
            yield model
            return
        if self.offload_folder is not None and not Path(self.offload_folder).is_dir():
            raise SettingError(
                f"offload_folder of embedding_pruning must be a folder, and {self.offload_folder} is none."
            )
        holders = _holders(model, table)
        embeddings = [module for module, _ in holders if isinstance(module, nn.Embedding)]
        heads = [module for module, _ in holders if not isinstance(module, nn.Embedding)]
        if self.restricted_softmax and not heads:
            warnings.warn("restricted_softmax of embedding_pruning changes nothing here: the head has its own weight.")
        with ExitStack() as undo:
            if heads and not self.restricted_softmax:
                self._head = heads[0]
                self._give_own_rows(undo, table, embeddings)
            else:
                self._prune(undo, model, table)
                for head in heads:
                    self._prune_head(undo, model, head)
            positions = torch.full((embedding.num_embeddings,), NO_ROW, dtype=torch.int32)
            positions[self._kept] = torch.arange(len(self._kept), dtype=torch.int32)
            positions = positions.to(table.device)
            for shared in embeddings:
                self._look_up_in(undo, shared, positions)
            for module in model.modules():
                for name in NEED_EVERY_ROW if self._head is None else (*NEED_EVERY_ROW, "tie_weights"):
                    if hasattr(type(module), name):
                        _set(undo, module, name, _Refusal(name))
            yield model

    def on_attached(self, model: nn.Module) -> None:
        """Refuse adapters on the embedding, and a tied head that trains."""
        pruned = {id(module) for rows in self._rows for module, _ in rows.holders}
        for name, module in model.named_modules():
            wraps = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            if wraps and any(id(inner) in pruned for inner in module.modules()):
                raise SettingError(
                    f"{name} is pruned by embedding_pruning, and adapted or saved as a whole by another technique: "
                    "take it out of target_modules, modules_to_save and the like, or take out embedding_pruning."
                )
        self._refuse_trained_tie()

    def on_step_begin(self, moment: Moment) -> None:
        """Refuse a tied head that has begun to train, and optimizer state that belongs to other rows."""
        self._refuse_trained_tie()
        self._refuse_moved_tie(moment.model)
        saved, self._saved_ids = self._saved_ids, None
        resumed = moment.optimizer is not None and self._table in moment.optimizer.state
        if resumed and saved is not None and not torch.equal(saved.cpu(), self._kept):
            raise SettingError(
                f"The checkpoint was trained with {len(saved)} embedding rows, and the data here needs other "
                f"{len(self._kept)}, for which the optimizer's state does not fit. Go on with the same data."
            )

    def to_saved(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """The full matrix."""
        return next((rows.whole() for rows in self._rows if rows.parameter is parameter), value)

    def from_saved(self, parameter: nn.Parameter, saved: Tensor) -> Tensor:
        """The kept rows of a full matrix."""
        return next((rows.take(saved) for rows in self._rows if rows.parameter is parameter), saved)

    def state_dict(self) -> dict[str, Any]:
        """The kept ids, which the optimizer's state belongs to."""
        return {"kept_ids": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember which rows the checkpoint was trained with."""
        self._saved_ids = state["kept_ids"]

    def _ids_to_keep(self, model: nn.Module, embedding: nn.Embedding) -> Int[Tensor, " kept"]:
        size, data, config = embedding.num_embeddings, self._data, getattr(model, "config", None)
        self._data = None  # not kept alive by the model
        if data is not None and not data:
            return torch.arange(size)
        if data is None and not self.keep_ids:
            raise SettingError(
                "embedding_pruning does not know which ids will come: give the tokenised data, recipe.apply(model, "
                "data={'train': ..., 'validation': ...}), or list the ids in keep_ids."
            )
        special = _special_ids(config, embedding.padding_idx, size) | _ids_of_tokenizer(self._processor, size)
        found = [torch.tensor(sorted({*special, *self.keep_ids}))]
        self._seen = list(data or ())
        counted = {name: rows for name, rows in (data or {}).items() if not (self.keep_ids and is_stream(rows))}
        if counted:
            found.append(used_ids(counted, self._columns(model)))
        ids = _over_processes(torch.cat(found).unique())
        if outside := [int(i) for i in (ids[0], ids[-1]) if not 0 <= i < size]:
            raise SettingError(
                f"The data or keep_ids of embedding_pruning hold the id {outside[0]}, but the embedding has {size} "
                "rows: resize it first, or use the tokenizer that belongs to the model."
            )
        return ids

    def _columns(self, model: nn.Module) -> list[str]:
        if self.columns is not None:
            return self.columns
        columns = ["input_ids"] if (main := getattr(model, "main_input_name", "input_ids")) == "input_ids" else [main]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return [*columns, "decoder_input_ids", "labels"]
        return [*columns, "labels"] if self.restricted_softmax else columns

    def _prune(self, undo: ExitStack, model: nn.Module, parameter: nn.Parameter) -> None:
        """Swap the data of a parameter, so that ties, optimizers and names stay as they are."""
        full = kept_at_home(parameter.detach(), self.offload_folder)
        rows = KeptRows(parameter, self._kept, full, _holders(model, parameter))
        rows.shrink()
        undo.callback(rows.grow)
        self._follow(undo, rows)

    def _give_own_rows(self, undo: ExitStack, table: nn.Parameter, embeddings: list[nn.Embedding]) -> None:
        """Leave the tied head its table, and give the input side a copy of the kept rows."""
        warnings.warn(
            "The head shares the embedding's weight and keeps it whole, so embedding_pruning saves no memory here: it "
            f"adds {len(self._kept)} rows. Leave it out, or set restricted_softmax."
        )
        own = nn.Parameter(table.detach()[self._kept.to(table.device)], requires_grad=False)
        for module in embeddings:
            module.weight = own
            undo.callback(setattr, module, "weight", table)
        self._follow(undo, KeptRows(own, self._kept, table, [(module, "weight") for module in embeddings]))

    def _follow(self, undo: ExitStack, rows: KeptRows) -> None:
        self._rows.append(rows)
        undo.callback(self._rows.remove, rows)
        rows.in_state_dicts(undo)

    def _look_up_in(self, undo: ExitStack, module: nn.Embedding, positions: Int[Tensor, " vocabulary"]) -> None:
        padding = module.padding_idx
        _set(undo, module, "num_embeddings", len(self._kept))
        _set(undo, module, "padding_idx", None if padding is None else self._kept.tolist().index(padding))
        _set(undo, module, "pruned_names", _Names(self._processor, self._seen))
        _buffer(undo, module, "pruned_positions", positions)
        undo.callback(module.register_forward_pre_hook(_look_up, with_kwargs=True).remove)

    def _prune_head(self, undo: ExitStack, model: nn.Module, head: nn.Module) -> None:
        """Cut a tied head, and put its outputs where they are in the full vocabulary."""
        if not isinstance(head, nn.Linear):
            raise SettingError(
                f"restricted_softmax of embedding_pruning needs a linear head, got {type(head).__name__}."
            )
        if getattr(getattr(model, "config", None), "final_logit_softcapping", None):
            raise SettingError(
                "restricted_softmax of embedding_pruning cannot leave ids out where the model caps its logits "
                "(final_logit_softcapping)."
            )
        if head.bias is not None:
            self._prune(undo, model, head.bias)
        _set(undo, head, "pruned_size", head.out_features)
        _set(undo, head, "out_features", len(self._kept))
        _buffer(undo, head, "pruned_ids", self._kept.to(head.weight.device))
        undo.callback(head.register_forward_hook(_spread).remove)

    def _refuse_trained_tie(self) -> None:
        if self._head is not None and self._table.requires_grad:
            raise SettingError(
                "embedding_pruning: the output head shares the embedding's weight, which trains, and a softmax over "
                "fewer rows is another loss. Freeze the embedding (as adapters do), accept that loss with "
                "restricted_softmax: true, or take out embedding_pruning."
            )

    def _refuse_moved_tie(self, model: nn.Module) -> None:
        """Beside a head that keeps the table, the input side is a copy of some rows: moved apart, one would be lost."""
        if self._head is None:
            return
        tied = {id(self._table), *(id(getattr(module, key)) for rows in self._rows for module, key in rows.holders)}
        for other in self._others:
            if not tied.isdisjoint(map(id, other.trained_without_gradient(model))):
                raise SettingError(
                    f"embedding_pruning: the output head shares the embedding's weight, which {other.name} moves. "
                    "Leave both out there by exclude_modules, or take out embedding_pruning."
                )


class _Names:
    """What to call an id that has no row, and where one was looked for."""

    def __init__(self, processor: Any, splits: list[str]):
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.splits = splits

    def __call__(self, index: int) -> str:
        token = getattr(self.tokenizer, "convert_ids_to_tokens", lambda index: None)(index)
        return f"{index} ({token!r})" if token is not None else str(index)


class _Refusal:
    """Stands in for a method of the model that needs every row."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise SettingError(
            f"{self.name}() needs every row of the embedding, of which embedding_pruning keeps only those of the data. "
            "Undo it first with Recipe.remove(model), or save and load the model, which brings all rows back."
        )


def _look_up(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the places of the rows in place of the ids, in front of an embedding."""
    ids = args[0] if args else kwargs["input"]
    return (_positions(module, ids), *args[1:]), {key: value for key, value in kwargs.items() if key != "input"}


def _positions(module: Any, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    positions = module.pruned_positions.index_select(0, ids.reshape(-1)).view(ids.shape)
    if has_values(positions) and bool((positions == NO_ROW).any()):
        missing = [int(index) for index in ids[positions == NO_ROW].unique()]
        names = module.pruned_names
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        where = f"it is not in the data that the recipe saw ({', '.join(names.splits) or 'none'})"
        raise SettingError(
            f"embedding_pruning kept no row for the id {names(missing[0])}{more}: {where}. Give that data too when the "
            "recipe is attached, or list the id in keep_ids."
        )
    return positions.to(ids.dtype)


def _spread(head: Any, args: Any, logits: Float[Tensor, "*batch kept"]) -> Float[Tensor, "*batch vocabulary"]:
    """Logits of the full vocabulary, so low for ids without a row that their probability is 0."""
    low = torch.finfo(logits.dtype).min / 2
    return logits.new_full((*logits.shape[:-1], head.pruned_size), low).index_copy(-1, head.pruned_ids, logits)


def _input_embedding(model: nn.Module) -> nn.Embedding:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and not has_values(weight) and not weight.is_meta:
        raise NotImplementedError("which rows the data uses is not known then")
    if not isinstance(embedding, nn.Embedding) or type(weight) is not nn.Parameter or not weight.is_floating_point():
        kind = "none" if embedding is None else type(embedding).__name__
        raise SettingError(
            f"embedding_pruning needs an nn.Embedding of plain numbers as the input of {type(model).__name__}, got "
            f"{kind}. One that is adapted, saved as a whole or quantized must be pruned before that is done."
        )
    if hasattr(embedding, ATTRIBUTE):
        raise SettingError("The embedding is pruned already: undo that first.")
    return embedding


def _holders(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    return [(m, name) for m in model.modules() for name, p in m._parameters.items() if p is parameter]


def _special_ids(config: Any, padding_idx: int | None, size: int) -> set[int]:
    """Ids that the model itself may put in: pad, decoder start and all others its configuration names.

    Raises SettingError if the padding id has no row.
    """

    def named(settings: dict[Any, Any]) -> Iterator[Any]:
        for key, value in settings.items():
            if isinstance(value, dict):
                yield from named(value)
            elif str(key).endswith(("_token_id", "_token_ids")):
                yield from value if isinstance(value, (list, tuple)) else [value]

    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad >= size:
        raise SettingError(f"pad_token_id is {pad}, but the embedding has only {size} rows; resize it first.")
    ids = {padding_idx, *named(config.to_dict() if hasattr(config, "to_dict") else {})}
    return {index for index in ids if isinstance(index, int) and 0 <= index < size}


def _ids_of_tokenizer(processor: Any, size: int) -> set[int]:
    tokenizer = getattr(processor, "tokenizer", processor)
    return {index for index in getattr(tokenizer, "all_special_ids", None) or () if 0 <= index < size}


def _over_processes(ids: Tensor) -> Tensor:
    """The ids of all processes, whose shares of the data differ."""
    if not (dist.is_available() and dist.is_initialized()):
        return ids
    all_ids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ids, ids)
    return torch.cat(all_ids).unique()


def _set(undo: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of the module itself until undone."""
    if name in module.__dict__:
        undo.callback(setattr, module, name, module.__dict__[name])
    else:
        undo.callback(delattr, module, name)
    setattr(module, name, value)


def _buffer(undo: ExitStack, module: nn.Module, name: str, value: Tensor) -> None:
    module.register_buffer(name, value, persistent=False)
    undo.callback(delattr, module, name)
