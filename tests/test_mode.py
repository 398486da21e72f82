"""Whose mode it is: a context's, the process's, and where a new thread stands."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextvars import copy_context
from threading import Thread

import pytest

import tiedquiet
from tiedquiet import mode

NAME = "_load_pretrained_model"


def in_a_thread() -> str:
    seen: list[str] = []
    thread = Thread(target=lambda: seen.append(mode.current()))
    thread.start()
    thread.join()
    return seen[0]


def test_a_plain_call_is_the_process_s() -> None:
    tiedquiet.enable("repair")
    assert (mode.current(), in_a_thread()) == ("repair", "repair")
    tiedquiet.disable()
    assert (mode.current(), in_a_thread()) == ("off", "off")


def test_a_with_is_this_context_s_and_guards_the_threads_started_in_it() -> None:
    with tiedquiet.enable("strict"):
        assert (mode.current(), in_a_thread()) == ("strict", "strict")
    assert (mode.current(), in_a_thread()) == ("on", "on")


def test_the_strictest_counts_where_a_context_says_nothing() -> None:
    with tiedquiet.enable("off"):
        assert (mode.current(), in_a_thread()) == ("off", "on")
    with tiedquiet.enable("strict"), tiedquiet.enable("on"):
        assert (mode.current(), in_a_thread()) == ("on", "on")


def test_one_thread_does_not_change_another() -> None:
    """Left in the order in which they were entered, not the other way round."""
    mine, theirs = tiedquiet.enable("strict"), []
    mine.__enter__()

    def work() -> None:
        with tiedquiet.enable("on"):
            theirs.append(mode.current())

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert theirs == ["on"]
    assert mode.current() == "strict"
    mine.__exit__(None, None, None)
    assert mode.current() == "on"


def test_a_plain_call_inside_a_with_goes_with_it() -> None:
    with tiedquiet.enable("strict"):
        tiedquiet.enable("repair")
        assert (mode.current(), in_a_thread()) == ("repair", "repair")
        with tiedquiet.enable("off"):
            assert mode.current() == "off"
        assert mode.current() == "repair"
    assert mode.current() == "on"


def test_left_twice_and_never_entered() -> None:
    restore = tiedquiet.enable("strict")
    with restore:
        pass
    restore.__exit__(None, None, None)
    assert mode.current() == "on"
    tiedquiet.enable("strict").__exit__(None, None, None)
    assert mode.current() == "on"


def test_off_in_one_context_takes_no_guard_from_another() -> None:
    import transformers.modeling_utils as module

    wrapped = vars(module.PreTrainedModel)[NAME]
    with tiedquiet.enable("off"):
        assert vars(module.PreTrainedModel)[NAME] is wrapped
    assert vars(module.PreTrainedModel)[NAME] is wrapped


def test_what_is_switched_off_inside_a_with_is_guarded_again_around_it() -> None:
    import transformers.modeling_utils as module

    tiedquiet.disable()
    original = vars(module.PreTrainedModel)[NAME]

    def in_passing() -> None:
        with tiedquiet.enable("on"):
            pass

    with tiedquiet.enable("on"):
        with tiedquiet.enable("strict"):
            tiedquiet.disable()
            assert vars(module.PreTrainedModel)[NAME] is original
        assert vars(module.PreTrainedModel)[NAME] is not original
        with tiedquiet.enable("off"):
            thread = Thread(target=in_passing)
            thread.start()
            thread.join()
        assert vars(module.PreTrainedModel)[NAME] is not original
    assert vars(module.PreTrainedModel)[NAME] is original


@pytest.fixture
def hurried() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_at_once_leave_nothing_behind_and_lose_no_guard(hurried: None) -> None:
    import transformers.modeling_utils as module

    tiedquiet.disable()
    original, guarded = vars(module.PreTrainedModel)[NAME], set[bool]()

    def work() -> None:
        for _ in range(1000):
            with tiedquiet.enable("strict"):
                guarded.add(vars(module.PreTrainedModel)[NAME] is not original and mode.is_on_somewhere())

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert guarded == {True}
    assert not mode.is_on_somewhere()
    assert vars(module.PreTrainedModel)[NAME] is original


def test_a_task_has_the_context_that_it_was_started_in() -> None:
    with tiedquiet.enable("strict"):
        context = copy_context()
    assert context.run(mode.current) == "strict"


def test_tasks_leave_nothing_behind() -> None:
    """Each begins with a copy of the context that started it, and the `with` around all of them is one."""

    async def load(which: str, seconds: float) -> None:
        with tiedquiet.enable(which):
            await asyncio.sleep(seconds)

    async def set_it() -> None:
        tiedquiet.enable("strict")

    async def work() -> None:
        with tiedquiet.enable("repair"):
            await asyncio.gather(load("strict", 0.01), load("on", 0.02), set_it())

    asyncio.run(work())
    assert (mode.current(), in_a_thread()) == ("on", "on")
    tiedquiet.disable()
    assert not mode.is_on_somewhere()


def test_a_task_s_with_takes_no_guard_from_the_others() -> None:
    async def unguarded() -> None:
        with tiedquiet.enable("off"):
            await asyncio.sleep(0.05)

    async def work() -> str:
        with tiedquiet.enable("strict"):
            task = asyncio.create_task(unguarded())
            await asyncio.sleep(0.01)
            found = await asyncio.get_running_loop().run_in_executor(None, mode.current)
            await task
        return found

    assert asyncio.run(work()) == "strict"
    assert (mode.current(), in_a_thread()) == ("on", "on")


def test_a_generator_closed_in_another_task_ends_its_with() -> None:
    async def guarded() -> AsyncIterator[None]:
        with tiedquiet.enable("strict"):
            yield

    async def work() -> None:
        generator = guarded()
        await asyncio.create_task(anext(generator))
        with tiedquiet.enable("repair"):
            await asyncio.create_task(anext(generator, None))
            assert mode.current() == "repair"

    asyncio.run(work())
    assert (mode.current(), in_a_thread()) == ("on", "on")


def test_a_path_is_not_a_model() -> None:
    with pytest.raises(TypeError, match="check takes a model, not str; for files, use python -m tiedquiet check"):
        tiedquiet.check("some/folder")  # type: ignore[arg-type]


def test_to_begin_what_another_context_has_set_changes_nothing_here() -> None:
    before = mode.setting()
    mode.enter(mode.Setting("strict", "elsewhere"))
    assert mode.setting() is before
