"""What tiedquiet costs when a `Trainer` resumes: a dense model, and one whose weights are converted.

    python -m benchmarks.load.resume                             # two CPU cores, 2 minutes, 2 GB of memory
    python -m benchmarks.load.resume --device cuda               # its peak of GPU memory as well
    python -m benchmarks.load.resume --layers 2 --experts 4 --rounds 1

Two real checkpoints, written by a `Trainer`: a Llama of 55 layers, which is read as it is, and a Qwen3-MoE with the
names of the one of 30 B (18,867 of them), whose experts a `Trainer` does not read. Each round resumes each model once
per arm, in rotating order, into parameters that were zeroed; `nothing again` is the noise of the baseline. Ratios are
taken within a round. Every resume is checked: what it read, what is told, and that `repair` gives the file's values.
tiedquiet's own part is measured after that, with a clock above and below each of its wrappers.
"""

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.clocks import OfResume
from benchmarks.record import arguments, spread, stop, turned, unseen, write

ARMS = {"nothing": "off", "tiedquiet": "on", "repair": "repair", "nothing again": "off"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=55, help="of the dense model (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=128, help="of each of the other's 48 layers (default: 128)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 1 or options.layers < 1 or options.experts < 2:
        stop("--rounds and --layers are at least 1, --experts at least 2")
    import torch
    import transformers

    if options.device == "cuda" and not torch.cuda.is_available():
        stop("no CUDA device")
    transformers.logging.disable_progress_bar()
    models = {"dense": dense(options.layers), "experts": experts(options.experts)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: Run(model, Path(folder, name), options.device, is_converted=name == "experts")
            for name, model in models.items()
        }
        for name, run in runs.items():
            results[name] = {"names": run.names, "bytes": run.bytes, **measured(run, options.rounds)}
        clocks = OfResume()
        for name, run in runs.items():
            results[name]["own_milliseconds"] = own_part(run, clocks, options.rounds)
    path = write("resume", {**vars(options), "out": None}, results, options.out)
    report(results)
    print(path)


def dense(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_hidden_layers=layers, **sizes))


def experts(number: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "head_dim": 16, "num_experts": number, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=1024, num_hidden_layers=48, **sizes))


class Run:
    """A `Trainer` that resumes the same checkpoint again and again.

    Args:
        model: a model with random weights, which is what it saves first.
        folder: where to.
        device: where the model is trained.
        is_converted: whether a `Trainer` leaves a part of that checkpoint unread.

    Attributes:
        names: how many tensors the checkpoint has.
        bytes: how many bytes they take.
    """

    def __init__(self, model: Any, folder: Path, device: str, is_converted: bool) -> None:
        from safetensors import safe_open
        from transformers import Trainer, TrainingArguments

        how = TrainingArguments(output_dir=str(folder), report_to=[], disable_tqdm=True, use_cpu=device == "cpu")
        self._trainer = Trainer(model=model, args=how)
        self._checkpoint = folder / "checkpoint-1"
        self._trainer.save_model(str(self._checkpoint))
        self._wanted = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self._is_converted = is_converted
        file = self._checkpoint / "model.safetensors"
        self.bytes = file.stat().st_size
        with safe_open(file, "pt") as stored:
            self.names = len(stored.keys())

    def resume(self, mode: str) -> tuple[float, int]:
        """Resume once, checked; returns the seconds, and the bytes of GPU memory beyond the model's own at the peak."""
        import torch

        import tiedquiet

        trainer, on_gpu = self._trainer, self._trainer.args.device.type == "cuda"
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.zero_()
        gc.collect()
        before = 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        trainer._load_from_checkpoint(str(self._checkpoint))
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
        now = trainer.model.state_dict()
        differing = {name for name, tensor in self._wanted.items() if not torch.equal(now[name].cpu(), tensor)}
        assert bool(differing) is (self._is_converted and mode != "repair"), f"{mode}: {len(differing)} differ"
        if mode != "off":
            unread = {found.key for found in tiedquiet.check(trainer.model).findings}
            assert unread == differing, f"{len(differing)} differ, {len(unread)} are told"
        return seconds, peak


def measured(run: Run, rounds: int) -> dict[str, Any]:
    """The seconds of each arm in each round, their ratios to `nothing`, and the most GPU memory."""
    import tiedquiet

    turns = []
    for number in range(-1, rounds):  # the first warms up
        turn = {}
        for name in turned(ARMS, number):
            with tiedquiet.enable(ARMS[name]), unseen():
                turn[name] = run.resume(ARMS[name])
        turns += [turn] if number >= 0 else []
    return {
        "arms": {
            name: {
                "seconds": spread([turn[name][0] for turn in turns]),
                "ratio_to_nothing": spread([turn[name][0] / turn["nothing"][0] for turn in turns]),
                "peak_bytes": max(turn[name][1] for turn in turns),
            }
            for name in ARMS
        },
        "rounds": [{name: seconds for name, (seconds, _) in turn.items()} for turn in turns],
    }


def own_part(run: Run, clocks: OfResume, rounds: int) -> dict[str, float]:
    """Milliseconds of tiedquiet's own code in a resume."""
    took = []
    with unseen():
        for number in range(-1, rounds):
            clocks.clear()
            run.resume("on")
            took += [1e3 * clocks.own] if number >= 0 else []
    return spread(took)


def report(results: dict[str, Any]) -> None:
    print("| model | arm | seconds | ratio to nothing | own part, ms | GPU memory on top, bytes |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, found in results.items():
        for arm, took in found["arms"].items():
            own = f"{found['own_milliseconds']['median']:.1f}" if arm == "tiedquiet" else ""
            times = (f"{took[what]['median']:.3f}" for what in ("seconds", "ratio_to_nothing"))
            cells = (f"{name}, {found['names']:,} tensors", arm, *times, own, f"{took['peak_bytes']:,}")
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
