"""The dispatch mode among others, and under errors; through real loads wherever a load can show it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from transformers import initialization as init

import tiedquiet
from tests.checkpoints import Printed
from tests.idioms import IDIOMS, Idiom, IdiomConfig, Part, Tiny, dirty_memory, same
from tiedquiet import Verdict
from tiedquiet.proof.placeholders import version_of, versions_of
from tiedquiet.proof.watch import Watch


def saved(folder: Path, name: str = "good citizen, lin.bias missing") -> Path:
    folder.mkdir(exist_ok=True)
    IDIOMS[name].save(folder)
    return folder


def verdicts(model: torch.nn.Module) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in tiedquiet.check(model).findings}


class TakesApart(Tiny):
    """Does away with what was read and with what was not, gives a layer more columns, and another no values."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        del model.part
        model.lin.bias = None
        model.lin.weight = torch.nn.Parameter(torch.zeros(8, 9))
        model.head.to("meta")
        return model


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
def test_what_a_class_takes_apart_is_unproven(mode: str, tmp_path: Path, printed: Printed) -> None:
    saved(tmp_path)
    with tiedquiet.enable(mode):
        model = TakesApart.from_pretrained(tmp_path)
    assert verdicts(model) == dict.fromkeys(["head.weight", "lin.weight", "part.weight"], Verdict.UNPROVEN)
    assert not printed.loud


class Raises(Tiny):
    """An initialiser that tries something and does without it."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, torch.nn.Linear) and module.bias is not None and not module.bias.is_meta:
            with pytest.raises(RuntimeError, match="must match the size"):
                module.bias.data.add_(torch.ones(3))
            Raises.tried += 1

    tried = 0


@pytest.mark.parametrize("mode", ["on", "repair"])
def test_an_operation_that_raises_raises_as_before(mode: str, tmp_path: Path, printed: Printed) -> None:
    before = Raises.tried
    with tiedquiet.enable(mode):
        Raises.from_pretrained(saved(tmp_path))
    assert Raises.tried > before
    assert not any("goes on without it" in line for line in printed.of("tiedquiet"))


compiled = torch.compile(lambda tensor: init.zeros_(tensor), backend="eager")


class Compiles(Tiny):
    """Calls compiled code while it initialises."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lin and not module.bias.is_meta:
            compiled(module.bias)


class UserMode(TorchDispatchMode):
    """Somebody else's mode, around the load."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", ["autocast", "inference", "mode", "compiled"])
def test_loads_in_the_middle_of_other_things(around: str, tmp_path: Path, printed: Printed) -> None:
    folder = saved(tmp_path)
    mode = UserMode()
    context: Any = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode(),
        "mode": mode,
        "compiled": torch.no_grad(),
    }[around]
    with context:
        model = (Compiles if around == "compiled" else Tiny).from_pretrained(folder)
        assert _get_current_dispatch_mode() is (mode if around == "mode" else None)
    assert Verdict.OVERWRITTEN not in verdicts(model).values()
    assert printed.loud == [] or list(verdicts(model).values()) == [Verdict.UNWRITTEN], (
        "5.2.0 leaves the bias unwritten"
    )


def test_it_looks_away_only_where_no_other_mode_is_above_it() -> None:
    watch, mode = Watch({}, protect=False), UserMode()
    with watch.aside():
        assert _get_current_dispatch_mode() is None
    assert _get_current_dispatch_mode() is None
    with watch:
        with watch.aside():
            assert _get_current_dispatch_mode() is None
        assert _get_current_dispatch_mode() is watch
        with mode:
            with watch.aside():
                assert _get_current_dispatch_mode() is mode
            assert _get_current_dispatch_mode() is mode
        assert _get_current_dispatch_mode() is watch
    assert _get_current_dispatch_mode() is None


def test_side_by_side_two_threads_see_their_own_writes_only(tmp_path: Path, printed: Printed) -> None:
    """Each under its own watch; what `from_pretrained` itself swaps for the whole process is left out."""
    start, done = threading.Barrier(2), {}

    def work(name: str) -> None:
        tensors = {name: torch.ones(8)}
        watch = Watch(tensors, protect=False)
        with watch:
            start.wait()
            for _ in range(200):
                tensors[name].add_(1)
                torch.empty(4)
            start.wait()
        done[name] = watch

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: list(watch.writes) for name, watch in done.items()} == {"a": ["a"], "b": ["b"]}


class ZeroesARowFirst(Tiny):
    """As where a base class zeroes the row of the padding, and a class made from it draws all anew."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data[0].zero_()
            self.draw(module)
            module.weight.data[1].zero_()

    def draw(self, module: Part) -> None:
        module.weight.data.normal_()


def test_what_wrote_the_most_is_named(tmp_path: Path, printed: Printed) -> None:
    Idiom(ZeroesARowFirst).save(tmp_path)
    ZeroesARowFirst.from_pretrained(tmp_path)
    assert "part.weight by ZeroesARowFirst.draw (" in printed.loud[0]


class Turns(Tiny):
    """A square matrix that is stored the other way round, and turned in its place."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        if not self.part.weight.is_meta:
            with torch.no_grad():
                self.part.weight.copy_(self.part.weight.t().clone())
        return super().tie_weights(*args, **kwargs)


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
def test_a_matrix_that_its_class_turns_is_turned_and_nothing_is_lost(
    mode: str, tmp_path: Path, printed: Printed
) -> None:
    file = Idiom(Turns).save(tmp_path)
    with tiedquiet.enable("off"):
        right = Turns.from_pretrained(tmp_path).part.weight
    assert same(right.detach(), file["part.weight"].t())
    with tiedquiet.enable(mode):
        model = Turns.from_pretrained(tmp_path)
    assert same(model.part.weight.detach(), right.detach())
    assert tiedquiet.check(model).ok
    assert printed.loud == printed.confirmed == []


def in_another_thread(work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


class InitialisesInThreads(Tiny):
    """A pool draws the weights and computes the tables, several at a time."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, Part):
            in_another_thread(lambda: module.weight.detach().normal_())
            in_another_thread(lambda: module.mask.copy_(torch.arange(8) % 2.0))
        else:
            super()._init_weights(module)


def test_a_stored_tensor_that_another_thread_wrote_to(tmp_path: Path, printed: Printed) -> None:
    file = Idiom(InitialisesInThreads).save(tmp_path)
    model = InitialisesInThreads.from_pretrained(tmp_path)
    assert verdicts(model) == {"part.weight": Verdict.OVERWRITTEN}
    assert "LOST after they were read: part.weight by another thread or by compiled code" in printed.loud[0]
    with tiedquiet.enable("repair"):
        model = InitialisesInThreads.from_pretrained(tmp_path)
    assert same(model.part.weight.detach(), file["part.weight"])
    assert tiedquiet.check(model).ok
    assert (
        "kept as stored, although overwritten by another thread or by compiled code: part.weight"
        in printed.confirmed[0]
    )


def test_memory_that_another_thread_wrote_to_is_not_called_unwritten(tmp_path: Path) -> None:
    with dirty_memory():
        InitialisesInThreads(IdiomConfig()).save_pretrained(tmp_path)
        model = InitialisesInThreads.from_pretrained(tmp_path)
    assert not model.part.mask.isnan().any()
    assert "part.mask" not in verdicts(model)


def test_entering_it_imports_no_compiler() -> None:
    """Torch's own mode class imports torch._dynamo at the first operation, which takes a second."""
    from tests.doors.test_wrapping import run

    code = """
import sys, torch
from tiedquiet.proof.watch import Watch
with Watch({"a": torch.ones(2)}, protect=False):
    torch.empty(2).zero_()
print("torch._dynamo" in sys.modules)
"""
    assert run(code).stdout.strip() == "False"


def test_values_that_are_too_many_to_keep_count_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a state dict that was handed over: there is no file that could be asked once more."""
    import tiedquiet.proof.watch

    def load(name: str) -> dict[str, Verdict]:
        idiom = IDIOMS[name]
        file = idiom.save(tmp_path / name)
        return verdicts(idiom.cls.from_pretrained(None, config=IdiomConfig(), state_dict=dict(file)))

    (tmp_path / "WritesAndRestores").mkdir()
    (tmp_path / "good citizen").mkdir()
    assert load("WritesAndRestores") == {}
    monkeypatch.setattr(tiedquiet.proof.watch, "_MOST_KEPT", 0)
    assert Verdict.OVERWRITTEN in load("WritesAndRestores").values()
    assert load("good citizen") == {}


def test_writes_are_counted_through_every_view_and_where_torch_counts() -> None:
    tensor = torch.ones(4)
    before = version_of(tensor)
    tensor.detach()[1:].add_(1)
    assert version_of(tensor) > before
    with torch.inference_mode():
        uncounted = torch.ones(4).add_(1)
    assert version_of(uncounted) == 0
    several = [tensor, uncounted, (tensor, tensor)]
    assert versions_of(several) == [version_of(place) for place in several] == [1, 0, 2]


def test_on_meta_nothing_can_be_lost() -> None:
    tensors = {"on meta": torch.ones(4, device="meta"), "here": torch.ones(4)}
    watch = Watch(tensors, protect=False)
    for tensor in tensors.values():
        tensor.add_(1)
    assert watch.written_elsewhere() == ["here"]
