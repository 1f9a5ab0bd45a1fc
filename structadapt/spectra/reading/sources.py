"""Open whatever holds weights: a list of matrices, each read when asked, and what is left out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import nn

from structadapt.bounds import few
from structadapt.spectra.reading.adapter_updates import Update, fitted, matrices_of
from structadapt.spectra.reading.contents import Content, Source, read_source, weights_of
from structadapt.spectra.reading.differences import difference
from structadapt.spectra.reading.matrix import (
    Opened,
    Skipped,
    SourceError,
    Stored,
    expert,
    kernel,
    weight,
)
from structadapt.spectra.reading.names import (
    Patterns,
    chosen_by,
    is_plane,
    is_stack,
    module_path,
    packs_of,
    reason_to_skip,
    renamed,
    shared_prefix,
)

Choice = Callable[[str], bool]


def open_source(
    source: Source,
    base: Source | None = None,
    *,
    allow_missing: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Opened:
    """What can be looked at in a source, from headers alone: no value is read yet.

    source: the path of a safetensors file, of a .pt or .bin file (tensors alone, never code), of an
        index of shards, or of a folder, which is read as the first of
        model.safetensors.index.json, model.safetensors, adapter_model.safetensors or .bin (PEFT),
        pytorch_model.bin.index.json, pytorch_model.bin, adapter.safetensors (a training run), or
        its only .safetensors file; a module; a state dict.
    base: the weights that the source started from, in any of these forms. Layers are matched by
        name, where need be with one prefix stripped or added, which is noted. The base may
        have more layers than the source.
    allow_missing: matrices that the base lacks are skipped (those of an adapter are kept, without
        a base) instead of an error.
    include, exclude: regular expressions, searched for in the module path.

    One matrix for each expert of a stacked tensor (n, a, b); the kernel of a convolution as
    (out, in k...). A tensor that cannot be looked at is in `skipped` with the reason.

    Raises SourceNotFoundError (also a FileNotFoundError) for a file or shard that is not there;
    SourceError (a ValueError) for one that is damaged, not safe to open, ambiguous or of another
    form, for a base without some of the layers, and where nothing can be looked at.
    """
    chosen = chosen_by(include, exclude)
    content = read_source(source, adapted=base is not None)
    below = None if base is None else weights_of(base)
    opened = (_adapter if content.is_adapter else _weights)(content, below, allow_missing, chosen)
    if below is not None:
        opened.notes.extend(f"the base: {note}" for note in below.notes)
        opened.files.extend(below.files)
    if not opened.matrices:
        label = "the model" if isinstance(source, nn.Module) else source
        if isinstance(source, Mapping):
            label = "the state dict"
        raise SourceError(f"{label}: the source has no matrix to look at{_reasons(opened.skipped)}")
    return opened


def _reasons(skipped: list[Skipped]) -> str:
    """The reasons for what is skipped, each with the first tensor it holds for."""
    first: dict[str, str] = {}
    for entry in skipped:
        shape = " x ".join(map(str, entry.shape))
        first.setdefault(entry.reason, f"{entry.name} ({shape}): {entry.reason}")
    return f": {'; '.join([*first.values()][:5])}" if first else ": it is empty"


def _refuse_no_choice(names: list[str], left: int, notes: list[str]) -> None:
    """A note on how many names were left out on purpose. SourceError if that was all."""
    if names and not left:
        raise SourceError(f"include and exclude leave no matrix: there are {few(names, 5)}")
    if left < len(names):
        notes.append(f"{len(names) - left} matrices were left out by include and exclude")


def _chosen_parts(
    content: Content, chosen: Choice
) -> tuple[dict[str, Stored], list[Update], Opened]:
    """The whole matrices and the updates that are looked at, and what is opened, still without
    matrices."""
    notes = list(content.notes)
    whole, skipped = _planes(content.tensors, notes, chosen)
    planes = {name: stored for name, stored in whole.items() if chosen(name)}
    updates = [update for update in content.updates if chosen(update.name)]
    names = [*(update.name for update in content.updates), *whole]
    _refuse_no_choice(names, len(updates) + len(planes), notes)
    skipped = [entry for entry in [*content.skipped, *skipped] if chosen(entry.name)]
    return planes, updates, Opened(content.what, [], skipped, notes, list(content.files))


# -- whole weights ---------------------------------------------------------------------------------


def _planes(
    tensors: Mapping[str, Stored], notes: list[str], chosen: Choice
) -> tuple[dict[str, Stored], list[Skipped]]:
    """All matrices among stored tensors by module path, and the rest with the reasons. Of several
    names of one storage, those after the first that is chosen are left out."""
    packs = packs_of(tensors.values())
    found: dict[str, Stored] = {}
    skipped, ties = [], {}
    stacks = kernels = 0
    for stored in tensors.values():
        name = module_path(stored.name)
        reason = reason_to_skip(stored, packs)
        if not reason and stored.tie in ties:
            reason = f"the same storage as {ties[stored.tie]}, which is looked at"
        if not reason and name in found:
            reason = f"another tensor, {found[name].name}, has the name {name} already"
        if reason:
            skipped.append(Skipped(name, stored.shape, stored.dtype, stored.source, reason))
            continue
        if stored.tie is not None and chosen(name):
            ties[stored.tie] = name
        if is_plane(stored):
            planes = {name: replace(expert(stored, 0), name=stored.name)}
        elif is_stack(stored):
            stacks += 1
            planes = {f"{name}.{i}": expert(stored, i) for i in range(stored.shape[0])}
        else:
            kernels += len(stored.shape) > 2
            planes = {name: kernel(stored) if len(stored.shape) > 2 else stored}
        found.update(planes)
    if stacks:
        notes.append(f"{stacks} stacked tensors are looked at as one matrix an expert")
    if kernels:
        notes.append(f"{kernels} kernels of convolutions are looked at as (out, in x kernel)")
    return found, skipped


def _weights(
    content: Content, below: Content | None, allow_missing: bool, chosen: Choice
) -> Opened:
    planes, _, opened = _chosen_parts(content, chosen)
    if below is None:
        opened.matrices.extend(weight(name, stored) for name, stored in planes.items())
        return opened
    bases = _Bases(below, planes, opened, allow_missing)
    for name, stored in planes.items():
        _pair(name, stored, bases.find(name), opened)
    _note_of_more(bases, planes, opened.notes)
    return replace(opened, what=f"{content.what} less its base")


def _pair(name: str, tuned: Stored, base: Stored | str, opened: Opened) -> None:
    """W' - W of one layer, or why there is none."""
    if isinstance(base, str):
        opened.skipped.append(_named(name, tuned, base))
    elif tuned.shape != base.shape and tuned.matrix_shape() != base.matrix_shape():
        reason = f"{name} is {tuned.shape} in the source and {base.shape} in the base"
        opened.skipped.append(_named(name, tuned, reason))
    else:
        opened.matrices.append(difference(name, *_same_way(tuned, base)))


def _same_way(tuned: Stored, base: Stored) -> tuple[Stored, Stored]:
    """Both as (out, in), where only a module says which of its weights are stored as (in, out)."""
    turned = tuned.transposed or base.transposed
    if not turned or tuned.shape != base.shape:
        return tuned, base
    return replace(tuned, transposed=True), replace(base, transposed=True)


def _named(name: str, stored: Stored, reason: str) -> Skipped:
    return Skipped(name, stored.shape, stored.dtype, stored.source, reason)


def _note_of_more(bases: "_Bases", planes: Mapping[str, Stored], notes: list[str]) -> None:
    known = {n for name in planes for n in (name, renamed(name, bases.prefix))}
    more = sorted(bases.planes.keys() - known)
    if more:
        notes.append(f"the base has {len(more)} matrices that the source lacks: {few(more)}")


class _Bases:
    """The base's matrices, found by the names of the source.

    prefix: (to strip, to add) that turns a name of the source into one of the base.
    """

    def __init__(
        self, below: Content, names: Iterable[str], opened: Opened, allow_missing: bool
    ) -> None:
        self.planes, skipped = _planes(below.tensors, [], lambda name: False)  # ties too
        self.unfit = {s.name: s.reason for s in skipped}
        known = self.planes.keys() | self.unfit.keys()
        missing = [name for name in names if name not in known]
        strip, add = self.prefix = shared_prefix(missing, known) if missing else ("", "")
        if strip or add:
            missing = [name for name in missing if renamed(name, self.prefix) not in known]
            way = "left out" if strip else "put before"
            opened.notes.append(f"to find the names in the base, {strip or add!r} is {way}")
        if missing and not allow_missing:
            raise SourceError(
                f"the base has no matrix {few(missing, 8)}: it has {few([*self.planes])}; give the "
                "base of this source, or pass allow_missing=True (--allow-missing) to go on without"
            )

    def find(self, name: str) -> Stored | str:
        """The base's matrix of a layer, or why there is none."""
        for known in (name, renamed(name, self.prefix)):
            if known in self.planes:
                return self.planes[known]
            if known in self.unfit:
                return f"the base's {known} cannot be used: {self.unfit[known]}"
        return "the base has no such matrix"


# -- adapters --------------------------------------------------------------------------------------


def _adapter(
    content: Content, below: Content | None, allow_missing: bool, chosen: Choice
) -> Opened:
    planes, updates, opened = _chosen_parts(content, chosen)
    names = [*(update.name for update in updates), *planes]
    bases = None if below is None else _Bases(below, names, opened, allow_missing)
    _add_updates(updates, bases, opened)
    for name, stored in planes.items():
        if bases is None:
            reason = "trained whole beside the adapters: pass base= to see its update"
            opened.skipped.append(_named(name, stored, reason))
        else:
            _pair(name, stored, bases.find(name), opened)
    return opened


def _add_updates(updates: list[Update], bases: "_Bases | None", opened: Opened) -> None:
    alone = 0
    for update in updates:
        found = update.base if bases is None else bases.find(update.name)
        if isinstance(found, Stored) and found.problem:
            found = f"its weight cannot be used: {found.problem}"
        try:
            update.refuse_unreadable()
            stored = None if found is None or isinstance(found, str) else fitted(update, found)
        except SourceError as error:
            some = next(iter(update.tensors.values()))
            opened.skipped.append(
                Skipped(update.name, update.shape, some.dtype, some.source, str(error))
            )
            continue
        matrices = matrices_of(update, stored)
        if isinstance(found, str):
            opened.notes.append(f"{update.name}: {found}")
            matrices = [replace(matrix, lacks=found) for matrix in matrices]
        opened.matrices.extend(matrices)
        alone += stored is None and not update.adapter.additive
    if alone:
        opened.notes.append(
            f"`direction` alone of {alone} layers: their whole update depends on W, pass base="
        )
