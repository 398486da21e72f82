"""What a Trainer has read of a folder by plain `load_state_dict`, and what the folder has but nothing read.

What the files would give by transformers' own rules is compared with what was read, by names and shapes; in `repair`,
the rest is read here.
"""

from collections.abc import Iterator
from dataclasses import replace

from tiedquiet import mode
from tiedquiet.doors.folder import Folder, Inside
from tiedquiet.proof import names
from tiedquiet.proof.memory import types_of
from tiedquiet.proof.missing import BOTH_OF_RUN, WHY_TWO_ENDS
from tiedquiet.proof.reading import Reading, read
from tiedquiet.proof.repair import copy_in_place
from tiedquiet.proof.survey import declared, embeddings, survey
from tiedquiet.proof.unread import ask_headers, find_unread, in_two_files, note_unread, out_of_date
from tiedquiet.verdict import ONE_OF_TWO, Finding, Verdict

_REPAIR = "Set TIEDQUIET=repair to read them"
_BY_HAND = "give Trainer a model that from_pretrained loaded from this checkpoint"
_BY_HAND_OF_BEST = "load this checkpoint with from_pretrained"
_BY_CODE = (
    "Make the code that read it rename and convert them, as from_pretrained does; TIEDQUIET=repair reads them only if "
    "all else came from these files"
)


def read_folder(
    of: Inside, folder: str, missing: set[str], unexpected: set[str], may_write: bool = True, is_best: bool = False
) -> tuple[Reading, list[Finding], set[str]]:
    """What was read from a folder, and what it has but nothing read; in `repair`, that is read now.

    Args:
        of: the model.
        folder: where the files are.
        missing: the names of the judged model that were reported missing.
        unexpected: the files' names that were reported to have no place.
        may_write: whether it is certain that these are the files which were read.
        is_best: whether the run is over, and it was its best model.

    Returns:
        The reading; what was read now; and the keys that nothing had to read, since the model has their values already.
    """
    resumed = _Resumed(of, folder, missing, unexpected, may_write)
    by_hand = _BY_HAND_OF_BEST if is_best else _BY_HAND
    resumed.note_files()
    resumed.take_converted(by_hand)
    resumed.note_other_shapes(by_hand)
    resumed.take_other_names()
    return resumed.outcome()


class _Resumed:
    """What becomes of a folder's tensors, in the order in which each of the rules is asked.

    The arguments are those of `read_folder`.
    """

    def __init__(self, of: Inside, folder: str, missing: set[str], unexpected: set[str], may_write: bool) -> None:
        self._model, self._folder, self._may_write = of.model, (there := Folder(of, folder)), may_write
        self._checkpoint = there.checkpoint
        # The Trainer believes the index.
        missing |= {there.key_at[name] for name in (self._checkpoint.promised - there.in_files) & there.key_at.keys()}
        self._unexpected = there.as_in_files(unexpected) & there.in_files
        self._unasked = there.unasked - missing if self._unexpected else set()
        self._twice = {name: (first, second) for name, first, second in self._checkpoint.twice()}
        self._converted = list(there.made(missing, self._unexpected)) if self._unexpected else []
        asked = missing.union(self._unasked, *(made.origins for made in self._converted))
        self._reading = read(self._model, asked, self._checkpoint, made_of=lambda: there.renamed)
        self._reading.free |= self._unasked
        # What an index lacks and a shard has is read along with that shard.
        lacked = {key: there.own[key] for key in self._reading.missing if there.own[key] in there.in_files}
        own = {key: names.Origin((name,), False) for key, name in lacked.items()}
        self._held = {key: origin for key, origin in own.items() if there.holds(names.Made({key: origin}, ""))}
        self._done: dict[str, names.Origin] = {}

    def note_files(self) -> None:
        """Note what the files by themselves tell: two values for one tensor, an older file beside, casts."""
        there, reading = self._folder, self._reading
        reading.found.update((finding.key, finding) for finding in self._of_tied_heads())
        for name, files in self._twice.items():
            if (key := there.key_at.get(name)) in reading.held:
                reading.found[key] = in_two_files(key, *files)
        reading.found.update((finding.key, finding) for finding in there.judge_rivals(reading))
        self._unexpected -= {name for _, every, _ in there.rivals.values() for name in every.names}
        if (older := out_of_date(self._checkpoint)) is not None:
            reading.found[""] = older
        if _has_cast(there, reading):
            headers, own = self._checkpoint.headers, there.own
            ask_headers(self._model, reading, also={own[key]: key for key in reading.held if own[key] in headers})

    def _of_tied_heads(self) -> Iterator[Finding]:
        """Findings on heads that were trained by themselves, and read into the embedding that they are tied to."""
        both = [found for found in self._reading.found.values() if found.verdict is Verdict.AMBIGUOUS and found.source]
        if not both:
            return
        now = survey(self._model)
        tied, heads = declared(now), [embeddings(model, "output") for _, model in now.models]
        for found in both:
            key, source = found.key, str(found.source)
            group = tied.get(key)
            owners = [self._model.get_submodule(name.rpartition(".")[0]) for name in (key, source)]
            if group and source in group.members and not group.flags.get(key) and any(o in heads for o in owners):
                why = f"{WHY_TWO_ENDS}; now both are {source}"
                yield replace(found, why=why, cure=ONE_OF_TWO + BOTH_OF_RUN)

    def _cure(self, by_hand: str = "") -> str:
        """What to do; `repair` puts nothing beside values that are not these files'."""
        return (f"{_REPAIR}, or {by_hand}" if by_hand else _REPAIR) if self._may_write else _BY_CODE

    def take_converted(self, by_hand: str) -> None:
        """Take what `from_pretrained` would have renamed and converted."""
        for made in self._converted:
            # That of the call that loaded the model, of which its class knows nothing.
            mapping = names.mapping_besides(made.conversions, names.conversions_of(self._folder.core))
            with_it = ", with the same key_mapping" if mapping else ""
            note_unread(self._reading, made, self._cure(by_hand + with_it))
            self._take(made)

    def note_other_shapes(self, by_hand: str) -> None:
        """Note what it would have found in another shape than the model's: nothing can read that."""
        there, reading = self._folder, self._reading
        unfit = {key: own for key, own in there.unfit.items() if key in reading.missing - reading.found.keys()}
        # Rows that were appended since, to what the model was made from, are no loss.
        grown = {key: own for key, own in unfit.items() if there.has_in_larger(key, own)}
        self._held.update(grown)
        lost = names.Made({key: own for key, own in unfit.items() if key not in grown}, "in another shape")
        note_unread(reading, lost, by_hand[0].upper() + by_hand[1:])
        self._unexpected -= {name for made in (*self._converted, names.Made(unfit, "")) for name in made.key_of}

    def take_other_names(self) -> None:
        """Take what lies under other names than those that transformers knows."""
        reading, headers = self._reading, self._checkpoint.headers
        left = {name: headers[name] for name in self._unexpected if name in headers}
        found = find_unread(self._model, reading, left, cure=self._cure(), is_resumed=True)
        missing = reading.missing - reading.found.keys()
        if not found and (under := self._folder.under_a_prefix(missing, left)) is not None:
            note_unread(reading, under, self._cure())
            found = [under]
        for made in found:
            self._take(made)

    def _take(self, made: names.Made) -> None:
        """Count as read what the model has already; in `repair`, read the rest into it."""
        there, once = self._folder, {}
        for key, origin in made.origins.items():
            if doubled := self._twice.keys() & set(origin.names):
                self._reading.found[key] = in_two_files(key, *self._twice[min(doubled)])
            else:
                once[key] = origin
        made = made._replace(origins=once)
        # Just one of them first: if there is something to report, it costs no more than that one.
        if once and there.holds(made._replace(origins=dict([*once.items()][:1]))) and there.holds(made):
            self._held.update(once)
        elif self._may_write and mode.current() == "repair":
            values = there.values(made)
            self._done.update((key, once[key]) for key, value in values if copy_in_place(there.state[key], value))

    def outcome(self) -> tuple[Reading, list[Finding], set[str]]:
        """The reading, with what was taken; what was read now; and what the model had already."""
        reading, came = self._reading, self._done | self._held
        unasked = self._unasked - reading.found.keys()
        if not came and not unasked:
            return reading, [], set()
        mended = [reading.found[key] for key in sorted(self._done)]
        made_of = {**self._folder.renamed, **came}
        again = read(self._model, reading.missing - came.keys() - unasked, self._checkpoint, made_of=lambda: made_of)
        again.found.update({key: finding for key, finding in reading.found.items() if key not in came})
        again.likely = {key: name for key, name in reading.likely.items() if key not in unasked}
        again.narrowed = reading.narrowed
        return again, mended, set(self._held)


def without_a_place(of: Inside, folder: str) -> set[str]:
    """The names in a folder's files that a plain `load_state_dict` of the model has no place for."""
    there = Folder(of, folder)
    return there.in_files - there.key_at.keys()


def came_from(of: Inside, folder: str, missing: set[str], unexpected: set[str]) -> bool:
    """Whether a folder's files have all that somebody's code was seen to read, each value to the bit.

    Args:
        of: the model.
        folder: where the files are.
        missing: the names of the judged model that nothing was read into.
        unexpected: the names of what was read and had no place.
    """
    there = Folder(of, folder)
    unexpected = there.as_in_files(unexpected)
    read_into = {key: names.Origin((there.own[key],), False) for key in there.state.keys() - missing - there.unasked}
    made = names.Made(read_into, "")
    return there.checkpoint.tensors.keys() >= unexpected | made.key_of.keys() and there.holds(made)


def _has_cast(there: Folder, reading: Reading) -> bool:
    """Whether anything was read into another type than the file has it in, and by no quantiser."""
    checkpoint = reading.checkpoint
    if getattr(there.core, "hf_quantizer", None) or len({*checkpoint.dtypes, *types_of(reading.held.values())}) < 2:
        return False
    headers = checkpoint.headers
    stored = ((headers.get(there.own[key]), tensor) for key, tensor in reading.held.items())
    return any(header is not None and header.dtype != tensor.dtype for header, tensor in stored)
