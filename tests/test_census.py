"""A sample of the census (benchmarks/census.py): classes that between them show every form of declaration."""

from typing import Any

import pytest
import transformers

from benchmarks import census
from tiedquiet import Finding, Verdict
from tiedquiet.load import Load

SAMPLE = """
    LlamaForCausalLM GPT2LMHeadModel Gemma3ForConditionalGeneration Qwen2VLForConditionalGeneration OPTForCausalLM
    WhisperForConditionalGeneration Blip2ForConditionalGeneration LlavaForConditionalGeneration FSMTModel
    AlbertForMaskedLM BertForMaskedLM BertForPreTraining BartModel BartForConditionalGeneration XLMRobertaForMaskedLM
    T5ForConditionalGeneration T5EncoderModel UMT5EncoderModel UMT5ForConditionalGeneration MT5ForConditionalGeneration
    LongT5ForConditionalGeneration M2M100ForConditionalGeneration LEDForConditionalGeneration SeamlessM4TModel
    FlavaForPreTraining UdopModel BarkFineModel MarianModel MarianMTModel ZambaModel DebertaForMaskedLM
    IdeficsForVisionText2Text SamModel DFineForObjectDetection RTDetrV2ForObjectDetection DabDetrForObjectDetection
    DeformableDetrForObjectDetection Deimv2ForObjectDetection GroundingDinoForObjectDetection
    MMGroundingDinoForObjectDetection IBertForMaskedLM PPDocLayoutV3Model T5Gemma2Model FunnelForMaskedLM
""".split()  # noqa: SIM905


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore")  # what building odd configurations warns of is not what is tested
def test_no_true_row_is_hidden_and_no_verdict_is_wrong(name: str) -> None:
    cls: Any = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    tried = [line for line in census.census_of_class(cls) if "reason" not in line]
    assert len(tried) >= 4
    assert [line for line in tried if any(line.get(what) for what in census.COUNTED)] == []


def test_the_census_sees_a_shim_that_confirms_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def confirm(self: Load, model: Any, key: str, *_: Any) -> Finding:
        return Finding(key, Verdict.TIED, key)

    monkeypatch.setattr(Load, "_judge_parted", confirm)
    lines = list(census.census_of_class(transformers.GPT2LMHeadModel))
    assert any(line.get("hidden_wrongly") for line in lines)
    assert any(line.get("verdict_wrong") for line in lines)
