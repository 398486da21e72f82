"""What is true of a loaded model, from the bytes of the file it was loaded from."""

import re
from functools import cached_property
from typing import Any

from benchmarks import tiny_models
from benchmarks.census import ways
from benchmarks.census.comparing import is_made_of, is_one_of, never_written
from benchmarks.census.models import Saved, asked_for, buffers_beside_the_state, fingerprint
from benchmarks.census.ways import (
    Tensors,
    Way,
    base_model_s_file,
    in_bfloat16,
    subclass_of_version_4,
    under_a_target_s_name,
)


def read_from_disk(model: Any, name: str) -> Any:
    """What accelerate puts in the place of a tensor on meta while its module is called; None if it has nothing.

    A module with two names has a hook for each, and each looks under its own.
    """
    path, _, last = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        weights = getattr(each, "weights_map", None)
        if weights is not None and weights.prefix + last == name:
            try:
                return weights[last]
            except KeyError:
                return None
    return None


class Truth:
    """What is true of a loaded model, from the bytes of the file it was loaded from."""

    def __init__(
        self, saved: Saved, way: Way, file: dict[str, Any], model: Any, info: dict[str, Any], read: Tensors
    ) -> None:
        import torch

        self.saved = saved
        self.way = way
        self.file = file
        self.model = model
        self.read = read
        self.now = dict(model.state_dict(keep_vars=True))
        self.buffers = buffers_beside_the_state(model)
        self.everything = {**self.now, **self.buffers}
        self.reported = set(info["missing_keys"])
        self.stored: dict[str, Any] = {}
        self._on_disk: dict[str, Any] = {}
        # Stored tensors of which one row is zero again, and all others as they were: the padding's.
        self.padding: set[str] = set()
        # Stored values that gave way to those of another stored name.
        self.clashes: list[str] = []
        # Merged or split tensors that transformers reads otherwise than it saved them.
        self.read_otherwise: list[str] = []
        # Keys that the loader reported missing, and the names under which the file has their values all the same;
        # empty where it has them in another form.
        self.unread: dict[str, str] = {}
        self.mismatched = {entry[0] for entry in info["mismatched_keys"]}
        not_delivered = self.reported | self.mismatched
        base = f"{saved.model.base_model_prefix}." if way.tensors is base_model_s_file else ""
        for key, value in file.items():
            name = (
                base + key if base and base + key in self.now else saved.name_in_model(key, saved.file.get(key, value))
            )
            if name in self.now and name not in not_delivered:
                self.stored[name] = value
            elif name in self.reported - self.mismatched and self.now[name].shape == value.shape:
                self.unread[name] = key
        # Of a merged or split tensor no file has the bytes: what the loader does not miss is then delivered, and
        # what it should be, the model that was saved tells; or what was read, where that was something else.
        not_delivered |= {name for group in saved.groups for name in group}
        places = {tensor.data_ptr() for name, tensor in self.now.items() if name in self.stored}
        for name in sorted(self.now.keys() - self.stored.keys() - not_delivered):
            if not self.needs_no_file(name) and self.now[name].data_ptr() not in places:
                value = saved.state[name]
                if way.tensors is in_bfloat16 and value.is_floating_point():
                    value = value.bfloat16()
                if name in read and not torch.equal(read[name], value.to(read[name].dtype)):
                    if is_one_of(read[name], file.values()):
                        continue  # the values of another one, of which the file has them as they are
                    self.read_otherwise.append(name)
                    value = read[name]
                self.stored[name] = value

    def needs_no_file(self, name: str) -> bool:
        """Whether the class itself says so, and the file does not have it in another shape."""
        if name in self.mismatched:
            return False
        patterns = [*(self.model._keys_to_ignore_on_load_missing or ()), *(self.model._keys_to_ignore_on_save or ())]
        return any(re.search(pattern, name) for pattern in patterns)

    def value(self, name: str) -> Any:
        """What a forward pass would find under a name; None where that is nothing."""
        if not (tensor := self.now[name]).is_meta:
            return tensor.detach()
        if name not in self._on_disk:
            self._on_disk[name] = read_from_disk(self.model, name)
        return self._on_disk[name]

    def one(self, a: str, b: str) -> bool:
        """Whether two names are one tensor: whether what is written to one is read from the other."""
        import torch

        left, right = self.now[a], self.now[b]
        if left.is_meta and right.is_meta and left.shape == right.shape:
            # What is on disk is read anew for each name, whatever the names share in memory.
            left, right = self.value(a), self.value(b)
            return left is not None and right is not None and torch.equal(left, right)
        if left is right:
            return True
        if left.is_meta or right.is_meta or left.shape != right.shape or not left.numel() or left.dtype != right.dtype:
            return False
        if left.data_ptr() != right.data_ptr():  # spares writing to pairs that cannot be one
            return False
        with torch.no_grad():
            before = left.flatten()[0].clone()
            left.view(-1)[0] = 1 - before
            follows = bool(right.flatten()[0] == 1 - before)
            left.view(-1)[0] = before
        return follows

    def intact(self, name: str) -> bool:
        from tests.checkpoints import holds

        stored, now = self.stored[name], self.value(name)
        if now is None or not holds(now, stored.to(now.dtype), any_row=True):
            return False
        changed = (now != stored.to(now.dtype)).flatten(1).any(1).nonzero().flatten().tolist() if now.dim() > 1 else []
        if changed:
            self.padding.add(name)
        return self.other_tokens.isdisjoint(changed)

    @cached_property
    def other_tokens(self) -> set[int]:
        """The rows of an embedding that are another special token's than that for padding."""
        configs = tiny_models.nested(self.model.config)
        named = (pair for config in configs for pair in vars(config).items() if pair[0].endswith("_token_id"))
        return {value for name, value in named if name != "pad_token_id" and isinstance(value, int)}

    def is_mixed_up(self, key: str) -> bool:
        """Whether what was read under a name is what the file has for another one."""
        import torch

        now, own = self.read.get(key), self.stored[key]
        return now is not None and any(
            torch.equal(now, value.to(now.dtype)) for value in self.file.values() if value is not own
        )

    def note_unread(self, others: set[str]) -> None:
        """Note the missing keys that the files have for another class: that which a user's extends, or the base's."""
        for key in self.reported & others - self.saved.meant.keys():
            self.unread.setdefault(key, "")

    def cannot_tell(self, key: str, ours: str | None, hint: str | None) -> bool:
        """Whether the bytes leave open what tiedquiet says."""
        import torch

        # Memory that nobody wrote reads as true.
        if ours == "unwritten" and self.everything[key].dtype == torch.bool:
            return bool(self.everything[key].all())
        # What nothing wrote and the files have is both.
        if ours == "unread" and key in self.unread and never_written(self.everything[key]):
            return True
        # Of tensors with the same values (a new batch norm's) the bytes do not tell which one a file has.
        if ours == "unread" and len(self.saved.aliases[fingerprint(self.saved.state[key])]) > 1:
            return True
        # Under a name that only this census gives it: then all that can be said is that it may be that one.
        if ours == "missing" and hint and self.way.tensors is under_a_target_s_name:
            return self.unread.get(key) == hint
        # Two stored values where there is one tensor in the end: whether it was one before it was read.
        return key in self.clashes and ours == "overwritten"

    def is_right_cause(self, found: Any) -> bool:
        """Whether what a finding says beside its verdict is so: its source, and the cause."""
        import torch

        follows = found.source in self.stored and self.one(found.key, found.source)
        match str(found.verdict):
            case "tied":
                return follows and self.intact(found.source)
            case "copied":
                return torch.equal(self.value(found.key), self.stored[found.source].to(self.now[found.key].dtype))
            case "untied":
                blames_the_flag = "tie_word_embeddings is false" in found.why
                return found.source in self.stored and blames_the_flag is self.way.is_flag_off
            case "ambiguous":
                rivals = [name for name in self.stored if name in found.why] or [found.key]
                differ = any(not torch.equal(self.stored[n], self.stored[found.source]) for n in rivals)
                return (follows or found.key in self.stored) and differ and self.intact(found.source)
            case "overwritten":
                # Of the code that writes in the other ways only transformers knows.
                by_us = self.way.cls is subclass_of_version_4 and found.key not in self.padding
                return follows and (not by_us or f"._init_weights ({ways.__file__}:" in found.why)
            case "unread":
                own = self.saved.state[found.key]
                own = own.bfloat16() if self.way.tensors is in_bfloat16 and own.is_floating_point() else own
                return is_made_of(own, self.file.get(found.source))
            case "missing":
                # A guess at what it may be in the file is no more than that, but it has to be there.
                return found.source is None or found.source in self.file
            case "unwritten":
                return (found.why == "a buffer") is (found.key in dict(self.model.named_buffers()))
        return True

    def other_buffers(self) -> list[str]:
        """Buffers that were written, and not with what they hold in a model that is built and not loaded."""
        import torch

        right = self.saved.buffers
        return [
            name
            for name, buffer in self.buffers.items()
            if name in right and buffer.shape == right[name].shape and buffer.dtype == right[name].dtype
            if not never_written(buffer) and not torch.equal(buffer, right[name])
        ]

    def chain(self, key: str) -> list[str]:
        chain: list[str] = []
        while (key := self.saved.sources.get(key, "")) and key not in chain:
            chain.append(key)
        return chain

    def verdicts(self) -> dict[str, str]:
        """The verdict that each tensor should get that is not simply stored and unchanged."""
        found = {name: "unwritten" for name, tensor in self.everything.items() if never_written(tensor)}
        for key in self.stored:
            if not self.intact(key):
                # A key that its class says needs no file is not reported, whether anything was read into it or not.
                is_unread = key not in self.read and not self.now[key].is_meta
                found[key] = "unread" if is_unread or self.is_mixed_up(key) else "overwritten"
        for group in self.saved.groups:
            members = sorted(name for name in group if name in self.now)
            stored = [name for name in members if name in self.stored]
            for key in members:
                if key not in self.stored:
                    verdict = self.verdict(key, stored)
                    if verdict != "missing" or key not in found:
                        found[key] = verdict
                elif not self.intact(key) and any(self.one(key, name) and self.intact(name) for name in stored):
                    # Two names were one tensor before the load: the loader read both values into it, and the last
                    # one stayed.
                    self.clashes.append(key)
                    found[key] = "ambiguous"
        if head := self.asked_for_by_the_config():
            key, source = head
            if key not in found and key not in self.stored and source in self.stored and not self.one(key, source):
                found[key] = "untied"
        for key in self.reported:
            if key not in found and (served := [name for name in self.stored if self.one(key, name)]):
                found[key] = self.verdict(key, served)
        return self.not_supplied(self.parted(found))

    def parted(self, found: dict[str, str]) -> dict[str, str]:
        """With the targets of ties that are asked for, of which both ends are stored, with two different values."""
        import torch

        for key in asked_for(self.model):
            source = next((name for name in self.chain(key) if name in self.stored), None)
            is_parted = key in self.stored and source is not None and not self.one(key, source)
            if is_parted and key not in found and not torch.equal(self.stored[key], self.stored[source]):
                found[key] = "ambiguous"
        return found

    def not_supplied(self, found: dict[str, str]) -> dict[str, str]:
        """With what nothing supplied: the file has it under a name that nothing read, or it has nothing for it."""
        for key in self.now.keys() - self.stored.keys():
            if found.get(key, "missing") in ("missing", "untied") and not any(self.one(key, n) for n in self.stored):
                if key in self.unread:
                    found[key] = "unread"
                elif found.setdefault(key, "missing") == "missing" and self.needs_no_file(key):
                    del found[key]
        return found

    def asked_for_by_the_config(self) -> tuple[str, str] | None:
        """The output and the input embedding, where the config wants them to be one."""
        if not getattr(self.model.config, "tie_word_embeddings", False):
            return None
        try:
            ends = self.model.get_output_embeddings().weight, self.model.get_input_embeddings().weight
        except (AttributeError, NotImplementedError):
            return None
        names = [next((name for name, tensor in self.now.items() if tensor is end), "") for end in ends]
        return (names[0], names[1]) if all(names) and ends[0].shape == ends[1].shape else None

    def verdict(self, key: str, stored: list[str]) -> str:
        import torch

        if not stored:
            return "missing"
        followed = [name for name in stored if self.one(key, name)]
        if not followed:
            now = self.value(key)
            equal = now is not None and any(torch.equal(now, self.stored[name].to(now.dtype)) for name in stored)
            return "copied" if equal and not (now == now.flatten()[0]).all() else "untied"
        if not all(self.intact(name) for name in followed):
            return "overwritten"
        first = self.stored[followed[0]]
        rivals = [name for name in stored if not torch.equal(self.stored[name], first)]
        meant = next((name for name in self.chain(key) if name in stored), None)
        return "ambiguous" if rivals and meant not in followed else "tied"

    def is_false(self, key: str, verdicts: dict[str, str]) -> bool:
        """Whether a MISSING row is false: its values are those of the file, and nothing leaves them in doubt."""
        served = [name for name in self.stored if self.one(key, name)]
        held = bool(served) and all(map(self.intact, served)) and verdicts.get(key) != "ambiguous"
        return held or verdicts.get(key) == "copied"
