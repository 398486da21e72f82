"""One load: what the checkpoint stored, what became of it, and what can be put right.

That two names share a tensor proves nothing: a module shared in `__init__` can be initialised anew after it was loaded,
and then both names hold the same random values. So a stored tensor counts as held only if it lies where it was read to
and nobody was seen to write there, or if it equals in full what was read.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tiedquiet.memory import Memory, holds, plain, same
from tiedquiet.survey import Survey, asks_for_ties, embeddings, name_of, survey, tensor_at
from tiedquiet.ties import Declaration, Group, groups
from tiedquiet.verdict import BUFFER, Finding, Proof, Verdict
from tiedquiet.watch import Watch, Write

_ATTRIBUTE = "_tiedquiet_load"
Read = Callable[[str], torch.Tensor | None]


class Load:
    """One load of one model. It lives on the model and goes with it, into its copies too.

    Args:
        model: the model whose tensors have just been read.
        missing: the keys that the checkpoint did not deliver (mismatched shapes included).
        read: gives the checkpoint's own values of a key, where it is known by that name.
        files: where those lie.
        offloaded: transformers' index of what stays on disk: for each key, a file and the name in it.
        protect: let no write to what was stored through.
        resumed: the checkpoint is one of this very model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        missing: set[str],
        read: Read = lambda name: None,
        files: Sequence[str] = (),
        offloaded: dict[str, Any] | None = None,
        protect: bool = False,
        resumed: bool = False,
    ) -> None:
        now = survey(model)
        self.missing = now.state.keys() & missing
        self.stored = now.state.keys() - self.missing
        if self.stored and not now.is_plain:
            self.stored &= model.state_dict(keep_vars=True).keys()  # what is kept out of it was asked of no checkpoint
        self.in_flight = sys.exc_info()[1]
        self.reported: set[str] = set()
        self._resumed = resumed
        self.offloaded = {} if offloaded is None else offloaded
        # The tensors that the checkpoint delivered, and aliases of the memory that they were read to.
        self.held = {name: now.state[name] for name in self.stored}
        self.read_to = {name: _alias(tensor) for name, tensor in self.held.items()}
        self._buffers = list(now.others)
        self.ask_file = read
        self.files = list(files)
        self._clashes = self._find_clashes()
        self.lasting: dict[str, Finding] = {}  # findings on the load itself, which nothing later changes
        self._grown: set[str] = set()
        self._settled: dict[str, Finding] = {}
        self.watch = Watch(self.read_to, protect)
        self._is_open, self._is_settled = True, False
        self._earlier = vars(model).get(_ATTRIBUTE)
        vars(model)[_ATTRIBUTE] = self

    @staticmethod
    def unsettled(model: torch.nn.Module) -> "Load | None":
        """The load that this model is in the middle of."""
        load = vars(model).get(_ATTRIBUTE)
        return load if isinstance(load, Load) and load._is_open else None

    def __deepcopy__(self, memo: object) -> "Load":
        return self  # once it is settled nothing changes it

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # a model may be unpickled where there is no tiedquiet

    def close(self) -> None:
        """Let go of all tensors, after the last word on the load; what stays are names and verdicts."""
        self._is_open = False
        earlier, self._earlier = self._earlier, None
        self.held, self.read_to, self.ask_file = {}, {}, lambda name: None
        self.watch = Watch({}, protect=False)
        if self._is_settled and isinstance(earlier, Load):
            # Of its base model before an adapter's, say.
            lasting = {key: finding for key, finding in earlier.lasting.items() if key not in self.stored}
            self.lasting = {**lasting, **self.lasting}
            self._grown |= earlier._grown - self.stored
            self.files = earlier.files + self.files
            self.stored = self.stored | earlier.stored
            self.missing = (self.missing | earlier.missing) - self.stored

    def note_placeholders(self, model: torch.nn.Module) -> None:
        """Note what transformers has just allocated for tensors that were not read: memory without values."""
        for name in (*self.missing, *self._buffers):
            tensor = tensor_at(model, name)
            if tensor is not None and not tensor.is_meta:
                self.watch.add_placeholder(tensor)

    # Judging

    def settle(self, model: torch.nn.Module, reported: set[str]) -> list[Finding]:
        """Judge the load, now that it has ended.

        Args:
            model: the loaded model.
            reported: the keys that transformers is about to report MISSING.

        Returns:
            The findings, sorted by key.

        Raises:
            Exception: what went wrong under the watch; after that nothing can be said.
        """
        self._is_open = self.watch.open = False
        if self.watch.error is not None:
            raise self.watch.error
        self.reported, self._grown = reported, set()
        if not self.watch.was_entered:
            self.missing &= reported  # of an adapter; the base model's keys are not its business
        now = survey(model)
        if not self._is_settled:  # what is written afterwards, `repair` writes
            self._note_writes_elsewhere()
        self.lasting = {**self._clashes, **self._judge_stored(model, now), **self._judge_placeholders(now)}
        self._settled = {}
        findings = self._judge(model, now)
        self._settled, self._is_settled = {finding.key: finding for finding in findings}, True
        return findings

    def proof(self, model: torch.nn.Module) -> Proof:
        """What is known of the model as it is now. To train it is no loss; to take its ties apart is one."""
        now = survey(model)
        for parts in (now.state, now.others):
            parts.update({loaded_name(name): tensor for name, tensor in parts.items()})
        findings = tuple(self._judge(model, now))
        return Proof(type(model).__name__, len(self.stored - {f.key for f in findings}), findings)

    def _judge(self, model: torch.nn.Module, now: Survey) -> list[Finding]:
        findings = dict(self.lasting)
        for finding in self._judge_missing(model, now):
            # A tie of which no end was stored does not explain why nothing was written to this one.
            if finding.key not in findings or finding.verdict is not Verdict.ABSENT:
                findings[finding.key] = finding
        return [findings[key] for key in sorted(findings) if key in now.state or key in now.others]

    def _find_clashes(self) -> dict[str, Finding]:
        """Findings on two names of one tensor that were both read: the last one stayed, whatever the other held."""
        found: dict[str, Finding] = {}
        if len(set(map(id, self.held.values()))) == len(self.held):
            return found
        for names in _by_object(self.held).values():
            if len(names) > 1:
                values = {name: self.ask_file(name) for name in sorted(names)}
                won = [name for name, value in values.items() if value is not None and self._was_read(name, value)]
                for name in values.keys() - set(won):
                    if won and values[name] is not None:
                        why = "not its own: both were read into one tensor"
                        found[name] = Finding(name, Verdict.AMBIGUOUS, won[0], why, True)
                    else:
                        why = "two stored keys share one tensor, and under these names the file does not have them"
                        found[name] = Finding(name, Verdict.UNPROVEN, None, why)
        return found

    def _was_read(self, name: str, value: torch.Tensor) -> bool:
        return bool(holds(self.read_to[name], value))

    def _note_writes_elsewhere(self) -> None:
        """Note the writes of which torch tells and the watch did not: those of other threads."""
        for name, tensor in self.held.items():
            # If it was given other memory, that is compared in any case.
            if self.watch.was_written_elsewhere(name) and lies_at(tensor, self.read_to[name]):
                values = self.ask_file(name)
                if values is not None and values.shape != tensor.shape:
                    values = None  # it was converted while it was read
                seen = self.watch.writes.get(name)
                by = seen.by if seen and seen.was_seen else "by another thread or by compiled code"
                self.watch.writes[name] = Write(by, 0 if values is None else tensor.numel(), values)

    def _judge_stored(self, model: torch.nn.Module, now: Survey) -> dict[str, Finding]:
        """Findings on stored keys that no longer hold what was read."""
        found = {}
        for name, tensor in self.held.items():
            read = self.read_to[name]
            current, write = now.state.get(name), self.watch.writes.get(name)
            if current is tensor and write is None and lies_at(current, read):
                continue
            before = write.before if write else read
            held = None if current is None or before is None else holds(current, before)
            if current is None or (held is None and not (write and write.was_seen)):
                found[name] = Finding(name, Verdict.UNPROVEN, None, "what became of its values cannot be told")
            elif held:
                if before is not None and current.numel() > before.numel():
                    self._grown.add(name)
            elif before is None or not is_padding(model, name, current, before):
                by = write.by if write else "by another tensor that took its place"
                found[name] = Finding(name, Verdict.OVERWRITTEN, name, by, True)
        return found

    def _judge_placeholders(self, now: Survey) -> dict[str, Finding]:
        """Findings on memory that was allocated while the model was loaded, and never written."""
        on_disk = any(read.is_meta for read in self.read_to.values())
        tensors = {**{key: now.state[key] for key in self.missing if key in now.state}, **now.others}
        return {
            name: Finding(name, Verdict.UNWRITTEN, None, _kind(tensor), True)
            for name, tensor in tensors.items()
            if self.watch.is_unwritten(tensor) or (tensor.is_meta and not on_disk and name in now.others)
        }

    def _judge_missing(self, model: Any, now: Survey) -> Iterator[Finding]:
        """Findings on missing keys that belong to a tie, or that lie in the memory of a stored one."""
        missing = [key for key in self.missing if key in now.state]
        if not missing:
            return
        stored = {name: now.state[name] for name in self.stored if name in now.state}
        memory: Memory | None = None
        names_of, ties = _by_object(stored), self.ties(now)
        for key in missing:
            tensor, group = now.state[key], ties.get(key)
            if tensor.is_meta and key in self._settled:
                yield self._settled[key]  # moved to disk since then
                continue
            followed = names_of.get(id(tensor), [])
            if not followed and (pieces := plain(tensor)):
                memory = memory or Memory(stored)
                followed = memory.holding(pieces[0])
            if followed:
                yield self._judge_follower(key, followed, group or Group(), stored)
            elif group is not None:
                yield self._judge_parted(model, key, tensor, group, stored)

    def ties(self, now: Survey) -> dict[str, Group]:
        """The groups of names that are meant to be one tensor: declared, or asked for by the config alone."""
        declarations = []
        for prefix, model in now.models:
            if keys := getattr(model, "_tied_weights_keys", None):
                flag = (
                    ""
                    if asks_for_ties(model)
                    else f"because {type(model.config).__name__}.tie_word_embeddings is false"
                )
                declarations.append(Declaration(prefix, keys, flag))
        found = groups(declarations, now.state)
        for _, model in now.models:
            if asks_for_ties(model):
                head, embedding = (
                    name_of(getattr(embeddings(model, which), "weight", None), now.state)
                    for which in ("output", "input")
                )
                asked = head in self.missing and embedding in self.stored and head not in found
                if asked and now.state[head].shape == now.state[embedding].shape:
                    found[head] = Group([embedding, head], {head: embedding}, by_config=type(model).__name__)
        return found

    def _judge_follower(self, key: str, followed: list[str], group: Group, stored: dict[str, torch.Tensor]) -> Finding:
        """The verdict on a missing key that lies in a stored one's memory."""
        for name in followed:
            lost = self.lasting.get(name)
            if lost is not None and lost.verdict is Verdict.OVERWRITTEN:
                return Finding(key, Verdict.OVERWRITTEN, name, lost.why, True)
            if lost is not None or name in self._grown:
                return Finding(key, Verdict.UNPROVEN, name, lost.why if lost else f"{name} was made larger")
        meant = next((name for name in group.chain(key) if name in stored), None)
        source = meant if meant in followed else min(set(followed) & set(group.members) or followed)
        # Following its own declared source is what the author asked for, whatever the rest of the group holds
        # (a T5 with an `lm_head` of its own). Otherwise two different stored values leave the choice open.
        if source != meant and (rival := rival_of(source, group, stored)):
            return Finding(key, Verdict.AMBIGUOUS, source, f"not of {rival}", True)
        if self._place(source) != self._place(key):
            # One tensor, without values: accelerate reads them for each name anew, and up to 5.12.1 it is not told
            # where those of a tied one are.
            return Finding(key, Verdict.UNTIED, source, "because accelerate finds nothing on disk under its name", True)
        return Finding(key, Verdict.TIED, source)

    def _judge_parted(
        self, model: Any, key: str, tensor: torch.Tensor, group: Group, stored: dict[str, torch.Tensor]
    ) -> Finding:
        """The verdict on a missing key of a tie that lies in memory of its own."""
        members = [name for name in group.members if name in stored]
        if not members:
            return Finding(key, Verdict.ABSENT, None, "no end of its tie is in the checkpoint")
        meant = next((name for name in group.chain(key) if name in stored), None)
        source = meant or members[0]
        if tensor.is_meta and (place := self._place(key)) is not None and place == self._place(source):
            return Finding(key, Verdict.TIED, source)
        if not tensor.is_meta:  # what is on meta and not in the index of what is on disk has no values at all
            other = stored[source]
            if other.is_meta and (values := self.ask_file(source)) is not None:  # it stays on disk
                other = values
            if not plain(tensor) or not plain(other):
                kinds = " and ".join(f"{type(t).__name__} on {t.device}" for t in (tensor, other))
                return Finding(key, Verdict.UNPROVEN, source, f"the two cannot be compared ({kinds})")
            # Two tensors of one constant are equal by accident: biases that start at zero.
            equal = holds(tensor, other) and tensor.numel() == other.numel()
            equal = equal and not _is_constant(tensor) and source not in self.lasting
            if equal and (meant or rival_of(source, group, stored) is None):
                return Finding(key, Verdict.COPIED, source)
        flag = group.flags.get(key, "")
        broken = not flag or (key in self.reported and not self._is_new_head(model, tensor))
        return Finding(key, Verdict.UNTIED, source, flag or _why_untied(model, group), broken)

    def _is_new_head(self, model: Any, tensor: torch.Tensor) -> bool:
        """Whether a key whose tie the config switches off is a head that nobody asked to tie.

        It is not if the checkpoint was saved by the very class that is loaded, or by one that it inherits from: then
        the head had a value, and the file lacks it. Nor if it is no head: the flag of the config is about heads, and
        two input embeddings that are one by the model's design (UMT5's) cannot part.
        """
        saved_by = getattr(getattr(model, "config", None), "architectures", None) or ()
        if self._resumed or any(kind.__name__ in saved_by for kind in type(model).__mro__):
            return False
        head = embeddings(model, "output")
        return isinstance(head, torch.nn.Module) and any(parameter is tensor for parameter in head.parameters())

    def _place(self, key: str) -> tuple[object, object] | None:
        """The file on disk, and the name in it, that a key's values are read from whenever they are needed."""
        entry = self.offloaded.get(key)
        return (entry.get("safetensors_file"), entry.get("weight_name")) if entry else None


def proof(model: Any, inert: str = "") -> Proof:
    """What is known of a model, or of those inside it: of `torch.compile`, DDP, PEFT, or a composite of several.

    Args:
        model: any object.
        inert: why no load can have been seen.
    """
    found: list[tuple[str, Proof]] = []
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        load = vars(module).get(_ATTRIBUTE)
        inside = any(name.startswith(outer) for outer, _ in found)
        if isinstance(load, Load) and load._is_settled and not inside:
            found.append((f"{name}." if name else "", load.proof(module)))
    if len(found) == 1:
        return found[0][1]
    findings = [
        replace(finding, key=prefix + finding.key, source=finding.source and prefix + finding.source)
        for prefix, part in found
        for finding in part.findings
    ]
    if not found:
        why = inert or "no record of a load: it was loaded before tiedquiet was enabled, or not from a checkpoint"
        findings = [Finding("", Verdict.UNPROVEN, None, why)]
    return Proof(type(model).__name__, sum(part.stored for _, part in found), tuple(findings))


def record(model: torch.nn.Module) -> Load | None:
    """What is known of a model's own load; None where it was not seen."""
    load = vars(model).get(_ATTRIBUTE)
    return load if isinstance(load, Load) and load._is_settled else None


def loaded_name(name: str) -> str:
    """The name that a tensor had when it was loaded, before PEFT wrapped the module that it is in."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _kind(tensor: torch.Tensor) -> str:
    return "a parameter" if isinstance(tensor, torch.nn.Parameter) else BUFFER


def _by_object(tensors: dict[str, torch.Tensor]) -> dict[int, list[str]]:
    """The names of each tensor."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    return names_of


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor over the same memory: it keeps that alive, and knows where it is, whatever `.data` is set to."""
    return tensor.detach() if type(tensor) in (torch.Tensor, torch.nn.Parameter) else tensor


def lies_at(tensor: torch.Tensor, read: torch.Tensor) -> bool:
    """Whether it is the same view of the same memory: a square matrix that was transposed has the address, too."""
    return tensor is read or (
        tensor.data_ptr() == read.data_ptr()
        and tensor.shape == read.shape
        and tensor.stride() == read.stride()
        and tensor.dtype is read.dtype
    )


def _is_constant(tensor: torch.Tensor) -> bool:
    flat = plain(tensor)[0].detach().reshape(-1)
    return same(flat, flat[:1].expand_as(flat))


def is_padding(model: Any, name: str, tensor: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether all that changed is the one row that stands for padding, zeroed again as releases before 5.9 do."""
    pieces = plain(tensor)
    if len(pieces) != 1 or pieces[0].dim() < 2 or pieces[0].shape != before.shape:
        return False
    now = pieces[0].detach()
    owner = model.get_submodule(name.rpartition(".")[0])
    rows = {getattr(owner, "padding_idx", None), getattr(getattr(model, "config", None), "pad_token_id", None)}
    return any(
        not now[row].any() and same(now[:row], before[:row]) and same(now[row + 1 :], before[row + 1 :])
        for row in rows
        if isinstance(row, int) and 0 <= row < len(now)
    )


def rival_of(source: str, group: Group, stored: dict[str, torch.Tensor]) -> str | None:
    """A stored member of the group whose values are not those of `source`, or cannot be compared with them."""
    for name in group.members:
        if name in stored and stored[name] is not stored[source] and not holds(stored[name], stored[source]):
            return name
    return None


def _why_untied(model: Any, group: Group) -> str:
    """Why a tie that is asked for does not hold, as a clause."""
    method = inspect.unwrap(getattr(type(model), "tie_weights", len))
    if "no_tie_weights" in method.__qualname__:
        return "because two models were loaded at once in two threads, which left PreTrainedModel.tie_weights empty"
    if group.by_config:
        return f"although its config asks for it, because {group.by_config}._tied_weights_keys does not declare it"
    code = getattr(method, "__code__", None)
    if code is not None and not method.__module__.startswith("transformers."):
        return f"because {method.__qualname__} ({code.co_filename}:{code.co_firstlineno}) does not tie it"
    return "although its config asks for it"
