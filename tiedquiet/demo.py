"""`python -m tiedquiet demo`: before and after, on tiny checkpoints and the installed transformers."""

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiedquiet
from tiedquiet.doors import wrapping


def demo() -> None:
    """Print six cases to stdout, without and with tiedquiet; writes only to a temporary folder.

    Raises:
        ImportError: transformers, torch or accelerate is missing.
        SystemExit: the installed transformers has no loading report (4.x).
    """
    import torch
    import transformers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        Trainer,
        TrainingArguments,
        UMT5Config,
        UMT5EncoderModel,
    )

    if reason := wrapping.inert_because():
        sys.exit(f"tiedquiet: {reason}")
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    gpt2 = GPT2Config(
        n_embd=16, n_head=2, n_layer=1, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    t5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}

    mixtral = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip

    class RemoteCodeGPT2(GPT2LMHeadModel):  # type: ignore[misc]
        """Like the many modelling files that tie in an override of `tie_weights`."""

        _tied_weights_keys = None

        def tie_weights(self, *_: Any, **__: Any) -> None:
            self.lm_head.weight = self.transformer.wte.weight

    print(f"tiedquiet {tiedquiet.__version__} on transformers {transformers.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary, _to_stdout():
        root = Path(temporary)

        _title("1. A false row: the model's own code ties lm_head, and the report does not know it.")
        GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
        _both(lambda: RemoteCodeGPT2.from_pretrained(root / "gpt2"))

        _title("2. A false list: Trainer resumes from its own checkpoint.")
        arguments = TrainingArguments(output_dir=str(root / "run"), report_to=[], disable_tqdm=True, use_cpu=True)
        resume = _saved_run(
            Trainer(T5ForConditionalGeneration(T5Config(**t5)), arguments), root / "t5" / "checkpoint-1"
        )
        _both(resume)

        _title("3. A true list: the Trainer reads none of the experts that it has just saved.")
        experts = MixtralForCausalLM(mixtral)
        resume = _saved_run(Trainer(experts, arguments), root / "mixtral" / "checkpoint-1")
        trained = {name: value.clone() for name, value in experts.state_dict().items()}
        experts.apply(experts._init_weights)  # the base model, from which a run begins
        _both(resume)

        _title("4. The same, repaired: TIEDQUIET=repair")
        with tiedquiet.enable("repair"):
            resume()
        right = sum(torch.equal(trained[name], value) for name, value in experts.state_dict().items())
        print(f"{right} of {len(trained)} tensors are what the checkpoint stores")

        model, path, key, source = _one_that_is_broken(root, GPT2LMHeadModel(gpt2), UMT5EncoderModel(UMT5Config(**t5)))
        _title(f"5. A row that is true: {model.__name__}, stored without {key}, its config's flag off.")
        _both(lambda: model.from_pretrained(path))

        _title("6. The same, repaired: TIEDQUIET=repair")
        with tiedquiet.enable("repair"):
            tensors = model.from_pretrained(path).state_dict()
        print(f"{key} equals the stored {source}: {torch.equal(tensors[key], tensors[source])}")


def _saved_run(trainer: Any, checkpoint: Path) -> Callable[[], None]:
    """Store a run's checkpoint; returns what resumes from it."""
    trainer.save_model(str(checkpoint))
    return lambda: trainer._load_from_checkpoint(str(checkpoint))


def _one_that_is_broken(root: Path, gpt2: Any, umt5: Any) -> tuple[type[Any], Path, str, str]:
    """A model whose missing row is true here: UMT5 as Wan stores it on transformers 5.0 to 5.2, else GPT-2."""
    path = root / "umt5"
    with tiedquiet.enable("off"), _silent():
        _save_with_its_flag_off(umt5, path)
        if type(umt5).from_pretrained(path, output_loading_info=True)[1]["missing_keys"]:
            return type(umt5), path, "encoder.embed_tokens.weight", "shared.weight"  # pragma: no cover (5.0 to 5.2)
        _save_with_its_flag_off(gpt2, root / "untied")
    return type(gpt2), root / "untied", "lm_head.weight", "transformer.wte.weight"


def _save_with_its_flag_off(model: Any, path: Path) -> None:
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def _both(load: Any) -> None:
    print("--- without tiedquiet")
    with tiedquiet.enable("off"):
        load()
    print("--- with tiedquiet")
    with tiedquiet.enable("on"):
        load()


def _title(text: str) -> None:
    print(f"\n=== {text}")


@contextmanager
def _to_stdout() -> Iterator[None]:
    """Let both libraries log to stdout, so that the two halves stay in order when redirected."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger("transformers"), logging.getLogger("tiedquiet")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger, level in zip(loggers, (logging.WARNING, logging.INFO), strict=True):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


@contextmanager
def _silent() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
