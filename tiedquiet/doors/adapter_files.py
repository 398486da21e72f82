"""What an adapter's files hold, and what became of it in the model that it was loaded into."""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tiedquiet import mode, words
from tiedquiet.doors.outcome import fold
from tiedquiet.proof import names, record
from tiedquiet.proof.adapted import PREFIX, base_of, base_s_own, names_in_files, saved, without
from tiedquiet.proof.aside import is_served
from tiedquiet.proof.casts import cast_finding
from tiedquiet.proof.files import Checkpoint, found_in
from tiedquiet.proof.memory import equals, types_of
from tiedquiet.proof.names import of_models
from tiedquiet.proof.prefixes import by_prefix
from tiedquiet.proof.record import Record, stored_name
from tiedquiet.proof.repair import copy_in_place, put_in_place
from tiedquiet.proof.survey import survey
from tiedquiet.proof.unread import out_of_date
from tiedquiet.verdict import Finding, Verdict

FOR_INFERENCE = "Load the adapter for inference, with is_trainable=False"
_CURE = "Set TIEDQUIET=repair to read them, or load the adapter into the model that it was trained on"
_ON_META = "by what put their layers on meta, where nothing has values"
_CURE_ON_META = "Load the adapter into a model that has values, and without low_cpu_mem_usage"
_OF_WRAPPERS = "because peft goes by the names of modules, which have a wrapper's part in them"
_CURE_OF_WRAPPERS = "Set TIEDQUIET=repair to read them, or wrap the layers once the adapter is loaded"


class Adapter:
    """An adapter that peft has just loaded, and what its files hold.

    Args:
        model: peft's.
        given: the arguments of the call, by name.
        unseen: the names of all tensors that `load_state_dict` found no values for.

    Attributes:
        where: the folder.
        base: the model that it was put into.
        prefix: what the whole model has before the names of that.
        checkpoint: its files.
        in_files: its tensors in the base model, each with its name in the files.
        known: the record of the load.
        repaired: findings that were repaired.
        beside: what the adapter has beside that model, X-LoRA's classifier for one, each with whether it was read.
    """

    def __init__(self, model: Any, given: Mapping[str, Any], unseen: Collection[str]) -> None:
        self._model, self._name = model, given["adapter_name"]
        self._has_mapping = bool(given.get("key_mapping"))
        self.where = os.path.join(given["model_id"], *filter(None, [given.get("subfolder")]))
        self.base, self.prefix = base_of(model)
        self.checkpoint = found_in(self.where, kind="adapter_model")
        self._state, self._whole = survey(self.base).state, survey(model).state
        own = saved(model, self._name)
        self.in_files = {key: own[self.prefix + key] for key in self._state if self.prefix + key in own}
        if self.checkpoint.headers and not self._has_mapping:
            # A layer may say nothing of what it finds no values for: quanto's of biases, which peft does not rename.
            kept = {name for name, in_files in own.items() if name == in_files}
            unseen = {*unseen, *(kept - self.checkpoint.headers.keys())}
        # Layers may share a tensor that the file has once, under another name (VB-LoRA's vector bank).
        read = {id(self._whole[name]) for name in own.keys() - unseen}
        missing = {key for key in self.in_files if id(self._state[key]) not in read}
        adapted = set(self.in_files)
        whole_names = (self.prefix + key for key in self._state.keys() - adapted)
        for name in base_s_own(self.checkpoint.headers, unseen, whole_names):
            self.in_files[name.removeprefix(self.prefix)] = name
        stored = self.in_files.keys() - missing
        self.known = Record(stored, missing, len(self.in_files), files=self.checkpoint.files)
        self.known.tensors = record.refs_to({key: self._state[key] for key in stored})
        self.known.adapted = adapted
        self.repaired: list[Finding] = []
        self.beside = {name: name not in unseen for name in self._names_beside()}
        # Prompts are read by code of their own, under the names that they have in the files.
        self._prompts = prompts_of(model, self._name).keys() - self.in_files.values()
        self.beside |= {name: name in self.checkpoint.headers for name in self._prompts}

    def _names_beside(self) -> list[str]:
        model = self._model
        if model.peft_config[self._name].is_prompt_learning:
            return []
        # What its layers hold as well, peft draws again from a seed (VeRA).
        in_base = set(map(id, self._state.values()))
        found = [n for n, t in self._whole.items() if not n.startswith(self.prefix) and id(t) not in in_base]
        own = {adapter: names_in_files(model, adapter) for adapter in (model.peft_config if found else ())}
        # What has no adapter's name is that of the one that came first.
        first = next(iter(model.peft_config))
        owners = ((name, next((adapter for adapter in own if name in own[adapter]), first)) for name in found)
        return [name for name, owner in owners if owner == self._name]

    def judge(self, reported: Collection[str]) -> list[Finding]:
        """All findings; what `repair` reads is read now.

        Args:
            reported: the names that peft says it found no place for.
        """
        known, checkpoint = self.known, self.checkpoint
        rest, count, single = self._without_place(reported)
        # Of these peft speaks itself, if it was told to go on in spite of them.
        for key in known.missing:
            header = checkpoint.headers.get(self.in_files[key])
            if header is not None and header.shape != self._state[key].shape:
                known.lasting[key] = Finding(key, Verdict.MISSING, None, "the file has it in another shape")
        count += len(known.lasting)
        wrapped = list(self._in_wrappers())
        settled = set()
        for finding in [*wrapped, *self._under_a_prefix(single - {finding.source for finding in wrapped})]:
            rest.discard(finding.source or "")
            if self._is_held(finding) or self._mend(finding, finding.source):
                self._count_as_read({finding.key})
                settled.add(finding.source)
        count -= len(settled)
        # A name that the files do not have may stand for several that peft has merged.
        is_known = rest <= checkpoint.headers.keys()
        known.lasting.update(of_the_whole(checkpoint, count if is_known else None, sorted(rest)))
        for key in sorted(key for key in known.stored if self.is_on_meta(key) and not is_served(self.base, key)):
            known.lasting[key] = Finding(key, Verdict.OVERWRITTEN, key, _ON_META, True, _CURE_ON_META)
        if not self._has_mapping:  # which may have exchanged names
            for finding in list(_lost_in_casts(known, self.in_files, self._state, checkpoint)):
                self._mend(finding, self.in_files[finding.key])
        if wrong := altered_prompts(self._model, self._name, checkpoint):
            known.lasting[""] = _of_prompts(wrong)
        elif "" not in known.lasting and (lost := self.lost_beside()):
            why = f"the adapter's files do not have {words.few(lost)}, which is no part of the base model"
            known.lasting[""] = Finding("", Verdict.MISSING, None, why)
        left = sorted(known.missing - known.lasting.keys())
        if checkpoint.closed:
            known.lasting.update({key: Finding(key, Verdict.UNPROVEN, None, checkpoint.closed) for key in left})
            left = []
        return [*known.lasting.values(), *(Finding(key, Verdict.MISSING) for key in left)]

    def _without_place(self, reported: Collection[str]) -> tuple[set[str], int, set[str]]:
        """The names in the files that peft found no place for, how many those are, and which stand for one each."""
        headers = self.checkpoint.headers
        others = [name if name in headers else stored_name(name) for name in reported if name not in self._prompts]
        found = {_as_given(self._name, name, headers) for name in others}
        count, single = len(others), found
        by_their_names = {self.in_files[key] for key in self.known.stored}
        if by_their_names <= headers.keys() and not found <= headers.keys():
            # peft has renamed what it then found no place for, or merged several of the files' (experts) into one.
            left_over = headers.keys() - by_their_names
            single = left_over if len(left_over) == count else found & headers.keys()
            found, count = set(left_over), len(left_over)
        drawn_again = made_again(self._model, [self._name], found, self.checkpoint)
        self._count_as_read({key for key in self.known.missing if self.in_files[key] in drawn_again})
        return found - drawn_again, count - len(drawn_again), single - drawn_again

    def _in_wrappers(self) -> Iterator[Finding]:
        """Findings on what the files have under its own name, and peft looks for under that of a wrapped module."""
        for key in sorted(self.known.missing - self.known.lasting.keys()):
            if stored_name(key) != key and self.in_files[key] in self.checkpoint.headers:
                yield Finding(key, Verdict.UNREAD, self.in_files[key], _OF_WRAPPERS, True, _CURE_OF_WRAPPERS)

    def _under_a_prefix(self, rest: Collection[str]) -> Iterator[Finding]:
        """Findings on what nothing read because its names have another prefix."""
        unread = of_models({name: self.checkpoint.headers[name] for name in self.checkpoint.headers.keys() & rest})
        by_name = {self.in_files[key]: self._state[key] for key in self.known.missing}
        prefixes = by_prefix(unread, by_name, by_name, [self.prefix + key for key in self._state])
        if prefixes is None:
            return
        for key in sorted(self.known.missing):  # of which layers may share one
            if name := prefixes.names.get(self.in_files[key]):
                yield Finding(key, Verdict.UNREAD, name, prefixes.why, True, _CURE)
        # What peft has saved of the base model's own is not missing: the load of that has read it.
        own = {self.prefix + key: key for key in self._state.keys() - self.in_files.keys()}
        others = prefixes.known_as(unread.keys() - set(prefixes.names.values()))
        for name, expected in ((name, expected) for name, expected in others.items() if expected in own):
            if unread[name].shape == self._whole[expected].shape:
                self.in_files[own[expected]] = expected
                self.known.total += 1
                yield Finding(own[expected], Verdict.UNREAD, name, prefixes.why, True, _CURE)

    def _count_as_read(self, keys: set[str]) -> None:
        known = self.known
        known.stored, known.missing = known.stored | keys, known.missing - keys
        known.tensors.update(record.refs_to({key: self._state[key] for key in keys}))

    def _mend(self, finding: Finding, name: str | None) -> bool:
        """Read a tensor from the files in `repair`; else note that it was lost. Returns whether it was read."""
        values = self.checkpoint.tensors.get(name or "") if mode.current() == "repair" else None
        if values is not None and self._take(finding.key, values()):
            self.repaired.append(finding)
            return True
        self.known.lasting[finding.key] = finding
        return False

    def lost_beside(self) -> list[str]:
        """What the adapter has beside the base model and its files do not have."""
        return [] if self.checkpoint.closed else sorted(name for name, is_read in self.beside.items() if not is_read)

    def is_on_meta(self, key: str) -> bool:
        """Whether a tensor has no values."""
        return self._state[key].is_meta

    def _is_held(self, finding: Finding) -> bool:
        values = self.checkpoint.tensors.get(finding.source or "")
        return values is not None and bool(equals(self._state[finding.key], values()))

    def _take(self, key: str, value: torch.Tensor) -> bool:
        if not self.is_on_meta(key):
            return copy_in_place(self._state[key], value)
        # With `low_cpu_mem_usage` peft leaves there what it has read nothing for.
        is_held = put_in_place(self._model, self._whole, self.prefix + key, value)
        self._state.update({name: self._whole[self.prefix + name] for name in self._state})
        return is_held


def made_again(model: Any, adapters: Collection[str], rest: Collection[str], checkpoint: Checkpoint) -> set[str]:
    """Those names in the files that have no place because the model has their values without them.

    It may make them from a seed again, once above its layers (VeRA's projections, for which peft 0.18 has no place), in
    each of them (RandLora's bases), or in each and outside of its state dict (SHiRA's indices). And where a vocabulary
    was made larger, peft saves embeddings that were trained as a whole under two names, and reads one; transformers
    reads one of two that are tied; where names lack its prefix, peft does not read what they have of the base model's
    own. It has to have the very values that the files have.

    Args:
        model: the model.
        adapters: the names of its adapters.
        rest: names that have no place.
        checkpoint: the files.
    """
    if not rest:
        return set()  # no file is opened for that
    now, found = survey(model), set()
    known_as: dict[str, list[torch.Tensor]] = {}
    for key, tensor in (*now.state.items(), *now.others.items()):
        wholes = (key.replace(f"modules_to_save.{adapter}.", "modules_to_save.") for adapter in adapters)
        for name in {key, ".".join(key.split(".")[-2:]), *wholes}:
            known_as.setdefault(name, []).append(tensor)
    for path, module in model.named_modules():
        for attribute, held in vars(module).items():
            tensors = [held[adapter] for adapter in adapters if adapter in held] if isinstance(held, dict) else []
            known_as.setdefault(f"{path}.{attribute}", []).extend(t for t in tensors if isinstance(t, torch.Tensor))
    for name in checkpoint.tensors.keys() & rest:
        ends = (f"{name.rpartition('.')[-1]}.{adapter}" for adapter in adapters)
        ours = {name, name.removeprefix(PREFIX), PREFIX + name, *ends}
        own = [tensor for one in ours for tensor in known_as.get(one, ())]
        if own and all(equals(tensor, checkpoint.tensors[name]()) for tensor in own):
            found.add(name)
    return found


def of_the_whole(checkpoint: Checkpoint, unread: int | None, rest: list[str]) -> dict[str, Finding]:
    """What there is to say about an adapter as a whole: tensors without a place, or files that are out of date."""
    if not rest:
        return {"": older} if (older := out_of_date(checkpoint)) else {}
    total = len(checkpoint.headers)
    of = "some were not read"
    if total and unread is not None:
        of = f"{total - unread:,} of {total:,} tensors of the adapter were read"
    why = f"{of}; the model has no place for {words.few(rest, fold)}"
    return {"": Finding("", Verdict.UNREAD, rest[0], why, True, "Load it into the model that it was trained on")}


def _lost_in_casts(
    known: Record, in_files: dict[str, str], state: names.Headers, checkpoint: Checkpoint
) -> Iterator[Finding]:
    """Findings on what was read into a type that cannot hold it, or went through one: that of the layer, for one."""
    types = set(types_of(state.values()))
    if len(types | checkpoint.dtypes) < 2:
        return
    headers, there = checkpoint.headers, checkpoint.tensors
    # What peft cuts to size has another shape in the file.
    same_shape = (k for k in sorted(known.stored) if getattr(headers.get(in_files[k]), "shape", None) == state[k].shape)
    for key in same_shape:
        tensor, values = state[key], there[in_files[key]]()
        if equals(tensor, values) is not False:
            continue
        if values.dtype != tensor.dtype:
            found = cast_finding(key, values.dtype, tensor.dtype)
            yield replace(found, cure=found.cure.replace("Load it", "Load the base model"))  # whose type peft takes
            continue
        through = next((kind for kind in types if equals(tensor, values.to(kind).to(values.dtype))), None)
        by = f"by a cast to {str(through).removeprefix('torch.')} and back" if through else "by what read it"
        cure = f"Set TIEDQUIET=repair to read them, or load the base model with dtype={values.dtype}" if through else ""
        yield Finding(key, Verdict.OVERWRITTEN, key, by, True, cure)


def prompts_of(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """What peft saves of an adapter that consists of prompts; nothing of any other."""
    from peft import get_peft_model_state_dict

    if not model.peft_config[adapter].is_prompt_learning:
        return {}
    now: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return now


def altered_prompts(model: Any, adapter: str, checkpoint: Checkpoint) -> list[str]:
    """What the files have of an adapter's prompts, where the model's are others once they went through an encoder."""
    now = prompts_of(model, adapter)
    return sorted(n for n, read in checkpoint.tensors.items() if n in now and not equals(now[n], read()))


def _of_prompts(names_there: list[str]) -> Finding:
    why = (
        f"{words.few(names_there)} of the adapter was read, but the model makes other values of it: peft saves what a "
        "prompt encoder computes, not the encoder, and has read it into what goes into a new one"
    )
    return Finding("", Verdict.UNREAD, names_there[0], why, True, FOR_INFERENCE)


def of_missing(keys: Collection[str], total: int, are_on_meta: bool = False) -> str:
    """What there is to say of an adapter's tensors that its files do not have: no report of peft's names them all."""
    of = f"{len(keys):,} of {total:,} tensors of the adapter {'is' if len(keys) == 1 else 'are'}"
    what = "have no values, because low_cpu_mem_usage left them on meta"
    what = what if are_on_meta else "kept the values that the model had"
    return f"missing, {of} not in its files under their names, and {what}: {words.few(keys, fold)}"


def _as_given(adapter: str, name: str, headers: names.Headers) -> str:
    """The name in the files of what peft found no place for: peft may have put the adapter's own into it."""
    parts = name.split(".")
    own = [without(parts, place) for place, part in enumerate(parts) if part == adapter and place]
    return next((known for known in (name, *own) if known in headers), [name, *own][-1])
